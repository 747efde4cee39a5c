// AVX-512 without its bfloat16 dot product: bf16 is split into even and odd fp32 halves.
// flags: -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx2 -mfma -mf16c -mprefer-vector-width=512
#include "cpu.h"
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#include <immintrin.h>
#define VL 16
#include "table.inc.h"
const fastlora::cpu::Kernels* fastlora::cpu::avx512() { return &table; }
#else
const fastlora::cpu::Kernels* fastlora::cpu::avx512() { return nullptr; }
#endif
