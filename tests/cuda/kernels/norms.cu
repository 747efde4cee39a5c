// norms = ‖w + scale · (g ⊙ b) a‖ of each row, DoRA's. w is read once; w + Δw is in registers alone, and never rounded.
// A warp goes along 16 rows of w in strips of 64 columns. Where that makes too few blocks K is split.
#include <cmath>

#include "check.h"
#include "direct.cuh"
#include "reduce.cuh"

constexpr int BN = FASTLORA_NORMS_ROWS, BK = 64, THREADS = BN / 16 * 32;

template <class T>
static __global__ void __launch_bounds__(THREADS, 2) norms_kernel(const __grid_constant__ NormsParams p) {
  SHARED_DYNAMIC(memory);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, own = warp * 16 + lane / 4, row = blockIdx.x * BN + own;
  const int all = int(cdiv(p.k, BK)), splits = gridDim.y, each = int(cdiv(all, splits));
  const int begin = min(int(blockIdx.y) * each, all), end = min(begin + each, all), ranks = int(p.ranks);
  Vector<float, 4> sum[1] = {};  // of two rows, over the lane's columns
  ROLLED for (int k0 = begin * BK; k0 < end * BK; k0 += BK) {
    const int k = int(p.k) - k0, mine = lane % 4 * 16, theirs = lane / 4 * 8;
    Vector<T, 8> w[2][2];
    UNROLL for (int i = 0; i < 4; i++)
      w[i / 2][i % 2] = load<8>(at<T>(p.w, row + i / 2 * 8, k0), mine + i % 2 * 8,
                                row + i / 2 * 8 < p.n ? k - mine - i % 2 * 8 : 0);
    float delta[8][4] = {};
    ROLLED for (int first = 0; first < ranks; first += 16) {
      const int r = first + lane % 4 * 4;
      Vector<T, 8> a[4];
      Vector<T, 4> b[2], rest[2];
      UNROLL for (int i = 0; i < 4; i++) a[i] = load<8>(at<T>(p.a, r + i, k0), theirs, r + i < ranks ? k - theirs : 0);
      UNROLL for (int i = 0; i < 2; i++)
        b[i] = load<4>(at<T>(p.b, row + i * 8, 0), r, row + i * 8 < p.n ? ranks - r : 0);
      if (p.g) {
        // ΔW may be as large as w, and undo it: what is left of g ⊙ b by rounding goes into the product as well.
        const Vector<float, 4> g = load<4>(p.g, r, ranks - r);
        UNROLL for (int i = 0; i < 8; i++) {
          const float gated = float(b[i / 4].v[i % 4]) * g.v[i % 4];
          b[i / 4].v[i % 4] = T(gated);
          rest[i / 4].v[i % 4] = T(gated - float(b[i / 4].v[i % 4]));
        }
        multiply(delta, rest, a);
      }
      multiply(delta, b, a);
    }
    UNROLL for (int i = 0; i < 2; i++) {
      float squares = 0;  // of the strip by themselves: shorter sums err less
      UNROLL for (int j = 0; j < 16; j++) {
        const float v = float(w[i][j / 8].v[j % 8]) + p.scale * delta[j % 8][2 * i + j / 8];
        squares += v * v;
      }
      sum[0].v[i] += squares;
    }
  }
  if (splits > 1 && !reduce<THREADS>(p.partial, p.arrived, blockIdx.x, blockIdx.y, splits, sum, 1)) return;
  auto* sums = reinterpret_cast<Vector<float, 4>*>(memory);  // of each row, by lanes
  UNROLL for (int i = 0; i < 2; i++) sums[own + i * 8].v[lane % 4] = sum[0].v[i];
  __syncthreads();
  const int thread = threadIdx.x, n = blockIdx.x * BN + thread;
  const Vector<float, 4> four = thread < BN ? sums[thread] : sum[0];
  if (thread < BN && n < p.n) p.norms[n] = sqrtf((four.v[0] + four.v[1]) + (four.v[2] + four.v[3]));
}

extern "C" int launch_norms(const NormsParams* params, void* stream) {
  Check check(params);
  if (check.status) return check.status;
  const NormsParams& p = *params;
  check.refuse(p.type != FASTLORA_BF16 && p.type != FASTLORA_FP16, FASTLORA_SHAPE);
  check.refuse(p.splits < 1 || p.splits > 65535, FASTLORA_SHAPE);
  for (long long n : {p.n, p.k, p.ranks}) check.size(n);
  const long long tiles = check.status ? 0 : cdiv(p.n, BN);
  check.matrix(p.w, p.n, p.k, 2);
  check.matrix(p.a, p.ranks, p.k, 2);
  check.matrix(p.b, p.n, p.ranks, 2);
  if (check.status || !tiles) return check.status;
  if (p.g && p.ranks) check.pointer(p.g, sizeof *p.g);
  check.pointer(p.norms, sizeof *p.norms);
  if (p.splits > 1) check.workspace(p, tiles * p.splits * 8 * BN, tiles);
  if (check.status) return check.status;
  auto* kernel = p.type == FASTLORA_BF16 ? norms_kernel<bf16> : norms_kernel<fp16>;
  return check.launch(kernel, dim3(unsigned(tiles), p.splits), THREADS, BN * int(sizeof(Vector<float, 4>)), p, stream);
}
