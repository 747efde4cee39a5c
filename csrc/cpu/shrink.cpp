#include <ATen/ops/ones.h>

#include "../composed.h"
#include "host.h"
#include "native.h"

namespace fastlora::cpu {

Tensor shrink(FASTLORA_SHRINK_ARGS) {
  if (!takes(x, lora_A)) return composed::shrink(FASTLORA_SHRINK);
  const Rows rows(x);
  const Factors a(lora_A, false);
  const auto R = total_rank(lora_A, 0);
  auto z = make(with_last(x.sizes(), R), x, at::kFloat);
  run(Shrink{type_of(x), rows.M, rows.n, R, rows.data, rows.ld, static_cast<int>(a.list.size()), a.list.data(),
             mask_of(dropout_p, seed, rows.n), z.data_ptr<float>()});
  return z;
}

ShrinkBackward shrink_backward(FASTLORA_SHRINK_BACKWARD_ARGS) {
  if (!takes(x, lora_A)) return composed::shrink_backward(FASTLORA_SHRINK_BACKWARD);
  const Rows rows(x);
  const Factors a(lora_A, false);
  const auto t = dz.to(at::kFloat).contiguous();
  const auto R = t.size(-1);
  const auto mask = mask_of(dropout_p, seed, rows.n);
  const Gates one{1, nullptr, 0};
  auto dx = nothing(x);
  Tensors dA;
  if (needs[0]) {
    dx = make(x.sizes(), x, x.scalar_type());
    Gemm p{};
    p.type = type_of(x);
    p.M = rows.M, p.N = rows.n, p.R = R;
    set_factors(p, a);
    p.z = t.const_data_ptr<float>();
    p.g = one;
    p.mask = mask;
    p.y = dx.mutable_data_ptr(), p.ldy = p.N;
    run_update(p);
  }
  if (needs[1])
    dA = run(Outer{type_of(x), rows.M, rows.n, R, t.const_data_ptr<float>(), one, rows.data, rows.ld, mask,
                   static_cast<int>(a.list.size()), a.list.data()}, lora_A);
  return {dx, dA};
}

Tensor dropout(const Tensor& x, double dropout_p, const Tensor& seed) {
  const auto mask = mask_of(dropout_p, seed, x.size(-1));
  if (x.scalar_type() == at::kDouble) {
    const auto kept = dropout(at::ones(x.sizes(), x.options().dtype(at::kFloat)), dropout_p, seed);
    return x.masked_fill(kept == 0, 0).mul_(mask.threshold ? 65536.0 / (65536 - std::min(mask.threshold, 65535u)) : 1.0);
  }
  auto y = make(x.sizes(), x, x.scalar_type());
  if (x.numel()) run_dropout(Rows(x), y, mask);
  return y;
}

}  // namespace fastlora::cpu
