// z = D(x) aᵀ for all adapters and projections that share x, and z ⊙ g in x's type for the GEMM. A block streams 64 rows of x
// past 64 ranks. Where that makes too few blocks, K is split: the last block of a tile to arrive adds all parts in their
// order, so that one launch gives the same bits whoever comes last.
#include "check.h"
#include "tile.cuh"

namespace {
constexpr int BM = 64, RANKS = 64, BK = 64, CHUNKS = BK / 8, STAGES = 4, THREADS = 128, TILE = 64 * BK * 2;
constexpr int TILES = RANKS / 8, PART = BM * RANKS;  // floats of a tile's part

__host__ __device__ __forceinline__ long long ranks_of(const ShrinkParams& p) {
  long long ranks = 0;
  for (int i = 0; i < p.count; i++) ranks += p.parts[i].ranks;
  return ranks;
}

template <class T>
__device__ __forceinline__ const T* row_of(const ShrinkParams& p, long long rank) {
  for (int i = 0; i < p.count; rank -= p.parts[i++].ranks)
    if (rank < p.parts[i].ranks) return static_cast<const T*>(p.parts[i].a.data) + rank * p.parts[i].a.stride;
  return nullptr;
}

// Fragment i of x holds rows i % 2 · 8 + g, columns i / 2 · 8 + 2 t and + 1: each lane of a quad decides about one
// fragment's eight columns, for all four lanes.
__device__ __forceinline__ void drop(uint32_t (&x)[4], uint64_t seed, uint64_t first, int dropped, int lane) {
  const uint32_t mine = keep_eight(seed, first, dropped);
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const uint32_t kept = __shfl_sync(~0u, mine, (lane & ~3) + i) >> lane % 4 * 2;
    x[i] &= (kept & 1 ? 0xffff : 0) | (kept & 2 ? 0xffff0000 : 0);
  }
}

// Publishes this block's part. True in the last block of the tile to arrive, which then has the sum of all parts.
__device__ __forceinline__ bool reduce(const ShrinkParams& p, float (&acc)[TILES][4], int tiles) {
  SHARED(last, bool);
  const int tile = blockIdx.y * gridDim.x + blockIdx.x, splits = gridDim.z;
  float4* parts = reinterpret_cast<float4*>(p.partial) + size_t(tile) * splits * (PART / 4) + threadIdx.x;
#pragma unroll
  for (int j = 0; j < TILES; j++)
    if (j < tiles) parts[blockIdx.z * (PART / 4) + j * THREADS] = make_float4(acc[j][0], acc[j][1], acc[j][2], acc[j][3]);
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();  // the block's part is out before its arrival is
    last = atomicAdd(p.arrived + tile, 1) == splits - 1;
    __threadfence();  // and the others' parts are read after theirs
    if (last) atomicExch(p.arrived + tile, 0);
  }
  __syncthreads();
  if (!last) return false;
#pragma unroll
  for (int j = 0; j < TILES; j++) {
    float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
    for (int i = 0; j < tiles && i < splits; i++) {
      const float4 part = __ldcg(parts + i * (PART / 4) + j * THREADS);
      sum = make_float4(sum.x + part.x, sum.y + part.y, sum.z + part.z, sum.w + part.w);
    }
    acc[j][0] = sum.x, acc[j][1] = sum.y, acc[j][2] = sum.z, acc[j][3] = sum.w;
  }
  return true;
}

template <class T>
__device__ __forceinline__ void store(const ShrinkParams& p, const float (&acc)[TILES][4], long long row, long long rank, int ranks) {
  const float keep = p.seed ? keep_scale(p.dropped) : 1.f;
#pragma unroll
  for (int i = 0; i < TILES * 4; i++) {
    const long long m = row + i % 4 / 2 * 8, r = rank + i / 4 * 8 + i % 2;
    if (m >= p.m || r >= ranks) continue;
    const float z = acc[i / 4][i % 4] * keep;
    if (p.z.data) static_cast<float*>(p.z.data)[m * p.z.stride + r] = z;
    const float g = p.g.data ? static_cast<const float*>(p.g.data)[m * p.g.stride + r] : 1.f;
    if (p.zg.data) round_to(static_cast<T*>(p.zg.data)[m * p.zg.stride + r], z * p.scale * g);
  }
}

