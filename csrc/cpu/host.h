// From tensors to the kernels' structs, and from a struct to threads.
#pragma once
#include <c10/util/SmallVector.h>

#include "../gate.h"
#include "../types.h"
#include "choose.h"

namespace fastlora::cpu {

// Whether our kernels take x with these adapters (double goes to the composed form, and so does an empty product).
bool takes(const Tensor& x, TensorList adapters);
Type type_of(const Tensor& t);
Tensor make(IntArrayRef sizes, const Tensor& like, at::ScalarType dtype);
inline Tensor nothing(const Tensor& like) { return make({0}, like, like.scalar_type()); }

// (..., n) seen as rows contiguous along n; `tensor` keeps what had to be copied.
struct Rows {
  explicit Rows(const Tensor& t);
  Tensor tensor;
  const void* data;
  int64_t M, n, ld;
};

// The adapters' matrices, each contiguous along its last dimension.
struct Factors {
  Factors(TensorList adapters, bool last_is_rank);
  c10::SmallVector<Tensor, 2> tensors;
  c10::SmallVector<Factor, 2> list;
};

void set_weight(Gemm& p, const Tensor& w, Tensor& keep);   // w [N, K], any strides
void set_factors(Gemm& p, const Factors& f);
Gates gates_of(const Gate& gate);
Mask mask_of(double p, const MaybeTensor& seed, int64_t width);

// Runs p; `out` is y's tensor as (M, N), and x the tensor behind p.x, for the vendor's GEMM. Where p.a is set, z is
// computed on the way, or ahead of it where that is cheaper.
void run(Gemm p, const Tensor& x, const Tensor& w, Tensor out);
void run_update(const Gemm& p);   // without a base: y = add + D((z g) f)
void run(const Shrink& p);
void run_dropout(const Rows& x, const Tensor& y, const Mask& mask);
void run(const Outer& p);
// Sets p.t, p.db and p.dbias for what is wanted and runs it; t [M, R], db [N, R] and dbias [N] in fp32.
struct Reduced {
  Tensor t, db, dbias;
};
Reduced run(Reduce p, const Tensor& like, bool want_db, bool want_dbias);

// fp32 sums [R, K] (dim 0) or [N, R] (dim 1) as one gradient per adapter, in its dtype
Tensors split_gradient(const Tensor& sums, TensorList adapters, int64_t dim);

}  // namespace fastlora::cpu
