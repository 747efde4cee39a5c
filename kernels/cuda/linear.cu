// y = c ⊙ ([x | z] · [w ; b]) + bias: a GEMM whose reduction runs on over the ranks. w and b come as they are stored, both
// along the reduction or both across it, and z is gated and rounded already: then a block of ranks is loaded and multiplied
// like any block of K, only from other matrices. With dropout the ranks come first, and the mask sees the update alone.
#include "check.h"
#include "tile.cuh"

namespace {
// Eight warps, 2 × 4, each 64 × 32; four stages of 16 KiB leave room for two blocks on an A100.
constexpr int BM = 128, BN = 128, BK = 32, STAGES = 4, THREADS = 256, TILE = 128 * BK * 2, M_TILES = 4, N_TILES = 4;
using Accumulator = float[M_TILES][N_TILES][4];

// A block's tile of y, and where its slice begins.
struct Place {
  int row, column;  // in the slice
  int slice, first_column, first_rank;
};

__device__ __forceinline__ Place place(const LinearParams& p) {
  // Eight rows of tiles at a time: neighbours share x and w in the L2.
  const int tall = int(cdiv(p.m, BM)), wide = gridDim.x / tall, group = blockIdx.x / (8 * wide) * 8;
  const int height = min(tall - group, 8), inside = blockIdx.x % (8 * wide);
  Place at = {(group + inside % height) * BM, inside / height * BN, 0, 0, 0};
  for (int width; at.column >= (width = int(cdiv(p.slices[at.slice].columns, BN)) * BN); at.slice++) {
    at.column -= width;
    at.first_column += int(p.slices[at.slice].columns);
    at.first_rank += int(p.slices[at.slice].ranks);
  }
  return at;
}

// One stage: BK columns of x and rows of w, or as many ranks of z and b.
template <class T, bool TRANSPOSED>
__device__ __forceinline__ void load(const LinearParams& p, const Place& at, unsigned char* stage, bool ranks, int first) {
  const Slice& slice = p.slices[at.slice];
  const Matrix &l = ranks ? p.z : p.x, &r = ranks ? slice.b : p.w;
  const T* left = static_cast<const T*>(l.data) + (ranks ? at.first_rank : 0);
  const T* right = static_cast<const T*>(r.data) + (ranks ? 0 : at.first_column * (TRANSPOSED ? 1 : r.stride));
  const int depth = int(ranks ? slice.ranks : p.k), columns = int(slice.columns);
  copy_tile<T, BM, BK / 8, THREADS>(stage, left, l.stride, at.row, int(p.m), first, depth);
  if constexpr (TRANSPOSED)
    copy_tile<T, BK, BN / 8, THREADS>(stage + TILE, right, r.stride, first, depth, at.column, columns);
  else
    copy_tile<T, BN, BK / 8, THREADS>(stage + TILE, right, r.stride, at.column, columns, first, depth);
}

template <class T, bool TRANSPOSED>
__device__ __forceinline__ void multiply(Accumulator& acc, const unsigned char* stage, int warp, int lane) {
#pragma unroll
  for (int step = 0; step < BK / 16; step++) {
    uint32_t left[M_TILES][4];
#pragma unroll
    for (int i = 0; i < M_TILES; i++)
      ldmatrix(left[i], stage + swizzle<BK / 8>(warp / 4 * 64 + i * 16 + lane % 16, step * 2 + lane / 16));
#pragma unroll
    for (int j = 0; j < N_TILES; j += 2) {
      uint32_t right[4];
      const int n = warp % 4 * 32 + j * 8;
      if constexpr (TRANSPOSED)
        ldmatrix_trans(right, stage + TILE + swizzle<BN / 8>(step * 16 + lane % 16, n / 8 + lane / 16));
      else
        ldmatrix(right, stage + TILE + swizzle<BK / 8>(n + lane / 16 * 8 + lane % 8, step * 2 + lane / 8 % 2));
#pragma unroll
      for (int i = 0; i < M_TILES; i++) {
        mma(acc[i][j], left[i], right[0], right[1], T{});
        mma(acc[i][j + 1], left[i], right[2], right[3], T{});
      }
    }
  }
}

// The four lanes of a quad hold two columns each of the same four tiles: each decides about one tile, for all.
__device__ __forceinline__ void drop(Accumulator& acc, const LinearParams& p, int row, int column, int lane) {
  const uint64_t seed = *p.seed;
  const float scale = keep_scale(p.dropped);
#pragma unroll
  for (int i = 0; i < 2 * M_TILES; i++) {
    const uint64_t first = uint64_t(row + i * 8) * p.n + column + lane % 4 * 8;
    const uint32_t mine = keep_eight(seed, first, p.dropped);
#pragma unroll
    for (int j = 0; j < N_TILES; j++) {
      const uint32_t kept = __shfl_sync(~0u, mine, (lane & ~3) + j) >> lane % 4 * 2;
#pragma unroll
      for (int c = 0; c < 2; c++) {
        float& v = acc[i / 2][j][i % 2 * 2 + c];
        v = kept >> c & 1 ? v * scale : 0.f;
      }
    }
  }
}

// A row of a quad: two columns of each of four tiles in a lane become, by an exchange, the eight columns of one tile.
template <class T>
__device__ __forceinline__ void store(const Matrix& to, long long row, bool inside, int column, int count, int lane,
                                      uint32_t (&pairs)[N_TILES]) {
#pragma unroll
  for (int bit = 1; bit < 4; bit *= 2)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if (i & bit) continue;
      const bool upper = lane & bit;
      const uint32_t other = __shfl_xor_sync(~0u, upper ? pairs[i] : pairs[i + bit], bit);
      if (upper) pairs[i] = other;
      else pairs[i + bit] = other;
    }
  if (!inside) return;
  T* y = static_cast<T*>(to.data) + row * to.stride + column;
  if (count >= 8 && reinterpret_cast<size_t>(y) % 16 == 0) {
    *reinterpret_cast<uint4*>(y) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
    return;
  }
  T elements[8];
  memcpy(elements, pairs, 16);
#pragma unroll
  for (int i = 0; i < 8; i++)
    if (i < count) y[i] = elements[i];
}

