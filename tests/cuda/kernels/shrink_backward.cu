// da = dzᵀ D(x) for all adapters and projections that share x and its mask. A block streams rows of 128 columns of x
// past 64 ranks of dz. Where that makes too few blocks the rows are split.
#include "check.h"
#include "reduce.cuh"

constexpr int BM = 64, BN = 128, RANKS = 64, TILES = RANKS / 8, CHUNKS = BN / 8, THREADS = 256, STAGES = 3;
constexpr int X = BM * BN * 2, STAGE = X + BM * RANKS * 2;
using Params = Shrink_backwardParams;

// Each thread drops what it copied itself, before others may read it.
DEVICE void drop(unsigned char* tile, const Params& p, uint64_t seed, int row, int column) {
  UNROLL for (int i = threadIdx.x; i < BM * CHUNKS; i += THREADS) {
    const uint64_t first = uint64_t(row + i / CHUNKS) * p.k + column + i % CHUNKS * 8;
    const uint32_t kept = keep_eight(seed, first, p.dropped);
    auto* x = reinterpret_cast<Vector<uint32_t, 4>*>(tile + swizzle<CHUNKS>(i / CHUNKS, i % CHUNKS));
    Vector<uint32_t, 4> chunk = *x;
    UNROLL for (int e = 0; e < 4; e++)
      chunk.v[e] &= (kept >> 2 * e & 1 ? 0xffff : 0) | (kept >> 2 * e & 2 ? 0xffff0000 : 0);
    *x = chunk;
  }
}

template <class T>
static __global__ void __launch_bounds__(THREADS, 2) shrink_backward_kernel(const __grid_constant__ Params p) {
  SHARED_DYNAMIC(memory);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, n0 = blockIdx.x * BN, rank0 = blockIdx.y * RANKS;
  const Part& final = p.parts[p.count - 1];
  const int ranks = int(final.rank + final.ranks), tiles = min(TILES, int(cdiv(ranks - rank0, 8)));
  const int all = int(cdiv(p.m, BM)), each = int(cdiv(all, gridDim.z));
  const int begin = min(int(blockIdx.z) * each, all), end = min(begin + each, all);
  auto fill = [&](int block) {
    unsigned char* stage = memory + (block - begin) % STAGES * STAGE;
    const int m0 = block * BM, m = int(p.m);
    const Matrix& dz = p.dz;
    if (block < end) {
      copy_tile<T, BM, CHUNKS, THREADS>(stage, at<T>(p.x, 0, 0), p.x.stride, m0, m, n0, int(p.k));
      if (p.fp32_dz) copy_tile<T, BM, TILES, THREADS>(stage + X, at<float>(dz, 0, 0), dz.stride, m0, m, rank0, ranks);
      else copy_tile<T, BM, TILES, THREADS>(stage + X, at<T>(dz, 0, 0), dz.stride, m0, m, rank0, ranks);
    }
    copy_async_commit();
  };
  ROLLED for (int i = 0; i < STAGES - 1; i++) fill(begin + i);
  const uint64_t seed = p.seed ? *p.seed : 0;
  Vector<float, 4> acc[TILES] = {};
  ROLLED for (int block = begin; block < end; block++) {
    unsigned char* stage = memory + (block - begin) % STAGES * STAGE;
    copy_async_wait<STAGES - 2>();
    if (p.seed) drop(stage, p, seed, block * BM, n0);
    __syncthreads();  // all copies of this block have landed, and nobody reads the block before it any more
    fill(block + STAGES - 1);
    multiply_rows<T, true, BM, CHUNKS, 1, 1>(acc, stage, warp * 16, stage + X, 0, tiles, lane);
  }
  const int tile = blockIdx.y * gridDim.x + blockIdx.x, splits = gridDim.z;
  if (splits > 1 && !reduce<THREADS>(p.partial, p.arrived, tile, blockIdx.z, splits, acc, tiles)) return;
  const float scale = p.seed ? keep_scale(p.dropped) : 1.f;
  ROLLED for (int i = 0; i < p.count; i++) {
    UNROLL for (int e = 0; e < TILES * 4; e++) {
      const int column = n0 + warp * 16 + lane / 4 + e % 4 / 2 * 8, r = rank0 + e / 4 * 8 + lane % 4 * 2 + e % 2;
      const int own = r - int(p.parts[i].rank);
      const bool inside = column < p.k && own >= 0 && own < p.parts[i].ranks;
      if (inside) put<T>(p.parts[i].m, p.fp32_da, own, column, acc[e / 4].v[e % 4] * scale);
    }
  }
}

extern "C" long long fastlora_shrink_backward_counters(long long k, long long ranks) {
  return cdiv(k, BN) * cdiv(ranks, RANKS);
}

extern "C" int launch_shrink_backward(const Params* params, void* stream) {
  Check check(params);
  if (check.status) return check.status;
  const Params& p = *params;
  check.common(p, p.k, p.fp32_da ? 4 : 2, true);
  check.dropped(p);
  check.matrix(p.dz, p.m, check.ranks, p.fp32_dz ? 4 : 2);
  const long long tiles = check.status ? 0 : fastlora_shrink_backward_counters(p.k, check.ranks);
  check.size(tiles);
  check.refuse(p.splits < 1 || p.splits > 65535, FASTLORA_SHAPE);
  check.refuse(check.ranks > 65535 * RANKS, FASTLORA_TOO_LARGE);
  if (p.splits > 1 && tiles) check.workspace(p, tiles * p.splits * 2 * FASTLORA_TILE, tiles);
  if (check.status || !tiles) return check.status;
  const dim3 grid(unsigned(cdiv(p.k, BN)), unsigned(cdiv(check.ranks, RANKS)), p.splits);
  auto* kernel = p.type == FASTLORA_BF16 ? shrink_backward_kernel<bf16> : shrink_backward_kernel<fp16>;
  return check.launch(kernel, grid, THREADS, STAGES * STAGE, p, stream);
}
