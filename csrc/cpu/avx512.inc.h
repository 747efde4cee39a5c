// What both AVX-512 files replace by instructions.
#include <immintrin.h>
#define VL 16
#define half_to_float(h) (vf)_mm512_cvtph_ps((__m256i)(h))
#define float_to_half(v) (vh)_mm512_cvtps_ph((__m512)(v), _MM_FROUND_TO_NEAREST_INT)
#define multiply(a, b) (vq)_mm512_mul_epu32((__m512i)(a), _mm512_set1_epi64(b))
#include "table.inc.h"
