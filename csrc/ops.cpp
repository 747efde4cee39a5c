// lora_linear, its halves lora_shrink and lora_expand, what their backward needs, and their backward; lora_dropout and
// draw_seed.
#include "ops.h"

#include <ATen/ops/addmm.h>
#include <ATen/ops/embedding.h>
#include <ATen/ops/embedding_dense_backward.h>
#include <ATen/ops/linalg_vector_norm.h>
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
  const auto gate = make_gate(scaling, gates, ranks, total_rank(lora_A, 0), x, accumulate_type(x.scalar_type()));
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
  const auto gate = make_gate(scaling, gates, ranks, z.size(-1), x, wide);
  const Dropout dropout{dropout_p, seed};
  auto dx = nothing(x), dweight = nothing(x), dscaling = nothing(x), dbias = nothing(x), dgates = nothing(x),
       dcolumn = nothing(x);
  Tensors dA;
  // DoRA: dy meets its columns' scale first; bias and scale have sums of their own
  const auto dv = column_scale ? (dy.to(wide) * column_scale->to(wide)).to(x.scalar_type()) : dy;
  const bool of_gate = need_scaling || need_gates;
  Gated t{gate};
  auto dB = expand_backward(use, t, need_x || need_A || of_gate, {gate, z.contiguous()}, need_B, dv, lora_B);
  if (need_x) {
    Product p{x, x.size(-1), dv, weight.t(), t, lora_A, false, dropout};
    dx = use.product(p);
  }
  if (need_A) dA = use.outer(t, x, lora_A, false, dropout);
  if (of_gate)
    std::tie(dscaling, dgates) = gate_backward(flat(t.z) * flat(z), scaling, gates, ranks, x, need_scaling, need_gates);
  if (need_weight) dweight = at::mm(flat(dv).t(), flat(x));
  if (need_bias) dbias = flat(dy).sum(0);
  if (need_column) dcolumn = (flat(dy).to(wide) * flat(u)).sum(0).to(column_scale->scalar_type());
  return {dx, dweight, dA, dB, dscaling, dbias, dgates, dcolumn};
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
  const auto wide = accumulate_type(y.scalar_type());
  const int64_t start = columns.empty() ? 0 : columns[0], stop = columns.empty() ? y.size(-1) : columns[1];
  const auto gate = make_gate(scaling, gates, ranks, z.size(-1), y, wide);
  const bool ours = cpu::takes(y, lora_B), kernels = cuda::takes("lora_expand", y);
  Gated given{gate};
  Product p{y, stop - start, {}, {}, given, lora_B, true};
  p.start = start;
  // of a table as lora_A lies, in y's type: it is as long as the vocabulary, and is not copied
  if (ids && kernels && z.scalar_type() == y.scalar_type() && z.stride(0) == 1) return cuda::gather(p, z, *ids);
  given.z = (ids ? at::embedding(z, *ids) : z).to(wide).contiguous();
  return products(kernels, ours).product(p);
}

ExpandBackward lora_expand_backward(FASTLORA_EXPAND_BACKWARD_ARGS) {
  const auto& use = products(cuda::takes("lora_expand_backward", dy), cpu::takes(dy, lora_B));
  const auto [need_z, need_B, need_scaling, need_gates] = needs;
  const auto wide = accumulate_type(dy.scalar_type());
  const auto gate = make_gate(scaling, gates, ranks, z.size(-1), dy, wide);
  const auto dv = columns.empty() ? dy : flat(dy).narrow(1, columns[0], columns[1] - columns[0]);
  const auto rows = ids ? at::embedding(z, *ids) : z;
  const Gated kept{gate, flat(rows.to(wide)).contiguous()};
  auto dz = nothing(z), dscaling = nothing(z), dgates = nothing(z);
  const bool of_gate = need_scaling || need_gates;
  Gated t{gate};
  auto dB = expand_backward(use, t, need_z || of_gate, kept, need_B, dv, lora_B);
  if (need_z) dz = gate.times(flat(t.z)).to(z.scalar_type()).reshape(rows.sizes());
  if (need_z && ids) dz = at::embedding_dense_backward(dz, *ids, z.size(0), -1, false);
  if (of_gate)
    std::tie(dscaling, dgates) = gate_backward(flat(t.z) * kept.z, scaling, gates, ranks, dy, need_scaling, need_gates);
  return {dz, dB, dscaling, dgates};
}

Tensor lora_norm(FASTLORA_NORM_ARGS) {
  const auto wide = accumulate_type(weight.scalar_type());
  const auto gate = make_gate(scaling, {}, ranks, total_rank(lora_A, 0), weight, wide);
  if (cuda::takes("lora_norm", weight)) return cuda::norm(weight, lora_A, lora_B, gate);
  const auto w = weight.to(wide), b = composed::joined(lora_B, true, w.size(0), w).t();
  return at::linalg_vector_norm(at::addmm(w, gate.times(b), composed::joined(lora_A, false, w.size(1), w)), 2, {{1}});
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
