// lora_routed. On a CPU: the base product, then each thread takes some tokens through both halves of their adapters' update.
// No weight is gathered or padded; rows of x are, where a segment's tokens do not lie together. What our kernels do not
// take, the reference computes.
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cstring>
#include <functional>

#include "../cuda.h"
#include "adapters.h"

namespace fastlora::cpu {
namespace {

constexpr int64_t kPartRows = 64;   // most tokens that go through together

// z = x aT, or with `back` dy b, which has the same form (where there are no slices)
void project(const Adapters& c, const Segment& p, const Rows& x, bool back, float* z) {
  const int64_t width = c.k * p.R, size = x.tensor.element_size(), bytes = x.n * size, M = p.stop - p.start;
  const auto* order = c.order + p.start;
  const auto* rows = static_cast<const char*>(x.data) + order[0] * x.ld * size;
  bool together = true;
  for (int64_t i = 1; i < M; i++) together &= order[i] == order[i - 1] + 1;
  thread_local std::vector<char> copy;
  if (!together) {
    copy.resize(M * bytes);
    for (int64_t i = 0; i < M; i++)
      std::memcpy(copy.data() + i * bytes, static_cast<const char*>(x.data) + order[i] * x.ld * size, bytes);
    rows = copy.data();
  }
  const auto* table = cpu().table[c.type];
  z += p.z;
  for (int64_t slice = 0; slice < c.k; slice++)
    for (auto slot = p.slots; slot != p.end; slot++) {
      const auto& entry = c.of(*slot);
      for (auto factor : back ? entry.b : entry.a) {
        factor.data = static_cast<const char*>(factor.data) + slice * entry.slice;
        const Gemm shrink{.type = c.type, .M = M, .K = x.n, .R = width, .x = rows, .ldx = together ? x.ld : x.n,
                          .adapters = 1, .a = &factor, .z_out = z};
        table->shrink(shrink, false, 0, M, scratch(shrink));
        z += factor.rank;
      }
    }
}

// y += each row's sum of zg b, or with `back` of zg a
void spread(const Adapters& c, const Segment& p, const float* zg, bool back, const Tensor& y, const Tensor& bias) {
  c10::SmallVector<Added, 8> list;
  for (auto slot = p.slots; slot != p.end; slot++) {
    const auto& entry = c.of(*slot);
    const auto& factors = back ? entry.a : entry.b;
    list.push_back({static_cast<int>(factors.size()), factors.data(), back ? nullptr : entry.d});
  }
  const auto N = y.size(-1);
  for (int64_t i = 0; i < c.k; i++)
    cpu().table[c.type]->spread({p.stop - p.start, c.order + p.start, zg + p.z + i * p.R, c.k * p.R, c.gates, c.offsets,
                                 static_cast<int>(list.size()), list.data(), y.mutable_data_ptr(), N,
                                 bias.defined() ? bias.const_data_ptr() : nullptr},
                                c.k == 1 ? 0 : c.bounds[i], c.k == 1 ? N : c.bounds[i + 1]);
}

// f(token, entry, slot, slice, gate times scale, where its z begins, its rank) of each adapter of each of the tokens
template <class F>
void walk(const Adapters& c, const Segment& p, F&& f) {
  auto at = p.z;
  for (auto i = p.start; i < p.stop; i++)
    for (int64_t slice = 0; slice < c.k; slice++)
      for (auto slot = p.slots; slot != p.end; slot++) {
        const auto& adapter = c.of(*slot);
        const int64_t token = c.order[i], entry = c.offsets[token] + (slot - p.slots);
        f(token, entry, *slot, slice, c.gates[entry] * adapter.scale, at, adapter.rank);
        at += adapter.rank;
      }
}

// f(some of a segment), the work of equal weight for each thread
template <class F>
void for_parts(const Adapters& c, int64_t columns, F&& f) {
  int64_t work = 0;
  for (const auto& s : c.segments) work += (s.stop - s.start) * (s.R + 1);
  const int64_t threads = threads_for(work * columns);
  parallel(threads, [&](int64_t thread) {
    const auto from = work * thread / threads, to = work * (thread + 1) / threads;
    int64_t begin = 0;
    for (const auto& s : c.segments) {
      const auto tokens = s.stop - s.start, first = begin;
      const auto place = [&](int64_t at) { return std::clamp<int64_t>(at::divup(at - first, s.R + 1), 0, tokens); };
      for (auto i = place(from); i < place(to); i += kPartRows)
        f(Segment{s.start + i, s.start + std::min(i + kPartRows, place(to)), s.R, s.slots, s.end, s.z + i * c.k * s.R});
      begin += tokens * (s.R + 1);
    }
  });
}

Tensor base(const Tensor& x, const Tensor& weight, const MaybeTensor& bias) {
  Gated none{Gate{}};
  Product p{x, weight.size(0), x, weight, none, {}, true, {}, {}, false, {}, bias};
  return products.product(p);
}

// of one of our kernels' types, pages included
bool takes_routed(const Tensor& x, const Tensor& weight, TensorList lora_A, TensorList lora_B, TensorList pages) {
  const auto plain = [&](const Tensor& t) { return t.scalar_type() == x.scalar_type() && t.is_contiguous(); };
  return takes(x, lora_A) && takes(weight, lora_B) && (pages.empty() || (plain(pages[0]) && plain(pages[1])));
}

// the sum over these tokens of each one's row of `z` times its row of x
Tensor gradient(const std::vector<int64_t>& tokens, std::vector<float>& z, const Tensor& x, const Tensor& adapter,
                bool last_is_rank) {
  if (z.empty()) return at::zeros(adapter.sizes(), adapter.options());
  const auto m = static_cast<int64_t>(tokens.size());
  const bool rising = std::adjacent_find(tokens.begin(), tokens.end(), std::greater_equal()) == tokens.end();
  const bool together = rising && tokens.back() - tokens.front() == m - 1;
  const auto mine = together ? x.narrow(0, tokens.front(), m) : x.index_select(0, at::tensor(tokens));
  const auto rows = at::from_blob(z.data(), {m, adapter.size(last_is_rank)}, at::kFloat);
  return products.outer({Gate{}, rows}, mine, adapter, last_is_rank, {})[0];
}

}  // namespace
}  // namespace fastlora::cpu

