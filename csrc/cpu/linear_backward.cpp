#include <ATen/ops/mm.h>
#include <ATen/ops/sum.h>

#include "../composed.h"
#include "host.h"
#include "native.h"

namespace fastlora::cpu {
namespace {

// dx = dy W + D((t g) a)
Tensor gradient_of_x(const Rows& dy, const Tensor& x, const Tensor& weight, const Factors& a, const Tensor& t,
                     const Gates& g, const Mask& mask) {
  auto dx = make(x.sizes(), x, x.scalar_type());
  Tensor keep;
  const auto w = weight.t();
  Gemm p{};
  p.type = type_of(x);
  p.M = dy.M, p.N = x.size(-1), p.K = dy.n, p.R = t.defined() ? t.size(1) : 0;
  p.x = dy.data, p.ldx = dy.ld;
  set_weight(p, w, keep);
  set_factors(p, a);
  p.z = t.defined() ? t.const_data_ptr<float>() : nullptr;
  p.g = g;
  p.mask = mask;
  p.y = dx.mutable_data_ptr(), p.ldy = p.N;
  run(p, dy.tensor, w, dx);
  return dx;
}

}  // namespace

LinearBackward linear_backward(FASTLORA_LINEAR_BACKWARD_ARGS) {
  if (!takes(x, lora_A) || !takes(weight, lora_B)) return composed::linear_backward(FASTLORA_LINEAR_BACKWARD);
  const auto [need_x, need_weight, need_A, need_B, need_scaling, need_bias, need_gates, need_column] = needs;
  // one fresh tensor each: outputs of an op must not alias
  auto dx = nothing(x), dweight = nothing(x), dscaling = nothing(x), dbias = nothing(x), dgates = nothing(x),
       dcolumn = nothing(x);
  Tensors dA;
  // DoRA: dy meets its columns' scale first; bias and scale have sums of their own
  const auto dv = column_scale ? (dy.to(at::kFloat) * column_scale->to(at::kFloat)).to(x.scalar_type()) : dy;
  const Rows rows(dv), x_rows(x);
  const auto R = z.size(-1);
  const Factors a(lora_A, false), b(lora_B, true);
  const auto gate = make_gate(scaling, gates, ranks, R, x, at::kFloat);
  const auto g = gates_of(gate);
  const auto mask = mask_of(dropout_p, seed, x.size(-1));
  const auto z_rows = z.contiguous();
  const bool need_gate = need_scaling || need_gates, bias_here = need_bias && !column_scale;

  Reduced sums;
  if ((R && (need_x || need_A || need_gate)) || need_B || bias_here) {
    Reduce p{type_of(x), rows.M, rows.n, R, rows.data, rows.ld, static_cast<int>(b.list.size()), b.list.data(),
             z_rows.const_data_ptr<float>(), g};
    sums = run(p, x, need_B ? lora_B : TensorList(), bias_here);
  }
  if (need_x) dx = gradient_of_x(rows, x, weight, a, R ? sums.t : Tensor(), g, mask);
  if (need_weight) dweight = at::mm(flat(dv).t(), flat(x));
  if (need_A)
    dA = run(Outer{type_of(x), x_rows.M, x_rows.n, R, R ? sums.t.const_data_ptr<float>() : nullptr, g, x_rows.data,
                   x_rows.ld, mask, static_cast<int>(a.list.size()), a.list.data()}, lora_A);
  if (need_gate)
    std::tie(dscaling, dgates) =
        gate_backward((R ? sums.t : make({rows.M, 0}, x, at::kFloat)) * z_rows.view({rows.M, R}), scaling, gates, ranks, x,
                      need_scaling, need_gates);
  if (need_bias) dbias = bias_here ? sums.dbias.to(x.scalar_type()) : flat(dy).sum(0);
  if (need_column) dcolumn = (flat(dy).to(at::kFloat) * flat(u)).sum(0).to(column_scale->scalar_type());
  return {dx, dweight, dA, std::move(sums.db), dscaling, dbias, dgates, dcolumn};
}

}  // namespace fastlora::cpu
