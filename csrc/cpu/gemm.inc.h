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

// dot form

// The update of a tile: z g and b in fp32, every adapter's rank padded with zeros to whole vectors.
template <class T>
struct Update {
  const Gemm& p;
  int64_t m0, width;
  float *zg, *b;

  Update(const Gemm& p, Scratch& s) : p(p), m0(0), width(0) {
    for (int e = 0; e < p.adapters; e++) width += round_up(p.f[e].rank, VL);
    zg = s.take<float>(kDotRows * width);
    b = s.take<float>(8 * width);
  }
  void rows(int64_t from, int64_t count, const float* z) {   // z of row `from` first
    m0 = from;
    for (int64_t m = 0; m < count; m++) {
      float* out = zg + m * width;
      int64_t r = 0;
      for (int e = 0; e < p.adapters; e++) {
        int64_t end = r + p.f[e].rank, padded = round_up(p.f[e].rank, VL);
        for (int64_t v = 0; v < padded; v += VL) store(out + v, vf{});
        for (float* o = out; r < end; r++) *o++ = z[m * p.R + r] * gate(p.g, from + m, r);
        out += padded;
      }
    }
  }
  template <int NR>
  INLINE void start(int64_t n) const {
    float* out = b;
    for (int j = 0; j < NR; j++)
      for (int e = 0; e < p.adapters; e++) {
        const Factor& f = p.f[e];
        for (int64_t r = 0; r < f.rank; r += VL, out += VL) {
          if (f.along_rank) {
            store(out, factor_part<T>(f, (n + j) * f.ld + r, f.rank - r));
          } else {
            for (int64_t i = 0; i < VL; i++) out[i] = i + r < f.rank ? factor_part<T>(f, (r + i) * f.ld + n + j, 1)[0] : 0;
          }
        }
      }
  }
  template <int MR, int NR>
  INLINE void operator()(int64_t m, int64_t n, vf (&acc)[MR][NR]) const {
    for (int64_t r = 0; r < width; r += VL) {
      UNROLL
      for (int j = 0; j < NR; j++) {
        vf bs = load(b + j * width + r);
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
  Update<T> update(p, s);
  vf* part = s.take<vf>(kDotRows * 4);
  float* z = p.a ? s.take<float>(kDotRows * p.R) : nullptr;
  for (int64_t m = m0; m < m1; m += kDotRows) {
    int64_t rows = min(kDotRows, m1 - m);
    const T* x = (const T*)p.x + m * p.ldx;
    if (p.a) shrink_rows(x, p.ldx, rows, p.K, p.adapters, p.a, z, p.R, 1, s);
    if (p.a && p.z_out && n0 == 0) __builtin_memcpy(p.z_out + m * p.R, z, rows * p.R * sizeof(float));
    update.rows(m, rows, p.a ? z : p.z + m * p.R);
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
constexpr bool kWide = VL == 16;

// One tile in hand: where its operands are and what it does at its first and last block of K.
template <class S>
struct Tile {
  const typename S::X* x;
  int64_t ldx;
  const typename S::W* w;
  int64_t ldw, steps;
  const float *zg, *f;        // [rows, R] and [R, columns] fp32
  int64_t ldf;
  const uint16_t* lanes;      // of the first row and column, rows kLanes apart; null: no mask
  float* part;                // [rows, kGroup]; null: this block is the only one
  bool first, last;
  int64_t m, rows, n, columns;
};

constexpr int64_t kChain = 256;   // sums run so far from zero and are added then: a chain over all of K loses digits

template <class T, class S, int MR, int NV, bool whole = false>
void run_tile(const Gemm& p, const Tile<S>& t) {
  vf acc[MR][NV] = {};
  if constexpr (whole) {
    for (int64_t k = 0; k < t.steps; k += kChain) {
      vf more[MR][NV] = {};
      row_tile<S, MR, NV>(t.x + k, t.ldx, t.w + k * t.ldw, t.ldw, min(kChain, t.steps - k), more);
      for (int i = 0; i < MR; i++)
        for (int v = 0; v < NV; v++) acc[i][v] += more[i][v];
    }
  } else {
    row_tile<S, MR, NV>(t.x, t.ldx, t.w, t.ldw, t.steps, acc);
  }
  vf more[MR][NV] = {};
  if (t.first) row_tile<Rows<float>, MR, NV>(t.zg, p.R, t.f, t.ldf, p.R, more);
  for (int i = 0; i < MR; i++)
    for (int v = 0; v < NV; v++) {
      if (!t.first) more[i][v] = load(t.part + i * kGroup + v * VL);
      if (t.first && t.lanes)
        more[i][v] = keep(more[i][v] * p.mask.scale, kept(t.lanes + i * kLanes + v * VL, p.mask.threshold));
      acc[i][v] += more[i][v];
    }
  if (!t.last) {
    for (int i = 0; i < MR; i++)
      for (int v = 0; v < NV; v++) store(t.part + i * kGroup + v * VL, acc[i][v]);
    return;
  }
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
  for (int e = 0; e < p.adapters; e++) {
    const Factor& f = p.f[e];
    for (int64_t v = 0; v < width; v += VL) {
      int64_t count = columns - v;
      if (!f.along_rank) {
        for (int64_t r = 0; r < f.rank; r++)
          store(out + r * width + v, count > 0 ? factor_part<T>(f, r * f.ld + n + v, count) : vf{});
        continue;
      }
      for (int64_t r = 0; r < f.rank; r += VL) {
        vf block[VL];
        for (int j = 0; j < VL; j++)
          block[j] = j < count ? factor_part<T>(f, (n + v + j) * f.ld + r, f.rank - r) : vf{};
        transpose(block);
        for (int j = 0; j < min(VL, f.rank - r); j++) store(out + (r + j) * width + v, block[j]);
      }
    }
    out += f.rank * width;
  }
}
void gated_rows(const Gemm& p, int64_t m, int64_t rows, int64_t padded, float* out) {
  for (int64_t i = 0; i < padded; i++)
    for (int64_t r = 0; r < p.R; r++) *out++ = i < rows ? p.z[(m + i) * p.R + r] * gate(p.g, m + i, r) : 0;
}

// dropout's lanes of columns n .. n + columns, the rows kLanes apart
void mask_rows(const Gemm& p, int64_t m, int64_t rows, int64_t n, int64_t columns, uint16_t* out) {
  for (int64_t i = 0; i < rows; i++, out += kLanes) {
    const uint16_t* at = lanes(p.mask.seed, (m + i) * p.mask.width + n, columns, out);
    for (int64_t j = 0; at != out && j < columns; j++) out[j] = at[j];
  }
}

// direct form: a few rows of x, w along n and read once, where it lies

template <class T, int MR, int NV>
int64_t direct_columns(const Gemm& p, Tile<Rows<T>> t, int64_t n, int64_t n1, float* f, uint16_t* lane) {
  if (p.mask.threshold && p.R) t.lanes = lane;
  t.ldf = NV * VL;
  t.columns = NV * VL;
  for (; n + NV * VL <= n1; n += NV * VL) {
    pack_factors<T>(p, n, NV * VL, NV * VL, f);
    if (t.lanes) mask_rows(p, t.m, t.rows, n, NV * VL, lane);
    t.n = n;
    t.w = (const T*)p.w + n;
    run_tile<T, Rows<T>, MR, NV, true>(p, t);
  }
  return n;
}
template <class T, int MR>
int64_t direct_rows(const Gemm& p, Tile<Rows<T>>& t, int64_t n, int64_t n1, float* f, uint16_t* lane) {
  constexpr int wide = (kWide ? 16 : 8) / (MR < 2 ? 2 : MR);
  n = direct_columns<T, MR, wide>(p, t, n, n1, f, lane);
  return direct_columns<T, MR, 2>(p, t, n, n1, f, lane);
}
template <class T>
int64_t gemm_direct(const Gemm& p, int64_t m, int64_t rows, int64_t n0, int64_t n1, Scratch s) {
  int64_t padded = rows < 3 ? rows : 4;
  float* f = s.take<float>(p.R * kGroup);
  float* zg = s.take<float>(padded * p.R);
  float* x = s.take<float>(padded * p.K);
  uint16_t* lane = s.take<uint16_t>(4 * kLanes);
  gated_rows(p, m, rows, padded, zg);
  for (int64_t i = 0; i < padded; i++)
    for (int64_t k = 0; k < p.K; k += VL) {
      int64_t left = p.K - k;
      store_upto(x + i * p.K + k, i < rows ? load_upto((const T*)p.x + (m + i) * p.ldx + k, left) : vf{}, left);
    }
  Tile<Rows<T>> t = {x, p.K, nullptr, p.ldw, p.K, zg, f, 0, nullptr, nullptr, true, true, m, rows, 0, 0};
  if (padded == 1) return direct_rows<T, 1>(p, t, n0, n1, f, lane);
  if (padded == 2) return direct_rows<T, 2>(p, t, n0, n1, f, lane);
  return direct_rows<T, 4>(p, t, n0, n1, f, lane);
}
