// The sums over rows: dy's single pass, and da.

constexpr int kColumns = 64;   // columns of dy per block: the blocks of dy, b and db stay in the first-level cache
constexpr int kReduceRows = VL == 16 ? 8 : 4;

// t[i, :] += d[i, n] b[n, :] and db[n, :] += d[i, n] zg[i, :] for one tile of rows
template <int MR, bool DB>
INLINE void reduce_tile(const float* d, const float* b, float* db, const float* zg, float* t, int64_t R, int64_t columns) {
  constexpr int U = MR < 4 ? 4 / MR : 1;   // more chains where there are few rows
  for (int64_t r = 0; r < R; r += VL) {
    vf ts[MR][U] = {}, zs[MR];
    UNROLL
    for (int i = 0; i < MR; i++) zs[i] = load(zg + i * R + r);
    for (int64_t n = 0; n < columns; n += U) {
      UNROLL
      for (int u = 0; u < U; u++) {
        vf bs = load(b + (n + u) * R + r), sum = {};
        UNROLL
        for (int i = 0; i < MR; i++) {
          float s = d[i * kColumns + n + u];
          ts[i][u] += bs * s;
          if (DB) sum += zs[i] * s;
        }
        if (DB) store(db + (n + u) * R + r, load(db + (n + u) * R + r) + sum);
      }
    }
    UNROLL
    for (int i = 0; i < MR; i++) {
      UNROLL
      for (int u = 1; u < U; u++) ts[i][0] += ts[i][u];
      store(t + i * R + r, load(t + i * R + r) + ts[i][0]);
    }
  }
}

template <class T>
struct Reducing {
  const Reduce& p;
  int64_t R, m0;             // R padded to whole vectors
  float *t, *zg, *b, *db, *d, *dbias, *recent;

  Reducing(const Reduce& p, int64_t m0, int64_t m1, Scratch& s) : p(p), R(round_up(p.R, VL)), m0(m0) {
    int64_t rows = m1 - m0;
    t = s.take<float>(rows * R);
    zg = s.take<float>(rows * R);
    b = s.take<float>(kColumns * R + VL);
    db = s.take<float>(kColumns * R + VL);
    d = s.take<float>(kReduceRows * kColumns);
    dbias = s.take<float>(kColumns);
    recent = s.take<float>(kColumns);
    for (int64_t i = 0; i < rows * R; i += VL) store(t + i, vf{}), store(zg + i, vf{});
    for (int64_t m = m0; m < m1; m++)
      for (int64_t r = 0; p.z && r < p.R; r++) zg[(m - m0) * R + r] = p.z[m * p.R + r] * gate(p.g, m, r);
  }
  void start(int64_t n, int64_t columns) {
    for (int64_t i = 0; i < kColumns * R; i += VL) store(db + i, vf{}), store(b + i, vf{});
    for (int64_t i = 0; i < kColumns; i += VL) store(dbias + i, vf{}), store(recent + i, vf{});
    for (int64_t j = 0; j < columns; j++) {
      float* out = b + j * R;
      for (int e = 0; e < p.adapters; out += p.b[e++].rank) {
        const Factor& f = p.b[e];
        // whole vectors: the next adapter overwrites the zeros beyond the rank
        for (int64_t r = 0; r < f.rank; r += VL) store(out + r, factor_part<T>(f, (n + j) * f.ld + r, f.rank - r));
      }
    }
  }
  void read(int64_t m, int64_t rows, int64_t n, int64_t columns) {
    for (int64_t j = 0; j < columns; j += VL) {
      vf sum = {};
      for (int64_t i = 0; i < rows; i++) {
        vf v = load_upto((const T*)p.dy + (m + i) * p.lddy + n + j, columns - j);
        store(d + i * kColumns + j, v);
        sum += v;
      }
      if (p.dbias) store(recent + j, load(recent + j) + sum);
    }
  }
  void add_recent() {   // a chain over all rows would lose digits
    for (int64_t i = 0; i < kColumns; i += VL) store(dbias + i, load(dbias + i) + load(recent + i)), store(recent + i, vf{});
  }
  template <int MR>
  void tile(int64_t m, int64_t n, int64_t columns) {
    read(m, MR, n, columns);
    float *z = zg + (m - m0) * R, *to = t + (m - m0) * R;
    p.db ? reduce_tile<MR, true>(d, b, db, z, to, R, columns) : reduce_tile<MR, false>(d, b, db, z, to, R, columns);
  }
  void finish(int64_t n, int64_t columns, int64_t slice) {
    const float* from = db;
    for (int e = 0; p.db && e < p.adapters; from += p.b[e++].rank) {
      int64_t rank = p.b[e].rank;
      float* to = p.db[e] + (slice * p.N + n) * rank;
      // whole vectors, but for the last: the next row overwrites what is beyond the rank
      for (int64_t j = 0; j < columns; j++, to += rank)
        for (int64_t r = 0; r < rank; r += VL) store_upto(to + r, load(from + j * R + r), (columns - j) * rank - r);
    }
    if (p.dbias) __builtin_memcpy(p.dbias + slice * p.N + n, dbias, columns * sizeof(float));
  }
};