template <class T>
__device__ __forceinline__ void finish(const LinearParams& p, const Accumulator& acc, int row, int column, int count, int lane) {
  float c[N_TILES][2], bias[N_TILES][2];
#pragma unroll
  for (int i = 0; i < 2 * N_TILES; i++) {
    const int n = i / 2 * 8 + lane % 4 * 2 + i % 2;
    c[i / 2][i % 2] = p.column_scale && n < count ? p.column_scale[column + n] : 1.f;
    bias[i / 2][i % 2] = p.bias && n < count ? to_float(static_cast<const T*>(p.bias)[column + n]) : 0.f;
  }
  const int own = lane % 4 * 8;
#pragma unroll
  for (int i = 0; i < 2 * M_TILES; i++) {
    uint32_t y[N_TILES], u[N_TILES];
#pragma unroll
    for (int j = 0; j < N_TILES; j++) {
      const float *v = acc[i / 2][j] + i % 2 * 2, *s = c[j], *t = bias[j];
      u[j] = pack<T>(v[0], v[1]);
      y[j] = pack<T>(v[0] * s[0] + t[0], v[1] * s[1] + t[1]);
    }
    const bool inside = row + i * 8 < p.m;
    if (p.u.data) store<T>(p.u, row + i * 8, inside, column + own, count - own, lane, u);
    store<T>(p.y, row + i * 8, inside, column + own, count - own, lane, y);
  }
}

