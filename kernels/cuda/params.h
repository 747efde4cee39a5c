// What the launchers of the CUDA kernels take and return. Plain C: torch's glue, ctypes and the kernels see one layout.
// Letters and shapes as in kernels/README.md; every matrix is row-major with rows of its own distance.
#pragma once

enum FastloraType { FASTLORA_BF16, FASTLORA_FP16 };
enum FastloraLimits { FASTLORA_PARTS = 8 };

// Zero is success; FASTLORA_CUDA + e is the runtime's error e. fastlora_error has a sentence for each.
enum FastloraStatus {
  FASTLORA_OK,
  FASTLORA_NO_DEVICE,
  FASTLORA_NULL,
  FASTLORA_MISALIGNED,
  FASTLORA_FOREIGN,
  FASTLORA_SHAPE,
  FASTLORA_TOO_LARGE,
  FASTLORA_WORKSPACE,
  FASTLORA_CUDA = 1000
};

struct Matrix {
  void* data;
  long long stride;  // elements from one row to the next
};

// The next `columns` columns of y, updated by the next `ranks` columns of z.
struct Slice {
  struct Matrix b;  // as w: [columns, ranks], or [ranks, columns] where w is transposed
  long long columns, ranks;
};

// y = c ⊙ (x w + z b) + bias. With a seed: y = c ⊙ (x w + D(z b)) + bias, the mask that of a matrix [m, n].
struct LinearParams {
  struct Matrix x;            // [m, k]
  struct Matrix w;            // [n, k], transposed: [k, n]
  struct Matrix z;            // [m, all ranks], gated and in x's type
  struct Matrix y;            // [m, n]
  struct Matrix u;            // null, or [m, n]: what c multiplies
  const void* bias;           // null, or [n] in x's type
  const float* column_scale;  // null, or c [n]
  const long long* seed;      // null, or one number on the device
  struct Slice slices[FASTLORA_PARTS];
  long long m, n, k;
  int count;    // of slices; together they are n columns wide
  int dropped;  // round(p · 65536)
  int transposed;
  int type;
};

// One adapter, or one projection's adapters: the next `ranks` columns of z.
struct Rows {
  struct Matrix a;  // [ranks, k] in x's type
  long long ranks;
};

// z = D(x) aᵀ, and zg = z ⊙ (scale · g) in x's type.
struct ShrinkParams {
  struct Matrix x;        // [m, k]
  struct Matrix z;        // null, or [m, all ranks] fp32
  struct Matrix zg;       // null, or [m, all ranks]
  struct Matrix g;        // null, or [m, all ranks] fp32; distance 0: one row for all
  const long long* seed;  // null, or one number on the device
  float* partial;         // room for fastlora_shrink_partials() floats where splits > 1
  int* arrived;           // fastlora_shrink_counters() numbers, zero before the first launch; each leaves zeros
  struct Rows parts[FASTLORA_PARTS];
  long long m, k, partials, counters;  // partials, counters: what there is room for
  float scale;
  int count;    // of parts
  int dropped;  // round(p · 65536)
  int splits;   // of k; the sum of their parts has a fixed order
  int type;
};

#ifdef __cplusplus
extern "C" {
#endif
const char* fastlora_error(int status);
int launch_linear(const struct LinearParams* params, void* stream);
int launch_shrink(const struct ShrinkParams* params, void* stream);
long long fastlora_shrink_partials(long long m, long long ranks, int splits);
long long fastlora_shrink_counters(long long m, long long ranks);
#ifdef __cplusplus
}
#endif
