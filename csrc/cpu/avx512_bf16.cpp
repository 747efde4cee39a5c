// bfloat16 through vdpbf16ps; the other types are in avx512.cpp.
// flags: -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512bf16 -mamx-tile -mamx-bf16 -mavx2 -mfma -mf16c -mprefer-vector-width=512
#include <immintrin.h>
#define DOT_BF16
#define TABLE avx512_bf16
#define VL 16
#include "table.inc.h"
