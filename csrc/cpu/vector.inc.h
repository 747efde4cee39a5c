// Vectors of VL floats in the compiler's vector extension, shared by all instruction sets. Each instruction-set file
// defines VL: 16 stands for AVX-512, 8 for AVX2.
typedef float vf __attribute__((vector_size(VL * 4)));
typedef int32_t vi __attribute__((vector_size(VL * 4)));
typedef uint32_t vu __attribute__((vector_size(VL * 4)));
typedef uint16_t vh __attribute__((vector_size(VL * 2)));
typedef uint16_t vw __attribute__((vector_size(VL * 4)));
typedef uint64_t vq __attribute__((vector_size(VL * 4)));
typedef float v4 __attribute__((vector_size(16)));
#define INLINE inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <class V>
INLINE V get(const void* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <class V>
INLINE void put(void* p, V v) {
  __builtin_memcpy(p, &v, sizeof v);
}

// part of a vector, zero beyond; fp16; products of 32-bit halves
#if VL == 16
INLINE vf get_part(const float* p, int64_t n) { return (vf)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p); }
INLINE vh get_part(const uint16_t* p, int64_t n) { return (vh)_mm256_maskz_loadu_epi16((__mmask16)((1u << n) - 1), p); }
INLINE vw get_wide_part(const uint16_t* p, int64_t n) {
  return (vw)_mm512_maskz_loadu_epi16((__mmask32)((1ull << n) - 1), p);
}
INLINE void put_part(float* p, vf v, int64_t n) { _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)v); }
INLINE void put_part(uint16_t* p, vh v, int64_t n) { _mm256_mask_storeu_epi16(p, (__mmask16)((1u << n) - 1), (__m256i)v); }
INLINE vf half_to_float(vh h) { return (vf)_mm512_cvtph_ps((__m256i)h); }
INLINE vh float_to_half(vf v) { return (vh)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT); }
INLINE vq multiply(vq a, uint64_t b) { return (vq)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(b)); }
#else
template <class V, class T>
INLINE V copy_part(const T* p, int64_t n) {
  T buffer[sizeof(V) / sizeof(T)] = {};
  for (int64_t i = 0; i < n; i++) buffer[i] = p[i];
  return get<V>(buffer);
}
INLINE vf get_part(const float* p, int64_t n) { return copy_part<vf>(p, n); }
INLINE vh get_part(const uint16_t* p, int64_t n) { return copy_part<vh>(p, n); }
INLINE vw get_wide_part(const uint16_t* p, int64_t n) { return copy_part<vw>(p, n); }
template <class T, class V>
INLINE void put_part(T* p, V v, int64_t n) {
  for (int64_t i = 0; i < n; i++) p[i] = v[i];
}
#if VL == 8
INLINE vf half_to_float(vh h) { return (vf)_mm256_cvtph_ps((__m128i)h); }
INLINE vh float_to_half(vf v) { return (vh)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT); }
INLINE vq multiply(vq a, uint64_t b) { return (vq)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b)); }
#else
// The exponent is moved by a multiplication, which also normalises subnormals; infinity and NaN keep all exponent bits.
INLINE vf half_to_float(vh h) {
  vu w = __builtin_convertvector(h, vu), magnitude = (w & 0x7fff) << 13;
  vu finite = (vu)((vf)magnitude * 0x1p112f), special = magnitude | 0x7f800000;
  vu is_special = (vu)((w & 0x7c00) == 0x7c00);
  return (vf)((is_special & special) | (~is_special & finite) | ((w & 0x8000) << 16));
}
INLINE vh float_to_half(vf v) {
  vu w = (vu)v, sign = w & 0x80000000, m = w ^ sign;
  vu small = (vu)((vf)m + 0.5f) - 0x3f000000u;            // the addition rounds a subnormal result
  vu normal = (m - 0x38000000u + 0xfff + ((m >> 13) & 1)) >> 13;
  vu big = (vu)(m >= 0x477ff000u), nan = (vu)(m > 0x7f800000u), tiny = (vu)(m < 0x38800000u);
  vu r = (tiny & small) | (~tiny & normal);
  r = (big & ((nan & 0x7e00) | (~nan & 0x7c00))) | (~big & r);
  return __builtin_convertvector(r | (sign >> 16), vh);
}
INLINE vq multiply(vq a, uint64_t b) { return (a & 0xffffffff) * b; }
#endif
#endif

