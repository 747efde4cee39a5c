// y's epilogue and the three forms of the product.
template <class T>
INLINE void finish(const Gemm& p, int64_t m, int64_t n, vf v, int64_t count) {
  if (p.add) v += load_upto((const T*)p.add + m * p.ldadd + n, count);
  if (p.u) store_upto((T*)p.u + m * p.N + n, v, count);
  if (p.c) v *= load_upto(p.c + n, count);
  if (p.bias) v += load_upto((const T*)p.bias + n, count);
  store_upto((T*)p.y + m * p.ldy + n, v, count);
}
INLINE float gate(const Gates& g, int64_t m, int64_t r) { return g.rows ? g.rows[m * g.stride + r] : g.scalar; }
// z g of the rows from m on, `z` the first of them: [padded, width], zero beyond
void gated_rows(const Gemm& p, const float* z, int64_t m, int64_t rows, int64_t padded, int64_t width, float* out) {
  for (int64_t i = 0; i < padded; i++)
    for (int64_t r = 0; r < width; r++) *out++ = i < rows && r < p.R ? z[i * p.R + r] * gate(p.g, m + i, r) : 0;
}

// All adapters' f at column n, in T's precision, as whole vectors: the next adapter, or row, overwrites the zeros beyond.
template <class T, class Out>
INLINE void factor_row(const Gemm& p, int64_t n, Out* out) {
  for (int e = 0; e < p.adapters; out += p.f[e++].rank) {
    const Factor& f = p.f[e];
    for (int64_t r = 0; f.along_rank && r < f.rank; r += VL) store(out + r, factor_part<T>(f, n * f.ld + r, f.rank - r));
    for (int64_t r = 0; !f.along_rank && r < f.rank; r++) store_upto(out + r, factor_part<T>(f, r * f.ld + n, 1), 1);
  }
}

// dot form

// The update of a tile: z g and b in fp32, their rows padded with zeros to whole vectors.
template <class T>
struct Update {
  const Gemm& p;
  Scratch& s;
  int64_t m0 = 0, width = round_up(p.R, VL);
  float* zg = s.take<float>(kDotRows * width);
  float* b = s.take<float>(8 * width + VL);
  // b's rows are read where they lie: one adapter, fp32, of whole vectors
  bool lone = sizeof(T) == 4 && p.adapters == 1 && p.f->type == kFloat && p.f->along_rank && p.f->rank == width;
  mutable const float* at = nullptr;   // this panel's first row
  mutable int64_t ld = 0;

  template <int NR>
  INLINE void start(int64_t n) const {
    at = lone ? (const float*)p.f->data + n * p.f->ld : b;
    ld = lone ? p.f->ld : width;
    for (int j = 0; j < NR && !lone; j++) factor_row<T>(p, n + j, b + j * width);
  }
  template <int MR, int NR>
  INLINE void operator()(int64_t m, int64_t n, vf (&acc)[MR][NR]) const {
    for (int64_t r = 0; r < width; r += VL) {
      UNROLL
      for (int j = 0; j < NR; j++) {
        vf bs = load(at + j * ld + r);
        UNROLL
        for (int i = 0; i < MR; i++) acc[i][j] += load(zg + (m + i) * width + r) * bs;
      }
    }
    UNROLL
    for (int i = 0; i < MR; i++) {
      float out[NR];
      sums<NR>(acc[i], out);
      UNROLL
      for (int j = 0; j < NR; j += 4) {
        vf v = {};
        __builtin_memcpy(&v, out + j, sizeof(float) * (NR < 4 ? NR : 4));
        finish<T>(p, m0 + m + i, n + j, v, NR < 4 ? NR : 4);
      }
    }
  }
};

template <class T>
void gemm_dot(const Gemm& p, int64_t m0, int64_t m1, int64_t n0, int64_t n1, Scratch s) {
  Update<T> update{p, s};
  for (int64_t i = 0; i < 8 * update.width; i += VL) store(update.b + i, vf{});
  vf* part = s.take<vf>(kDotRows * 4);
  float* z = p.a ? s.take<float>(kDotRows * p.R) : nullptr;
  const Factor* a = p.a ? factor_rows<T>(p, s) : nullptr;
  for (int64_t m = m0; m < m1; m += kDotRows) {
    int64_t rows = min(kDotRows, m1 - m);
    const T* x = (const T*)p.x + m * p.ldx;
    if (p.a) shrink_rows(p, a, x, p.ldx, rows, z, s);
    if (p.a && p.z_out && n0 == 0) __builtin_memcpy(p.z_out + m * p.R, z, rows * p.R * sizeof(float));
    gated_rows(p, p.a ? z : p.z + m * p.R, m, rows, rows, update.width, update.zg);
    update.m0 = m;
    dot_columns(x, p.ldx, rows, (const T*)p.w, p.ldw, n0, n1, p.K, part, update);
  }
}

