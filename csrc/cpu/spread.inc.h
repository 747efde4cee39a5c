// The second half of the routed update: rows of y, wherever they lie, += their adapters' b, read in place.
template <class T, int MR, int NV>
INLINE void spread_tile(const Spread& p, int64_t m, int64_t n, int64_t left) {
  const int64_t columns = NV > 1 ? NV * VL : left;   // a lone vector may be a part
  const auto get = [&](const T* at, int v) { return load_upto(at + v * VL, columns - v * VL); };
  const float* z = p.zg + m * p.ldz;
  T* y[MR];
  vf acc[MR][NV];
  UNROLL
  for (int i = 0; i < MR; i++) {
    y[i] = (T*)p.y + p.rows[m + i] * p.ldy + n;
    UNROLL
    for (int v = 0; v < NV; v++) acc[i][v] = get(y[i], v);
  }
  for (int j = 0; j < p.adapters; j++) {
    const Added& added = p.list[j];
    vf before[MR][NV];
    for (int i = 0; added.d && i < MR; i++)
      for (int v = 0; v < NV; v++) before[i][v] = acc[i][v], acc[i][v] = vf{};
    for (int e = 0; e < added.pieces; e++) {
      const T* b = (const T*)added.b[e].data + n;
      for (int64_t r = 0; r < added.b[e].rank; r++, b += added.b[e].ld, z++) {
        UNROLL
        for (int v = 0; v < NV; v++) {
          vf row = get(b, v);
          UNROLL
          for (int i = 0; i < MR; i++) acc[i][v] += row * z[i * p.ldz];
        }
      }
    }
    for (int i = 0; added.d && i < MR; i++) {
      float gate = p.gates[p.offsets[p.rows[m + i]] + j];
      for (int v = 0; v < NV; v++) {
        vf d = get((const T*)added.d + n, v), base = get(y[i], v);
        if (p.bias) base -= get((const T*)p.bias + n, v);
        acc[i][v] = before[i][v] + acc[i][v] * (d + 1) + base * d * gate;
      }
    }
  }
  UNROLL
  for (int i = 0; i < MR; i++) {
    UNROLL
    for (int v = 0; v < NV; v++) store_upto(y[i] + v * VL, acc[i][v], columns - v * VL);
  }
}
template <class T, int NV>
void spread_rows(const Spread& p, int64_t n, int64_t left) {
  int64_t m = 0;
  for (; m + 4 <= p.M; m += 4) spread_tile<T, 4, NV>(p, m, n, left);
  for (; m + 2 <= p.M; m += 2) spread_tile<T, 2, NV>(p, m, n, left);
  for (; m < p.M; m++) spread_tile<T, 1, NV>(p, m, n, left);
}
template <class T>
void spread(const Spread& p, int64_t n0, int64_t n1) {
  constexpr int NV = VL == 16 ? 4 : 2;
  int64_t n = n0;
  for (; n + NV * VL <= n1; n += NV * VL) spread_rows<T, NV>(p, n, n1 - n);
  for (; n < n1; n += VL) spread_rows<T, 1>(p, n, n1 - n);
}
