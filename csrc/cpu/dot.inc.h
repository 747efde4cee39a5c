// Dot-product form: x and w both lie contiguous along K, so tiles of dot products need no packing, and the low-rank
// update is one more step of the same loop, with z g and b in the place of x and w.
template <class T>
struct Dot {   // float, and half through float
  typedef vf Reg;
  static constexpr int step = VL;
  static INLINE Reg whole(const T* p) { return load(p); }
  static INLINE Reg part(const T* p, int64_t n) { return load_upto(p, n); }
  static INLINE vf fma(Reg x, Reg w, vf acc) { return x * w + acc; }
};
template <>
struct Dot<bf16> {
  static constexpr int step = 2 * VL;
#ifdef DOT_BF16
  typedef __m512bh Reg;
  static INLINE Reg cut(vw v) { return (Reg)v; }
  static INLINE vf fma(Reg x, Reg w, vf acc) { return (vf)_mm512_dpbf16_ps((__m512)acc, x, w); }
#else
  // Even and odd elements as floats: a shift and a mask, no shuffle.
  struct Reg {
    vf even, odd;
  };
  static INLINE Reg cut(vw v) { return {(vf)((vu)v << 16), (vf)((vu)v & 0xffff0000)}; }
  static INLINE vf fma(Reg x, Reg w, vf acc) { return x.odd * w.odd + (x.even * w.even + acc); }
#endif
  static INLINE Reg whole(const bf16* p) { return cut(get<vw>(p)); }
  static INLINE Reg part(const bf16* p, int64_t n) { return cut(get_wide_part((const uint16_t*)p, n)); }
};

template <class T, int MR, int NR>
INLINE void dot_tile(const T* x, int64_t ldx, const T* w, int64_t ldw, int64_t K, vf (&acc)[MR][NR]) {
  typedef Dot<T> D;
  typename D::Reg xs[MR];
  int64_t k = 0;
  const auto step = [&](const auto& get) __attribute__((always_inline)) {
    UNROLL
    for (int i = 0; i < MR; i++) xs[i] = get(x + i * ldx + k);
    UNROLL
    for (int j = 0; j < NR; j++) {
      typename D::Reg ws = get(w + j * ldw + k);
      UNROLL
      for (int i = 0; i < MR; i++) acc[i][j] = D::fma(xs[i], ws, acc[i][j]);
    }
  };
  for (; k + D::step <= K; k += D::step) step([](const T* p) __attribute__((always_inline)) { return D::whole(p); });
  if (k < K) step([&](const T* p) __attribute__((always_inline)) { return D::part(p, K - k); });
}

constexpr int kDotTile = VL == 16 ? 4 : 2;     // rows of x and columns of a tile that the registers hold

// One panel of NR rows of w against up to kDotRows rows of x; `done` is told of the panel and gets each finished tile.
// Blocks of K keep the panel in the first-level cache while the rows of x pass; `part` holds the unfinished sums.
template <class T, int MR, int NR, class Done>
INLINE void dot_rows(const T* x, int64_t ldx, const T* w, int64_t ldw, int64_t n, int64_t m, int64_t k0, int64_t k1,
                     bool last, vf* part, const Done& done) {
  vf acc[MR][NR] = {};
  vf* mine = part + m * NR;
  if (k0)
    for (int i = 0; i < MR * NR; i++) acc[i / NR][i % NR] = mine[i];
  dot_tile<T, MR, NR>(x + m * ldx + k0, ldx, w + n * ldw + k0, ldw, k1 - k0, acc);
  if (last) return done(m, n, acc);
  for (int i = 0; i < MR * NR; i++) mine[i] = acc[i / NR][i % NR];
}
template <class T, int NR, class Done>
INLINE void dot_panel(const T* x, int64_t ldx, int64_t M, const T* w, int64_t ldw, int64_t n, int64_t K, vf* part,
                      const Done& done) {
  constexpr int64_t block = 4096 / sizeof(T);
  int64_t k0 = 0;
  done.template start<NR>(n);
  do {
    int64_t k1 = M > kDotTile ? min(K, k0 + block) : K, m = 0;
    for (; m + kDotTile <= M; m += kDotTile)
      dot_rows<T, kDotTile, NR>(x, ldx, w, ldw, n, m, k0, k1, k1 == K, part, done);
    if (m + 2 <= M) dot_rows<T, 2, NR>(x, ldx, w, ldw, n, m, k0, k1, k1 == K, part, done), m += 2;
    if (m < M) dot_rows<T, 1, NR>(x, ldx, w, ldw, n, m, k0, k1, k1 == K, part, done);
    k0 = k1;
  } while (k0 < K);
}
template <class T, class Done>
INLINE void dot_columns(const T* x, int64_t ldx, int64_t M, const T* w, int64_t ldw, int64_t n0, int64_t n1, int64_t K,
                        vf* part, const Done& done) {
  int64_t n = n0;
  if (M == 1)   // eight streams of w: memory, not arithmetic, is the limit
    for (; n + 8 <= n1; n += 8) done.template start<8>(n), dot_rows<T, 1, 8>(x, ldx, w, ldw, n, 0, 0, K, true, part, done);
  for (; n + 4 <= n1; n += 4) dot_panel<T, 4>(x, ldx, M, w, ldw, n, K, part, done);
  for (; n < n1; n++) dot_panel<T, 1>(x, ldx, M, w, ldw, n, K, part, done);
}
template <int NR>
INLINE void sums(const vf (&acc)[NR], float* out) {
  if constexpr (NR == 1) {
    v4 s = fold(acc[0]);
    out[0] = s[0] + s[1] + s[2] + s[3];
  } else {
    UNROLL
    for (int j = 0; j < NR; j += 4) put(out + j, sum4(acc[j], acc[j + 1], acc[j + 2], acc[j + 3]));
  }
}