namespace fastlora {

using namespace cpu;

static RoutedForward run_routed(FASTLORA_ROUTED_ARGS, bool want_z) {
  if (cuda::takes_routed(x, lora_A, pages)) return cuda::routed(x, weight, bias, route, gates, slices, pages, want_z);
  if (!takes_routed(x, weight, lora_A, lora_B, pages))
    return call<"fastlora::lora_routed_forward", decltype(lora_routed_forward), "reference">(FASTLORA_ROUTED);
  const Rows rows(x);
  const Adapters c(x, lora_A, lora_B, scaling, route, gates, column_scale, slices, pages);
  const auto row = bias ? bias->contiguous() : Tensor();
  auto y = base(x, weight, bias);
  int64_t most = pages.empty() ? 0 : 8 * pages[2].size(1);
  for (const auto& b : lora_B) most = std::max(most, b.size(1));
  auto out = want_z ? at::zeros({gates.size(0), c.k * most}, x.options().dtype(at::kFloat)) : nothing(x);
  const auto buffer = make({c.total}, x, at::kFloat);
  auto *z = buffer.data_ptr<float>(), *kept = want_z ? out.data_ptr<float>() : nullptr;
  for_parts(c, rows.n + weight.size(0), [&](const Segment& p) {
    project(c, p, rows, false, z);
    walk(c, p, [&](int64_t, int64_t entry, int64_t, int64_t slice, float g, int64_t at, int64_t rank) {
      if (kept) std::memcpy(kept + (entry * c.k + slice) * most, z + at, rank * sizeof(float));
      for (int64_t r = 0; r < rank; r++) z[at + r] *= g;
    });
    spread(c, p, z, false, y, row);
  });
  return {y, out};
}
Tensor lora_routed(FASTLORA_ROUTED_ARGS) { return std::get<0>(run_routed(FASTLORA_ROUTED, false)); }
RoutedForward lora_routed_forward(FASTLORA_ROUTED_ARGS) { return run_routed(FASTLORA_ROUTED, true); }

RoutedBackward lora_routed_backward(FASTLORA_ROUTED_BACKWARD_ARGS) {
  const auto reference = [&] {
    return call<"fastlora::lora_routed_backward", decltype(lora_routed_backward), "reference">(
        dy, x, weight, lora_A, lora_B, scaling, route, gates, column_scale, slices, pages, z, needs);
  };
  if (!takes_routed(x, weight, lora_A, lora_B, pages) || !slices.empty()) return reference();
  const Adapters c(x, lora_A, lora_B, scaling, route, gates, column_scale, slices, pages);
  if (c.dora) return reference();
  const auto [need_x, need_weight, need_A, need_B, need_scaling, need_bias, need_gates] = needs;
  const Rows rows(dy);
  const auto dy2 = flat(dy), x2 = flat(x), buffer = make({2, c.total}, x, at::kFloat), saved = z.contiguous();
  auto *t = buffer.data_ptr<float>(), *zg = t + c.total;
  const auto S = paged(pages), E = static_cast<int64_t>(lora_A.size()), width = z.size(1);
  auto dg = at::zeros({gates.size(0)}, z.options()), ds = at::zeros({E}, z.options());
  auto* sums = dg.data_ptr<float>();
  const auto dx = need_x ? base(dy, weight.t(), {}) : nothing(x);
  for_parts(c, rows.n + x.size(-1), [&](const Segment& p) {
    project(c, p, rows, true, t);
    walk(c, p, [&](int64_t, int64_t entry, int64_t, int64_t, float g, int64_t at, int64_t rank) {
      const float* z_row = saved.const_data_ptr<float>() + entry * width;
      for (int64_t r = 0; r < rank; r++) {
        sums[entry] += t[at + r] * z_row[r];
        t[at + r] *= g, zg[at + r] = z_row[r] * g;
      }
    });
    if (need_x) spread(c, p, t, true, dx, {});
  });
  std::vector<std::vector<int64_t>> tokens(E);   // that use a pair, and their rows of t and of z g
  std::vector<std::vector<float>> ts(E), zgs(E);
  for (const auto& s : c.segments)
    walk(c, s, [&](int64_t token, int64_t entry, int64_t slot, int64_t, float, int64_t at, int64_t rank) {
      if (const auto e = slot - S; e >= 0) {
        tokens[e].push_back(token);
        if (need_A) ts[e].insert(ts[e].end(), t + at, t + at + rank);
        if (need_B) zgs[e].insert(zgs[e].end(), zg + at, zg + at + rank);
        ds.data_ptr<float>()[e] += sums[entry] * c.gates[entry];
      }
      sums[entry] *= c.of(slot).scale;
    });
  Tensors dA, dB;
  for (int64_t e = 0; e < E; e++) {
    if (need_A) dA.push_back(gradient(tokens[e], ts[e], x2, lora_A[e], false));
    if (need_B) dB.push_back(gradient(tokens[e], zgs[e], dy2, lora_B[e], true));
  }
  return {dx, need_weight ? at::mm(dy2.t(), x2) : nothing(x), dA, dB,
          need_scaling ? ds.sum_to_size(scaling.sizes()).to(scaling.scalar_type()) : nothing(x),
          need_bias ? dy2.sum(0) : nothing(x), need_gates ? dg.to(gates.scalar_type()) : nothing(x)};
}

}  // namespace fastlora
