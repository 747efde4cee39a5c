// Calls through torch's dispatcher, the switch that sends an op to a back-end written in Python, and what the autograd
// formulas share.
#pragma once
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/FunctionsManual.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <atomic>

#include "types.h"

namespace fastlora {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// True while a back-end other than `native` is pinned for the process (fastlora/backends.py sets it).
inline std::atomic<bool> pinned_elsewhere{false};

template <size_t n>
struct Name {
  char text[n];
  constexpr Name(const char (&literal)[n]) { std::copy_n(literal, n, text); }
};

// The overload "python" walks the back-ends written in Python.
template <Name name, class Signature, Name overload = "", class... Args>
auto call(Args&&... args) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow(name.text, overload.text).template typed<Signature>();
  return op.call(std::forward<Args>(args)...);
}

template <Name name, class Signature, class... Args>
auto call_below_autograd(Args&&... args) {
  at::AutoDispatchBelowADInplaceOrView below;
  return call<name, Signature>(std::forward<Args>(args)...);
}

inline bool has_tangent(const Tensor& t) { return torch::autograd::isFwGradDefined(t); }
inline bool has_tangent(const MaybeTensor& t) { return torch::autograd::isFwGradDefined(t); }
inline bool has_tangent(TensorList ts) { return torch::autograd::isFwGradDefinedTensorList(ts); }

// Whether a node is needed. A C++ autograd Function would drop tangents without a word.
template <class... Inputs>
bool records(const Inputs&... inputs) {
  TORCH_CHECK_NOT_IMPLEMENTED(!(has_tangent(inputs) || ...), "fastlora: forward-mode AD (jvp) is not implemented");
  return torch::autograd::compute_requires_grad(inputs...);
}

inline void save(AutogradContext* ctx, variable_list tensors, std::initializer_list<TensorList> adapters) {
  for (const auto list : adapters) tensors.insert(tensors.end(), list.begin(), list.end());
  ctx->save_for_backward(std::move(tensors));
}

inline MaybeTensor maybe(const Tensor& t) { return t.defined() ? MaybeTensor(t) : MaybeTensor(); }

// The inputs in their order: a list has an edge for each tensor, an optional tensor that is missing has none.
struct Edges {
  AutogradContext* ctx;
  size_t next = 0;
  bool need(size_t count = 1) {
    bool any = false;
    for (; count; count--) any |= ctx->needs_input_grad(next++);
    return any;
  }
};

// An op's gradients as the engine takes them: nothing where `needs` says so, and nothing for `others` that are no tensors.
template <class Needs, class... Grads>
variable_list flatten(const std::tuple<Grads...>& grads, const Needs& needs, size_t adapters, size_t others) {
  variable_list out;
  size_t i = 0;
  const auto add = [&](const auto& grad) {
    const bool need = needs[i++];
    if constexpr (std::is_same_v<decltype(grad), const Tensors&>) {
      for (size_t e = 0; e < adapters; e++) out.push_back(need ? grad[e] : Tensor());
    } else {
      out.push_back(need ? grad : Tensor());
    }
  };
  std::apply([&](const auto&... all) { (add(all), ...); }, grads);
  out.resize(out.size() + others);
  return out;
}

}  // namespace fastlora
