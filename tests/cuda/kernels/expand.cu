// y += z b in place, slice by slice of its columns, for base layers that are no dense matrix. z comes gated and rounded. y is
// read once and written once, in whole sectors: column c of tile j is b's row 8 c + j, so that a lane has 16 neighbours.
#include "check.h"
#include "direct.cuh"

constexpr int BM = 128, BN = 64, THREADS = 256;  // a strip a warp

template <class T>
static __global__ void __launch_bounds__(THREADS, 2) expand_kernel(const __grid_constant__ ExpandParams p) {
  const Part& part = p.parts[blockIdx.y];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, wide = gridDim.x / int(cdiv(p.m, BM)), m = int(p.m);
  const int m0 = blockIdx.x / wide * BM + warp * 16, n0 = blockIdx.x % wide * BN, row = m0 + lane / 4;
  const int ranks = int(part.ranks), columns = int(part.columns);
  if (m0 >= m || n0 >= columns || !ranks) return;
  float acc[8][4] = {};
  ROLLED for (int first = 0; first < ranks; first += 32) {
    const int k = first + lane % 4 * 8, count = ranks - k;
    Vector<T, 8> z[2];
    UNROLL for (int i = 0; i < 2; i++)
      z[i] = load<8>(at<T>(p.z, row + i * 8, part.rank), k, row + i * 8 < m ? count : 0);
    UNROLL for (int j = 0; j < 8; j++) {
      const int column = n0 + lane / 4 * 8 + j;
      multiply(acc[j], z, load<8>(at<T>(part.m, column, 0), k, column < columns ? count : 0));
    }
  }
  UNROLL for (int i = 0; i < 2; i++)
    if (row + i * 8 < m) add(at<T>(p.y, row + i * 8, part.column + n0), acc, i, lane % 4 * 16, columns - n0);
}

extern "C" int launch_expand(const ExpandParams* params, void* stream) {
  Check check(params);
  if (check.status) return check.status;
  const ExpandParams& p = *params;
  check.common(p, 0);
  const long long blocks = check.status ? 0 : cdiv(p.m, BM) * cdiv(check.widest, BN);
  check.size(blocks);
  check.matrix(p.z, p.m, check.ranks, 2);
  check.matrix(p.y, p.m, check.columns, 2, true);
  if (check.status || !blocks) return check.status;
  auto* kernel = p.type == FASTLORA_BF16 ? expand_kernel<bf16> : expand_kernel<fp16>;
  return check.launch(kernel, dim3(unsigned(blocks), p.count), THREADS, 0, p, stream);
}
