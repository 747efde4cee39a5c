// bfloat16 through vdpbf16ps; the other types are in avx512.cpp.
// flags: -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512bf16 -mamx-tile -mamx-bf16 -mavx2 -mfma -mf16c -mprefer-vector-width=512
#include "cpu.h"
#if defined(__AVX512BF16__) && defined(__AMX_BF16__)
#include <immintrin.h>
#include <time.h>
#define DOT_BF16
#define VL 16
#include "table.inc.h"
namespace fastlora::cpu {
namespace {
int64_t now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1000000000ll + t.tv_nsec;
}
// Twelve chains: more than latency times throughput of either instruction.
template <bool dot>
int64_t chains(int n) {
  __m512 acc[12] = {}, x = _mm512_set1_ps(1);
  asm volatile("" : "+v"(x));
  int64_t start = now();
  for (int i = 0; i < n; i++) {
    UNROLL
    for (int c = 0; c < 12; c++) {
      acc[c] = dot ? _mm512_dpbf16_ps(acc[c], (__m512bh)x, (__m512bh)x) : _mm512_fmadd_ps(x, x, acc[c]);
      asm volatile("" : "+v"(acc[c]));   // or equal chains become one
    }
  }
  return now() - start;
}
}  // namespace
const Kernels* avx512_bf16() { return &table; }
void probe_bf16(int n, int64_t* dot, int64_t* fma) {
  *dot = chains<true>(n);
  *fma = chains<false>(n);
}
}  // namespace fastlora::cpu
#else
const fastlora::cpu::Kernels* fastlora::cpu::avx512_bf16() { return nullptr; }
void fastlora::cpu::probe_bf16(int, int64_t* dot, int64_t* fma) { *dot = *fma = 1; }
#endif
