// lora_shrink, lora_dropout and draw_seed: entry points.
#include <ATen/ops/randint.h>

#include <limits>

#include "dispatch.h"
#include "ops.h"
#include "products.h"

namespace fastlora {
namespace {

using Op = Tensor(FASTLORA_SHRINK_ARGS);
using BackwardOp = ShrinkBackward(FASTLORA_SHRINK_BACKWARD_ARGS);
using DropoutOp = Tensor(const Tensor&, double, const Tensor&);

}  // namespace

Tensor lora_shrink(FASTLORA_SHRINK_ARGS) {
  if (pinned_elsewhere || !check::shrink(FASTLORA_SHRINK))
    return call<"fastlora::lora_shrink", Op, "python">(FASTLORA_SHRINK);
  return products(cpu::takes(x, lora_A)).project(x, lora_A, false, {dropout_p, seed});
}

ShrinkBackward lora_shrink_backward(FASTLORA_SHRINK_BACKWARD_ARGS) {
  if (pinned_elsewhere) return call<"fastlora::lora_shrink_backward", BackwardOp, "python">(FASTLORA_SHRINK_BACKWARD);
  const auto& use = products(cpu::takes(x, lora_A));
  const Gate one;
  Gated t{dz.to(accumulate_type(x.scalar_type())).contiguous(), one};
  Product p{x, x.size(-1), {}, {}, t, lora_A, false, {dropout_p, seed}};
  return {needs[0] ? use.product(p) : nothing(x), needs[1] ? use.outer(t, x, lora_A, false, p.dropout) : Tensors()};
}

Tensor lora_dropout(const Tensor& x, double dropout_p, const Tensor& seed) {
  if (pinned_elsewhere) return call<"fastlora::lora_dropout", DropoutOp, "python">(x, dropout_p, seed);
  TORCH_CHECK_VALUE(check::dropout(dropout_p, seed, x), "fastlora: dropout_p, seed: got ", dropout_p, " and a ", seed.dim(),
                    "-d tensor of type ", seed.scalar_type(), " on ", seed.device(),
                    ", expected a number from 0 to 1 and a 0-d int64 tensor on ", x.device(), ", as x");
  return cpu::dropout(x, dropout_p, seed);
}

Tensor draw_seed(const Tensor& x) {
  return at::randint(0, std::numeric_limits<int64_t>::max(), {}, x.options().dtype(at::kLong));
}

}  // namespace fastlora
