// z = D(x) aᵀ for all adapters and projections that share x and its mask, and z ⊙ g in x's type for the GEMM. A block
// streams 64 rows of x past 64 ranks. Where that makes too few blocks K is split.
#include "check.h"
#include "reduce.cuh"

constexpr int BM = 64, RANKS = FASTLORA_TILE / BM, TILES = RANKS / 8, THREADS = 128;
constexpr int BK = 64, CHUNKS = BK / 8, STAGES = 4, TILE = 64 * BK * 2;
using Accumulator = Vector<float, 4>[TILES];

// Fragment i of x has rows i % 2 · 8 + lane / 4 and columns i / 2 · 8 …: each lane of a quad decides about one, for all.
DEVICE void drop(uint32_t (&x)[4], uint64_t seed, uint64_t first, int dropped, int lane) {
  const uint32_t mine = keep_eight(seed, first, dropped);
  UNROLL for (int i = 0; i < 4; i++) {
    const uint32_t kept = __shfl_sync(~0u, mine, (lane & ~3) + i) >> lane % 4 * 2;
    x[i] &= (kept & 1 ? 0xffff : 0) | (kept & 2 ? 0xffff0000 : 0);
  }
}

template <class T> DEVICE void store(const ShrinkParams& p, const Accumulator& acc, int row, int rank, int ranks) {
  const float keep = p.seed ? keep_scale(p.dropped) : 1.f;
  UNROLL for (int i = 0; i < TILES * 4; i++) {
    const int m = row + i % 4 / 2 * 8, r = rank + i / 4 * 8 + i % 2;
    if (m >= p.m || r >= ranks) continue;
    const float z = acc[i / 4].v[i % 4] * keep, g = p.g.data ? *at<float>(p.g, m, r) : 1.f;
    if (p.z.data) *at<float>(p.z, m, r) = z;
    if (p.zg.data) *at<T>(p.zg, m, r) = T(z * p.scale * g);
  }
}

template <class T>
static __global__ void __launch_bounds__(THREADS, 3) shrink_kernel(const __grid_constant__ ShrinkParams p) {
  SHARED_DYNAMIC(memory);
  const T** a_rows = reinterpret_cast<const T**>(memory + STAGES * 2 * TILE);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, m0 = blockIdx.x * BM, rank0 = blockIdx.y * RANKS;
  const Part& final = p.parts[p.count - 1];
  const int ranks = int(final.rank + final.ranks), tiles = min(TILES, int(cdiv(ranks - rank0, 16)) * 2);
  const int all = int(cdiv(p.k, BK)), each = int(cdiv(all, gridDim.z));
  const int begin = min(int(blockIdx.z) * each, all), end = min(begin + each, all);
  for (int i = 0, rank = rank0 + threadIdx.x; threadIdx.x < RANKS && i < p.count; i++)
    if (rank >= p.parts[i].rank) a_rows[threadIdx.x] = at<const T>(p.parts[i].m, rank - p.parts[i].rank, 0);
  __syncthreads();
  auto fill = [&](int block) {
    unsigned char* stage = memory + (block - begin) % STAGES * 2 * TILE;
    const int k0 = block * BK, k = int(p.k);
    if (block < end) copy_tile<T, BM, CHUNKS, THREADS>(stage, at<T>(p.x, 0, 0), p.x.stride, m0, int(p.m), k0, k);
    for (int i = threadIdx.x; block < end && i < tiles * 8 * CHUNKS; i += THREADS) {
      const int row = i / CHUNKS, column = k0 + i % CHUNKS * 8, count = rank0 + row < ranks ? k - column : 0;
      copy_chunk(stage + TILE + swizzle<CHUNKS>(row, i % CHUNKS), a_rows[row], column, count);
    }
    copy_async_commit();
  };
  ROLLED for (int i = 0; i < STAGES - 1; i++) fill(begin + i);
  const int row = m0 + warp * 16 + lane / 4;
  const uint64_t seed = p.seed ? *p.seed : 0;
  Accumulator acc = {};
  ROLLED for (int block = begin; block < end; block++) {
    copy_async_wait<STAGES - 2>();
    __syncthreads();  // all copies of this block have landed, and nobody reads the block before it any more
    fill(block + STAGES - 1);
    const unsigned char* stage = memory + (block - begin) % STAGES * 2 * TILE;
    UNROLL for (int step = 0; step < BK / 16; step++) {
      uint32_t x[4], a[4];
      ldmatrix(x, stage + swizzle<CHUNKS>(warp * 16 + lane % 16, step * 2 + lane / 16));
      const uint64_t first = uint64_t(row + lane % 2 * 8) * p.k + block * BK + step * 16 + lane % 4 / 2 * 8;
      if (p.seed) drop(x, seed, first, p.dropped, lane);
      UNROLL for (int j = 0; j < TILES; j += 2) {
        if (j >= tiles) break;
        ldmatrix(a, stage + TILE + swizzle<CHUNKS>(j * 8 + lane / 16 * 8 + lane % 8, step * 2 + lane / 8 % 2));
        mma(acc[j].v, x, a[0], a[1], T{});
        mma(acc[j + 1].v, x, a[2], a[3], T{});
      }
    }
  }
  const int tile = blockIdx.y * gridDim.x + blockIdx.x, splits = gridDim.z;
  if (splits == 1 || reduce<THREADS>(p.partial, p.arrived, tile, blockIdx.z, splits, acc, tiles)) store<T>(p, acc, row, rank0 + lane % 4 * 2, ranks);
}

extern "C" long long fastlora_shrink_counters(long long m, long long ranks) { return cdiv(m, BM) * cdiv(ranks, RANKS); }

extern "C" int launch_shrink(const ShrinkParams* params, void* stream) {
  Check check(params);
  if (check.status) return check.status;
  const ShrinkParams& p = *params;
  check.common(p, p.k);
  check.dropped(p);
  const long long ranks = check.ranks, tiles = check.status ? 0 : fastlora_shrink_counters(p.m, ranks);
  check.size(tiles);
  check.refuse(p.splits < 1 || p.splits > 65535, FASTLORA_SHAPE);
  check.refuse(ranks > 65535 * RANKS, FASTLORA_TOO_LARGE);
  if (check.status || !tiles) return check.status;
  check.refuse(!p.z.data && !p.zg.data, FASTLORA_NULL);
  if (p.g.data) check.matrix(p.g, p.m, ranks, 4);
  if (p.z.data) check.matrix(p.z, p.m, ranks, 4, true);
  if (p.zg.data) check.matrix(p.zg, p.m, ranks, 2, true);
  if (p.splits > 1) check.workspace(p, tiles * p.splits * FASTLORA_TILE, tiles);
  if (check.status) return check.status;
  const dim3 grid(unsigned(cdiv(p.m, BM)), unsigned(cdiv(ranks, RANKS)), p.splits);
  auto* kernel = p.type == FASTLORA_BF16 ? shrink_kernel<bf16> : shrink_kernel<fp16>;
  return check.launch(kernel, grid, THREADS, STAGES * 2 * TILE + RANKS * int(sizeof(void*)), p, stream);
}
