#include "../composed.h"
#include "host.h"
#include "native.h"

namespace fastlora::cpu {

Tensor expand(FASTLORA_EXPAND_ARGS) {
  if (!takes(y, lora_B)) return composed::expand(FASTLORA_EXPAND);
  const Rows rows(y);
  const Factors b(lora_B, true);
  const auto t = z.to(at::kFloat).contiguous();
  const auto gate = make_gate(scaling, gates, ranks, t.size(-1), y, at::kFloat);
  const int64_t start = columns.empty() ? 0 : columns[0], stop = columns.empty() ? rows.n : columns[1];
  const int64_t bytes = y.element_size();
  auto out = make(y.sizes(), y, y.scalar_type());
  if (stop - start < rows.n) out.copy_(y);
  if (stop == start) return out;
  Gemm p{};
  p.type = type_of(y);
  p.M = rows.M, p.N = stop - start, p.R = t.size(-1);
  set_factors(p, b);
  p.z = t.const_data_ptr<float>();
  p.g = gates_of(gate);
  p.add = static_cast<const char*>(rows.data) + start * bytes, p.ldadd = rows.ld;
  p.y = static_cast<char*>(out.mutable_data_ptr()) + start * bytes, p.ldy = rows.n;
  run_update(p);
  return out;
}

ExpandBackward expand_backward(FASTLORA_EXPAND_BACKWARD_ARGS) {
  if (!takes(dy, lora_B)) return composed::expand_backward(FASTLORA_EXPAND_BACKWARD);
  const auto [need_z, need_B, need_scaling, need_gates] = needs;
  const Rows rows(dy);
  const Factors b(lora_B, true);
  const auto R = z.size(-1);
  const auto z_rows = z.to(at::kFloat).contiguous().view({rows.M, R});
  const auto gate = make_gate(scaling, gates, ranks, R, dy, at::kFloat);
  const int64_t start = columns.empty() ? 0 : columns[0], stop = columns.empty() ? rows.n : columns[1];
  Reduce p{type_of(dy), rows.M, stop - start, R, static_cast<const char*>(rows.data) + start * dy.element_size(), rows.ld,
           static_cast<int>(b.list.size()), b.list.data(), z_rows.const_data_ptr<float>(), gates_of(gate)};
  auto sums = run(p, dy, need_B ? lora_B : TensorList(), false);
  auto dz = nothing(z), dscaling = nothing(z), dgates = nothing(z);
  if (need_z) dz = gate.times(sums.t).to(z.scalar_type()).view(z.sizes());
  if (need_scaling || need_gates)
    std::tie(dscaling, dgates) = gate_backward(sums.t * z_rows, scaling, gates, ranks, dy, need_scaling, need_gates);
  return {dz, std::move(sums.db), dscaling, dgates};
}

}  // namespace fastlora::cpu