template <class T, bool TRANSPOSED>
__global__ void __launch_bounds__(THREADS, 2) linear_kernel(const __grid_constant__ LinearParams p) {
  SHARED_DYNAMIC(memory);
  const Place at = place(p);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int base = int(cdiv(p.k, BK)), ranks = int(cdiv(p.slices[at.slice].ranks, BK)), blocks = base + ranks;
  auto fill = [&](int block) {
    const bool rank = p.seed ? block < ranks : block >= base;
    const int first = rank ? (p.seed ? 0 : base) : (p.seed ? ranks : 0);
    if (block < blocks)
      load<T, TRANSPOSED>(p, at, memory + block % STAGES * 2 * TILE, rank, (block - first) * BK);
    copy_async_commit();
  };
#pragma unroll 1
  for (int block = 0; block < STAGES - 1; block++) fill(block);

  const int row = at.row + warp / 4 * 64 + lane / 4, in_slice = at.column + warp % 4 * 32;
  const int column = at.first_column + in_slice, count = int(p.slices[at.slice].columns) - in_slice;
  Accumulator acc = {};
#pragma unroll 1
  for (int part = p.seed ? 0 : 1, block = 0; part < 2; part++) {
#pragma unroll 1
    for (const int end = part ? blocks : ranks; block < end; block++) {
      copy_async_wait<STAGES - 2>();
      __syncthreads();  // all copies of this block have landed, and nobody reads the block before it any more
      fill(block + STAGES - 1);
      multiply<T, TRANSPOSED>(acc, memory + block % STAGES * 2 * TILE, warp, lane);
    }
    if (part == 0) drop(acc, p, row, column, lane);
  }
  finish<T>(p, acc, row, column, count, lane);
}

template <class T, bool TRANSPOSED>
int launch(Check& check, const LinearParams& p, long long blocks, void* stream) {
  auto* kernel = linear_kernel<T, TRANSPOSED>;
  constexpr int bytes = STAGES * 2 * TILE;
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes) == cudaSuccess)
    LAUNCH(kernel, dim3(unsigned(blocks)), dim3(THREADS), bytes, stream, p);
  return check.launched();
}
}  // namespace

extern "C" int launch_linear(const LinearParams* params, void* stream) {
  Check check;
  check.refuse(!params, FASTLORA_NULL);
  if (check.status) return check.status;
  const LinearParams& p = *params;
  for (long long n : {p.m, p.n, p.k}) check.size(n);
  check.refuse(p.count < 1 || p.count > FASTLORA_PARTS || (p.type != FASTLORA_BF16 && p.type != FASTLORA_FP16), FASTLORA_SHAPE);
  long long columns = 0, ranks = 0, tiles = 0;
  for (int i = 0; !check.status && i < p.count; i++) {
    const Slice& s = p.slices[i];
    check.size(s.columns);
    check.size(s.ranks);
    check.matrix(s.b, s.columns, s.ranks, 2);
    columns += s.columns, ranks += s.ranks, tiles += cdiv(s.columns, BN);
  }
  check.refuse(columns != p.n, FASTLORA_SHAPE);
  check.size(ranks);
  check.size(cdiv(p.m, BM) * tiles);
  if (check.status || !p.m || !p.n) return check.status;
  check.matrix(p.x, p.m, p.k, 2);
  check.matrix(p.w, p.k, p.n, 2);
  check.matrix(p.z, p.m, ranks, 2);
  check.output(p.y, p.m, p.n, 2);
  if (p.u.data) check.output(p.u, p.m, p.n, 2);
  if (p.bias) check.pointer(p.bias, 2);
  if (p.column_scale) check.pointer(p.column_scale, sizeof *p.column_scale);
  check.dropout(p.seed, p.dropped);
  if (check.status) return check.status;
  const long long blocks = cdiv(p.m, BM) * tiles;
  if (p.type == FASTLORA_BF16)
    return p.transposed ? launch<bf16, true>(check, p, blocks, stream) : launch<bf16, false>(check, p, blocks, stream);
  return p.transposed ? launch<fp16, true>(check, p, blocks, stream) : launch<fp16, false>(check, p, blocks, stream);
}
