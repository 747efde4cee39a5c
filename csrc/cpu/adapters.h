// A routed call's adapters, as the kernels read them.
#pragma once
#include "host.h"

namespace fastlora::cpu {

// One adapter: its rank rows in pieces that each lie together, of x's type: a [k, rank, in], its slices `slice` bytes apart;
// b [rank, out].
struct Entry {
  int64_t rank;
  float scale;
  c10::SmallVector<Factor, 4> a, b;
  int64_t slice;
  const void* d = nullptr;   // c - 1
};

// Tokens that share a list, or some of them, by their places in `order`; their z [tokens, k, R] begins at `z`, R being the
// sum of the list's ranks.
struct Segment {
  int64_t start, stop, R;
  const int64_t *slots, *end;
  int64_t z;
};

class Adapters {
  Tensors keep;
  std::vector<int32_t> index;   // by slot, of entries
  std::vector<Entry> entries;
  Tensor x;

 public:
  const Type type;
  const int64_t k;           // slices
  int64_t total = 0;         // floats of all z
  bool dora = false;
  const int32_t* offsets;
  const int64_t* order;
  const float* gates;
  c10::SmallVector<int64_t, 4> bounds{0};   // of the slices, in columns
  std::vector<Segment> segments;            // those with adapters

  Adapters(const Tensor& x, TensorList lora_A, TensorList lora_B, const Tensor& scaling, TensorList route,
           const Tensor& gate_values, TensorList column_scale, IntArrayRef slices, TensorList pages)
      : x(x), type(type_of(x)), k(std::max<int64_t>(1, slices.size())) {
    for (auto width : slices) bounds.push_back(bounds.back() + width);
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
            add_pages(entry, *slot, pages);
          } else {
            entry.scale = scales[e];
            add_pair(entry, lora_A[e], lora_B[e], column_scale.empty() ? Tensor() : column_scale[e]);
          }
          dora |= entry.d != nullptr;
        }
        s.R += of(*slot).rank;
      }
      total += (s.stop - s.start) * k * s.R;
      if (s.slots != s.end) segments.push_back(s);
    }
  }

  const Entry& of(int64_t slot) const { return entries[index[slot]]; }

 private:
  const void* held(const Tensor& t) { return keep.emplace_back(t.contiguous()).const_data_ptr(); }

  void add_piece(Entry& entry, const void* a, const void* b, int64_t N, int64_t rank) {
    entry.a.push_back({a, type, rank, x.size(-1), false});
    entry.b.push_back({b, type, rank, N, false});
  }

  void add_pair(Entry& entry, const Tensor& lora_A, const Tensor& lora_B, const Tensor& column_scale) {
    const auto dtype = x.scalar_type();
    entry.rank = lora_B.size(1);
    entry.slice = entry.rank * x.size(-1) * x.element_size();
    add_piece(entry, held(lora_A.to(dtype)), held(lora_B.t().to(dtype)), lora_B.size(0), entry.rank);
    if (column_scale.defined() && column_scale.numel()) entry.d = held(column_scale.to(at::kFloat).sub(1).to(dtype));
  }

  void add_pages(Entry& entry, int64_t slot, TensorList pages) {
    const auto N = pages[1].size(2), bytes = x.element_size(), page_b = 8 * N * bytes;
    const auto* A = static_cast<const char*>(pages[0].const_data_ptr());
    const auto* B = static_cast<const char*>(pages[1].const_data_ptr());
    const auto* table = pages[2].const_data_ptr<int32_t>() + slot * pages[2].size(1);
    entry.rank = pages[3].const_data_ptr<int32_t>()[slot];
    entry.scale = pages[4].const_data_ptr<float>()[slot];
    entry.slice = 8 * x.size(-1) * bytes;
    for (int64_t p = 0, left = entry.rank; left > 0;) {
      int64_t n = 1;   // neighbours make one piece
      while (k == 1 && n * 8 < left && table[p + n] == table[p] + n) n++;
      add_piece(entry, A + table[p] * k * entry.slice, B + table[p] * page_b, N, std::min(left, n * 8));
      left -= n * 8, p += n;
    }
    const auto column = pages[5].const_data_ptr<int32_t>()[slot];
    if (column >= 0) entry.d = B + column * page_b;
  }
};

}  // namespace fastlora::cpu
