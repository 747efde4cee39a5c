// g[..., row] = scaling_e * gates[..., e] for the rank rows of adapter e.
#pragma once
#include <ATen/TensorOperators.h>

#include "types.h"

namespace fastlora {

struct Gate {
  double scalar = 1;  // the gate of every row, where `rows` is undefined
  Tensor rows;        // (R) or (M, R), contiguous, in the accumulation dtype

  Tensor times(const Tensor& z) const { return rows.defined() ? z * rows : scalar == 1 ? z : z * scalar; }
};

// `like` gives the device and the leading sizes (its last dimension is ignored), `dtype` the accumulation dtype.
Gate make_gate(const Tensor& scaling, const MaybeTensor& gates, IntArrayRef ranks, int64_t R, const Tensor& like,
               at::ScalarType dtype);

// dg (M, R) -> (dscaling, dgates) in the shapes and dtypes of their tensors; `like` as above. Not needed: empty.
std::tuple<Tensor, Tensor> gate_backward(const Tensor& dg, const Tensor& scaling, const MaybeTensor& gates,
                                         IntArrayRef ranks, const Tensor& like, bool need_scaling, bool need_gates);

}  // namespace fastlora
