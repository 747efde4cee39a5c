// t = dy bᵀ and db = (z ⊙ g)ᵀ dy from one read of dy. A block goes through strips of 256 rows of dy: t is in registers,
// z ⊙ g in shared memory, b streams by, and each strip leaves its part of db.
#include "check.h"
#include "reduce.cuh"

// Eight warps: for t of 32 rows each, for db of 16 columns and every other eight ranks. Two blocks fit an H100.
constexpr int BM = 256, BN = 64, RANKS = 64, TILES = RANKS / 8, CHUNKS = 8, THREADS = 256, STAGES = 2;
constexpr int DY = BM * BN * 2, STAGE = DY + BN * RANKS * 2;
using Params = Expand_backwardParams;

// Tiles of all parts in a row: each begins at a place of its own.
__host__ __device__ constexpr long long place(long long before, int part, int size) { return before / size + part; }
__host__ __device__ constexpr int row_blocks(const Params& p) { return p.m > BM ? int(cdiv(p.m, BM)) : 1; }

DEVICE float gated(const Params& p, float v, int m, int r) {
  return v * p.scale * (p.g.data ? *at<float>(p.g, m, r) : 1.f);
}

template <class T> DEVICE void store(const Params& p, const Vector<float, 4>* acc, int row, int rank, int end) {
  UNROLL for (int i = 0; i < 8 * TILES; i++) {
    const int m = row + i / 4 % 2 * 16 + i % 4 / 2 * 8, r = rank + i / 8 * 8 + i % 2;
    const float t = acc[i / 4].v[i % 4];
    if (m >= p.m || r >= end) continue;
    if (p.t.data) *at<float>(p.t, m, r) = t;
    if (p.dz.data) *at<T>(p.dz, m, r) = T(gated(p, t, m, r));
    if (p.dg.data) *at<float>(p.dg, m, r) = t * *at<float>(p.z, m, r);
  }
}

template <class T>
static __global__ void __launch_bounds__(THREADS, 2) expand_backward_kernel(const __grid_constant__ Params p) {
  SHARED_DYNAMIC(memory);
  unsigned char* zg = memory + STAGES * STAGE;
  const Part &part = p.parts[blockIdx.z], &final = p.parts[p.count - 1];
  const Matrix& db = p.db[blockIdx.z];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, tall = row_blocks(p), splits = gridDim.x / tall;
  const int block = blockIdx.x % tall, split = blockIdx.x / tall, m0 = block * BM, rank0 = blockIdx.y * RANKS;
  const int ranks = int(part.ranks), columns = int(part.columns), first = int(part.rank);
  if (rank0 >= ranks) return;  // the grid is as high as the highest part
  const int tiles = min(TILES, int(cdiv(ranks - rank0, 8)));
  const int all = int(cdiv(columns, BN)), each = int(cdiv(all, splits));
  const int begin = min(split * each, all), count = min(each, all - begin);
  // Blocks of rows begin at different strips, so that it is not one of them that is the last everywhere.
  auto strip = [&](int i) { return begin + (i + block) % count; };
  auto fill = [&](int i) {
    unsigned char* stage = memory + i % STAGES * STAGE;
    if (i < count) {
      const int n0 = strip(i) * BN;
      copy_tile<T, BM, CHUNKS, THREADS>(stage, at<T>(p.dy, 0, part.column), p.dy.stride, m0, int(p.m), n0, columns);
      copy_tile<T, BN, CHUNKS, THREADS>(stage + DY, at<T>(part.m, 0, 0), part.m.stride, n0, columns, rank0, ranks);
    }
    copy_async_commit();
  };
  fill(0);
  ROLLED for (int i = threadIdx.x; i < BM * CHUNKS; i += THREADS) {
    const int m = m0 + i / CHUNKS, own = rank0 + i % CHUNKS * 8, r = first + own;
    Vector<T, 8> chunk;
    UNROLL for (int e = 0; e < 8; e++)
      chunk.v[e] = T(db.data && m < p.m && own + e < ranks ? gated(p, *at<float>(p.z, m, r + e), m, r + e) : 0.f);
    *reinterpret_cast<Vector<T, 8>*>(zg + swizzle<CHUNKS>(i / CHUNKS, i % CHUNKS)) = chunk;
  }
  const long long strips = place(final.column + final.columns, p.count, BN), counters = strips * gridDim.y;
  Vector<float, 4> t[2 * TILES] = {};
  ROLLED for (int i = 0; i < count; i++) {
    copy_async_wait<STAGES - 2>();
    __syncthreads();  // all copies of this strip have landed, and nobody reads the one before it any more
    fill(i + STAGES - 1);
    const unsigned char* dy = memory + i % STAGES * STAGE;
    UNROLL for (int h = 0; h < 2; h++)
      multiply_rows<T, false, BN, CHUNKS, 1, 2>(t + h, dy, warp * 32 + h * 16, dy + DY, 0, tiles, lane);
    if (!db.data) continue;
    Vector<float, 4> sum[TILES / 2] = {};
    multiply_rows<T, true, BM, CHUNKS, 2, 1>(sum, dy, warp % 4 * 16, zg, warp / 4, tiles, lane);
    const int tile = int(blockIdx.y * strips + place(part.column, blockIdx.z, BN)) + strip(i);
    if (tall > 1 && !reduce<THREADS>(p.partial, p.arrived, tile, block, tall, sum, (tiles + 1) / 2)) continue;
    UNROLL for (int e = 0; e < TILES * 2; e++) {
      const int n = strip(i) * BN + warp % 4 * 16 + lane / 4 + e % 4 / 2 * 8;
      const int r = rank0 + warp / 4 * 8 + e / 4 * 16 + lane % 4 * 2 + e % 2;
      if (n < columns && r < ranks) put<T>(db, p.fp32_db, n, r, sum[e / 4].v[e % 4]);
    }
  }
  float* partial = p.partial + (tall > 1 ? counters * tall * BN * RANKS : 0);
  const int tile = int(place(first, blockIdx.z, RANKS) + blockIdx.y) * tall + block;
  if (splits == 1 || reduce<THREADS>(partial, p.arrived + counters, tile, split, splits, t, tiles * 2))
    store<T>(p, t, m0 + warp * 32 + lane / 4, first + rank0 + lane % 4 * 2, first + ranks);
}

