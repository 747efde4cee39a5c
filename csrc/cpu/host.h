// From tensors to the kernels' structs, and from a struct to threads.
#pragma once
#include <ATen/Parallel.h>
#include <c10/util/SmallVector.h>

#include "../products.h"
#include "cpu.h"

namespace fastlora::cpu {

char* scratch(const Gemm& p);            // grows and stays, per thread: kernels ask for no memory of their own
int threads_for(int64_t multiply_adds);

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

}  // namespace fastlora::cpu
