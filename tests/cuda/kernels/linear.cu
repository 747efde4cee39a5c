// y = c ⊙ ([x | z] · [w ; b]) + bias: a GEMM whose reduction runs on over the ranks. z comes gated and rounded, b stored as
// w is: a block of ranks is loaded and multiplied like any block of K, only from other matrices. With dropout the ranks
// come first, and the mask sees the update alone.
#include "check.h"

// Eight warps, 2 × 4, of 64 × 32 each; four stages of 16 KiB leave room for two blocks on an A100.
constexpr int BM = 128, BN = 128, BK = 32, STAGES = 4, THREADS = 256, TILE = 128 * BK * 2, M_TILES = 4, N_TILES = 4;
using Accumulator = float[M_TILES][N_TILES][4];

template <class T, bool TRANSPOSED> DEVICE void multiply(Accumulator& acc, const unsigned char* stage, int warp, int lane) {
  UNROLL for (int step = 0; step < BK / 16; step++) {
    uint32_t left[M_TILES][4], right[4];
    UNROLL for (int i = 0; i < M_TILES; i++)
      ldmatrix(left[i], stage + swizzle<BK / 8>(warp / 4 * 64 + i * 16 + lane % 16, step * 2 + lane / 16));
    UNROLL for (int j = 0; j < N_TILES; j += 2) {
      const int n = warp % 4 * 32 + j * 8;
      if (TRANSPOSED) ldmatrix_trans(right, stage + TILE + swizzle<BN / 8>(step * 16 + lane % 16, n / 8 + lane / 16));
      else ldmatrix(right, stage + TILE + swizzle<BK / 8>(n + lane / 16 * 8 + lane % 8, step * 2 + lane / 8 % 2));
      UNROLL for (int i = 0; i < M_TILES; i++) {
        mma(acc[i][j], left[i], right[0], right[1], T{});
        mma(acc[i][j + 1], left[i], right[2], right[3], T{});
      }
    }
  }
}

// The lanes of a quad have two columns each of the same four tiles of eight: each decides about one tile, for all.
DEVICE void drop(Accumulator& acc, const LinearParams& p, int row, int column, int lane) {
  const uint64_t seed = *p.seed;
  const float scale = keep_scale(p.dropped);
  UNROLL for (int i = 0; i < 2 * M_TILES; i++) {
    const uint32_t mine = keep_eight(seed, uint64_t(row + i * 8) * p.n + column + lane % 4 * 8, p.dropped);
    UNROLL for (int j = 0; j < N_TILES; j++) {
      const uint32_t kept = __shfl_sync(~0u, mine, (lane & ~3) + j) >> lane % 4 * 2;
      float* v = acc[i / 2][j] + i % 2 * 2;
      v[0] = kept & 1 ? v[0] * scale : 0.f;
      v[1] = kept & 2 ? v[1] * scale : 0.f;
    }
  }
}

template <class T> DEVICE void store(const Matrix& to, int row, int column, int count, float low, float high) {
  const Vector<T, 2> pair = {{T(low), T(high)}};
  T* y = at<T>(to, row, column);
  const bool whole = count > 1 && reinterpret_cast<size_t>(y) % sizeof pair == 0;
  if (whole) *reinterpret_cast<Vector<T, 2>*>(y) = pair;
  for (int i = 0; i < 2; i++) if (!whole && i < count) y[i] = pair.v[i];
}

// A thread has rows row, row + 8 … of columns column, column + 1, column + 8 …; `count` columns are left from the first on.
template <class T> DEVICE void finish(const LinearParams& p, const Accumulator& acc, int row, int column, int count) {
  UNROLL for (int j = 0; j < N_TILES; j++, column += 8, count -= 8) {
    float c[2] = {1.f, 1.f}, bias[2] = {0.f, 0.f};
    UNROLL for (int i = 0; i < 2; i++) {
      if (p.column_scale && i < count) c[i] = p.column_scale[column + i];
      if (p.bias && i < count) bias[i] = float(static_cast<const T*>(p.bias)[column + i]);
    }
    UNROLL for (int i = 0; i < 2 * M_TILES; i++) {
      const float* v = acc[i / 2][j] + i % 2 * 2;
      if (row + i * 8 >= p.m) continue;
      if (p.u.data) store<T>(p.u, row + i * 8, column, count, v[0], v[1]);
      store<T>(p.y, row + i * 8, column, count, v[0] * c[0] + bias[0], v[1] * c[1] + bias[1]);
    }
  }
}

