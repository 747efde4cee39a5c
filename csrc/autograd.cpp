// The autograd formula, once for all ops: an op's `_backward` takes dy, the op's arguments but the one at `apart`, the
// results of its `_forward` but y, and which gradients are needed. (fastlora/ops/library.py says the same in Python.)
#include <torch/csrc/autograd/FunctionsManual.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>

#include "ops.h"

namespace fastlora {
namespace {

using torch::autograd::AutogradContext, torch::autograd::isFwGradDefinedTensorList;

// An input's tensors, each of which has an edge: an optional one that is missing has none.
TensorList tensors_of(const Tensor& t) { return t; }
TensorList tensors_of(const MaybeTensor& t) { return t ? TensorList(*t) : TensorList(); }
TensorList tensors_of(TensorList list) { return list; }

// What backward takes of the forward: written in an order, read in the same.
struct Saved {
  Tensors tensors = {};
  std::vector<int64_t> integers = {};   // lists, their lengths first
  double real = 0;                      // no op has two
  size_t tensor = 0, integer = 0;       // those that are read

  void add(const Tensor& t) { tensors.push_back(t); }
  void add(const MaybeTensor& t) { tensors.push_back(t.value_or(Tensor())); }
  void add(TensorList list) {
    integers.push_back(list.size());
    tensors.insert(tensors.end(), list.begin(), list.end());
  }
  void add(IntArrayRef list) {
    integers.push_back(list.size());
    integers.insert(integers.end(), list.begin(), list.end());
  }
  void add(double number) { real = number; }