INLINE vf widen(vh v, bf16) { return (vf)(__builtin_convertvector(v, vu) << 16); }
INLINE vf widen(vh v, f16) { return half_to_float(v); }
INLINE vh narrow(vf v, bf16) {
#ifdef DOT_BF16
  return (vh)_mm512_cvtneps_pbh((__m512)v);
#endif
  vu w = (vu)v, nan = (vu)(v != v), r = (w + 0x7fff + ((w >> 16) & 1)) >> 16;
  return __builtin_convertvector((nan & 0x7fc0) | (~nan & r), vh);
}
INLINE vh narrow(vf v, f16) { return float_to_half(v); }

INLINE vf load(const float* p) { return get<vf>(p); }
INLINE void store(float* p, vf v) { put(p, v); }
template <class T>
INLINE vf load(const T* p) {
  return widen(get<vh>(p), T());
}
template <class T>
INLINE void store(T* p, vf v) {
  put(p, narrow(v, T()));
}
INLINE vf load_upto(const float* p, int64_t n) { return n >= VL ? load(p) : get_part(p, n); }
INLINE void store_upto(float* p, vf v, int64_t n) { n >= VL ? store(p, v) : put_part(p, v, n); }
template <class T>
INLINE vf load_upto(const T* p, int64_t n) {
  return n >= VL ? load(p) : widen(get_part((const uint16_t*)p, n), T());
}
template <class T>
INLINE void store_upto(T* p, vf v, int64_t n) {
  n >= VL ? store(p, v) : put_part((uint16_t*)p, narrow(v, T()), n);
}
// fp32 adapters take part at x's precision
INLINE vf round_to(vf v, float) { return v; }
template <class T>
INLINE vf round_to(vf v, T t) {
  return widen(narrow(v, t), t);
}

template <int...>
struct Seq {};
template <int N, int... I>
struct Count : Count<N - 1, N - 1, I...> {};
template <int... I>
struct Count<0, I...> {
  typedef Seq<I...> type;
};
// interleave within 128-bit lanes (hi = 0, 2: first or second half of each lane)
template <int hi, int... I>
INLINE vf zip_lane(vf a, vf b, Seq<I...>) {
  return __builtin_shufflevector(a, b, (I / 4 * 4 + hi + I % 4 / 2 + I % 2 * VL)...);
}
template <int hi, int... I>
INLINE vf zip(vf a, vf b, Seq<I...>) {
  return __builtin_shufflevector(a, b, (hi + I / 2 + I % 2 * VL)...);
}
template <int hi, class V, int... I>
INLINE auto half(V v, Seq<I...>) {
  return __builtin_shufflevector(v, v, (hi + I)...);
}
// the sum of v's 128-bit lanes
template <class V>
INLINE v4 fold(V v) {
  constexpr int n = sizeof(V) / sizeof(float) / 2;
  if constexpr (n == 2) {
    return v;
  } else {
    typename Count<n>::type lanes;
    return fold(half<0>(v, lanes) + half<n>(v, lanes));
  }
}
// the sums of four vectors, in order
INLINE v4 sum4(vf a, vf b, vf c, vf d) {
  typename Count<VL>::type s;
  vf ac = zip_lane<0>(a, c, s) + zip_lane<2>(a, c, s), bd = zip_lane<0>(b, d, s) + zip_lane<2>(b, d, s);
  return fold(zip_lane<0>(ac, bd, s) + zip_lane<2>(ac, bd, s));
}
// VL x VL transpose: log2(VL) rounds of interleaving row i with row i + VL / 2
INLINE void transpose(vf (&rows)[VL]) {
  typename Count<VL>::type s;
  UNROLL
  for (int round = 1; round < VL; round *= 2) {
    vf next[VL];
    UNROLL
    for (int i = 0; i < VL / 2; i++) {
      next[2 * i] = zip<0>(rows[i], rows[i + VL / 2], s);
      next[2 * i + 1] = zip<VL / 2>(rows[i], rows[i + VL / 2], s);
    }
    UNROLL
    for (int i = 0; i < VL; i++) rows[i] = next[i];
  }
}

struct Scratch {
  char* at;
  template <class T>
  T* take(int64_t n) {
    char* p = at;
    at += (n * (int64_t)sizeof(T) + 63) / 64 * 64;
    return (T*)p;
  }
};
INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
