// packed form: blocks of w, copied to panels of kPanel columns, stay in the second-level cache while x passes; a tile of
// x's rows, copied to the first level, serves all panels of a group.

template <class T>
struct Packing {   // everything becomes fp32
  typedef Rows<float> S;
  static constexpr int steps = kSteps / 4 * 3;
  static constexpr int per_step = 1;
  static INLINE vf words(const T* p, int64_t n) { return load_upto(p, n); }
  static INLINE vf column(const T* w, int64_t, int64_t, int64_t n) { return load_upto(w, n); }
};
#ifdef DOT_BF16
template <>
struct Packing<bf16> {
  typedef Pairs S;
  static constexpr int steps = kSteps;
  static constexpr int per_step = 2;
  static INLINE vf words(const bf16* p, int64_t n) {
    return n >= 2 * VL ? get<vf>(p) : (vf)get_wide_part((const uint16_t*)p, n);
  }
  static INLINE vu bits(const bf16* p, int64_t n) {
    return __builtin_convertvector(n >= VL ? get<vh>(p) : get_part((const uint16_t*)p, n), vu);
  }
  static INLINE vf column(const bf16* w, int64_t ldw, int64_t steps, int64_t n) {
    return (vf)(steps > 1 ? bits(w, n) | bits(w + ldw, n) << 16 : bits(w, n));
  }
};
#endif

// w(n .. n + columns, k .. k + depth) as panels of [steps, kPanel], kSteps * kPanel apart, zero beyond
template <class T>
void pack_group(const Gemm& p, int64_t n, int64_t columns, int64_t k, int64_t depth, float* out) {
  typedef Packing<T> P;
  const T* w = (const T*)p.w;
  int64_t padded = round_up(columns, kPanel);
  if (!p.w_along_k) {
    for (int64_t d = 0; d < depth; d += P::per_step)
      for (int64_t v = 0; v < padded; v += VL)
        store(out + v / kPanel * kPanel * kSteps + d / P::per_step * kPanel + v % kPanel,
              v < columns ? P::column(w + (k + d) * p.ldw + n + v, p.ldw, depth - d, columns - v) : vf{});
    return;
  }
  for (int64_t v = 0; v < padded; v += VL)
    for (int64_t d = 0; d < depth; d += VL * P::per_step) {
      vf block[VL];
      UNROLL
      for (int j = 0; j < VL; j++)
        block[j] = v + j < columns ? P::words(w + (n + v + j) * p.ldw + k + d, depth - d) : vf{};
      transpose(block);
      float* to = out + v / kPanel * kPanel * kSteps + d / P::per_step * kPanel + v % kPanel;
      UNROLL
      for (int j = 0; j < VL; j++) store(to + j * kPanel, block[j]);
    }
}

template <class T, class S>
void any_rows(const Gemm& p, const Tile<S>& t, int64_t padded) {
  if constexpr (kWide) {
    if (padded == 12) return run_tile<T, S, 12, 2>(p, t);
    if (padded == 8) return run_tile<T, S, 8, 2>(p, t);
    return run_tile<T, S, 4, 2>(p, t);
  } else {
    if (padded == 6) return run_tile<T, S, 6, 2>(p, t);
    if (padded == 4) return run_tile<T, S, 4, 2>(p, t);
    return run_tile<T, S, 2, 2>(p, t);
  }
}

template <class T>
struct Packed {
  typedef Packing<T> P;
  typedef typename P::S S;
  const Gemm& p;
  float *w, *f, *zg, *part;
  typename S::X* x;
  uint16_t* lane;

  Packed(const Gemm& p, Scratch& s) : p(p) {
    w = s.take<float>(kSteps * kGroup);
    f = s.take<float>(p.R * kGroup);
    zg = s.take<float>(kTall * p.R);
    part = s.take<float>(kRows * kGroup);
    x = s.take<typename S::X>(kTall * kStride);
    lane = s.take<uint16_t>(kTall * kLanes);
  }
  void rows_of_x(int64_t m, int64_t rows, int64_t padded, int64_t k, int64_t depth) {
    for (int64_t i = 0; i < padded; i++) {
      const T* from = (const T*)p.x + (m + i) * p.ldx + k;
      for (int64_t d = 0; d < depth; d += VL * P::per_step)
        store((float*)x + i * kStride + d / P::per_step, i < rows ? P::words(from + d, depth - d) : vf{});
    }
  }
  // one group of columns, one block of K, the rows m0 .. m1
  void block(int64_t m0, int64_t m1, int64_t n, int64_t columns, int64_t k, int64_t depth) {
    bool first = k == 0, last = k + depth == p.K, masked = first && p.mask.threshold && p.R;
    pack_group<T>(p, n, columns, k, depth, w);
    for (int64_t m = m0; m < m1;) {
      // the last two tiles share what is left evenly
      int64_t left = m1 - m, rows = left > kTall && left < 2 * kTall ? (left + 1) / 2 : min(left, kTall);
      int64_t padded = round_up(rows, kTall / 3);
      rows = min(left, padded);
      rows_of_x(m, rows, padded, k, depth);
      if (first) gated_rows(p, m, rows, padded, zg);
      if (masked) mask_rows(p, m, rows, n, columns, lane);
      for (int64_t c = 0; c < columns; c += kPanel) {
        float* sums = part + (m - m0) * kGroup + c;
        Tile<S> t = {x, kStride, (const typename S::W*)(w + c * kSteps), kPanel, (depth + P::per_step - 1) / P::per_step,
                     first ? zg : nullptr, f + c * p.R, kPanel, masked ? lane + c : nullptr, first ? nullptr : sums,
                     last ? nullptr : sums, kGroup, m, rows, n + c, columns - c};
        any_rows<T>(p, t, padded);
      }
      m += rows;
    }
  }
};

template <class T>
void gemm_packed(const Gemm& p, int64_t m0, int64_t m1, int64_t n0, int64_t n1, Scratch s) {
  Packed<T> packed(p, s);
  // blocks of K of one size
  constexpr int64_t most = Packing<T>::steps * Packing<T>::per_step;
  int64_t blocks = p.K > most ? (p.K + most - 1) / most : 1;
  int64_t depth = round_up((p.K + blocks - 1) / blocks, VL * Packing<T>::per_step);
  for (int64_t m = m0; m < m1; m += kRows)
    for (int64_t n = n0; n < n1; n += kGroup) {
      int64_t columns = min(kGroup, n1 - n), k = 0;
      for (int64_t c = 0; c < columns; c += kPanel) pack_factors<T>(p, n + c, min(kPanel, columns - c), kPanel, packed.f + c * p.R);
      do {
        packed.block(m, min(m + kRows, m1), n, columns, k, min(depth, p.K - k));
        k += depth;
      } while (k < p.K);
    }
}
