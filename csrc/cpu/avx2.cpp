// AVX2, FMA and F16C.
// flags: -mavx2 -mfma -mf16c
#include "cpu.h"
#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include <immintrin.h>
#define VL 8
#include "table.inc.h"
const fastlora::cpu::Kernels* fastlora::cpu::avx2() { return &table; }
#else
const fastlora::cpu::Kernels* fastlora::cpu::avx2() { return nullptr; }
#endif
