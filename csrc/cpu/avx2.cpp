// AVX2, FMA and F16C.
// flags: -mavx2 -mfma -mf16c
#include <immintrin.h>
#define TABLE avx2
#define VL 8
#include "table.inc.h"
