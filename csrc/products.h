// What the ops are made of: by our kernels (cpu/host.cpp, cuda.cpp), or by ATen calls, which are right on every device
// (composed.cpp). Arguments are checked already. Factors are lora_A, or lora_B where the last dimension is the rank.
#pragma once
#include <ATen/EmptyTensor.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>

#include "ops.h"

namespace fastlora {

// g[..., row] = scaling_e * gates[..., e] for the rank rows of adapter e.
struct Gate {
  double scalar = 1;  // the gate of every row, where `rows` is undefined
  Tensor rows;        // (R) or (M, R), contiguous, in the accumulation dtype

  Tensor times(const Tensor& z) const { return rows.defined() ? z * rows : scalar == 1 ? z : z * scalar; }
};

// `like` gives the device, the dtype and the leading sizes (its last dimension is ignored).
Gate make_gate(const Tensor& scaling, const MaybeTensor& gates, IntArrayRef ranks, int64_t R, const Tensor& like);

// dg = t z -> (dscaling, dgates) in the shapes and dtypes of their tensors. Not needed: empty.
std::tuple<Tensor, Tensor> gate_backward(const Tensor& t, const Tensor& z, const Tensor& scaling, const MaybeTensor& gates,
                                         IntArrayRef ranks, bool need_scaling, bool need_gates);

struct Dropout {
  double p = 0;
  MaybeTensor seed = {};
};

// z g, or t g. Our kernels apply the gate where they read z; ATen takes a rounded product, which is made once.
struct Gated {
  const Gate& gate;
  Tensor z = {};   // (..., R), contiguous, in the accumulation dtype
  mutable Tensor product = {};

  const Tensor& in(at::ScalarType dtype) const {
    if (!product.defined()) product = gate.times(flat(z)).to(dtype);
    return product;
  }
};

// y = c (x wT + D((z g) f)) + bias, with the leading sizes and the type of `like`; u = y before c and bias
struct Product {
  const Tensor& like;
  int64_t N;
  Tensor x, w;             // w [N, K]; both undefined: the update alone
  Gated& z;                // an undefined z is computed from a, and left there if it is wanted
  TensorList f;
  bool last_is_rank;
  Dropout dropout = {};
  TensorList a = {};
  bool want_z = false;
  MaybeTensor column_scale = {}, bias = {};
  Tensor u = {};
  std::optional<int64_t> start = {};   // y is `like` with the update added to its columns from here on
  Tensor table = {}, ids = {};         // both undefined, or z is undefined, and these rows of the table are it
};

struct Products {
  // D(x) fT, z or t = dv b, into z.z
  void (*project)(Gated& z, const Tensor& x, TensorList f, bool last_is_rank, const Dropout&);
  // (t g)T D(x) of each factor, in its shape and dtype
  Tensors (*outer)(const Gated& t, const Tensor& x, TensorList f, bool last_is_rank, const Dropout&);
  Tensor (*product)(Product&);
  // the first into t and the second of z, with f = lora_B, from one read of dy; null where it takes two
  Tensors (*project_outer)(Gated& t, const Gated& z, const Tensor& dy, TensorList f) = nullptr;
};

namespace composed {
extern const Products products;
// All factors as one [R, n] in the type of `like`.
Tensor joined(TensorList f, bool last_is_rank, int64_t n, const Tensor& like);
// One gradient of each factor, in its dtype, from one of all.
Tensors cut(const Tensor& sum, TensorList f, bool last_is_rank);
}  // namespace composed
namespace cuda {
extern const Products products;
}
namespace cpu {
extern const Products products;
// Whether our kernels take x with these adapters (double goes to the composed form, and so does an empty product).
bool takes(const Tensor& x, TensorList adapters);
Tensor dropout(const Tensor& x, double p, const Tensor& seed);
}  // namespace cpu

inline const Products& products(bool on_gpu, bool ours) {
  return on_gpu ? cuda::products : ours ? cpu::products : composed::products;
}

// What an op returns for a gradient that is not needed: a tensor each, since outputs of an op share no memory.
inline Tensor nothing(const Tensor& like) {
  return like.is_cpu() ? Tensor(at::detail::empty_cpu({0}, like.options())) : at::empty({0}, like.options());
}

}  // namespace fastlora
