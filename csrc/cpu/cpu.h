// The CPU kernels' own border: plain structs and one table of functions per instruction set and type, no torch. Letters as
// in the formula: x [M, K], w, a [R, K], b [N, R], z [M, R], g (gates). Inline code does not belong here: every
// instruction-set file includes this header, and the linker keeps one copy of an inline function for everyone.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace fastlora::cpu {

enum Type { kFloat, kBFloat16, kHalf };

// One adapter's matrix. f(n, r) is data[n * ld + r] when along_rank, else data[r * ld + n]: b and a serve both ways.
struct Factor {
  const void* data;
  Type type;
  int64_t rank, ld;
  bool along_rank;
};

// g[m, r] is rows[m * stride + r], or the scalar where rows is null.
struct Gates {
  float scalar;
  const float* rows;
  int64_t stride;
};

// Philox dropout: element (m, k) of a matrix with `width` columns is kept where its 16-bit lane is >= threshold.
struct Mask {
  uint64_t seed;
  uint32_t threshold;
  float scale;
  int64_t width;
};

// y[m, n] = c[n] (sum_k x[m, k] w(n, k) + D(sum_r z[m, r] g[m, r] f(n, r)) + add[m, n]) + bias[n];  u = y before c, bias
// or z_out = D(x) aT;  or da[r, k] = sum_m z[m, r] g[m, r] D(x)[m, k], for each adapter: their kernels read less of it.
struct Gemm {
  Type type;
  int64_t M, N, K, R;
  const void* x;
  int64_t ldx;
  const void* w;
  int64_t ldw;
  bool w_along_k;    // w(n, k) is w[n * ldw + k], else w[k * ldw + n]
  int adapters;
  const Factor* a;   // beside w, each thread computes z = x aT for itself; null: z is given
  const Factor* f;
  const float* z;
  float* z_out;      // where the first thread leaves z; may be null
  Gates g;
  Mask mask;
  const void* add;
  int64_t ldadd;
  void* y;
  int64_t ldy;
  void* u;
  const float* c;
  const void* bias;
  float* const* da;  // of each adapter [rank, K], or [K, rank] where a lies along_rank
};

// One adapter of a token's list: `pieces` of rank rows along n, and DoRA's d = c - 1 or null
struct Added {
  int pieces;
  const Factor* b;
  const void* d;
};

// For M rows of y that share a list: with v = y - bias, y += sum over the list's adapters j of sum_r zg[m, r] b(r, n), which
// DoRA makes (1 + d) that + gates[offsets[rows[m]] + j] d v
struct Spread {
  int64_t M;
  const int64_t* rows;     // y's row of each
  const float* zg;
  int64_t ldz;
  const float* gates;
  const int32_t* offsets;
  int adapters;
  const Added* list;
  void* y;
  int64_t ldy;
  const void* bias;
};

enum Form { kDot, kTiles, kDirect, kPacked, kVendor };

constexpr int kGroup = 256;     // columns of w packed together: one read of an x tile serves them
constexpr int kSteps = 512;     // most steps of the summed axis per block
constexpr int kRows = 576;     // most rows of y per block of partial sums: a multiple of every row tile
constexpr int kTileRows = 12;   // the tallest row tile
constexpr int kDotRows = 64;    // rows of x per block of the dot form
constexpr int kTileBlock = 128; // and of the tile form

struct Kernels {
  void (*gemm)(const Gemm&, Form, int64_t m0, int64_t m1, int64_t n0, int64_t n1, char* scratch);
  void (*shrink)(const Gemm&, bool tiles, int64_t m0, int64_t m1, char* scratch);
  void (*outer)(const Gemm&, int64_t k0, int64_t k1, char* scratch);
  void (*spread)(const Spread&, int64_t n0, int64_t n1);
  void (*dropout)(const void* x, void* y, int64_t n, int64_t i, const Mask&);   // one row, from element i of the mask
  int tile_columns;   // n0 and n1 are multiples of it, except N itself
};

// by Type
extern const Kernels portable[], avx2[], avx512[];
extern const Kernels avx512_bf16[];   // bfloat16 only; the rest is avx512's

// What the CPU does, and which form a product takes.
struct Cpu {
  const Kernels* table[3];   // by Type
  const char* name;
  bool dot_bf16;             // vdpbf16ps is worth using
  bool intel;                // MKL's sgemm reaches its peak there only
  bool amx;                  // products of bf16 run on tiles, several times as fast as in any vector form
  bool composed;             // FASTLORA_CPU=composed: no kernel of ours
};
const Cpu& cpu();            // throws where FASTLORA_CPU names what this CPU lacks
Form choose(const Gemm&, const Cpu&);

}  // namespace fastlora::cpu
