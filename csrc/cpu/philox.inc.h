// Philox 4x32-10, VL / 2 counters at a time: 32-bit words in the low halves of 64-bit lanes (what lies above is ignored).
// The lanes of counters q .. q + VL / 2 - 1: eight 16-bit lanes each, in the order of the elements.
INLINE void philox(uint64_t seed, uint64_t q, uint64_t* out) {
  vq index, c1, c2 = {}, c3 = {};
  for (int i = 0; i < VL / 2; i++) index[i] = i;
  vq c0 = index + q;
  c1 = c0 >> 32;
  uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
  UNROLL
  for (int round = 0; round < 10; round++) {
    vq p0 = multiply(c0, 0xD2511F53), p1 = multiply(c2, 0xCD9E8D57);
    c0 = (p1 >> 32) ^ c1 ^ k0;
    c1 = p1;
    c2 = (p0 >> 32) ^ c3 ^ k1;
    c3 = p0;
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  vq low = (c0 & 0xffffffff) | (c1 << 32), high = (c2 & 0xffffffff) | (c3 << 32);
  for (int i = 0; i < VL / 2; i++) {
    out[2 * i] = low[i];
    out[2 * i + 1] = high[i];
  }
}

constexpr int kLanes = kGroup + 8 + 4 * VL;   // what lanes() may write for kGroup elements

// Fills `out` with the lanes of elements i .. i + n - 1 and returns where the first one is.
INLINE const uint16_t* lanes(uint64_t seed, uint64_t i, int64_t n, uint16_t* out) {
  uint64_t first = i / 8;
  for (int64_t q = 0; q * 8 < n + (int64_t)(i % 8); q += VL / 2) philox(seed, first + q, (uint64_t*)(out + q * 8));
  return out + i % 8;
}
INLINE vi kept(const uint16_t* lane, uint32_t threshold) {
  return (vi)(__builtin_convertvector(get<vh>(lane), vu) >= threshold);
}
INLINE vf keep(vf v, vi kept) { return (vf)((vi)v & kept); }

// y[0..n) = x where kept, else 0; elements start at index i of the mask
template <class T, class Out>
void keep_row(const T* x, Out* y, int64_t n, uint64_t i, const Mask& mask, float scale) {
  alignas(64) uint16_t buffer[kLanes];
  for (int64_t j = 0; j < n; j += kGroup) {
    const uint16_t* lane = lanes(mask.seed, i + j, min(kGroup, n - j), buffer);
    for (int64_t v = j; v < min(j + kGroup, n); v += VL)
      store_upto(y + v, keep(load_upto(x + v, n - v), kept(lane + v - j, mask.threshold)) * scale, n - v);
  }
}
