// packed form: blocks of w, copied to panels of kPanel columns, stay in the second-level cache while x passes; a tile of
// x's rows, copied to the first level, serves all panels of a group.

template <class T>
struct Packing {   // everything becomes fp32
  typedef Rows<float> S;
  static constexpr int steps = kSteps / 4 * 3;
  static constexpr int per_step = 1;
  static void pair_rows(float*, int64_t, int64_t) {}
  static void pair_columns(float*, int64_t, int64_t) {}
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
  // fp32 [R, width] to pairs [(R + 1) / 2, width], in place; z g takes part at x's precision, as in plain torch
  static void pair_rows(float* f, int64_t R, int64_t width) {
    for (int64_t r = 0; r < R; r += 2)
      for (int64_t v = 0; v < width; v += VL) {
        vf next = r + 1 < R ? load(f + (r + 1) * width + v) : vf{};
        vu low = __builtin_convertvector(narrow(load(f + r * width + v), bf16()), vu);
        store(f + r / 2 * width + v, (vf)(low | __builtin_convertvector(narrow(next, bf16()), vu) << 16));
      }
  }
  // fp32 [rows, R] to pairs within each row, which stays R elements from the next
  static void pair_columns(float* z, int64_t rows, int64_t R) {
    for (; rows; rows--, z += R)
      for (int64_t r = 0; r < R; r += 2 * VL) {
        vf low = load_upto(z + r, R - r), high = R - r > VL ? load_upto(z + r + VL, R - r - VL) : vf{};
        vh parts[2] = {narrow(low, bf16()), narrow(high, bf16())};
        store_upto(z + r / 2, get<vf>(parts), (min(R - r, 2 * VL) + 1) / 2);
      }
  }
};
#endif

// w(n .. n + columns, k .. k + depth) as panels of [steps, kPanel], zero beyond
template <class T>
void pack_group(const Gemm& p, int64_t n, int64_t columns, int64_t k, int64_t depth, float* out) {
  typedef Packing<T> P;
  const T* w = (const T*)p.w;
  int64_t padded = round_up(columns, kPanel);
  if (!p.w_along_k) {
    for (int64_t d = 0; d < depth; d += P::per_step)
      for (int64_t v = 0; v < padded; v += VL)
        store(out + v / kPanel * kPanelStride + d / P::per_step * kPanel + v % kPanel,
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
      float* to = out + v / kPanel * kPanelStride + d / P::per_step * kPanel + v % kPanel;
      UNROLL
      for (int j = 0; j < VL; j++) store(to + j * kPanel, block[j]);
    }
}

template <class T, class S>
void any_rows(const Gemm& p, const Tile<S>& t, int64_t padded) {
  if (padded == kTall) return run_tile<T, S, kTall, 2>(p, t);
  if (padded == kTall / 3 * 2) return run_tile<T, S, kTall / 3 * 2, 2>(p, t);
  return run_tile<T, S, kTall / 3, 2>(p, t);
}

template <class T>
struct Packed {
  typedef Packing<T> P;
  typedef typename P::S S;
  const Gemm& p;
  Scratch& s;
  float* w = s.take<float>(kPanelStride * (kGroup / kPanel));
  float* f = s.take<float>(p.R * kGroup);
  float* zg = s.take<float>((kRows + kTall) * p.R);
  float* part = s.take<float>(kRows * kGroup);
  typename S::X* x = s.take<typename S::X>(kTall * kStride);
  uint16_t* lane = s.take<uint16_t>(kTall * kLanes);

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
      if (masked) mask_rows(p, m, rows, n, columns, lane);
      for (int64_t c = 0; c < columns; c += kPanel) {
        float* sums = part + (m - m0) * kGroup + c;
        const auto* panel = (const typename S::W*)(w + c / kPanel * kPanelStride);
        Tile<S> t = {x, kStride, panel, kPanel, (depth + P::per_step - 1) / P::per_step,
                     first ? (const typename S::X*)(zg + (m - m0) * p.R) : nullptr, (const typename S::W*)(f + c * p.R),
                     p.R, kPanel, (p.R + P::per_step - 1) / P::per_step, masked ? lane + c : nullptr,
                     first ? nullptr : sums, last ? nullptr : sums, kGroup, m, rows, n + c, columns - c};
        any_rows<T>(p, t, padded);
      }
      m += rows;
    }
  }
};

template <class T>
void gemm_packed(const Gemm& p, int64_t m0, int64_t m1, int64_t n0, int64_t n1, Scratch s) {
  Packed<T> packed{p, s};
  // rows of w that lie along n pack faster into few panels at once; with many rows of x that no longer counts
  const int64_t group = p.w_along_k || m1 - m0 > 128 ? kGroup : kGroup / 2;
  // blocks of one size
  constexpr int64_t most = Packing<T>::steps * Packing<T>::per_step;
  int64_t blocks = p.K > most ? (p.K + most - 1) / most : 1;
  int64_t depth = round_up((p.K + blocks - 1) / blocks, VL * Packing<T>::per_step);
  int64_t parts = (m1 - m0 + kRows - 1) / kRows, most_rows = round_up((m1 - m0 + parts - 1) / parts, kTall);
  for (int64_t m = m0; m < m1; m += most_rows) {
    int64_t rows = min(most_rows, m1 - m);
    gated_rows(p, p.z + m * p.R, m, rows, rows + kTall, p.R, packed.zg);
    Packing<T>::pair_columns(packed.zg, rows + kTall, p.R);
    for (int64_t n = n0; n < n1; n += group) {
      int64_t columns = min(group, n1 - n), k = 0;
      for (int64_t c = 0; c < columns; c += kPanel) {
        pack_factors<T>(p, n + c, min(kPanel, columns - c), kPanel, packed.f + c * p.R);
        Packing<T>::pair_rows(packed.f + c * p.R, p.R, kPanel);
      }
      do {
        packed.block(m, m + rows, n, columns, k, min(depth, p.K - k));
        k += depth;
      } while (k < p.K);
    }
  }
}