extern "C" long long fastlora_expand_backward_workspace(const Params* params, long long* counters) {
  const Params& p = *params;
  long long highest = 0, ranks = 0, columns = 0, tall = row_blocks(p);
  for (int i = 0; i < p.count; ranks += p.parts[i].ranks, columns += p.parts[i++].columns)
    highest = max(highest, p.parts[i].ranks);
  const long long db = place(columns, p.count, BN) * cdiv(highest, RANKS), t = place(ranks, p.count, RANKS) * tall;
  *counters = db + t;
  return (tall > 1 ? db * tall * BN * RANKS : 0) + (p.splits > 1 ? t * p.splits * BM * RANKS : 0);
}

extern "C" int launch_expand_backward(const Params* params, void* stream) {
  Check check(params);
  if (check.status) return check.status;
  const Params& p = *params;
  check.common(p, 0);
  check.refuse(p.splits < 1 || p.splits > 65535, FASTLORA_SHAPE);
  check.refuse(p.m > 65535 * BM || check.highest > 65535 * RANKS, FASTLORA_TOO_LARGE);
  check.matrix(p.dy, p.m, check.columns, 2);
  check.matrix(p.z, p.m, check.ranks, 4);
  if (p.g.data) check.matrix(p.g, p.m, check.ranks, 4);
  for (const Matrix* to : {&p.t, &p.dz, &p.dg})
    if (to->data) check.matrix(*to, p.m, check.ranks, to == &p.dz ? 2 : 4, true);
  for (int i = 0; !check.status && i < p.count; i++)
    if (p.db[i].data) check.matrix(p.db[i], p.parts[i].columns, p.parts[i].ranks, p.fp32_db ? 4 : 2, true);
  if (check.status || !check.ranks) return check.status;
  const long long blocks = 1ll * row_blocks(p) * p.splits;
  long long counters, floats = fastlora_expand_backward_workspace(params, &counters);
  check.size(blocks), check.size(counters);
  if (floats) check.workspace(p, floats, counters);
  if (check.status) return check.status;
  const dim3 grid(unsigned(blocks), unsigned(cdiv(check.highest, RANKS)), p.count);
  auto* kernel = p.type == FASTLORA_BF16 ? expand_backward_kernel<bf16> : expand_backward_kernel<fp16>;
  return check.launch(kernel, grid, THREADS, STAGES * STAGE + BM * RANKS * 2, p, stream);
}
