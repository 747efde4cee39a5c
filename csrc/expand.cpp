// lora_expand and its backward.
#include "cuda.h"
#include "ops.h"

namespace fastlora {
namespace {

std::tuple<int64_t, int64_t> start_and_count(const Tensor& y, IntArrayRef columns) {
  return columns.empty() ? std::tuple(int64_t{0}, y.size(-1)) : std::tuple(columns[0], columns[1] - columns[0]);
}

}  // namespace

Tensor lora_expand(FASTLORA_EXPAND_ARGS) {
  const auto wide = accumulate_type(y.scalar_type());
  const auto [start, count] = start_and_count(y, columns);
  const auto gate = make_gate(scaling, gates, ranks, z.size(-1), y, wide);
  Gated given{gate, z.to(wide).contiguous()};
  Product p{y, count, {}, {}, given, lora_B, true};
  p.start = start;
  return products(false, cpu::takes(y, lora_B)).product(p);
}

ExpandBackward lora_expand_backward(FASTLORA_EXPAND_BACKWARD_ARGS) {
  const auto& use = products(cuda::takes("lora_expand_backward", dy, 0, z.size(-1)), cpu::takes(dy, lora_B));
  const auto [need_z, need_B, need_scaling, need_gates] = needs;
  const auto wide = accumulate_type(dy.scalar_type());
  const auto [start, count] = start_and_count(dy, columns);
  const auto gate = make_gate(scaling, gates, ranks, z.size(-1), dy, wide);
  const auto dv = columns.empty() ? dy : flat(dy).narrow(1, start, count);
  const Gated kept{gate, flat(z.to(wide)).contiguous()};
  auto dz = nothing(z), dscaling = nothing(z), dgates = nothing(z);
  if (need_z || need_scaling || need_gates) {
    Gated t{gate};
    use.project(t, dv, lora_B, true, {});
    const auto rows = flat(t.z);
    if (need_z) dz = gate.times(rows).to(z.scalar_type()).reshape(z.sizes());
    if (need_scaling || need_gates)
      std::tie(dscaling, dgates) = gate_backward(rows * kept.z, scaling, gates, ranks, dy, need_scaling, need_gates);
  }
  return {dz, need_B ? use.outer(kept, dv, lora_B, true, {}) : Tensors(), dscaling, dgates};
}

}  // namespace fastlora
