// What the launchers of the CUDA kernels take and return. Letters as in kernels/README.md; matrices are row-major; every
// pointer is memory of the current device. `dropped` is round(p · 65536), `type` a FastloraType.
#pragma once
enum FastloraType { FASTLORA_BF16, FASTLORA_FP16 };
enum FastloraLimits { FASTLORA_PARTS = 8, FASTLORA_TILE = 4096 };
// FASTLORA_CUDA + e is the runtime's error e. fastlora_error has a sentence for each.
enum FastloraStatus { FASTLORA_OK, FASTLORA_NO_DEVICE, FASTLORA_NULL, FASTLORA_MISALIGNED, FASTLORA_FOREIGN,
                      FASTLORA_SHAPE, FASTLORA_TOO_LARGE, FASTLORA_WORKSPACE, FASTLORA_CUDA = 1000 };

struct Matrix { void* data; long long stride; };  // `stride` elements from one row to the next
// Columns of z and, in the GEMM, the columns of y that they update; each part begins where the one before ends.
struct Part {
  Matrix m;  // GEMM: b as w, [columns, ranks] or transposed [ranks, columns]; shrink: a [ranks, k]
  long long rank, ranks, column, columns;
};

// y = c ⊙ (x w + z b) + bias. With a seed y = c ⊙ (x w + D(z b)) + bias, the mask that of a matrix [m, n].
struct LinearParams {
  Matrix x, w, z;             // [m, k]; [n, k] or transposed [k, n]; gated, in x's type
  Matrix y, u;                // [m, n]; null or [m, n], what c multiplies
  const void* bias;           // null or [n] in x's type
  const float* column_scale;  // null or c [n]
  const long long* seed;      // null or one number
  Part parts[FASTLORA_PARTS];
  long long m, n, k;
  int count, dropped, type, transposed;
};

// z = D(x) aᵀ and zg = z ⊙ (scale · g) in x's type.
struct ShrinkParams {
  Matrix x, z, zg, g;     // [m, k]; null or fp32 [m, ranks]; null or [m, ranks]; null or fp32, stride 0 for one row
  const long long* seed;  // null or one number
  float* partial;         // where splits > 1: for each counter splits · FASTLORA_TILE floats
  unsigned* arrived;      // and fastlora_shrink_counters() zeros, left as zeros
  Part parts[FASTLORA_PARTS];
  long long m, k, partials, counters;  // the last two: what there is room for
  float scale;
  int count, dropped, type, splits;  // splits: parts of K, added in their order
};

// What Route and Pages of fastlora/ops/route.py hold: tokens with equal lists of adapters in tiles of at most sixteen,
// and for each slot the pages that have its rank rows, eight a page.
struct Route {
  const int *tiles, *offsets, *slots, *table, *ranks;
  const long long* order;
  const float *gates, *scales;
  long long a_page, b_page, table_stride;  // elements from one page, or row of the table, to the next
  int count, known;                        // tiles; slots that have a row in the tables
};

// y = c ⊙ (x w + zg b) + bias for at most 64 tokens, zg as in the shrink; with a route each token's own adapters:
// c ⊙ (x w + Σ gate · scales[slot] · z b) + bias, g and scale not used.
struct DecodeParams {
  Matrix x, w, y, g;          // [m, k]; [n, k]; [m, n]; null or fp32 [m, ranks], stride 0 for one row
  const void* bias;           // null or [n] in x's type
  const float* column_scale;  // null or c [n]
  float* partial;             // as for the shrink, with fastlora_decode_counters()
  unsigned* arrived;
  Part parts[FASTLORA_PARTS];  // m: a; with a route its pages for this part, from the first on, and no ranks
  Matrix b[FASTLORA_PARTS];    // [columns, ranks] of each part; with a route the pages of B from the part's column on
  Route route;                 // no tiles: none
  long long m, n, k, partials, counters;
  float scale;
  int count, type, splits;
};

extern "C" const char* fastlora_error(int status);
extern "C" int launch_linear(const LinearParams* params, void* stream);
extern "C" int launch_shrink(const ShrinkParams* params, void* stream);
extern "C" long long fastlora_shrink_counters(long long m, long long ranks);
extern "C" int launch_decode(const DecodeParams* params, void* stream);
extern "C" long long fastlora_decode_counters(long long parts, long long widest);