  template <class T>
  auto read() {
    if constexpr (std::is_same_v<T, const Tensor&>) return tensors[tensor++];
    else if constexpr (std::is_same_v<T, const MaybeTensor&>) {
      const auto& t = tensors[tensor++];
      return t.defined() ? MaybeTensor(t) : MaybeTensor();
    } else if constexpr (std::is_same_v<T, TensorList>) {
      const size_t n = integers[integer++];
      return TensorList(tensors).slice((tensor += n) - n, n);
    } else if constexpr (std::is_same_v<T, IntArrayRef>) {
      const size_t n = integers[integer++];
      return IntArrayRef(integers).slice((integer += n) - n, n);
    } else if constexpr (std::is_same_v<T, double>) return real;
    else return T();   // which gradients are needed
  }
};

// `inputs` are the arguments that have gradients. Where `_backward` gives one gradient less, the first's is dy.
// A node computes its type's name at each backward: Self is a short one.
template <class Self, Name op, Name forward_op, Name backward_op, class Forward, class Backward, int apart, size_t... inputs>
struct Recorded;

template <class Self, Name op, Name forward_op, Name backward_op, class Results, class... Args, class Grads, class... Given,
          int apart, size_t... inputs>
struct Recorded<Self, op, forward_op, backward_op, Results(Args...), Grads(Given...), apart, inputs...>
    : torch::autograd::Function<Self> {
  using All = std::tuple<Args...>;

  static Tensor forward(AutogradContext* ctx, const All& all, const std::tuple_element_t<inputs, All>&... edges) {
    Saved saved;
    (saved.integers.push_back(tensors_of(edges).size()), ...);
    int i = 0;
    std::apply([&](const auto&... args) { ((i++ == apart ? void() : saved.add(args)), ...); }, all);
    at::AutoDispatchBelowADInplaceOrView below;
    const std::tuple results{
        std::apply([](const auto&... args) { return call<forward_op, Results(Args...)>(args...); }, all)};
    std::apply([&](const auto&, const auto&... more) { (saved.add(more), ...); }, results);
    ctx->save_for_backward(std::move(saved.tensors));
    ctx->saved_data["integers"] = std::move(saved.integers);
    ctx->saved_data["real"] = saved.real;
    return std::get<0>(results);
  }

  static Tensors backward(AutogradContext* ctx, const Tensors& dys) {
    constexpr size_t n = sizeof...(inputs), passed = n - std::tuple_size_v<Grads>;
    Saved saved{ctx->get_saved_variables(), ctx->saved_data["integers"].toIntVector(), ctx->saved_data["real"].toDouble()};
    saved.tensors.insert(saved.tensors.begin(), dys[0]);
    std::array<size_t, n> edges;
    std::array<bool, n> needs;
    for (size_t i = 0, edge = 0; i < n; edge += edges[i++]) {
      edges[i] = saved.integers[saved.integer++];
      needs[i] = ctx->needs_input_grad({{edge, edge + edges[i]}});
    }
    std::tuple given{saved.template read<Given>()...};
    std::copy_n(needs.begin() + passed, n - passed, std::get<sizeof...(Given) - 1>(given).begin());
    const auto grads = std::apply([](const auto&... args) { return call<backward_op, Grads(Given...)>(args...); }, given);

    Tensors out(1);   // `all` has none
    size_t i = 0;
    const auto add = [&](const auto& grad) {
      if constexpr (std::is_same_v<decltype(grad), const Tensors&>) {
        for (size_t e = 0; e < edges[i]; e++) out.push_back(needs[i] ? grad[e] : Tensor());
      } else {
        out.push_back(needs[i] ? grad : Tensor());
      }
      i++;
    };
    if (passed) add(dys[0]);
    std::apply([&](const auto&... all) { (add(all), ...); }, grads);
    return out;
  }

  static Tensor kernel(Args... args) {
    const All all(args...);
    // a Function would drop tangents without a word
    TORCH_CHECK_NOT_IMPLEMENTED(!(isFwGradDefinedTensorList(tensors_of(std::get<inputs>(all))) || ...),
                                "fastlora: forward-mode AD (jvp) is not implemented");
    if (torch::autograd::compute_requires_grad(std::get<inputs>(all)...)) return Self::apply(all, std::get<inputs>(all)...);
    at::AutoDispatchBelowADInplaceOrView below;
    return call<op, Tensor(Args...)>(args...);
  }
};

struct Linear : Recorded<Linear, "fastlora::lora_linear", "fastlora::lora_linear_forward", "fastlora::lora_linear_backward",
                         decltype(lora_linear_forward), decltype(lora_linear_backward), 5, 0, 1, 2, 3, 4, 5, 6, 8> {};
struct Shrink : Recorded<Shrink, "fastlora::lora_shrink", "fastlora::lora_shrink", "fastlora::lora_shrink_backward",
                         decltype(lora_shrink), decltype(lora_shrink_backward), -1, 0, 1> {};
struct Expand : Recorded<Expand, "fastlora::lora_expand", "fastlora::lora_expand", "fastlora::lora_expand_backward",
                         decltype(lora_expand), decltype(lora_expand_backward), 0, 0, 1, 2, 3, 4> {};
struct Routed : Recorded<Routed, "fastlora::lora_routed", "fastlora::lora_routed_forward", "fastlora::lora_routed_backward",
                         decltype(lora_routed_forward), decltype(lora_routed_backward), 5, 0, 1, 2, 3, 4, 5, 7> {};

Tensor embedding(FASTLORA_EMBEDDING_ARGS) {
  if (torch::autograd::compute_requires_grad(y, lora_A, lora_B, scaling, gates) && check::embedding(FASTLORA_EMBEDDING))
    return composed_embedding(FASTLORA_EMBEDDING);
  at::AutoDispatchBelowADInplaceOrView below;
  return call<"fastlora::lora_embedding", decltype(lora_embedding)>(FASTLORA_EMBEDDING);
}

}  // namespace

void register_autograd(torch::Library& m) {
  m.impl("lora_linear", Linear::kernel);
  m.impl("lora_shrink", Shrink::kernel);
  m.impl("lora_expand", Expand::kernel);
  m.impl("lora_embedding", embedding);
  m.impl("lora_routed", Routed::kernel);
  // double backward raises by name instead of being silently wrong
  for (auto op : {"lora_linear_forward", "lora_linear_backward", "lora_shrink_backward", "lora_expand_backward",
                  "lora_routed_forward", "lora_routed_backward"})
    m.impl(op, torch::autograd::autogradNotImplementedFallback());
}

}  // namespace fastlora
