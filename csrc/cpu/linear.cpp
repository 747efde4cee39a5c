#include "../composed.h"
#include "host.h"
#include "native.h"

namespace fastlora::cpu {

LinearForward linear_forward(FASTLORA_LINEAR_ARGS, bool want_z) {
  if (!takes(x, lora_A) || !takes(weight, lora_B)) return composed::linear_forward(FASTLORA_LINEAR);
  const Rows rows(x);
  const auto R = total_rank(lora_A, 0), out = weight.size(0);
  const Factors a(lora_A, false), b(lora_B, true);
  const auto gate = make_gate(scaling, gates, ranks, R, x, at::kFloat);
  auto y = make(with_last(x.sizes(), out), x, x.scalar_type());
  const bool dropped = dropout_p > 0;
  Tensor z, u, keep, c;
  if (want_z || dropped) z = make(with_last(x.sizes(), R), x, at::kFloat);

  Gemm p{};
  p.type = type_of(x);
  p.M = rows.M, p.N = out, p.K = rows.n, p.R = R;
  p.x = rows.data, p.ldx = rows.ld;
  set_weight(p, weight, keep);
  set_factors(p, b);
  p.g = gates_of(gate);
  p.y = y.mutable_data_ptr(), p.ldy = out;
  p.z_out = z.defined() ? z.data_ptr<float>() : nullptr;
  if (dropped) {
    run(Shrink{p.type, p.M, p.K, R, p.x, p.ldx, p.adapters, a.list.data(), mask_of(dropout_p, seed, p.K), p.z_out});
    p.z = p.z_out;
  } else if (R) {
    p.a = a.list.data();
  }
  if (column_scale) {
    c = column_scale->to(at::kFloat).contiguous();
    u = make(y.sizes(), x, x.scalar_type());
    p.c = c.data_ptr<float>(), p.u = u.mutable_data_ptr();
  }
  const auto bias_row = bias ? bias->contiguous() : Tensor();
  p.bias = bias ? bias_row.const_data_ptr() : nullptr;
  run(p, rows.tensor, weight, y);
  return {y, z.defined() ? z : nothing(x), u.defined() ? u : nothing(x)};
}

}  // namespace fastlora::cpu
