// The kernels that binding.cpp and autograd.cpp register, one per op and dispatch key, the checks of their arguments, and
// calls through torch's dispatcher.
#pragma once
#include <torch/library.h>

#include <algorithm>

#include "types.h"

namespace fastlora {

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

Tensor lora_linear(FASTLORA_LINEAR_ARGS);
LinearForward lora_linear_forward(FASTLORA_LINEAR_ARGS);
LinearBackward lora_linear_backward(FASTLORA_LINEAR_BACKWARD_ARGS);

Tensor lora_shrink(FASTLORA_SHRINK_ARGS);
ShrinkBackward lora_shrink_backward(FASTLORA_SHRINK_BACKWARD_ARGS);

Tensor lora_expand(FASTLORA_EXPAND_ARGS);
ExpandBackward lora_expand_backward(FASTLORA_EXPAND_BACKWARD_ARGS);

Tensor lora_embedding(FASTLORA_EMBEDDING_ARGS);
Tensor composed_embedding(FASTLORA_EMBEDDING_ARGS);   // of ops that have gradients

Tensor lora_routed(FASTLORA_ROUTED_ARGS);
RoutedForward lora_routed_forward(FASTLORA_ROUTED_ARGS);
RoutedBackward lora_routed_backward(FASTLORA_ROUTED_BACKWARD_ARGS);

Tensor lora_dropout(const Tensor& x, double dropout_p, const Tensor& seed);
Tensor draw_seed(const Tensor& x);

void register_autograd(torch::Library& m);

namespace check {

// Whether an op takes these arguments. Where one does not, its Python overload is called, which says why by name
// (fastlora/ops/check.py): what is refused here must be refused there.
bool linear(FASTLORA_LINEAR_ARGS);
bool shrink(FASTLORA_SHRINK_ARGS);
bool expand(FASTLORA_EXPAND_ARGS);
bool embedding(FASTLORA_EMBEDDING_ARGS);
bool routed(FASTLORA_ROUTED_ARGS);
bool dropout(double p, const MaybeTensor& seed, const Tensor& x);

}  // namespace check

}  // namespace fastlora