template <class T, bool TRANSPOSED>
static __global__ void __launch_bounds__(THREADS, 2) linear_kernel(const __grid_constant__ LinearParams p) {
  SHARED_DYNAMIC(memory);
  const Part& part = p.parts[blockIdx.y];
  // Eight rows of tiles at a time: neighbours share x and w in the L2.
  const int tall = int(cdiv(p.m, BM)), wide = gridDim.x / tall, group = blockIdx.x / (8 * wide) * 8;
  const int height = min(tall - group, 8), inside = blockIdx.x % (8 * wide);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, m0 = (group + inside % height) * BM, n0 = inside / height * BN;
  if (n0 >= part.columns) return;  // the grid is as wide as the widest part
  const int base = int(cdiv(p.k, BK)), ranks = int(cdiv(part.ranks, BK)), blocks = base + ranks;
  auto fill = [&](int block) {
    const bool rank = p.seed ? block < ranks : block >= base;
    const int first = (block - (p.seed ? (rank ? 0 : ranks) : (rank ? base : 0))) * BK;
    const Matrix &l = rank ? p.z : p.x, &r = rank ? part.m : p.w;
    const T* left = at<T>(l, 0, rank ? part.rank : 0);
    const T* right = at<T>(r, rank || TRANSPOSED ? 0 : part.column, !rank && TRANSPOSED ? part.column : 0);
    const int depth = int(rank ? part.ranks : p.k), columns = int(part.columns);
    unsigned char* stage = memory + block % STAGES * 2 * TILE;
    if (block < blocks) {
      copy_tile<T, BM, BK / 8, THREADS>(stage, left, l.stride, m0, int(p.m), first, depth);
      if (TRANSPOSED) copy_tile<T, BK, BN / 8, THREADS>(stage + TILE, right, r.stride, first, depth, n0, columns);
      else copy_tile<T, BN, BK / 8, THREADS>(stage + TILE, right, r.stride, n0, columns, first, depth);
    }
    copy_async_commit();
  };
  ROLLED for (int block = 0; block < STAGES - 1; block++) fill(block);
  const int row = m0 + warp / 4 * 64 + lane / 4, column = n0 + warp % 4 * 32, own = column + lane % 4 * 2;
  Accumulator acc = {};
  ROLLED for (int masked = p.seed ? 1 : 0, block = 0; masked >= 0; masked--) {
    ROLLED for (const int end = masked ? ranks : blocks; block < end; block++) {
      copy_async_wait<STAGES - 2>();
      __syncthreads();  // all copies of this block have landed, and nobody reads the block before it any more
      fill(block + STAGES - 1);
      multiply<T, TRANSPOSED>(acc, memory + block % STAGES * 2 * TILE, warp, lane);
    }
    if (masked) drop(acc, p, row, int(part.column) + column, lane);
  }
  finish<T>(p, acc, row, int(part.column) + own, int(part.columns) - own);
}

extern "C" int launch_linear(const LinearParams* params, void* stream) {
  Check check(params);
  if (check.status) return check.status;
  const LinearParams& p = *params;
  check.common(p, 0);
  check.dropped(p);
  check.refuse(check.columns != p.n, FASTLORA_SHAPE);
  const long long blocks = check.status ? 0 : cdiv(p.m, BM) * cdiv(check.widest, BN);
  check.size(blocks);
  check.matrix(p.w, p.n, p.k, 2);
  check.matrix(p.z, p.m, check.ranks, 2);
  check.matrix(p.y, p.m, p.n, 2, true);
  if (p.u.data) check.matrix(p.u, p.m, p.n, 2, true);
  if (p.bias) check.pointer(p.bias, 2);
  if (p.column_scale) check.pointer(p.column_scale, sizeof *p.column_scale);
  if (check.status || !blocks) return check.status;
  auto* kernel = p.type == FASTLORA_BF16 ? p.transposed ? linear_kernel<bf16, true> : linear_kernel<bf16, false>
                                         : p.transposed ? linear_kernel<fp16, true> : linear_kernel<fp16, false>;
  return check.launch(kernel, dim3(unsigned(blocks), p.count), THREADS, STAGES * 2 * TILE, p, stream);
}

extern "C" const char* fastlora_error(int status) {
  static const char* const sentences[] = {
      "success", "there is no CUDA device, or no driver for it", "a pointer is null", "a pointer is misaligned",
      "a pointer is not memory of the current CUDA device", "sizes, strides, parts, type or dropout do not fit together",
      "a size or a stride is beyond 2^31, or beyond what this kernel takes", "the workspace is too small"};
  if (status >= FASTLORA_CUDA) return cudaGetErrorString(static_cast<cudaError_t>(status - FASTLORA_CUDA));
  return status >= 0 && status <= FASTLORA_WORKSPACE ? sentences[status] : "an unknown status";
}

extern "C" int fastlora_device(int* architecture, int* multiprocessors) {
  int device = 0, major = 0, minor = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return FASTLORA_NO_DEVICE;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  const int error = cudaDeviceGetAttribute(multiprocessors, cudaDevAttrMultiProcessorCount, device);
  *architecture = 10 * major + minor;
  return error ? FASTLORA_CUDA + error : FASTLORA_OK;
}
