#include "adapters.h"

namespace fastlora::cpu {
namespace {

void add_pieces(Entry& entry, Type type, const char* a, const char* b, int64_t K, int64_t N, int64_t rank) {
  const int64_t bytes = type == kFloat ? 4 : 2;
  for (int64_t r = 0; r < rank; r += kPieceRows) {
    const auto rows = std::min(kPieceRows, rank - r);
    entry.a.push_back({a + r * K * bytes, type, rows, K, false});
    entry.b.push_back({b + r * N * bytes, type, rows, N, false});
  }
}

const char* bytes_of(const Tensor& t) { return static_cast<const char*>(t.const_data_ptr()); }

}  // namespace

Adapters::Adapters(const Tensor& x, TensorList lora_A, TensorList lora_B, const Tensor& scaling, TensorList route,
                   const Tensor& gate_values, TensorList column_scale, IntArrayRef slices, TensorList pages)
    : type(type_of(x)), k(std::max<int64_t>(1, slices.size())), bounds{0} {
  for (auto width : slices) bounds.push_back(bounds.back() + width);
  const auto held = [&](const Tensor& t) { return keep.emplace_back(t.contiguous()).const_data_ptr(); };
  offsets = static_cast<const int32_t*>(held(route[0]));
  order = static_cast<const int64_t*>(held(route[2]));
  gates = static_cast<const float*>(held(gate_values.to(at::kFloat)));
  const auto S = paged(pages), E = static_cast<int64_t>(lora_A.size());
  const auto* scales = E ? static_cast<const float*>(held(scaling.to(at::kFloat).expand({E}))) : nullptr;
  index.assign(S + E, -1);
  const Plan plan(route);
  for (int64_t i = 0; i < plan.G; i++) {
    Segment s{plan.starts[i], plan.starts[i + 1], 0, plan.slots + plan.bounds[i], plan.slots + plan.bounds[i + 1], total};
    for (auto slot = s.slots; slot != s.end; slot++) {
      if (index[*slot] < 0) {
        index[*slot] = static_cast<int32_t>(entries.size());
        auto& entry = entries.emplace_back();
        const auto e = *slot - S;
        if (e < 0) {
          add_pages(entry, *slot, pages, x.size(-1));
        } else {
          entry.scale = scales[e];
          add_pair(entry, lora_A[e], lora_B[e], x, column_scale.empty() ? nullptr : &column_scale[e]);
        }
        dora |= entry.d != nullptr;
      }
      s.R += of(*slot).rank;
    }
    total += (s.stop - s.start) * k * s.R;
    if (s.slots != s.end) segments.push_back(s);
  }
}

void Adapters::add_pair(Entry& entry, const Tensor& lora_A, const Tensor& lora_B, const Tensor& x, const Tensor* column_scale) {
  const auto& a = keep.emplace_back(lora_A.to(x.scalar_type()).contiguous());
  const auto* rows = bytes_of(a);
  const auto& b = keep.emplace_back(lora_B.t().to(x.scalar_type()).contiguous());
  entry.rank = b.size(0);
  entry.slice = entry.rank * x.size(-1) * x.element_size();
  add_pieces(entry, type, rows, bytes_of(b), x.size(-1), b.size(1), entry.rank);
  if (!column_scale || !column_scale->numel()) return;
  entry.d = bytes_of(keep.emplace_back(column_scale->to(at::kFloat).sub(1).to(x.scalar_type()).contiguous()));
}

void Adapters::add_pages(Entry& entry, int64_t slot, TensorList pages, int64_t K) {
  const auto N = pages[1].size(2), bytes = pages[0].element_size(), page_a = k * 8 * K * bytes, page_b = 8 * N * bytes;
  const auto *A = bytes_of(pages[0]), *B = bytes_of(pages[1]);
  const auto* table = pages[2].const_data_ptr<int32_t>() + slot * pages[2].size(1);
  entry.rank = pages[3].const_data_ptr<int32_t>()[slot];
  entry.scale = pages[4].const_data_ptr<float>()[slot];
  entry.slice = 8 * K * bytes;
  for (int64_t p = 0, left = entry.rank; left > 0;) {
    int64_t n = 1;   // neighbours make one piece
    while (k == 1 && n * 8 < left && table[p + n] == table[p] + n) n++;
    add_pieces(entry, type, A + table[p] * page_a, B + table[p] * page_b, K, N, std::min(left, n * 8));
    left -= n * 8, p += n;
  }
  const auto column = pages[5].const_data_ptr<int32_t>()[slot];
  if (column >= 0) entry.d = B + column * page_b;
}

}  // namespace fastlora::cpu
