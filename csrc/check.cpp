#include <ATen/ExpandUtils.h>

#include "ops.h"

namespace fastlora::check {
namespace {

bool is_half(const Tensor& t) { return t.scalar_type() == at::kBFloat16 || t.scalar_type() == at::kHalf; }
bool floating(const Tensor& t) { return is_half(t) || t.scalar_type() == at::kFloat || t.scalar_type() == at::kDouble; }
bool same(const Tensor& t, const Tensor& x) { return t.scalar_type() == x.scalar_type() && t.device() == x.device(); }
bool vector(const Tensor& t, int64_t n) { return t.dim() == 1 && t.size(0) == n; }

// an adapter's (rows, columns), where -1 is its own rank
bool adapter(const Tensor& t, int64_t rows, int64_t columns, const Tensor& x) {
  return t.dim() == 2 && (rows < 0 || t.size(0) == rows) && (columns < 0 || t.size(1) == columns) &&
         (t.scalar_type() == x.scalar_type() || (is_half(x) && t.scalar_type() == at::kFloat)) && t.device() == x.device();
}

bool gate(const Tensor& scaling, const MaybeTensor& gates, IntArrayRef ranks, size_t count, int64_t R, const Tensor& like) {
  if (std::any_of(ranks.begin(), ranks.end(), [](int64_t r) { return r < 0; })) return false;
  if (ranks.empty() ? count > 1 : c10::sum_integers(ranks) != R) return false;
  const auto E = ranks.empty() ? R : static_cast<int64_t>(ranks.size());
  if (!floating(scaling) || (scaling.dim() != 0 && !vector(scaling, E))) return false;
  if (scaling.device() != like.device() && !(scaling.dim() == 0 && scaling.is_cpu())) return false;
  return !gates || (floating(*gates) && gates->device() == like.device() &&
                    at::is_expandable_to(gates->sizes(), with_last(like.sizes(), E)));
}

}  // namespace

bool dropout(double p, const MaybeTensor& seed, const Tensor& x) {
  if (!(p >= 0 && p <= 1)) return false;
  return p == 0 || (seed && seed->scalar_type() == at::kLong && seed->dim() == 0 && seed->device() == x.device());
}

bool shrink(FASTLORA_SHRINK_ARGS) {
  return floating(x) && x.dim() >= 1 && dropout(dropout_p, seed, x) &&
         std::all_of(lora_A.begin(), lora_A.end(), [&](const Tensor& a) { return adapter(a, -1, x.size(-1), x); });
}

bool base(const Tensor& x, const Tensor& weight, const MaybeTensor& bias) {
  return floating(x) && x.dim() >= 1 && weight.dim() == 2 && x.size(-1) == weight.size(1) && same(weight, x) &&
         (!bias || (vector(*bias, weight.size(0)) && same(*bias, x)));
}

bool linear(FASTLORA_LINEAR_ARGS) {
  if (!base(x, weight, bias) || !shrink(x, lora_A, dropout_p, seed) || lora_A.size() != lora_B.size()) return false;
  const auto out = weight.size(0);
  for (size_t e = 0; e < lora_A.size(); e++)
    if (!adapter(lora_B[e], out, lora_A[e].size(0), x)) return false;
  return gate(scaling, gates, ranks, lora_A.size(), total_rank(lora_A, 0), x) &&
         (!column_scale || (vector(*column_scale, out) && floating(*column_scale) && column_scale->device() == x.device()));
}

bool routed(FASTLORA_ROUTED_ARGS) {
  if (!base(x, weight, bias) || lora_A.size() != lora_B.size() || route[2].size(0) != rows_of(x)) return false;
  const auto out = weight.size(0), in = weight.size(1), k = std::max<int64_t>(1, slices.size());
  if (!slices.empty() && (c10::sum_integers(slices) != out || *std::min_element(slices.begin(), slices.end()) < 0)) return false;
  const auto E = static_cast<int64_t>(lora_A.size());
  for (int64_t e = 0; e < E; e++)
    if (!adapter(lora_B[e], out, -1, x) || !adapter(lora_A[e], k * lora_B[e].size(1), in, x)) return false;
  if (gates.sizes() != route[1].sizes() || gates.device() != x.device()) return false;
  if (!floating(scaling) || (scaling.dim() && !vector(scaling, E))) return false;
  if (!column_scale.empty() && column_scale.size() != lora_A.size()) return false;
  for (const auto& c : column_scale)
    if (!vector(c, out) && !vector(c, 0)) return false;
  const Plan plan(route);
  const auto* end = plan.slots + plan.bounds[plan.G];
  if (plan.slots != end && *std::max_element(plan.slots, end) >= paged(pages) + E) return false;
  if (pages.empty()) return true;
  if (pages.size() < 6 || pages[2].dim() != 2 || pages[0].dim() != 4) return false;
  const auto &A = pages[0], &B = pages[1];
  for (int i : {2, 3, 4, 5})
    if (pages[i].scalar_type() != (i == 4 ? at::kFloat : at::kInt) || !pages[i].is_contiguous() ||
        pages[i].device() != x.device() || pages[i].sizes() != pages[2].sizes().slice(0, i == 2 ? 2 : 1)) return false;
  return A.sizes() == IntArrayRef({A.size(0), k, 8, in}) && B.sizes() == IntArrayRef({A.size(0), 8, out}) &&
         A.device() == x.device() && B.device() == x.device();
}

bool expand(FASTLORA_EXPAND_ARGS) {
  if (!floating(y) || y.dim() < 1 || (columns.size() != 0 && columns.size() != 2)) return false;
  const auto out = y.size(-1), start = columns.empty() ? 0 : columns[0], stop = columns.empty() ? out : columns[1];
  if (!(0 <= start && start <= stop && stop <= out)) return false;
  for (const auto& b : lora_B)
    if (!adapter(b, stop - start, -1, y)) return false;
  const auto R = total_rank(lora_B, 1);
  const auto zt = z.scalar_type(), yt = y.scalar_type();
  if (ids && (ids->sizes() != y.sizes().slice(0, y.dim() - 1) || ids->device() != y.device() || z.dim() != 2 ||
              (ids->scalar_type() != at::kLong && ids->scalar_type() != at::kInt))) return false;
  return z.sizes() == IntArrayRef(with_last(ids ? z.sizes() : y.sizes(), R)) && (zt == accumulate_type(yt) || zt == yt) &&
         z.device() == y.device() && gate(scaling, gates, ranks, lora_B.size(), R, y);
}

}  // namespace fastlora::check
