// The ops: types of their arguments, the kernels that binding.cpp registers, the checks of their arguments, and calls
// through torch's dispatcher.
#pragma once
#include <torch/library.h>

#include <algorithm>

namespace fastlora {

using at::IntArrayRef;
using at::Tensor;
using at::TensorList;
using MaybeTensor = std::optional<Tensor>;
using Tensors = std::vector<Tensor>;

// y, z (rank-R image of x before the gate), u (y before column_scale and bias; empty without column_scale)
using LinearForward = std::tuple<Tensor, Tensor, Tensor>;
// dx, dweight, dA, dB, dscaling, dbias, dgates, dcolumn_scale: empty where not needed
using LinearBackward = std::tuple<Tensor, Tensor, Tensors, Tensors, Tensor, Tensor, Tensor, Tensor>;
using ShrinkBackward = std::tuple<Tensor, Tensors>;
// dz, dB, dscaling, dgates
using ExpandBackward = std::tuple<Tensor, Tensors, Tensor, Tensor>;
using RoutedForward = std::tuple<Tensor, Tensor>;   // y, z (n, k * most ranks): an entry's image before its gate
// as LinearBackward, but the last
using RoutedBackward = std::tuple<Tensor, Tensor, Tensors, Tensors, Tensor, Tensor, Tensor>;

#define FASTLORA_ADAPTED_ARGS \
  const Tensor &x, const Tensor &weight, TensorList lora_A, TensorList lora_B, const Tensor &scaling
#define FASTLORA_LINEAR_OPTIONS \
  const MaybeTensor &gates, IntArrayRef ranks, const MaybeTensor &column_scale, double dropout_p, const MaybeTensor &seed
#define FASTLORA_LINEAR_ARGS FASTLORA_ADAPTED_ARGS, const MaybeTensor &bias, FASTLORA_LINEAR_OPTIONS
#define FASTLORA_LINEAR_BACKWARD_ARGS                                                                                     \
  const Tensor &dy, FASTLORA_ADAPTED_ARGS, FASTLORA_LINEAR_OPTIONS, const Tensor &z, const Tensor &u, std::array<bool, 8> needs
#define FASTLORA_SHRINK_ARGS const Tensor &x, TensorList lora_A, double dropout_p, const MaybeTensor &seed
#define FASTLORA_SHRINK_BACKWARD_ARGS const Tensor &dz, FASTLORA_SHRINK_ARGS, std::array<bool, 2> needs
#define FASTLORA_EXPAND_OPTIONS                                                                                          \
  const Tensor &z, TensorList lora_B, const Tensor &scaling, const MaybeTensor &gates, IntArrayRef ranks,                \
      IntArrayRef columns, const MaybeTensor &ids
#define FASTLORA_EXPAND_ARGS const Tensor &y, FASTLORA_EXPAND_OPTIONS
#define FASTLORA_NORM_ARGS const Tensor &weight, TensorList lora_A, TensorList lora_B, const Tensor &scaling, IntArrayRef ranks
#define FASTLORA_EXPAND_BACKWARD_ARGS const Tensor &dy, FASTLORA_EXPAND_OPTIONS, std::array<bool, 4> needs
// routes are made by ops/route.py
#define FASTLORA_ROUTED_OPTIONS \
  TensorList route, const Tensor &gates, TensorList column_scale, IntArrayRef slices, TensorList pages
#define FASTLORA_ROUTED_ARGS FASTLORA_ADAPTED_ARGS, const MaybeTensor &bias, FASTLORA_ROUTED_OPTIONS
#define FASTLORA_ROUTED_BACKWARD_ARGS \
  const Tensor &dy, FASTLORA_ADAPTED_ARGS, FASTLORA_ROUTED_OPTIONS, const Tensor &z, std::array<bool, 7> needs

// the same arguments, passed on
#define FASTLORA_LINEAR x, weight, lora_A, lora_B, scaling, bias, gates, ranks, column_scale, dropout_p, seed
#define FASTLORA_ROUTED x, weight, lora_A, lora_B, scaling, bias, route, gates, column_scale, slices, pages

// A route's tensors on the host: segment i is the tokens starts[i] .. starts[i + 1] of `order`, its list slots[bounds[i]] ..
struct Plan {
  explicit Plan(TensorList route)
      : G(*route[4].const_data_ptr<int64_t>()), starts(route[4].const_data_ptr<int64_t>() + 1), bounds(starts + G + 1),
        slots(bounds + G + 1) {}
  int64_t G;
  const int64_t *starts, *bounds, *slots;
};

// Slots below it are pages', the others pairs of tensors.
inline int64_t paged(TensorList pages) { return pages.empty() ? 0 : pages[2].size(0); }

inline int64_t total_rank(TensorList lora_A, int64_t dim) {
  int64_t R = 0;
  for (const auto& t : lora_A) R += t.size(dim);
  return R;
}

inline int64_t rows_of(const Tensor& x) { return c10::multiply_integers(x.sizes().slice(0, x.dim() - 1)); }

// (..., n) as (M, n); a view where the strides allow one
inline Tensor flat(const Tensor& x) { return x.dim() == 2 ? x : x.reshape({rows_of(x), x.size(-1)}); }

inline at::ScalarType accumulate_type(at::ScalarType t) { return t == at::kDouble ? at::kDouble : at::kFloat; }

inline std::vector<int64_t> with_last(IntArrayRef sizes, int64_t last) {
  std::vector<int64_t> out(sizes.begin(), sizes.end() - 1);
  out.push_back(last);
  return out;
}

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

Tensor lora_routed(FASTLORA_ROUTED_ARGS);
RoutedForward lora_routed_forward(FASTLORA_ROUTED_ARGS);
RoutedBackward lora_routed_backward(FASTLORA_ROUTED_BACKWARD_ARGS);

Tensor lora_norm(FASTLORA_NORM_ARGS);
Tensor lora_dropout(const Tensor& x, double dropout_p, const Tensor& seed);
Tensor draw_seed(const Tensor& x);

namespace check {

// Whether an op takes these arguments. Where one does not, its Python overload is called, which says why by name
// (fastlora/ops/check.py): what is refused here must be refused there.
bool linear(FASTLORA_LINEAR_ARGS);
bool shrink(FASTLORA_SHRINK_ARGS);
bool expand(FASTLORA_EXPAND_ARGS);
bool routed(FASTLORA_ROUTED_ARGS);
bool dropout(double p, const MaybeTensor& seed, const Tensor& x);

}  // namespace check

}  // namespace fastlora