template <class T>
void reduce_rows(const Reduce& p, int64_t m0, int64_t m1, int64_t slice, Scratch s) {
  Reducing<T> job(p, m0, m1, s);
  for (int64_t n = 0; n < p.N; n += kColumns) {
    int64_t columns = min(kColumns, p.N - n), m = m0;
    job.start(n, columns);
    for (; m + kReduceRows <= m1; m += kReduceRows) {
      job.template tile<kReduceRows>(m, n, columns);
      if ((m - m0) % (16 * kReduceRows) == 0) job.add_recent();
    }
    for (; m + 2 <= m1; m += 2) job.template tile<2>(m, n, columns);
    for (; m < m1; m++) job.template tile<1>(m, n, columns);
    job.add_recent();
    job.finish(n, columns, slice);
  }
  for (int64_t m = m0; p.t && m < m1; m++)
    __builtin_memcpy(p.t + m * p.R, job.t + (m - m0) * job.R, p.R * sizeof(float));
}

// da's columns k0 .. k1: blocks of x become fp32 (and lose what dropout drops), then meet all rows of dz
template <class T>
void outer_columns(const Outer& p, int64_t k0, int64_t k1, Scratch s) {
  constexpr int64_t depth = 8192 / kGroup;
  constexpr int MR = kTall / 3 * 2;
  int64_t padded = round_up(p.R, MR);
  float *block = s.take<float>(depth * kGroup), *sums = s.take<float>(padded * kGroup), *dz = s.take<float>(padded * depth);
  for (int64_t k = k0; k < k1; k += kGroup) {
    int64_t columns = min(kGroup, k1 - k);
    for (int64_t i = 0; i < padded * kGroup; i += VL) store(sums + i, vf{});
    for (int64_t m = 0; m < p.M; m += depth) {
      int64_t rows = min(depth, p.M - m);
      for (int64_t i = 0; i < rows; i++) {
        const T* x = (const T*)p.x + (m + i) * p.ldx + k;
        if (p.mask.threshold) {
          keep_row(x, block + i * kGroup, columns, (m + i) * p.mask.width + k, p.mask, p.mask.scale);
        } else {
          for (int64_t c = 0; c < columns; c += VL) store(block + i * kGroup + c, load_upto(x + c, columns - c));
        }
      }
      for (int64_t r = 0; r < padded; r++)
        for (int64_t i = 0; i < rows; i++) dz[r * depth + i] = r < p.R ? p.t[(m + i) * p.R + r] * gate(p.g, m + i, r) : 0;
      for (int64_t r = 0; r < padded; r += MR)
        for (int64_t c = 0; c < columns; c += kPanel) {
          vf acc[MR][2] = {};
          row_tile<Rows<float>, MR, 2>(dz + r * depth, depth, block + c, kGroup, rows, acc);
          for (int i = 0; i < 2 * MR; i++) {
            float* sum = sums + (r + i / 2) * kGroup + c + i % 2 * VL;
            store(sum, load(sum) + acc[i / 2][i % 2]);
          }
        }
    }
    const float* from = sums;
    for (int e = 0; e < p.adapters; e++)
      for (int64_t r = 0; r < p.a[e].rank; r++, from += kGroup)
        __builtin_memcpy(p.da[e] + r * p.K + k, from, columns * sizeof(float));
  }
}
