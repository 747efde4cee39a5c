#include "products.h"

#include <ATen/Dispatch.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/stack.h>

#include <algorithm>

namespace fastlora {
namespace {

bool uniform(IntArrayRef ranks) {
  return std::all_of(ranks.begin(), ranks.end(), [&](int64_t r) { return r == ranks[0]; });
}

// (..., E) -> (..., R), each adapter's gate once per rank row; no index tensor, so nothing is copied to the device
Tensor spread(const Tensor& g, IntArrayRef ranks) {
  const auto E = static_cast<int64_t>(ranks.size());
  if (E < 2 || g.dim() == 0 || g.size(-1) != E) return g;
  if (uniform(ranks)) return g.repeat_interleave(ranks[0], -1);
  Tensors parts;
  for (int64_t e = 0; e < E; e++) parts.push_back(g.narrow(-1, e, 1).expand(with_last(g.sizes(), ranks[e])));
  return at::cat(parts, -1);
}

// (M, R) -> (M, E)
Tensor gather(const Tensor& dg, IntArrayRef ranks) {
  if (ranks.empty()) return dg;
  const auto E = static_cast<int64_t>(ranks.size());
  if (uniform(ranks)) return dg.reshape({dg.size(0), E, ranks[0]}).sum(-1);
  Tensors parts;
  for (const auto& part : dg.split_with_sizes(ranks, 1)) parts.push_back(part.sum(-1));
  return at::stack(parts, -1);
}

}  // namespace

Gate make_gate(const Tensor& scaling, const MaybeTensor& gates, IntArrayRef ranks, int64_t R, const Tensor& like) {
  const auto dtype = accumulate_type(like.scalar_type());
  if (!gates && scaling.dim() == 0 && scaling.is_cpu()) return {scaling.item<double>()};
  const auto E = static_cast<int64_t>(ranks.size());
  if (E && like.is_cpu() && (!gates || gates->numel() == rows_of(like) * E)) {
    // a number for each adapter, or for each token too, in one pass: the calls below cost more than a layer at one token
    const auto scale = scaling.to(dtype).contiguous(), given = gates ? gates->to(dtype).contiguous() : scale;
    const int64_t M = gates ? rows_of(like) : 1;
    const auto rows = at::empty(gates ? IntArrayRef{M, R} : IntArrayRef{R}, scale.options());
    AT_DISPATCH_FLOATING_TYPES(dtype, "gate", [&] {
      const auto *from = given.const_data_ptr<scalar_t>(), *s = scale.const_data_ptr<scalar_t>();
      auto* to = rows.data_ptr<scalar_t>();
      const int64_t step = scale.numel() > 1;
      for (int64_t m = 0; m < M; m++)
        for (int64_t e = 0; e < E; e++) to = std::fill_n(to, ranks[e], s[e * step] * (gates ? *from++ : 1));
    });
    return {1, rows};
  }
  auto g = scaling.to(like.device(), dtype);
  if (gates) g = g * gates->to(dtype);
  g = spread(g, ranks);
  if (g.dim() == 0 || g.numel() == g.size(-1)) return {1, g.flatten().expand({R}).contiguous()};
  return {1, flat(g.expand(with_last(like.sizes(), R))).contiguous()};
}

std::tuple<Tensor, Tensor> gate_backward(const Tensor& t, const Tensor& z, const Tensor& scaling, const MaybeTensor& gates,
                                         IntArrayRef ranks, bool need_scaling, bool need_gates) {
  auto dscaling = nothing(z), dgates = nothing(z);
  if (!need_scaling && !need_gates) return {dscaling, dgates};
  auto each = gather(flat(t) * flat(z), ranks);
  each = each.reshape(with_last(z.sizes(), each.size(-1)));
  const auto sum_to = [](const Tensor& grad, const Tensor& t) { return grad.sum_to_size(t.sizes()).to(t.options()); };
  if (need_scaling) dscaling = sum_to(gates ? each * gates->to(each.scalar_type()) : each, scaling);
  if (need_gates) dgates = sum_to(each * scaling.to(each.options()), *gates);
  return {dscaling, dgates};
}

}  // namespace fastlora
