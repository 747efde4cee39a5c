// y += (scale · g ⊙ z) b in place, where z is the column of a that a token's id names: an embedding's update. A block
// gathers z once for its columns, gates it in fp32 and rounds it, as the shrink does zg; y is read and written once.
#include "check.h"
#include "direct.cuh"

constexpr int BM = 32, BN = 256, STEP = 32, THREADS = 256;  // a strip a warp, STEP ranks at a time

// Negative where there is no such row of y, or no such column of a.
DEVICE long long id_of(const GatherParams& p, int row) {
  const long long id = row < p.m ? p.ids[row] : -1;
  return id < p.vocab ? id : -1;
}

template <class T>
static __global__ void __launch_bounds__(THREADS, 2) gather_kernel(const __grid_constant__ GatherParams p) {
  SHARED_DYNAMIC(memory);
  T* zg = reinterpret_cast<T*>(memory);  // BM rows of STEP: a warp's reads of 16 bytes fill all banks
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, ranks = int(p.ranks), columns = int(p.columns);
  const int m0 = blockIdx.x * BM, own = warp / 4 * 16 + lane / 4, n0 = blockIdx.y * BN + warp % 4 * 64;
  float acc[8][4] = {};
  ROLLED for (int first = 0; first < ranks; first += STEP) {
    __syncthreads();  // nobody reads the ranks before any more
    UNROLL for (int i = threadIdx.x; i < BM * STEP; i += THREADS) {
      const int row = m0 + i / STEP, r = first + i % STEP;
      const long long id = id_of(p, row);
      const bool there = id >= 0 && r < ranks;
      const float z = there ? float(*at<T>(p.a, r, id)) : 0.f, g = there && p.g.data ? *at<float>(p.g, row, r) : 1.f;
      if (p.z.data && !blockIdx.y && row < p.m && r < ranks) *at<float>(p.z, row, r) = z;
      zg[i] = T(there ? z * p.scale * g : 0.f);
    }
    __syncthreads();
    const int k = lane % 4 * 8;
    Vector<T, 8> z[2];
    UNROLL for (int i = 0; i < 2; i++) z[i] = *reinterpret_cast<const Vector<T, 8>*>(zg + (own + i * 8) * STEP + k);
    UNROLL for (int j = 0; j < 8; j++) {
      const int column = n0 + lane / 4 * 8 + j;
      multiply(acc[j], z, load<8>(at<T>(p.b, column, 0), first + k, column < columns ? ranks - first - k : 0));
    }
  }
  UNROLL for (int i = 0; i < 2; i++) {
    const int row = m0 + own + i * 8;
    if (n0 < columns && id_of(p, row) >= 0) add(at<T>(p.y, row, n0), acc, i, lane % 4 * 16, columns - n0);
  }
}

extern "C" int launch_gather(const GatherParams* params, void* stream) {
  Check check(params);
  if (check.status) return check.status;
  const GatherParams& p = *params;
  check.refuse(p.type != FASTLORA_BF16 && p.type != FASTLORA_FP16, FASTLORA_SHAPE);
  for (long long n : {p.m, p.ranks, p.columns, p.vocab}) check.size(n);
  if (check.status || !p.m || !p.ranks) return check.status;
  const dim3 grid(unsigned(cdiv(p.m, BM)), unsigned(max(1ll, cdiv(p.columns, BN))));  // without columns z alone
  check.refuse(grid.y > 65535, FASTLORA_TOO_LARGE);
  check.matrix(p.y, p.m, p.columns, 2, true);
  check.matrix(p.a, p.ranks, p.vocab, 2);
  check.matrix(p.b, p.columns, p.ranks, 2);
  if (p.g.data) check.matrix(p.g, p.m, p.ranks, 4);
  if (p.z.data) check.matrix(p.z, p.m, p.ranks, 4, true);
  check.pointer(p.ids, sizeof *p.ids);
  if (check.status) return check.status;
  auto* kernel = p.type == FASTLORA_BF16 ? gather_kernel<bf16> : gather_kernel<fp16>;
  return check.launch(kernel, grid, THREADS, BM * STEP * 2, p, stream);
}