template <class T>
__global__ void __launch_bounds__(THREADS, 3) shrink_kernel(const __grid_constant__ ShrinkParams p) {
  SHARED_DYNAMIC(memory);
  using Row = const T*;
  SHARED(a_rows, Row[RANKS]);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int m0 = blockIdx.x * BM, rank0 = blockIdx.y * RANKS, ranks = int(ranks_of(p));
  const int tiles = min(TILES, int(cdiv(ranks - rank0, 16)) * 2);
  const int all = int(cdiv(p.k, BK)), each = int(cdiv(all, gridDim.z));
  const int begin = min(int(blockIdx.z) * each, all), end = min(begin + each, all);
  if (threadIdx.x < RANKS) a_rows[threadIdx.x] = row_of<T>(p, rank0 + threadIdx.x);
  __syncthreads();
  auto fill = [&](int block) {
    unsigned char* stage = memory + (block - begin) % STAGES * 2 * TILE;
    if (block < end) {
      const T* x = static_cast<const T*>(p.x.data);
      copy_tile<T, BM, CHUNKS, THREADS>(stage, x, p.x.stride, m0, int(p.m), block * BK, int(p.k));
      for (int i = threadIdx.x; i < tiles * 8 * CHUNKS; i += THREADS) {
        const int row = i / CHUNKS, chunk = i % CHUNKS, column = block * BK + 8 * chunk;
        const T* a = a_rows[row];
        copy_chunk(stage + TILE + swizzle<CHUNKS>(row, chunk), a ? a : x, column, a ? int(p.k) - column : 0);
      }
    }
    copy_async_commit();
  };
  for (int i = 0; i < STAGES - 1; i++) fill(begin + i);

  const int row = m0 + warp * 16 + lane / 4;
  const uint64_t seed = p.seed ? *p.seed : 0;
  float acc[TILES][4] = {};
#pragma unroll 1
  for (int block = begin; block < end; block++) {
    copy_async_wait<STAGES - 2>();
    __syncthreads();  // all copies of this block have landed, and nobody reads the block before it any more
    fill(block + STAGES - 1);
    const unsigned char* stage = memory + (block - begin) % STAGES * 2 * TILE;
#pragma unroll
    for (int step = 0; step < BK / 16; step++) {
      uint32_t x[4], a[4];
      ldmatrix(x, stage + swizzle<CHUNKS>(warp * 16 + lane % 16, step * 2 + lane / 16));
      const int column = block * BK + step * 16 + lane % 4 / 2 * 8;
      if (p.seed) drop(x, seed, uint64_t(row + lane % 2 * 8) * p.k + column, p.dropped, lane);
#pragma unroll
      for (int j = 0; j < TILES; j += 2) {
        if (j >= tiles) break;
        ldmatrix(a, stage + TILE + swizzle<CHUNKS>(j * 8 + lane / 16 * 8 + lane % 8, step * 2 + lane / 8 % 2));
        mma(acc[j], x, a[0], a[1], T{});
        mma(acc[j + 1], x, a[2], a[3], T{});
      }
    }
  }
  if (gridDim.z == 1 || reduce(p, acc, tiles)) store<T>(p, acc, row, rank0 + lane % 4 * 2, ranks);
}

template <class T>
int launch(Check& check, const ShrinkParams& p, dim3 grid, void* stream) {
  auto* kernel = shrink_kernel<T>;
  constexpr int bytes = STAGES * 2 * TILE;
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes) == cudaSuccess)
    LAUNCH(kernel, grid, dim3(THREADS), bytes, stream, p);
  return check.launched();
}
}  // namespace

extern "C" long long fastlora_shrink_counters(long long m, long long ranks) { return cdiv(m, BM) * cdiv(ranks, RANKS); }
extern "C" long long fastlora_shrink_partials(long long m, long long ranks, int splits) {
  return splits > 1 ? fastlora_shrink_counters(m, ranks) * splits * PART : 0;
}

extern "C" int launch_shrink(const ShrinkParams* params, void* stream) {
  Check check;
  check.refuse(!params, FASTLORA_NULL);
  if (check.status) return check.status;
  const ShrinkParams& p = *params;
  for (long long n : {p.m, p.k}) check.size(n);
  check.refuse(p.count < 0 || p.count > FASTLORA_PARTS || (p.type != FASTLORA_BF16 && p.type != FASTLORA_FP16), FASTLORA_SHAPE);
  check.refuse(p.splits < 1 || p.splits > 65535, FASTLORA_SHAPE);
  for (int i = 0; !check.status && i < p.count; i++) {
    check.size(p.parts[i].ranks);
    check.matrix(p.parts[i].a, p.parts[i].ranks, p.k, 2);
  }
  const long long ranks = check.status ? 0 : ranks_of(p);
  check.refuse(ranks > 65535 * RANKS, FASTLORA_TOO_LARGE);
  if (check.status || !p.m || !ranks) return check.status;
  check.matrix(p.x, p.m, p.k, 2);
  if (p.g.data) check.matrix(p.g, p.m, ranks, 4);
  if (p.z.data) check.output(p.z, p.m, ranks, 4);
  if (p.zg.data) check.output(p.zg, p.m, ranks, 2);
  check.refuse(!p.z.data && !p.zg.data, FASTLORA_NULL);
  check.dropout(p.seed, p.dropped);
  if (p.splits > 1) {
    check.pointer(p.partial, 16);
    check.pointer(p.arrived, sizeof *p.arrived);
    check.refuse(p.partials < fastlora_shrink_partials(p.m, ranks, p.splits), FASTLORA_WORKSPACE);
    check.refuse(p.counters < fastlora_shrink_counters(p.m, ranks), FASTLORA_WORKSPACE);
  }
  if (check.status) return check.status;
  const dim3 grid(unsigned(cdiv(p.m, BM)), unsigned(cdiv(ranks, RANKS)), p.splits);
  return p.type == FASTLORA_BF16 ? launch<bf16>(check, p, grid, stream) : launch<fp16>(check, p, grid, stream);
}
