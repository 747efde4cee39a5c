// AVX2, FMA and F16C.
// flags: -mavx2 -mfma -mf16c
#include "cpu.h"
#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include <immintrin.h>
#define VL 8
#define half_to_float(h) (vf)_mm256_cvtph_ps((__m128i)(h))
#define float_to_half(v) (vh)_mm256_cvtps_ph((__m256)(v), _MM_FROUND_TO_NEAREST_INT)
#define multiply(a, b) (vq)_mm256_mul_epu32((__m256i)(a), _mm256_set1_epi64x(b))
#include "table.inc.h"
const fastlora::cpu::Kernels* fastlora::cpu::avx2() { return &table; }
#else
const fastlora::cpu::Kernels* fastlora::cpu::avx2() { return nullptr; }
#endif
