// From tensors to the kernels' structs, and from a struct to threads.
#pragma once
#include <ATen/Parallel.h>
#include <c10/util/SmallVector.h>

#include "../products.h"
#include "choose.h"

namespace fastlora::cpu {

char* scratch(int64_t bytes);            // grows and stays, per thread: kernels ask for no memory of their own
int threads_for(int64_t multiply_adds);
inline int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }
inline int64_t chunk_of(int64_t n, int64_t parts, int64_t unit) {
  return std::max<int64_t>(1, divide_up(divide_up(n, parts), unit)) * unit;
}

template <class F>
void parallel(int64_t tasks, const F& f) {
  if (tasks == 1) return f(0);
  at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++) f(t);
  });
}

Type type_of(const Tensor& t);
Tensor make(IntArrayRef sizes, const Tensor& like, at::ScalarType dtype);

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
  int count() const { return static_cast<int>(list.size()); }
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
void run(Shrink p);
void run_dropout(const Rows& x, const Tensor& y, const Mask& mask);
// Sets p.da and runs it: the adapters' gradients, in their shapes and dtypes.
Tensors run(Outer p, TensorList adapters);

}  // namespace fastlora::cpu