// broadcast form: y's tile is MR rows by NV vectors along n; x broadcasts, w(., k) is a row of vectors

template <class T>
struct Rows {   // w read where it lies, x converted to fp32
  typedef float X;
  typedef T W;
  static INLINE vf fma(float x, vf w, vf acc) { return x * w + acc; }
  static INLINE vf row(const T* w) { return load(w); }
};
#ifdef DOT_BF16
struct Pairs {   // two steps of k in each 32-bit element
  typedef uint32_t X;
  typedef uint32_t W;
  static INLINE vf fma(uint32_t x, vf w, vf acc) {
    return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_set1_epi32(x), (__m512bh)w);
  }
  static INLINE vf row(const uint32_t* w) { return get<vf>(w); }
};
#endif

template <class S, int MR, int NV>
INLINE void row_tile(const typename S::X* x, int64_t ldx, const typename S::W* w, int64_t ldw, int64_t steps,
                     vf (&acc)[MR][NV]) {
  for (int64_t k = 0; k < steps; k++, w += ldw) {
    vf ws[NV];
    UNROLL
    for (int v = 0; v < NV; v++) ws[v] = S::row(w + v * VL);
    UNROLL
    for (int i = 0; i < MR; i++) {
      UNROLL
      for (int v = 0; v < NV; v++) acc[i][v] = S::fma(x[i * ldx + k], ws[v], acc[i][v]);
    }
  }
}

constexpr int kPanel = 2 * VL;                   // columns of a packed panel
constexpr int kTall = VL == 16 ? 12 : 6;         // rows of the tallest tile
constexpr int kStride = kSteps + 16;             // of the packed rows of x: rows of a power of two would share cache sets
constexpr int kPanelStride = (kSteps + 2) * kPanel;   // so would panels

// One tile in hand. To the product of x and w it adds the sums so far and, at one of its blocks of K, the update.
template <class S>
struct Tile {
  const typename S::X* x;
  int64_t ldx;
  const typename S::W* w;
  int64_t ldw, steps;
  const typename S::X* zg;    // [rows, R]; null: no update
  const typename S::W* f;     // [R, columns]
  int64_t ldz, ldf, ranks;    // ranks: steps of the update
  const uint16_t* lanes;      // of the first row and column, rows kLanes apart; null: no mask
  const float* sums;          // null: none so far
  float* part;                // where the sums go; null: they are y
  int64_t ldpart, m, rows, n, columns;
};

template <class T, class S, int MR, int NV>
void run_tile(const Gemm& p, const Tile<S>& t) {
  vf acc[MR][NV] = {}, update[MR][NV] = {};
  row_tile<S, MR, NV>(t.x, t.ldx, t.w, t.ldw, t.steps, acc);
  if (t.zg) row_tile<S, MR, NV>(t.zg, t.ldz, t.f, t.ldf, t.ranks, update);
  for (int i = 0; i < MR; i++)
    for (int v = 0; v < NV; v++) {
      vf u = update[i][v];
      if (t.lanes) u = keep(u * p.mask.scale, kept(t.lanes + i * kLanes + v * VL, p.mask.threshold));
      acc[i][v] += t.sums ? u + load(t.sums + i * t.ldpart + v * VL) : u;
      if (t.part) store(t.part + i * t.ldpart + v * VL, acc[i][v]);
    }
  if (t.part) return;
  UNROLL
  for (int i = 0; i < MR; i++) {
    UNROLL
    for (int v = 0; v < NV; v++)
      if (i < t.rows && v * VL < t.columns) finish<T>(p, t.m + i, t.n + v * VL, acc[i][v], t.columns - v * VL);
  }
}

// f's columns n .. n + columns as fp32 rows of `width`, zero beyond
template <class T>
void pack_factors(const Gemm& p, int64_t n, int64_t columns, int64_t width, float* out) {
  for (int e = 0; e < p.adapters; out += p.f[e++].rank * width)
    for (int64_t v = 0; v < width; v += VL) factor_vectors<T>(p.f[e], n + v, columns - v, out + v, width);
}

