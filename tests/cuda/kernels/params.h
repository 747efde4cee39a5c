// What the launchers of the CUDA kernels take and return. Letters as in kernels/README.md; matrices are row-major; every
// pointer is memory of the current device. `dropped` is round(p · 65536), `type` a FastloraType.
#pragma once
enum FastloraType { FASTLORA_BF16, FASTLORA_FP16 };
enum FastloraLimits { FASTLORA_PARTS = 8, FASTLORA_TILE = 4096, FASTLORA_ROUTED_TILE = 512, FASTLORA_NORMS_ROWS = 128 };
// FASTLORA_CUDA + e is the runtime's error e. fastlora_error has a sentence for each.
enum FastloraStatus { FASTLORA_OK, FASTLORA_NO_DEVICE, FASTLORA_NULL, FASTLORA_MISALIGNED, FASTLORA_FOREIGN,
                      FASTLORA_SHAPE, FASTLORA_TOO_LARGE, FASTLORA_WORKSPACE, FASTLORA_CUDA = 1000 };

struct Matrix { void* data; long long stride; };  // `stride` elements from one row to the next
// Columns of z and, where b is, the columns of y that they update; each part begins where the one before ends.
struct Part {
  Matrix m;  // b as w, [columns, ranks] or transposed [ranks, columns]; shrink: a [ranks, k], its backward: da
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

// Rank row r of slot s: row r % 8 of page table[s, r / 8]. Elements from one page, slice of y's columns, row to the next.
struct Pages { void* data; long long page, slice, row; };
// Which adapters each token uses: the tensors of a Route and of Pages (fastlora/ops/route.py). They are trusted, but a
// slot that is not in the tables has rank 0 and no DoRA. DoRA's c − 1 is the first row of b's page columns[slot], if not negative.
struct Routed {
  const long long* order;                         // [m]
  const int *tiles, *offsets, *slots, *ranks;     // [count, 3]; [m + 1]; [entries]; [adapters]
  const int* columns;                             // null or [adapters]
  Matrix table;                                   // int [adapters, pages]
  long long m, count, entries, adapters, pages;
};

// y = c ⊙ (x w + zg b) + bias for at most 64 tokens, zg as in the shrink; with a route each token's own adapters:
// c ⊙ (x w + Σ gate (d ⊙ x w + (1 + d) ⊙ scales[slot] · z b)) + bias, d the slot's c − 1 or 0; g and scale not used.
struct DecodeParams {
  Matrix x, w, y, g;          // [m, k]; [n, k]; [m, n]; null or fp32 [m, ranks], stride 0 for one row
  const void* bias;           // null or [n] in x's type
  const float* column_scale;  // null or c [n]
  float* partial;             // as for the shrink, with fastlora_decode_counters()
  unsigned* arrived;
  Part parts[FASTLORA_PARTS];    // m: a; with a route columns alone
  Matrix b[FASTLORA_PARTS];      // [columns, ranks] of each part; not with a route
  Routed route;                  // of m tokens, or no tiles, entries or pages: none
  Pages a_pages, b_pages;        // rows of k, a slice for each part; of n
  const float *gates, *scales;   // [entries]; [adapters]
  long long m, n, k, partials, counters;
  float scale;
  int count, type, splits;
};

// t = dy bᵀ, t ⊙ (scale · g), t ⊙ z, and db = (z ⊙ (scale · g))ᵀ dy, (z ⊙ …) rounded to dy's type as the shrink does it.
struct Expand_backwardParams {
  Matrix dy, z, g;            // [m, columns]; fp32 [m, ranks]; null or fp32, stride 0 for one row
  Matrix t, dz, dg;           // null or [m, ranks], in fp32, dy's type, fp32
  Matrix db[FASTLORA_PARTS];  // null or [columns, ranks], in dy's type or fp32
  float* partial;             // both as fastlora_expand_backward_workspace() says; counters are zero and left as zeros
  unsigned* arrived;
  Part parts[FASTLORA_PARTS];
  long long m, partials, counters;
  float scale;
  int count, type, splits, fp32_db;  // splits: parts of n for t; db has one for each block of rows
};

// da = dzᵀ D(x)
struct Shrink_backwardParams {
  Matrix x, dz;           // [m, k]; [m, ranks] gated, in x's type or fp32
  const long long* seed;  // null or one number
  float* partial;         // where splits > 1: for each counter splits · 2 · FASTLORA_TILE floats
  unsigned* arrived;      // and fastlora_shrink_backward_counters() zeros, left as zeros
  Part parts[FASTLORA_PARTS];
  long long m, k, partials, counters;
  int count, dropped, type, splits, fp32_dz, fp32_da;  // splits: parts of m, added in their order
};

// y += z b, in place, columns of the parts side by side.
struct ExpandParams {
  Matrix y, z;  // [m, columns]; gated, in y's type, [m, ranks]
  Part parts[FASTLORA_PARTS];
  long long m;
  int count, type;
};

// y[i] += (scale · g[i] ⊙ a[:, ids[i]]) b, in place, and z[i] = a[:, ids[i]]. Where ids[i] is not in [0, vocab) y keeps
// its bits and z is zero.
struct GatherParams {
  Matrix y, a, b;        // [m, columns]; [ranks, vocab]; [columns, ranks]
  Matrix g, z;           // null or fp32 [m, ranks]; g's stride 0 for one row
  const long long* ids;  // [m]
  long long m, ranks, columns, vocab;
  float scale;
  int type;
};

// norms[i] = ‖w[i] + scale · (g ⊙ b[i]) a‖₂
struct NormsParams {
  Matrix w, a, b;  // [n, k]; [ranks, k]; [n, ranks]
  const float* g;  // null or [ranks]; g ⊙ b must be in w's type's range
  float* norms;
  float* partial;     // where splits > 1: for each counter splits · 8 · FASTLORA_NORMS_ROWS floats
  unsigned* arrived;  // and ⌈n / FASTLORA_NORMS_ROWS⌉ zeros, left as zeros
  long long n, k, ranks, partials, counters;
  float scale;
  int type, splits;  // splits: parts of k, added in their order
};

// z[entry] = x aᵀ of its token and slot: in fp32, for each slice 8 · pages columns, zero beyond the rank.
struct Routed_shrinkParams {
  Matrix x, z;        // [m, k]; [entries, slices · 8 · pages]
  Pages a;            // rows of k
  Routed route;
  float* partial;     // where splits > 1: for each counter splits · FASTLORA_ROUTED_TILE floats
  unsigned* arrived;  // and entries · slices · ⌈pages / 4⌉ zeros, left as zeros
  long long k, slices, partials, counters;
  int type, splits;
};

// y[token] += Σ gate (d ⊙ (y[token] − bias) + (1 + d) ⊙ scale · z[entry] b) over its slots, in place, d as in decode; a
// token without any keeps its bits.
struct Routed_expandParams {
  Matrix y, z;                        // [m, columns of all slices]; as the shrink leaves it
  Pages b;                            // rows of y's columns, all slices side by side
  Routed route;
  const void* bias;                   // null or [columns of all slices] in y's type, what y has beside x w: for DoRA alone
  const float *gates, *scales;        // [entries]; [adapters]
  long long columns[FASTLORA_PARTS];  // of each slice
  int count, type;
};

extern "C" const char* fastlora_error(int status);
// Of the current device: 80, 90 …, and how many multiprocessors it has.
extern "C" int fastlora_device(int* architecture, int* multiprocessors);
extern "C" int launch_linear(const LinearParams* params, void* stream);
extern "C" int launch_shrink(const ShrinkParams* params, void* stream);
extern "C" long long fastlora_shrink_counters(long long m, long long ranks);
extern "C" int launch_decode(const DecodeParams* params, void* stream);
extern "C" long long fastlora_decode_counters(long long parts, long long widest);
extern "C" int launch_expand_backward(const Expand_backwardParams* params, void* stream);
extern "C" int launch_shrink_backward(const Shrink_backwardParams* params, void* stream);
// Floats, and the number of counters, of what the params describe: m, parts and splits are looked at.
extern "C" long long fastlora_expand_backward_workspace(const Expand_backwardParams* params, long long* counters);
extern "C" long long fastlora_shrink_backward_counters(long long k, long long ranks);
extern "C" int launch_expand(const ExpandParams* params, void* stream);
extern "C" int launch_gather(const GatherParams* params, void* stream);
extern "C" int launch_norms(const NormsParams* params, void* stream);
extern "C" int launch_routed_shrink(const Routed_shrinkParams* params, void* stream);
extern "C" int launch_routed_expand(const Routed_expandParams* params, void* stream);
