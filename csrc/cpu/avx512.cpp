// AVX-512 without its bfloat16 dot product: bf16 is split into even and odd fp32 halves.
// flags: -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx2 -mfma -mf16c -mprefer-vector-width=512
#include <immintrin.h>
#define TABLE avx512
#define VL 16
#include "table.inc.h"
