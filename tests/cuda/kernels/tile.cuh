// Tiles of 16-bit elements in shared memory, the instructions that move and multiply them, and dropout's mask. The only
// file with PTX and the only one that tells a device compiler from a host compiler, which is given the names between
// #ifdef and #endif by tests/cuda/emulate.
#pragma once
#include "params.h"
#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cstdint>
#define DEVICE static __device__ __forceinline__
#define SHARED_DYNAMIC(name) extern __shared__ __align__(128) unsigned char name[]
#define LAUNCH(kernel, grid, block, bytes, stream, params) \
  kernel<<<grid, block, bytes, static_cast<cudaStream_t>(stream)>>>(params)
DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }
// d += a b, 16 × 16 by 16 × 8
#define MMA(T, NAME)                                                                                                   \
  DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, T) {                                \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." NAME "." NAME ".f32 "                                        \
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                                     \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                      \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                                      \
  }
MMA(__nv_bfloat16, "bf16")
MMA(__half, "f16")
// Four matrices of 8 × 8: lane i names row i % 8 of matrix i / 8.
#define LDMATRIX(NAME, KIND)                                                                              \
  DEVICE void NAME(uint32_t (&r)[4], const void* row) {                                                   \
    asm volatile("ldmatrix.sync.aligned.m8n8.x4" KIND ".shared.b16 {%0, %1, %2, %3}, [%4];"               \
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory"); \
  }
LDMATRIX(ldmatrix, "")
LDMATRIX(ldmatrix_trans, ".trans")
// 16 bytes to shared memory: `bytes` of them from global memory, then zeros.
DEVICE void copy_async(void* to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes) : "memory");
}
DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int LEFT> DEVICE void copy_async_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory"); }
#endif

#define UNROLL _Pragma("unroll")
#define ROLLED _Pragma("unroll 1")
using bf16 = __nv_bfloat16; using fp16 = __half;
__host__ __device__ constexpr long long cdiv(long long a, long long b) { return (a + b - 1) / b; }
template <class T, int N> struct alignas(N * sizeof(T)) Vector { T v[N]; };
template <class T> DEVICE T* at(const Matrix& m, long long row, long long column) {
  return static_cast<T*>(m.data) + row * m.stride + column;
}

template <class T> DEVICE void put(const Matrix& m, bool fp32, int row, int column, float value) {
  if (fp32) *at<float>(m, row, column) = value;
  else *at<T>(m, row, column) = T(value);
}

// Where a chunk of eight elements lies in a tile of CHUNKS a row: eight rows of one column of chunks fill all banks.
template <int CHUNKS> DEVICE int swizzle(int row, int chunk) {
  return (row * CHUNKS + (chunk ^ (CHUNKS == 4 ? row / 2 % 4 : row % 8))) * 16;
}

// Eight elements at `from` + offset, zeros from the count-th on. A chunk off the grid of 16 bytes is copied by hand; so is
// one of another type.
template <class S, class T = S> DEVICE void copy_chunk(unsigned char* to, const S* from, long long offset, int count) {
  count = max(0, min(count, 8));
  from += count ? offset : 0;
  if (sizeof(S) == sizeof(T) && reinterpret_cast<size_t>(from) % 16 == 0) return copy_async(to, from, 2 * count);
  Vector<T, 8> chunk;
  UNROLL for (int i = 0; i < 8; i++) chunk.v[i] = i < count ? T(from[i]) : T(0.f);
  *reinterpret_cast<Vector<T, 8>*>(to) = chunk;
}

// ROWS × 8·CHUNKS elements of a matrix, zeros outside its rows and columns.
template <class T, int ROWS, int CHUNKS, int THREADS, class S>
DEVICE void copy_tile(unsigned char* tile, const S* from, long long stride, int row0, int rows, int column0, int columns) {
  UNROLL for (int i = threadIdx.x; i < ROWS * CHUNKS; i += THREADS) {
    const int row = row0 + i / CHUNKS, column = column0 + i % CHUNKS * 8, count = row < rows ? columns - column : 0;
    copy_chunk<S, T>(tile + swizzle<CHUNKS>(i / CHUNKS, i % CHUNKS), from, row * stride + column, count);
  }
}

// acc[j · STRIDE] += rows first … first + 15 of `left`, or columns where it is TURNED, times the columns of tile + j · STEP
// of `right`: it has tiles of eight columns, 64 in all, and its rows are the sum's K.
template <class T, bool TURNED, int K, int CHUNKS, int STEP, int STRIDE>
DEVICE void multiply_rows(Vector<float, 4>* acc, const unsigned char* left, int first, const unsigned char* right,
                          int tile, int tiles, int lane) {
  UNROLL for (int k = 0; k < K; k += 32) {
    uint32_t a[2][4], b[4];
    UNROLL for (int i = 0; i < 2; i++) {
      const int k0 = k + i * 16;
      if (TURNED) ldmatrix_trans(a[i], left + swizzle<CHUNKS>(k0 + lane / 16 * 8 + lane % 8, first / 8 + lane / 8 % 2));
      else ldmatrix(a[i], left + swizzle<CHUNKS>(first + lane % 16, k0 / 8 + lane / 16));
    }
    UNROLL for (int j = 0; j * STEP < 8; j++) {
      if (tile + j * STEP >= tiles) break;
      ldmatrix_trans(b, right + swizzle<8>(k + lane, tile + j * STEP));
      mma(acc[j * STRIDE].v, a[0], b[0], b[1], T{});
      mma(acc[j * STRIDE].v, a[1], b[2], b[3], T{});
    }
  }
}

// The four words of Philox 4x32-10 whose 16-bit halves, low half first, decide elements 8·group … 8·group + 7.
DEVICE void philox(uint64_t seed, uint64_t group, uint32_t (&c)[4]) {
  uint32_t key0 = uint32_t(seed), key1 = uint32_t(seed >> 32);
  c[0] = uint32_t(group), c[1] = uint32_t(group >> 32), c[2] = c[3] = 0;
  UNROLL for (int round = 0; round < 10; round++) {
    const uint64_t p = uint64_t(0xD2511F53) * c[0], q = uint64_t(0xCD9E8D57) * c[2];
    c[0] = uint32_t(q >> 32) ^ c[1] ^ key0, c[1] = uint32_t(q);
    c[2] = uint32_t(p >> 32) ^ c[3] ^ key1, c[3] = uint32_t(p);
    key0 += 0x9E3779B9, key1 += 0xBB67AE85;
  }
}

// Bit i: dropout keeps element first + i. Eight decisions from one call, from two where they straddle groups.
DEVICE uint32_t keep_eight(uint64_t seed, uint64_t first, uint32_t dropped) {
  const int shift = int(first % 8);
  uint32_t bits = 0;
  for (int group = 0; group <= (shift ? 1 : 0); group++) {
    uint32_t words[4];
    philox(seed, first / 8 + group, words);
    UNROLL for (int i = 0; i < 8; i++)
      bits |= uint32_t((words[i / 2] >> i % 2 * 16 & 0xffff) >= dropped) << (8 * group + i);
  }
  return bits >> shift & 0xff;
}
DEVICE float keep_scale(int dropped) { return dropped < 65536 ? 65536.f / float(65536 - dropped) : 0.f; }
