// The dense ops and their backward; lora_norm, lora_dropout and draw_seed.
#include "ops.h"

#include <ATen/ops/embedding.h>
#include <ATen/ops/embedding_dense_backward.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/randint.h>
#include <ATen/ops/sum.h>

#include <limits>

#include "cuda.h"

namespace fastlora {
namespace {

LinearForward run(FASTLORA_LINEAR_ARGS, bool want_z) {
  const bool ours = cpu::takes(x, lora_A) && cpu::takes(weight, lora_B);
  const auto& use = products(cuda::takes("lora_linear_forward", x), ours);
  const auto gate = make_gate(scaling, gates, ranks, total_rank(lora_A, 0), x);
  Gated z{gate};
  if (dropout_p > 0) use.project(z, x, lora_A, false, {dropout_p, seed});
  Product p{x, weight.size(0), x, weight, z, lora_B, true, {}, lora_A, want_z, column_scale, bias};
  auto y = use.product(p);
  return {y, z.z.defined() ? z.z : nothing(x), p.u.defined() ? p.u : nothing(x)};
}

// t = dy lora_B and dB = dyT (z g), those that are wanted
Tensors expand_backward(const Products& use, Gated& t, bool want_t, const Gated& z, bool want_B, const Tensor& dy,
                        TensorList lora_B) {
  if (use.project_outer && want_t && want_B) return use.project_outer(t, z, dy, lora_B);
  if (want_t) use.project(t, dy, lora_B, true, {});
  return want_B ? use.outer(z, dy, lora_B, true, {}) : Tensors();
}

}  // namespace

Tensor lora_linear(FASTLORA_LINEAR_ARGS) { return std::get<0>(run(FASTLORA_LINEAR, false)); }
LinearForward lora_linear_forward(FASTLORA_LINEAR_ARGS) { return run(FASTLORA_LINEAR, true); }

LinearBackward lora_linear_backward(FASTLORA_LINEAR_BACKWARD_ARGS) {
  const bool ours = cpu::takes(x, lora_A) && cpu::takes(weight, lora_B);
  const auto& use = products(cuda::takes("lora_linear_backward", x), ours);
  const auto [need_x, need_weight, need_A, need_B, need_scaling, need_bias, need_gates, need_column] = needs;
  const auto wide = accumulate_type(x.scalar_type());
  const auto gate = make_gate(scaling, gates, ranks, z.size(-1), x);
  const Dropout dropout{dropout_p, seed};
  // DoRA: dy meets its columns' scale first; bias and scale have sums of their own
  const auto dv = column_scale ? (dy.to(wide) * column_scale->to(wide)).to(x.scalar_type()) : dy;
  Gated t{gate};
  const bool want_t = need_x || need_A || need_scaling || need_gates;
  auto dB = expand_backward(use, t, want_t, {gate, z.contiguous()}, need_B, dv, lora_B);
  Product p{x, x.size(-1), dv, weight.t(), t, lora_A, false, dropout};
  auto dx = need_x ? use.product(p) : nothing(x);
  auto dA = need_A ? use.outer(t, x, lora_A, false, dropout) : Tensors();
  auto [dscaling, dgates] = gate_backward(t.z, z, scaling, gates, ranks, need_scaling, need_gates);
  return {dx, need_weight ? at::mm(flat(dv).t(), flat(x)) : nothing(x), dA, dB, dscaling,
          need_bias ? flat(dy).sum(0) : nothing(x), dgates,
          need_column ? (flat(dy).to(wide) * flat(u)).sum(0).to(column_scale->scalar_type()) : nothing(x)};
}

Tensor lora_shrink(FASTLORA_SHRINK_ARGS) {
  Gated z{Gate{}};
  products(cuda::takes("lora_shrink", x), cpu::takes(x, lora_A)).project(z, x, lora_A, false, {dropout_p, seed});
  return z.z;
}

ShrinkBackward lora_shrink_backward(FASTLORA_SHRINK_BACKWARD_ARGS) {
  const auto& use = products(cuda::takes("lora_shrink_backward", x), cpu::takes(x, lora_A));
  Gated t{Gate{}, dz.to(accumulate_type(x.scalar_type())).contiguous()};
  Product p{x, x.size(-1), {}, {}, t, lora_A, false, {dropout_p, seed}};
  return {needs[0] ? use.product(p) : nothing(x), needs[1] ? use.outer(t, x, lora_A, false, p.dropout) : Tensors()};
}

Tensor lora_expand(FASTLORA_EXPAND_ARGS) {
  const bool ours = cpu::takes(y, lora_B), kernels = cuda::takes("lora_expand", y);
  const int64_t start = columns.empty() ? 0 : columns[0], stop = columns.empty() ? y.size(-1) : columns[1];
  const auto gate = make_gate(scaling, gates, ranks, z.size(-1), y);
  Gated given{gate};
  Product p{y, stop - start, {}, {}, given, lora_B, true};
  p.start = start;
  // a table is as long as the vocabulary, and is not copied: the kernel reads it as lora_A lies, in y's type
  if (ids && kernels && z.scalar_type() == y.scalar_type() && z.stride(0) == 1) p.table = z, p.ids = *ids;
  else given.z = (ids ? at::embedding(z, *ids) : z).to(accumulate_type(y.scalar_type())).contiguous();
  return products(kernels, ours).product(p);
}

ExpandBackward lora_expand_backward(FASTLORA_EXPAND_BACKWARD_ARGS) {
  const auto& use = products(cuda::takes("lora_expand_backward", dy), cpu::takes(dy, lora_B));
  const auto [need_z, need_B, need_scaling, need_gates] = needs;
  const auto gate = make_gate(scaling, gates, ranks, z.size(-1), dy);
  const auto dv = columns.empty() ? dy : flat(dy).narrow(1, columns[0], columns[1] - columns[0]);
  const auto rows = ids ? at::embedding(z, *ids) : z;
  const Gated kept{gate, rows.to(accumulate_type(dy.scalar_type())).contiguous()};
  Gated t{gate};
  auto dB = expand_backward(use, t, need_z || need_scaling || need_gates, kept, need_B, dv, lora_B);
  auto dz = need_z ? gate.times(flat(t.z)).reshape(rows.sizes()) : nothing(z);
  if (need_z && ids) dz = at::embedding_dense_backward(dz, *ids, z.size(0), -1, false);
  auto [dscaling, dgates] = gate_backward(t.z, kept.z, scaling, gates, ranks, need_scaling, need_gates);
  return {dz.to(z.scalar_type()), dB, dscaling, dgates};
}

Tensor lora_norm(FASTLORA_NORM_ARGS) {
  if (check::linear(weight, weight, lora_A, lora_B, scaling, {}, {}, ranks, {}, 0, {}) && cuda::takes("lora_norm", weight))
    return cuda::norm(weight, lora_A, lora_B, make_gate(scaling, {}, ranks, total_rank(lora_A, 0), weight));
  return call<"fastlora::lora_norm", decltype(lora_norm), "reference">(weight, lora_A, lora_B, scaling, ranks);
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
