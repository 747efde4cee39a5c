#include "host.h"

#include <ATen/EmptyTensor.h>
#include <ATen/ops/addmm.h>

#include <memory>
#include <numeric>

namespace fastlora::cpu {
namespace {

// Columns first, so that w is read once; rows as well where the columns do not suffice.
void run_grid(const Gemm& p, Form form, int threads) {
  const auto* table = cpu().table[p.type];
  const int64_t unit = table->tile_columns;
  const int64_t by_n = std::min<int64_t>(threads, divide_up(p.N, unit));
  const int64_t by_m = std::max<int64_t>(1, std::min<int64_t>(threads / by_n, p.M / kTileRows));
  const int64_t dn = chunk_of(p.N, by_n, unit), dm = chunk_of(p.M, by_m, kTileRows);
  const int64_t columns = divide_up(p.N, dn), rows = divide_up(p.M, dm);
  const int64_t bytes = scratch_bytes(p);
  parallel(columns * rows, [&](int64_t t) {
    const int64_t m = t / columns * dm, n = t % columns * dn;
    table->gemm(p, form, m, std::min(m + dm, p.M), n, std::min(n + dn, p.N), scratch(bytes));
  });
}

}  // namespace

char* scratch(int64_t bytes) {
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

Factors::Factors(TensorList adapters, bool last_is_rank) {
  for (const auto& t : adapters) {
    tensors.push_back(t.stride(1) == 1 ? t : t.contiguous());
    const auto& c = tensors.back();
    list.push_back({c.const_data_ptr(), type_of(c), c.size(last_is_rank), c.stride(0), last_is_rank});
  }
}

void set_weight(Gemm& p, const Tensor& w, Tensor& keep) {
  keep = w.stride(1) == 1 || w.stride(0) == 1 ? w : w.contiguous();
  p.w = keep.const_data_ptr();
  p.w_along_k = keep.stride(1) == 1;
  p.ldw = keep.stride(p.w_along_k ? 0 : 1);
}

void set_factors(Gemm& p, const Factors& f) {
  p.adapters = f.count();
  p.f = f.list.data();
}

Gates gates_of(const Gate& gate) {
  if (!gate.rows.defined()) return {static_cast<float>(gate.scalar), nullptr, 0};
  return {1, gate.rows.const_data_ptr<float>(), gate.rows.dim() == 2 ? gate.rows.size(1) : 0};
}

Mask mask_of(double p, const MaybeTensor& seed, int64_t width) {
  if (p == 0) return {};
  const auto threshold = static_cast<uint32_t>(std::nearbyint(p * 65536));
  const float scale = threshold == 65536 ? 0 : 65536.0 / (65536 - threshold);
  return {static_cast<uint64_t>(seed->item<int64_t>()), threshold, scale, width};
}

void run_update(const Gemm& p) { run_grid(p, kPacked, threads_for(p.M * p.N * (p.R + 16))); }

void run(Gemm p, const Tensor& x, const Tensor& w, Tensor out) {
  const int threads = threads_for(p.M * p.N * (p.K + p.R));
  Form form = choose({p.type, p.M, p.N, p.K, p.R, p.w_along_k, p.mask.threshold != 0}, cpu());
  if (form == kVendor && (p.c || p.u)) form = kPacked;
  Tensor ahead;
  const int64_t worth = form == kTiles && p.M >= 64 ? 32 : 4;   // else each thread computes all of z for itself
  if (p.a && (form > kTiles || p.R * threads * worth > p.N)) {
    if (!p.z_out) {
      ahead = make({p.M, p.R}, x, at::kFloat);
      p.z_out = ahead.data_ptr<float>();
    }
    run(Shrink{p.type, p.M, p.K, p.R, p.x, p.ldx, p.adapters, p.a, {}, p.z_out});
    p.z = p.z_out;
    p.a = nullptr;
  }
  if (form != kVendor) return run_grid(p, form, threads);
  const bool started = p.R > 0 || p.bias || p.add;
  if (started) {
    auto update = p;
    update.K = 0;
    run_update(update);
  }
  auto y = out.view({p.M, p.N});
  at::addmm_out(y, y, flat(x), w.t(), started ? 1 : 0);
}

void run(Shrink p) {
  const auto* table = cpu().table[p.type];
  p.tiles = p.type == kBFloat16 && cpu().amx && p.M >= 8;
  const int64_t chunk = chunk_of(p.M, threads_for(p.M * p.K * (p.R + 8 * (p.mask.threshold != 0))), 4);
  const int64_t bytes = scratch_bytes(p);
  parallel(divide_up(p.M, chunk), [&](int64_t t) {
    table->shrink(p, t * chunk, std::min(p.M, (t + 1) * chunk), scratch(bytes));
  });
}

void run_dropout(const Rows& x, const Tensor& y, const Mask& mask) {
  const auto kernel = cpu().table[type_of(y)]->dropout;
  const int64_t row = x.n * y.element_size();
  const int64_t chunk = divide_up(x.M, threads_for(x.M * x.n * 8));
  parallel(divide_up(x.M, chunk), [&](int64_t t) {
    for (int64_t m = t * chunk; m < std::min(x.M, (t + 1) * chunk); m++)
      kernel(type_of(y), static_cast<const char*>(x.data) + m * x.ld * y.element_size(),
             static_cast<char*>(y.mutable_data_ptr()) + m * row, x.n, m * x.n, mask);
  });
}

Tensors run(Outer p, TensorList adapters) {
  const auto* table = cpu().table[p.type];
  const int64_t chunk = chunk_of(p.K, threads_for(p.M * p.K * p.R), table->tile_columns), bytes = scratch_bytes(p);
  // one buffer for each gradient: outputs of an op share no memory
  Tensors sums;
  c10::SmallVector<float*, 2> data;
  for (const auto& t : adapters) data.push_back(sums.emplace_back(make(t.sizes(), t, at::kFloat)).data_ptr<float>());
  p.da = data.data();
  parallel(divide_up(p.K, chunk), [&](int64_t t) {
    table->outer(p, t * chunk, std::min(p.K, (t + 1) * chunk), scratch(bytes));
  });
  for (size_t e = 0; e < sums.size(); e++) sums[e] = sums[e].to(adapters[e].scalar_type());
  return sums;
}

}  // namespace fastlora::cpu
