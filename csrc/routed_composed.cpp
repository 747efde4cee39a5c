// lora_routed of ATen calls: a product for each adapter of each segment, from the route's and the tables' host copies.
#include <ATen/TensorIndexing.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include "routed.h"

namespace fastlora::composed {
namespace {

struct Adapter {
  Tensor a, b, scale, d;   // (k, r, in), (r, out), 0-d; d = c - 1 (out) or undefined
};

// The call's adapters by slot, at x's precision in the accumulation dtype.
struct Adapters {
  const Tensor& x;
  TensorList lora_A, lora_B, column_scale, pages;
  Tensor scaling;
  int64_t k, S = paged(pages);
  at::ScalarType wide = accumulate_type(x.scalar_type());

  Tensor rounded(const Tensor& t) const { return t.to(x.scalar_type()).to(wide); }
  Adapter operator()(int64_t slot) const {
    if (slot >= S) {
      const auto e = slot - S;
      const auto& a = lora_A[e];
      const auto c = column_scale.empty() ? Tensor() : column_scale[e];
      return {rounded(a).reshape({k, a.size(0) / k, a.size(1)}), rounded(lora_B[e]).t(),
              scaling.dim() ? scaling[e] : scaling, c.defined() && c.numel() ? c.to(wide).sub(1) : Tensor()};
    }
    // the device's tables are the host's where the device is the CPU
    const auto host = pages.size() > 6 ? pages[6].narrow(1, 2, pages[2].size(1)) : pages[2];
    const auto rank = pages.size() > 6 ? pages[6][slot][0].item<int64_t>() : pages[3][slot].item<int64_t>();
    const auto column = pages.size() > 6 ? pages[6][slot][1].item<int64_t>() : pages[5][slot].item<int64_t>();
    const auto at = host[slot].narrow(0, 0, (rank + 7) / 8).to(x.device(), at::kLong);
    const auto a = pages[0].index_select(0, at).transpose(0, 1).reshape({k, at.size(0) * 8, x.size(-1)}).narrow(1, 0, rank);
    const auto b = pages[1].index_select(0, at).reshape({at.size(0) * 8, pages[1].size(2)}).narrow(0, 0, rank);
    return {rounded(a), rounded(b), pages[4][slot].to(wide), column < 0 ? Tensor() : pages[1][column][0].to(wide)};
  }
};

// (m, k, r) by the columns of b (r, out) that each slice has
Tensor expand(const Tensor& z, const Tensor& b, IntArrayRef slices) {
  if (slices.empty()) return at::mm(z.select(1, 0), b);
  Tensors parts;
  const auto columns = b.split_with_sizes(slices, 1);
  for (size_t i = 0; i < columns.size(); i++) parts.push_back(at::mm(z.select(1, i), columns[i]));
  return at::cat(parts, 1);
}

// (m, k, r): the columns e of each slice by those of b
Tensor contract(const Tensor& e, const Tensor& b, IntArrayRef slices) {
  if (slices.empty()) return at::mm(e, b.t()).unsqueeze(1);
  Tensors parts;
  const auto es = e.split_with_sizes(slices, 1), bs = b.split_with_sizes(slices, 1);
  for (size_t i = 0; i < es.size(); i++) parts.push_back(at::mm(es[i], bs[i].t()).unsqueeze(1));
  return at::cat(parts, 1);
}

// f(tokens, entries, slot) of each adapter of each segment
template <class F>
void for_adapters(TensorList route, F&& f) {
  const Plan plan(route);
  for (int64_t i = 0; i < plan.G; i++) {
    if (plan.bounds[i] == plan.bounds[i + 1]) continue;
    const auto tokens = route[2].narrow(0, plan.starts[i], plan.starts[i + 1] - plan.starts[i]);
    const auto first = route[0].index_select(0, tokens).to(at::kLong);
    for (auto j = plan.bounds[i]; j < plan.bounds[i + 1]; j++) f(tokens, first + (j - plan.bounds[i]), plan.slots[j]);
  }
}

}  // namespace

RoutedForward routed_forward(FASTLORA_ROUTED_ARGS) {
  const auto wide = accumulate_type(x.scalar_type());
  const int64_t k = std::max<int64_t>(1, slices.size());
  const Adapters adapters{x, lora_A, lora_B, column_scale, pages, scaling.to(x.device(), wide), k};
  const auto x2 = flat(x);
  auto z = at::zeros({gates.size(0), k, most_ranks(lora_B, pages)}, x.options().dtype(wide));
  const auto v = at::linear(x2, weight).to(wide);
  auto y = bias ? v + bias->to(wide) : v.clone();
  for_adapters(route, [&](const Tensor& tokens, const Tensor& entries, int64_t slot) {
    const auto [a, b, scale, d] = adapters(slot);
    const auto rows = x2.index_select(0, tokens).to(wide);
    const auto zs = at::mm(rows, a.flatten(0, 1).t()).view({rows.size(0), k, a.size(1)});
    z.index_put_({entries, at::indexing::Slice(), at::indexing::Slice(0, a.size(1))}, zs);
    auto update = expand(zs, b, slices) * scale;
    if (d.defined()) update = d * v.index_select(0, tokens) + (d + 1) * update;
    y.index_add_(0, tokens, gates.index_select(0, entries).to(wide).unsqueeze(1) * update);
  });
  return {y.to(x.scalar_type()).reshape(with_last(x.sizes(), weight.size(0))), z.flatten(1)};
}

RoutedBackward routed_backward(FASTLORA_ROUTED_BACKWARD_ARGS) {
  const auto [need_x, need_weight, need_A, need_B, need_scaling, need_bias, need_gates] = needs;
  const auto dtype = x.scalar_type(), wide = accumulate_type(dtype);
  const int64_t k = std::max<int64_t>(1, slices.size());
  const Adapters adapters{x, lora_A, lora_B, column_scale, pages, scaling.to(x.device(), wide), k};
  const auto x2 = flat(x), dy2 = flat(dy).to(wide), z3 = z.view({gates.size(0), k, z.size(1) / k});
  auto dv = dy2.clone(), dx = at::zeros(x2.sizes(), z.options());
  auto dg = at::zeros({gates.size(0)}, z.options()), ds = at::zeros({static_cast<int64_t>(lora_A.size())}, z.options());
  Tensors dA, dB;
  for (size_t e = 0; e < lora_A.size() && (need_A || need_B); e++) {
    dA.push_back(at::zeros(lora_A[e].sizes(), z.options()));
    dB.push_back(at::zeros(lora_B[e].sizes(), z.options()));
  }
  for_adapters(route, [&](const Tensor& tokens, const Tensor& entries, int64_t slot) {
    const auto [a, b, scale, d] = adapters(slot);
    const auto gate = gates.index_select(0, entries).to(wide).unsqueeze(1);
    const auto zs = z3.index_select(0, entries).narrow(2, 0, a.size(1));
    auto e = dy2.index_select(0, tokens);
    if (d.defined()) {
      if (need_gates) dg.index_add_(0, entries, (e * d * at::linear(x2.index_select(0, tokens), weight).to(wide)).sum(1));
      dv.index_add_(0, tokens, gate * d * e);
      e = e * (d + 1);
    }
    const auto t = contract(e, b, slices), tz = (t * zs).sum({1, 2});
    dg.index_add_(0, entries, tz * scale);
    const auto dz = (t * (gate * scale).unsqueeze(2)).flatten(1);
    if (need_x) dx.index_add_(0, tokens, at::mm(dz, a.flatten(0, 1)));
    const auto own = slot - adapters.S;
    if (own < 0) return;
    if (need_A) dA[own].addmm_(dz.t(), x2.index_select(0, tokens).to(wide));
    if (need_scaling) ds.select(0, own).add_((gate.squeeze(1) * tz).sum());
    if (!need_B) return;
    const auto zg = zs * (gate * scale).unsqueeze(2);
    int64_t row = 0;
    for (int64_t i = 0; i < k; i++) {
      const auto width = slices.empty() ? b.size(1) : slices[i];
      dB[own].narrow(0, row, width).addmm_(e.narrow(1, row, width).t(), zg.select(1, i));
      row += width;
    }
  });
  const auto empty = [&] { return at::empty({0}, x.options()); };
  for (size_t e = 0; e < dA.size(); e++) {
    dA[e] = dA[e].to(lora_A[e].scalar_type());
    dB[e] = dB[e].to(lora_B[e].scalar_type());
  }
  const auto low = dv.to(dtype);
  return {need_x ? (dx + at::mm(low, weight).to(wide)).to(dtype).reshape(x.sizes()) : empty(),
          need_weight ? at::mm(low.t(), x2) : empty(), need_A ? dA : Tensors{}, need_B ? dB : Tensors{},
          need_scaling ? ds.sum_to_size(scaling.sizes()).to(scaling.device(), scaling.scalar_type()) : empty(),
          need_bias ? dy2.sum(0).to(dtype) : empty(), need_gates ? dg.to(gates.scalar_type()) : empty()};
}

}  // namespace fastlora::composed