// dropout's lanes of columns n .. n + columns, the rows kLanes apart
void mask_rows(const Gemm& p, int64_t m, int64_t rows, int64_t n, int64_t columns, uint16_t* out) {
  for (int64_t i = 0; i < rows; i++, out += kLanes) {
    const uint16_t* at = lanes(p.mask.seed, (m + i) * p.mask.width + n, columns, out);
    for (int64_t j = 0; at != out && j < columns; j++) out[j] = at[j];
  }
}

// direct form: a few rows of x; w along n and read once, where it lies, eight of its rows at a time from end to end: the
// rows lie far apart, and only long runs are prefetched

constexpr int64_t kSlab = 1024;   // columns whose sums stay in the first-level cache
constexpr int64_t kDepth = 8;

template <class T, int MR, int NV>
INLINE int64_t slab_columns(const float* x, int64_t ldx, const T* w, int64_t ldw, int64_t steps, float* sums, int64_t n,
                            int64_t n1) {
  for (; n + NV * VL <= n1; n += NV * VL) {
    vf acc[MR][NV] = {};
    if (steps == kDepth) {
      UNROLL
      for (int64_t k = 0; k < kDepth; k++) row_tile<Rows<T>, MR, NV>(x + k, ldx, w + n + k * ldw, ldw, 1, acc);
    } else {
      row_tile<Rows<T>, MR, NV>(x, ldx, w + n, ldw, steps, acc);
    }
    for (int i = 0; i < MR; i++)
      for (int v = 0; v < NV; v++) {
        float* sum = sums + i * kSlab + n + v * VL;
        store(sum, load(sum) + acc[i][v]);
      }
  }
  return n;
}
template <class T, int MR>
void direct_slab(const Gemm& p, int64_t m, int64_t rows, int64_t n0, int64_t columns, const float* x, const float* zg,
                 Scratch s) {
  constexpr int wide = (VL == 16 ? 16 : 8) / (MR < 2 ? 2 : MR), width = 2 * VL;
  float *sums = s.take<float>(MR * kSlab), *f = s.take<float>(p.R * width);
  uint16_t* lane = s.take<uint16_t>(MR * kLanes);
  const T* w = (const T*)p.w + n0;
  for (int64_t i = 0; i < MR * kSlab; i += VL) store(sums + i, vf{});
  for (int64_t k = 0; k < p.K; k += kDepth, w += kDepth * p.ldw) {
    int64_t steps = min(kDepth, p.K - k);
    int64_t n = slab_columns<T, MR, wide>(x + k, p.K, w, p.ldw, steps, sums, 0, columns);
    slab_columns<T, MR, 2>(x + k, p.K, w, p.ldw, steps, sums, n, columns);
  }
  bool masked = p.mask.threshold && p.R;
  for (int64_t n = 0; n < columns; n += width) {
    pack_factors<T>(p, n0 + n, width, width, f);
    if (masked) mask_rows(p, m, rows, n0 + n, width, lane);
    Tile<Rows<float>> t = {nullptr, 0, nullptr, 0, 0, zg, f, p.R, width, p.R, masked ? lane : nullptr, sums + n, nullptr,
                           kSlab, m, rows, n0 + n, width};
    run_tile<T, Rows<float>, MR, 2>(p, t);
  }
}
// Returns the first column that is in no whole tile.
template <class T>
int64_t gemm_direct(const Gemm& p, int64_t m, int64_t rows, int64_t n0, int64_t n1, Scratch s) {
  int64_t padded = rows < 3 ? rows : 4, whole = n0 + (n1 - n0) / (2 * VL) * (2 * VL);
  float* zg = s.take<float>(padded * p.R);
  float* x = s.take<float>(padded * p.K);
  gated_rows(p, p.z + m * p.R, m, rows, padded, p.R, zg);
  for (int64_t i = 0; i < padded; i++)
    for (int64_t k = 0; k < p.K; k += VL) {
      int64_t left = p.K - k;
      store_upto(x + i * p.K + k, i < rows ? load_upto((const T*)p.x + (m + i) * p.ldx + k, left) : vf{}, left);
    }
  for (int64_t n = n0; n < whole; n += kSlab) {
    int64_t columns = min(kSlab, whole - n);
    if (padded == 1) direct_slab<T, 1>(p, m, rows, n, columns, x, zg, s);
    if (padded == 2) direct_slab<T, 2>(p, m, rows, n, columns, x, zg, s);
    if (padded == 4) direct_slab<T, 4>(p, m, rows, n, columns, x, zg, s);
  }
  return whole;
}