template <class T>
INLINE vf factor_part(const Factor& f, int64_t at, int64_t n) {
  if (sizeof(T) == 4 || f.type != kFloat) return load_upto((const T*)f.data + at, n);
  return round_to(load_upto((const float*)f.data + at, n), T());
}
// What f has at n .. n + count and the ranks from r, in T's precision, to out[rank * ld]; VL columns, zero beyond count.
template <class T, class Out>
INLINE void factor_vectors(const Factor& f, int64_t n, int64_t count, Out* out, int64_t ld) {
  if (!f.along_rank) {
    for (int64_t r = 0; r < f.rank; r++) store(out + r * ld, count > 0 ? factor_part<T>(f, r * f.ld + n, count) : vf{});
    return;
  }
  for (int64_t r = 0; r < f.rank; r += VL) {
    vf block[VL];
    for (int j = 0; j < VL; j++) block[j] = j < count ? factor_part<T>(f, (n + j) * f.ld + r, f.rank - r) : vf{};
    transpose(block);
    for (int j = 0; j < min(VL, f.rank - r); j++) store(out + (r + j) * ld, block[j]);
  }
}
// The adapters a as rows of T: copied where they lie otherwise.
template <class T>
const Factor* factor_rows(const Gemm& p, Scratch& s) {
  Factor* all = s.take<Factor>(p.adapters);
  for (int e = 0; e < p.adapters; e++) {
    const Factor& f = all[e] = p.a[e];
    if (!f.along_rank && (sizeof(T) == 4 || f.type != kFloat)) continue;
    int64_t ld = round_up(p.K, 32);
    T* rows = s.take<T>(f.rank * ld);
    for (int64_t k = 0; k < p.K; k += VL) factor_vectors<T>(f, k, p.K - k, rows + k, ld);
    all[e] = {rows, p.type, f.rank, ld, false};
  }
  return all;
}

struct StoreZ {
  float* z;
  int64_t ldz;
  float scale;
  template <int NR>
  void start(int64_t) const {}
  template <int MR, int NR>
  INLINE void operator()(int64_t m, int64_t n, vf (&acc)[MR][NR]) const {
    UNROLL
    for (int i = 0; i < MR; i++) {
      UNROLL
      for (int j = 0; j < NR; j++) acc[i][j] *= scale;
      sums<NR>(acc[i], z + (m + i) * ldz + n);
    }
  }
};
// z [M, p.R] = x aT times the mask's scale; x has lost what is dropped, a is what factor_rows gave
template <class T>
void shrink_rows(const Gemm& p, const Factor* a, const T* x, int64_t ldx, int64_t M, float* z, Scratch s) {
  vf* part = s.take<vf>(kDotRows * 4);
  float scale = p.mask.threshold ? p.mask.scale : 1;
  const int64_t K = p.K, ldz = p.R;
  for (const Factor* end = a + p.adapters; a != end; z += a++->rank)
    dot_columns(x, ldx, M, (const T*)a->data, a->ld, 0, a->rank, K, part, StoreZ{z, ldz, scale});
}
