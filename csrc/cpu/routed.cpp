// lora_routed on a CPU: z = x aT adapter by adapter, the base product, then each row's sum of its adapters' b. No weight is
// gathered or padded; rows of x are, where a segment's tokens do not lie together.
#include "../routed.h"

#include <ATen/ops/mm.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>
#include <cstring>

#include "host.h"

namespace fastlora::cpu {
namespace {

constexpr int64_t kPieceRows = 16;   // most rank rows of a task, so that few adapters still occupy all threads
constexpr int64_t kTaskRows = 64;    // most tokens of a task

// One adapter: where its rank rows lie, in pieces of consecutive ones. a [k, rank, in] and b [rank, out] of x's type.
struct Entry {
  int64_t rank = 0;
  float scale = 1;
  const void* d = nullptr;   // c - 1
  c10::SmallVector<Factor, 4> a, b;   // a's slices stand `slice` bytes apart
  int64_t slice = 0;
};

struct Segment {
  int64_t start, stop, R;   // R: ranks of all its adapters
  const int64_t *slots, *end;
  int64_t z;                // where its [tokens, k, R] begins
};

struct Call {
  Call(const Tensor& x, TensorList lora_A, TensorList lora_B, const Tensor& scaling, TensorList route, const Tensor& gates,
       TensorList column_scale, IntArrayRef slices, TensorList pages);
  const Entry& of(int64_t slot) const { return entries[index[slot]]; }
  void add(int64_t slot, const Tensor& x, TensorList lora_A, TensorList lora_B, const Tensor& scales,
           TensorList column_scale, TensorList pages);

