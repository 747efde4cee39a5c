// lora_linear, what its backward needs, and its backward.
#include <ATen/ops/mm.h>
#include <ATen/ops/sum.h>

#include "cuda.h"
#include "ops.h"

namespace fastlora {
namespace {

LinearForward run(FASTLORA_LINEAR_ARGS, bool want_z) {
  const auto R = total_rank(lora_A, 0);
  const auto& use = products(cuda::takes("lora_linear_forward", x, weight.size(0), R),
                             cpu::takes(x, lora_A) && cpu::takes(weight, lora_B));
  const auto gate = make_gate(scaling, gates, ranks, R, x, accumulate_type(x.scalar_type()));
  Gated z{gate};
  if (dropout_p > 0) use.project(z, x, lora_A, false, {dropout_p, seed});
  Product p{x, weight.size(0), x, weight, z, lora_B, true, {}, lora_A, want_z, column_scale, bias};
  auto y = use.product(p);
  return {y, z.z.defined() ? z.z : nothing(x), p.u.defined() ? p.u : nothing(x)};
}

}  // namespace

Tensor lora_linear(FASTLORA_LINEAR_ARGS) { return std::get<0>(run(FASTLORA_LINEAR, false)); }
LinearForward lora_linear_forward(FASTLORA_LINEAR_ARGS) { return run(FASTLORA_LINEAR, true); }

LinearBackward lora_linear_backward(FASTLORA_LINEAR_BACKWARD_ARGS) {
  const auto& use = products(cuda::takes("lora_linear_backward", x, weight.size(0), z.size(-1)),
                             cpu::takes(x, lora_A) && cpu::takes(weight, lora_B));
  const auto [need_x, need_weight, need_A, need_B, need_scaling, need_bias, need_gates, need_column] = needs;
  const auto wide = accumulate_type(x.scalar_type());
  const auto gate = make_gate(scaling, gates, ranks, z.size(-1), x, wide);
  const Dropout dropout{dropout_p, seed};
  auto dx = nothing(x), dweight = nothing(x), dscaling = nothing(x), dbias = nothing(x), dgates = nothing(x),
       dcolumn = nothing(x);
  Tensors dA, dB;
  // DoRA: dy meets its columns' scale first; bias and scale have sums of their own
  const auto dv = column_scale ? (dy.to(wide) * column_scale->to(wide)).to(x.scalar_type()) : dy;
  if (need_x || need_A || need_scaling || need_gates) {
    Gated t{gate};
    use.project(t, dv, lora_B, true, {});
    if (need_x) {
      Product p{x, x.size(-1), dv, weight.t(), t, lora_A, false, dropout};
      dx = use.product(p);
    }
    if (need_A) dA = use.outer(t, x, lora_A, false, dropout);
    if (need_scaling || need_gates)
      std::tie(dscaling, dgates) = gate_backward(flat(t.z) * flat(z), scaling, gates, ranks, x, need_scaling, need_gates);
  }
  if (need_B) dB = use.outer({gate, z.contiguous()}, dv, lora_B, true, {});
  if (need_weight) dweight = at::mm(flat(dv).t(), flat(x));
  if (need_bias) dbias = flat(dy).sum(0);
  if (need_column) dcolumn = (flat(dy).to(wide) * flat(u)).sum(0).to(column_scale->scalar_type());
  return {dx, dweight, dA, dB, dscaling, dbias, dgates, dcolumn};
}

}  // namespace fastlora
