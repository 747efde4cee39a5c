// The products on CPU tensors, through our kernels.
#include "host.h"

#include <ATen/ops/addmm.h>

#include <cmath>
#include <memory>

namespace fastlora::cpu {

char* scratch(const Gemm& p) {
  // The most that any kernel takes in any form, in floats: pages that none touches cost nothing.
  const auto panels = [](int64_t K) { return (K / (2 * kSteps) + 1) * kTileBlock * (kSteps + 2); };   // of x, for tiles
  const int64_t rows = (p.K + 64) * (p.R + kTileBlock + 4);      // copies of the adapters' rows and of some of x's
  const int64_t update = (p.R + 32) * (kGroup + 2 * kRows);      // z, z g and f
  const int64_t block = (kSteps + 2 + kRows) * kGroup + 65536;   // of w, and its sums; tiles and lanes
  const int64_t bytes = (rows + update + block + panels(p.K) + panels(p.R + 32)) * 4 + p.adapters * 128;
  thread_local std::unique_ptr<char[]> buffer;
  thread_local int64_t size = 0;
  if (size < bytes) {
    buffer.reset(new char[bytes + 64]);
    size = bytes;
  }
  return buffer.get() + (64 - reinterpret_cast<uintptr_t>(buffer.get()) % 64) % 64;
}

int threads_for(int64_t multiply_adds) {
  constexpr int64_t one_thread = 200000;   // below it waking the others costs more
  return multiply_adds < one_thread || at::in_parallel_region() ? 1 : at::get_num_threads();
}

Type type_of(const Tensor& t) {
  return t.scalar_type() == at::kFloat ? kFloat : t.scalar_type() == at::kBFloat16 ? kBFloat16 : kHalf;
}

bool takes(const Tensor& x, TensorList adapters) {
  const auto dtype = x.scalar_type();
  if (!x.is_cpu() || cpu().composed || x.numel() == 0) return false;
  if (dtype != at::kFloat && dtype != at::kBFloat16 && dtype != at::kHalf) return false;
  return std::all_of(adapters.begin(), adapters.end(), [&](const Tensor& t) {
    return t.scalar_type() == dtype || t.scalar_type() == at::kFloat;
  });
}

Tensor make(IntArrayRef sizes, const Tensor& like, at::ScalarType dtype) {
  return at::detail::empty_cpu(sizes, like.options().dtype(dtype));
}

Rows::Rows(const Tensor& t) : tensor(t), n(t.size(-1)) {
  M = n ? t.numel() / n : rows_of(t);
  if (!t.is_contiguous() && !(t.dim() == 2 && (t.stride(1) == 1 || n == 1))) tensor = t.contiguous();
  ld = tensor.dim() == 2 ? tensor.stride(0) : n;
  data = tensor.const_data_ptr();
}

namespace {

// The adapters' matrices, each contiguous along its last dimension.
struct Factors {
  Factors(TensorList adapters, bool last_is_rank) {
    for (const auto& t : adapters) {
      const auto& c = tensors.emplace_back(t.stride(1) == 1 ? t : t.contiguous());
      list.push_back({c.const_data_ptr(), type_of(c), c.size(last_is_rank), c.stride(0), last_is_rank});
      R += list.back().rank;
    }
  }
  int count() const { return static_cast<int>(list.size()); }
  int64_t R = 0;
  c10::SmallVector<Tensor, 2> tensors;
  c10::SmallVector<Factor, 2> list;
};

Gates gates_of(const Gate& gate) {
  if (!gate.rows.defined()) return {static_cast<float>(gate.scalar), nullptr, 0};
  return {1, gate.rows.const_data_ptr<float>(), gate.rows.dim() == 2 ? gate.rows.size(1) : 0};
}

Mask mask_of(const Dropout& d, int64_t width) {
  if (d.p == 0) return {};
  const auto threshold = static_cast<uint32_t>(std::nearbyint(d.p * 65536));
  const float scale = threshold == 65536 ? 0 : 65536.0 / (65536 - threshold);
  return {static_cast<uint64_t>(d.seed->item<int64_t>()), threshold, scale, width};
}

int64_t chunk_of(int64_t n, int64_t parts, int64_t unit) {
  return std::max<int64_t>(1, at::divup(at::divup(n, parts), unit)) * unit;
}

// f(from, to) on each thread's share of 0 .. n, in multiples of `unit`
template <class F>
void share(int64_t n, int64_t unit, int64_t multiply_adds, const F& f) {
  const int64_t chunk = chunk_of(n, threads_for(multiply_adds), unit);
  parallel(at::divup(n, chunk), [&](int64_t t) { f(t * chunk, std::min(n, (t + 1) * chunk)); });
}

// Columns first, so that w is read once; rows as well where the columns do not suffice.
void run_grid(const Gemm& p, Form form, int threads) {
  const auto* table = cpu().table[p.type];
  const int64_t unit = table->tile_columns;
  const int64_t by_n = std::min<int64_t>(threads, at::divup(p.N, unit));
  const int64_t by_m = std::max<int64_t>(1, std::min<int64_t>(threads / by_n, p.M / kTileRows));
  const int64_t dn = chunk_of(p.N, by_n, unit), dm = chunk_of(p.M, by_m, kTileRows);
  const int64_t columns = at::divup(p.N, dn), rows = at::divup(p.M, dm);
  parallel(columns * rows, [&](int64_t t) {
    const int64_t m = t / columns * dm, n = t % columns * dn;
    table->gemm(p, form, m, std::min(m + dm, p.M), n, std::min(n + dn, p.N), scratch(p));
  });
}

// without a base: y = add + D((z g) f)
void run_update(const Gemm& p) { run_grid(p, kPacked, threads_for(p.M * p.N * (p.R + 16))); }

void run_shrink(const Gemm& p) {
  const bool tiles = p.type == kBFloat16 && cpu().amx && p.M >= 8;
  share(p.M, 4, p.M * p.K * (p.R + 8 * (p.mask.threshold != 0)), [&](int64_t from, int64_t to) {
    cpu().table[p.type]->shrink(p, tiles, from, to, scratch(p));
  });
}

// Runs p; `out` is y's tensor, and x and w those behind p.x and p.w, for the vendor's GEMM. Where p.a is set, z is
// computed on the way, or ahead of it where that is cheaper.
void run(Gemm p, const Tensor& x, const Tensor& w, const Tensor& out) {
  const int threads = threads_for(p.M * p.N * (p.K + p.R));
  const Form form = choose(p, cpu());
  Tensor ahead;
  const int64_t worth = form == kTiles && p.M >= 64 ? 32 : 4;   // else each thread computes all of z for itself
  if (p.a && (form > kTiles || p.R * threads * worth > p.N)) {
    if (!p.z_out) p.z_out = (ahead = make({p.M, p.R}, x, at::kFloat)).data_ptr<float>();
    run_shrink(p);   // which drops nothing: a mask of y comes with a given z only
    p.z = p.z_out;
    p.a = nullptr;
  }
  if (form != kVendor) return run_grid(p, form, threads);
  const bool started = p.R > 0 || p.bias;
  p.K = 0;
  if (started) run_update(p);
  auto y = out.view({p.M, p.N});
  at::addmm_out(y, y, flat(x), w.t(), started ? 1 : 0);
}

void project(Gated& g, const Tensor& x, TensorList f, bool last_is_rank, const Dropout& d) {
  const Rows rows(x);
  const Factors factors(f, last_is_rank);
  g.z = make(with_last(x.sizes(), factors.R), x, at::kFloat);
  run_shrink({.type = type_of(x), .M = rows.M, .K = rows.n, .R = factors.R, .x = rows.data, .ldx = rows.ld,
              .adapters = factors.count(), .a = factors.list.data(), .z_out = g.z.data_ptr<float>(),
              .mask = mask_of(d, rows.n)});
}

Tensors outer(const Gated& t, const Tensor& x, TensorList f, bool last_is_rank, const Dropout& d) {
  const Rows rows(x);
  const Factors factors(f, last_is_rank);
  // one buffer for each gradient: outputs of an op share no memory
  Tensors sums;
  c10::SmallVector<float*, 2> data;
  for (const auto& a : f) data.push_back(sums.emplace_back(make(a.sizes(), a, at::kFloat)).data_ptr<float>());
  const Gemm p{.M = rows.M, .K = rows.n, .R = factors.R, .x = rows.data, .ldx = rows.ld, .adapters = factors.count(),
               .a = factors.list.data(), .z = t.z.const_data_ptr<float>(), .g = gates_of(t.gate),
               .mask = mask_of(d, rows.n), .da = data.data()};
  const auto* table = cpu().table[type_of(x)];
  share(p.K, table->tile_columns, p.M * p.K * p.R,
        [&](int64_t from, int64_t to) { table->outer(p, from, to, scratch(p)); });
  for (size_t e = 0; e < sums.size(); e++) sums[e] = sums[e].to(f[e].scalar_type());
  return sums;
}

Tensor product(Product& q) {
  const Factors a(q.a, false), f(q.f, q.last_is_rank);
  const auto width = q.start ? q.like.size(-1) : q.N;
  auto y = make(with_last(q.like.sizes(), width), q.like, q.like.scalar_type());
  const Rows rows(q.x.defined() ? q.x : q.start ? q.like : y);
  Gemm p{.type = type_of(y), .M = rows.M, .N = q.N, .R = f.R, .adapters = f.count(), .f = f.list.data(),
         .g = gates_of(q.z.gate), .mask = mask_of(q.dropout, q.N), .y = y.mutable_data_ptr(), .ldy = width};
  if (q.z.z.defined()) {
    p.z = q.z.z.const_data_ptr<float>();
  } else {
    if (q.want_z) p.z_out = (q.z.z = make(with_last(q.like.sizes(), f.R), q.like, at::kFloat)).data_ptr<float>();
    p.a = f.R ? a.list.data() : nullptr;
  }
  if (q.start) {
    const int64_t bytes = *q.start * y.element_size();
    p.add = static_cast<const char*>(rows.data) + bytes, p.ldadd = rows.ld;
    p.y = static_cast<char*>(p.y) + bytes;
    if (p.N < width) y.copy_(q.like);
  }
  if (!q.x.defined()) {
    if (p.N) run_update(p);
    return y;
  }
  p.K = rows.n, p.x = rows.data, p.ldx = rows.ld;
  const auto w = q.w.stride(1) == 1 || q.w.stride(0) == 1 ? q.w : q.w.contiguous();
  p.w = w.const_data_ptr();
  p.w_along_k = w.stride(1) == 1;
  p.ldw = w.stride(!p.w_along_k);
  Tensor c, bias;
  if (q.column_scale) {
    c = q.column_scale->to(at::kFloat).contiguous();
    q.u = make(y.sizes(), y, y.scalar_type());
    p.c = c.data_ptr<float>(), p.u = q.u.mutable_data_ptr();
  }
  if (q.bias) bias = q.bias->contiguous(), p.bias = bias.const_data_ptr();
  run(p, rows.tensor, w, y);
  return y;
}

}  // namespace

const Products products = {project, outer, product};

Tensor dropout(const Tensor& x, double p, const Tensor& seed) {
  const auto mask = mask_of({p, seed}, x.size(-1));
  if (x.scalar_type() == at::kDouble) {
    const auto kept = dropout(make(x.sizes(), x, at::kFloat).fill_(1), p, seed);
    return x.masked_fill(kept == 0, 0).mul_(mask.threshold ? 65536.0 / (65536 - std::min(mask.threshold, 65535u)) : 1.0);
  }
  auto y = make(x.sizes(), x, x.scalar_type());
  if (x.numel() == 0) return y;
  const Rows rows(x);
  const auto kernel = cpu().table[type_of(y)]->dropout;
  const int64_t size = x.element_size();
  share(rows.M, 1, rows.M * rows.n * 8, [&](int64_t from, int64_t to) {
    for (int64_t m = from; m < to; m++)
      kernel(static_cast<const char*>(rows.data) + m * rows.ld * size,
             static_cast<char*>(y.mutable_data_ptr()) + m * rows.n * size, rows.n, m * rows.n, mask);
  });
  return y;
}

}  // namespace fastlora::cpu