  Type type;
  int64_t k, total = 0;      // slices; floats of all z
  bool dora = false;
  const int32_t* offsets;
  const int64_t* order;
  const float* gates;
  std::vector<int64_t> bounds;   // of the slices, in columns
  std::vector<Segment> segments;
  std::vector<int32_t> index;    // by slot, of entries
  std::vector<Entry> entries;
  Tensors keep;
};

Call::Call(const Tensor& x, TensorList lora_A, TensorList lora_B, const Tensor& scaling, TensorList route,
           const Tensor& gate_values, TensorList column_scale, IntArrayRef slices, TensorList pages)
    : type(type_of(x)), k(std::max<int64_t>(1, slices.size())), bounds{0} {
  for (auto width : slices) bounds.push_back(bounds.back() + width);
  keep = {route[0].contiguous(), route[2].contiguous(), gate_values.to(at::kFloat).contiguous(),
          scaling.to(at::kFloat).expand({static_cast<int64_t>(lora_A.size())}).contiguous()};
  offsets = keep[0].const_data_ptr<int32_t>();
  order = keep[1].const_data_ptr<int64_t>();
  gates = keep[2].const_data_ptr<float>();
  const auto scales = keep[3];
  const Plan plan(route);
  index.assign(paged(pages) + lora_A.size(), -1);
  for (int64_t i = 0; i < plan.G; i++) {
    Segment s{plan.starts[i], plan.starts[i + 1], 0, plan.slots + plan.bounds[i], plan.slots + plan.bounds[i + 1], total};
    for (auto slot = s.slots; slot != s.end; slot++) {
      if (index[*slot] < 0) add(*slot, x, lora_A, lora_B, scales, column_scale, pages);
      s.R += of(*slot).rank;
    }
    total += (s.stop - s.start) * k * s.R;
    if (s.slots != s.end) segments.push_back(s);
  }
}

void Call::add(int64_t slot, const Tensor& x, TensorList lora_A, TensorList lora_B, const Tensor& scales,
               TensorList column_scale, TensorList pages) {
  index[slot] = static_cast<int32_t>(entries.size());
  auto& entry = entries.emplace_back();
  const auto K = x.size(-1), bytes = x.element_size();
  // pieces of consecutive rank rows, at most kPieceRows
  const auto piece = [&](const char* a, const char* b, int64_t N, int64_t rank) {
    for (int64_t r = 0; r < rank; r += kPieceRows) {
      const auto rows = std::min(kPieceRows, rank - r);
      entry.a.push_back({a + r * K * bytes, type, rows, K, false});
      entry.b.push_back({b + r * N * bytes, type, rows, N, false});
    }
  };
  if (const auto own = slot - paged(pages); own >= 0) {
    const auto a = lora_A[own].to(x.scalar_type()).contiguous(), b = lora_B[own].t().to(x.scalar_type()).contiguous();
    entry.rank = b.size(0), entry.scale = scales.const_data_ptr<float>()[own], entry.slice = entry.rank * K * bytes;
    piece(static_cast<const char*>(a.const_data_ptr()), static_cast<const char*>(b.const_data_ptr()), b.size(1), entry.rank);
    keep.insert(keep.end(), {a, b});
    if (column_scale.empty() || !column_scale[own].numel()) return;
    keep.push_back(column_scale[own].to(at::kFloat).sub(1).to(x.scalar_type()).contiguous());
    entry.d = keep.back().const_data_ptr();
  } else {
    const auto N = pages[1].size(2), page_a = k * 8 * K * bytes, page_b = 8 * N * bytes;
    const auto *A = static_cast<const char*>(pages[0].const_data_ptr()), *B = static_cast<const char*>(pages[1].const_data_ptr());
    const auto* table = pages[2].const_data_ptr<int32_t>() + slot * pages[2].size(1);
    entry.rank = pages[3].const_data_ptr<int32_t>()[slot], entry.scale = pages[4].const_data_ptr<float>()[slot];
    entry.slice = 8 * K * bytes;
    for (int64_t p = 0, left = entry.rank; left > 0;) {
      int64_t n = 1;   // neighbours in one piece
      while (k == 1 && n * 8 < left && table[p + n] == table[p] + n) n++;
      piece(A + table[p] * page_a, B + table[p] * page_b, N, std::min(left, n * 8));
      left -= n * 8, p += n;
    }
    const auto column = pages[5].const_data_ptr<int32_t>()[slot];
    if (column >= 0) entry.d = B + column * page_b;
  }
  dora |= entry.d != nullptr;
}

// z of every segment: x aT, or with `back` dy b, which has the same form (only without slices)
void project(const Call& c, const Rows& x, bool back, float* z) {
  struct Task {
    const Segment* segment;
    const Factor* factor;
    int64_t slice, start, stop, column;
  };
  const int64_t row = x.ld * x.tensor.element_size(), bytes = x.n * x.tensor.element_size();
  std::vector<Task> tasks;
  std::vector<const char*> at;      // each segment's rows of x, `lds` apart
  std::vector<int64_t> lds;
  int64_t gathered = 0, work = 0;
  const auto together = [&](const Segment& s) {
    for (auto i = s.start + 1; i < s.stop; i++)
      if (c.order[i] != c.order[i - 1] + 1) return false;
    return true;
  };
  for (const auto& s : c.segments) {
    const bool whole = together(s);
    at.push_back(whole ? static_cast<const char*>(x.data) + c.order[s.start] * row : nullptr);
    lds.push_back(whole ? x.ld : x.n);
    gathered += whole ? 0 : s.stop - s.start;
    work += (s.stop - s.start) * c.k * s.R * x.n;
    int64_t column = 0;
    for (int64_t slice = 0; slice < c.k; slice++)
      for (auto slot = s.slots; slot != s.end; slot++)
        for (const auto& f : back ? c.of(*slot).b : c.of(*slot).a) {
          for (auto start = s.start; start < s.stop; start += kTaskRows)
            tasks.push_back({&s, &f, slice * c.of(*slot).slice, start, std::min(s.stop, start + kTaskRows), column});
          column += f.rank;
        }
  }
  const auto copy = gathered ? make({gathered * x.n}, x.tensor, x.tensor.scalar_type()) : Tensor();
  auto* to = gathered ? static_cast<char*>(copy.mutable_data_ptr()) : nullptr;
  for (size_t i = 0; i < at.size(); i++) {
    if (at[i]) continue;
    at[i] = to;
    for (auto t = c.segments[i].start; t < c.segments[i].stop; t++, to += bytes)
      std::memcpy(to, static_cast<const char*>(x.data) + c.order[t] * row, bytes);
  }
  const auto* table = cpu().table[c.type];
  const auto run_task = [&](int64_t t) {
    const auto& [s, f, slice, start, stop, column] = tasks[t];
    const auto i = s - c.segments.data(), width = c.k * s->R;
    auto factor = *f;
    factor.data = static_cast<const char*>(f->data) + slice;
    const Shrink p{c.type, stop - start, x.n, width, at[i] + (start - s->start) * lds[i] * x.tensor.element_size(), lds[i],
                   1, &factor, {}, z + s->z + (start - s->start) * width + column};
    table->shrink(p, 0, p.M, scratch(scratch_bytes(p)));
  };
  if (threads_for(work) > 1) return parallel(tasks.size(), run_task);
  for (size_t t = 0; t < tasks.size(); t++) run_task(t);
}

// y += each row's sum of zg b, or with `back` of zg a; DoRA's term needs y before its bias
void spread(const Call& c, const float* zg, bool back, const Tensor& y, const Tensor& bias) {
  const auto N = y.size(-1);
  int64_t work = 0;
  std::vector<Spread> parts;
  std::vector<c10::SmallVector<Added, 4>> lists;
  lists.reserve(c.segments.size());
  for (const auto& s : c.segments) {
    auto& list = lists.emplace_back();
    for (auto slot = s.slots; slot != s.end; slot++) {
      const auto& f = back ? c.of(*slot).a : c.of(*slot).b;
      list.push_back({static_cast<int>(f.size()), f.data(), back ? nullptr : c.of(*slot).d});
    }
    for (int64_t i = 0; i < c.k; i++) {
      const auto n0 = c.k == 1 ? 0 : c.bounds[i], n1 = c.k == 1 ? N : c.bounds[i + 1];
      parts.push_back({c.type, s.stop - s.start, n0, n1, c.order + s.start, zg + s.z + i * s.R, c.k * s.R, c.gates,
                       c.offsets, static_cast<int>(list.size()), list.data(), y.mutable_data_ptr(), N,
                       bias.defined() ? bias.const_data_ptr() : nullptr});
    }
    work += (s.stop - s.start) * s.R * N;
  }
  const auto* table = cpu().table[c.type];
  const int64_t chunk = chunk_of(N, threads_for(work), 64);
  parallel(divide_up(N, chunk), [&](int64_t t) {
    for (const auto& p : parts) table->spread(p, std::max(p.n0, t * chunk), std::min(p.n1, (t + 1) * chunk));
  });
}

// f(entry, slot, slice, gate times scale, where its part of z begins, its rank) of each adapter of each token
template <class F>
void walk(const Call& c, F&& f) {
  for (const auto& s : c.segments)
    for (auto i = s.start; i < s.stop; i++)
      for (int64_t slice = 0, at = s.z + (i - s.start) * c.k * s.R; slice < c.k; slice++)
        for (auto slot = s.slots; slot != s.end; slot++) {
          const int64_t entry = c.offsets[c.order[i]] + (slot - s.slots), rank = c.of(*slot).rank;
          f(entry, *slot, slice, c.gates[entry] * c.of(*slot).scale, at, rank);
          at += rank;
        }
}

void base(const Rows& x, const Tensor& weight, const Tensor& bias, const Tensor& y) {
  Tensor keep;
  Gemm p{};
  p.type = type_of(y);
  p.M = x.M, p.N = y.size(-1), p.K = x.n;
  p.x = x.data, p.ldx = x.ld;
  set_weight(p, weight, keep);
  p.bias = bias.defined() ? bias.const_data_ptr() : nullptr;
  p.y = y.mutable_data_ptr(), p.ldy = p.N;
  run(p, x.tensor, weight, y);
}

bool ours(const Tensor& x, TensorList lora_A, TensorList lora_B, TensorList pages) {
  const auto plain = [&](const Tensor& t) { return t.scalar_type() == x.scalar_type() && t.is_contiguous(); };
  return takes(x, lora_A) && takes(x, lora_B) && (pages.empty() || (plain(pages[0]) && plain(pages[1])));
}

// The rows of t that a slot's tokens have, a view where they lie together.
Tensor rows_of(const Tensor& t, const std::vector<int64_t>& tokens) {
  const auto n = static_cast<int64_t>(tokens.size());
  if (n && tokens.back() - tokens.front() == n - 1 && std::is_sorted(tokens.begin(), tokens.end()))
    return t.narrow(0, tokens.front(), n);
  return t.index_select(0, at::tensor(tokens));
}

// grad [rank, columns] = sum over the slot's tokens of t rows
Tensor outer(const Tensor& t, const Tensor& x, const Tensor& like) {
  const Rows rows(x);
  const Factor f{nullptr, type_of(x), t.size(1), rows.n, false};
  return run(Outer{type_of(x), rows.M, rows.n, t.size(1), t.const_data_ptr<float>(), {1, nullptr, 0}, rows.data, rows.ld, {},
                   1, &f}, like)[0];
}

}  // namespace

RoutedForward routed_forward(FASTLORA_ROUTED_ARGS, bool want_z) {
  if (!ours(x, lora_A, lora_B, pages)) return composed::routed_forward(FASTLORA_ROUTED);
  const Call c(x, lora_A, lora_B, scaling, route, gates, column_scale, slices, pages);
  const Rows rows(x);
  const auto row = bias ? bias->contiguous() : Tensor();
  auto y = make(with_last(x.sizes(), weight.size(0)), x, x.scalar_type());
  auto out = want_z ? at::zeros({gates.size(0), c.k * most_ranks(lora_B, pages)}, x.options().dtype(at::kFloat)) : nothing(x);
  base(rows, weight, row, y);
  if (c.total == 0 && !c.dora) return {y, out};
  const auto buffer = make({c.total}, x, at::kFloat);
  auto* z = buffer.data_ptr<float>();
  project(c, rows, false, z);
  const auto width = want_z ? out.size(1) : 0;
  walk(c, [&](int64_t entry, int64_t, int64_t slice, float g, int64_t at, int64_t rank) {
    if (want_z) std::memcpy(out.data_ptr<float>() + entry * width + slice * (width / c.k), z + at, rank * sizeof(float));
    for (int64_t r = 0; r < rank; r++) z[at + r] *= g;
  });
  spread(c, z, false, y, row);
  return {y, out};
}

RoutedBackward routed_backward(FASTLORA_ROUTED_BACKWARD_ARGS) {
  if (!ours(x, lora_A, lora_B, pages) || !slices.empty()) return composed::routed_backward(FASTLORA_ROUTED_BACKWARD);
  const Call c(x, lora_A, lora_B, scaling, route, gates, column_scale, slices, pages);
  if (c.dora) return composed::routed_backward(FASTLORA_ROUTED_BACKWARD);
  const auto [need_x, need_weight, need_A, need_B, need_scaling, need_bias, need_gates] = needs;
  const Rows rows(dy);
  const auto dy2 = flat(dy), x2 = flat(x), buffer = make({2, c.total}, x, at::kFloat), saved = z.contiguous();
  auto *t = buffer.data_ptr<float>(), *zg = t + c.total;
  const auto S = paged(pages), E = static_cast<int64_t>(lora_A.size()), width = z.size(1);
  auto dg = at::zeros({gates.size(0)}, z.options()), ds = at::zeros({E}, z.options());
  std::vector<std::vector<int64_t>> tokens(E), places(E);   // of each pair: its tokens, and where their z lies
  project(c, rows, true, t);
  walk(c, [&](int64_t entry, int64_t slot, int64_t, float g, int64_t at, int64_t rank) {
    const float* of_entry = saved.const_data_ptr<float>() + entry * width;
    float sum = 0;
    for (int64_t r = 0; r < rank; r++) {
      sum += t[at + r] * of_entry[r];
      t[at + r] *= g, zg[at + r] = of_entry[r] * g;
    }
    dg.data_ptr<float>()[entry] = sum * c.of(slot).scale;
    if (slot < S) return;
    ds.data_ptr<float>()[slot - S] += sum * c.gates[entry];
    places[slot - S].push_back(at);
  });
  for (const auto& s : c.segments)
    for (auto i = s.start; i < s.stop; i++)
      for (auto slot = s.slots; slot != s.end; slot++)
        if (*slot >= S) tokens[*slot - S].push_back(c.order[i]);
  auto dx = nothing(x);
  if (need_x) {
    dx = make(x.sizes(), x, x.scalar_type());
    base(rows, weight.t(), {}, dx);
    if (c.total) spread(c, t, true, dx, {});
  }
  Tensors dA, dB;
  for (int64_t e = 0; e < E && (need_A || need_B); e++) {
    const auto m = static_cast<int64_t>(tokens[e].size()), r = lora_B[e].size(1);
    const auto of = [&](const float* from) {
      auto part = make({m, r}, x, at::kFloat);
      for (int64_t i = 0; i < m; i++) std::memcpy(part.data_ptr<float>() + i * r, from + places[e][i], r * sizeof(float));
      return part;
    };
    const bool none = m == 0 || r == 0;
    if (need_A) dA.push_back(none ? at::zeros_like(lora_A[e]) : outer(of(t), rows_of(x2, tokens[e]), lora_A[e]));
    if (need_B)
      dB.push_back(none ? at::zeros_like(lora_B[e]) : outer(of(zg), rows_of(dy2, tokens[e]), lora_B[e].t()).t().contiguous());
  }
  return {dx, need_weight ? at::mm(dy2.t(), x2) : nothing(x), dA, dB,
          need_scaling ? ds.sum_to_size(scaling.sizes()).to(scaling.scalar_type()) : nothing(x),
          need_bias ? dy2.sum(0) : nothing(x), need_gates ? dg.to(gates.scalar_type()) : nothing(x)};
}

}  // namespace fastlora::cpu
