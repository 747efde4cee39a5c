// lora_shrink with its backward, lora_dropout and draw_seed.
#include <ATen/ops/randint.h>

#include <limits>

#include "cuda.h"
#include "ops.h"

namespace fastlora {

Tensor lora_shrink(FASTLORA_SHRINK_ARGS) {
  const Gate one;
  Gated z{one};
  const bool on_gpu = cuda::takes("lora_shrink", x, 0, total_rank(lora_A, 0));
  products(on_gpu, cpu::takes(x, lora_A)).project(z, x, lora_A, false, {dropout_p, seed});
  return z.z;
}

ShrinkBackward lora_shrink_backward(FASTLORA_SHRINK_BACKWARD_ARGS) {
  const auto& use = products(cuda::takes("lora_shrink_backward", x, 0, dz.size(-1)), cpu::takes(x, lora_A));
  const Gate one;
  Gated t{one, dz.to(accumulate_type(x.scalar_type())).contiguous()};
  Product p{x, x.size(-1), {}, {}, t, lora_A, false, {dropout_p, seed}};
  return {needs[0] ? use.product(p) : nothing(x), needs[1] ? use.outer(t, x, lora_A, false, p.dropout) : Tensors()};
}

Tensor lora_dropout(const Tensor& x, double dropout_p, const Tensor& seed) {
  TORCH_CHECK_VALUE(check::dropout(dropout_p, seed, x), "fastlora: dropout_p, seed: got ", dropout_p, " and a ", seed.dim(),
                    "-d tensor of type ", seed.scalar_type(), " on ", seed.device(),
                    ", expected a number from 0 to 1 and a 0-d int64 tensor on ", x.device(), ", as x");
  return cpu::dropout(x, dropout_p, seed);
}

Tensor draw_seed(const Tensor& x) {
  return at::randint(0, std::numeric_limits<int64_t>::max(), {}, x.options().dtype(at::kLong));
}

}  // namespace fastlora
