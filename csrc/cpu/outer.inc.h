// rows kGroup apart, of which whole vectors are read, to [columns, rank]
INLINE void store_transposed(const float* from, int64_t rank, int64_t columns, float* out) {
  for (int64_t r = 0; r < rank; r += VL)
    for (int64_t c = 0; c < columns; c += VL) {
      vf block[VL];
      for (int j = 0; j < VL; j++) block[j] = load(from + (r + j) * kGroup + c);
      transpose(block);
      for (int j = 0; j < min(VL, columns - c); j++) store_upto(out + (c + j) * rank + r, block[j], rank - r);
    }
}

// da's columns k0 .. k1: blocks of x become fp32 (and lose what dropout drops), then meet all rows of dz
template <class T>
void outer(const Gemm& p, int64_t k0, int64_t k1, char* scratch) {
  Scratch s{scratch};
  constexpr int64_t depth = 8192 / kGroup;
  constexpr int MR = kTall / 3 * 2;
  int64_t padded = round_up(p.R, MR);
  float *block = s.take<float>(depth * kGroup), *dz = s.take<float>(padded * depth);
  float* sums = s.take<float>((padded + VL) * kGroup);
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
        for (int64_t i = 0; i < rows; i++) dz[r * depth + i] = r < p.R ? p.z[(m + i) * p.R + r] * gate(p.g, m + i, r) : 0;
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
    for (int e = 0; e < p.adapters; from += p.a[e++].rank * kGroup) {
      if (p.a[e].along_rank) store_transposed(from, p.a[e].rank, columns, p.da[e] + k * p.a[e].rank);
      for (int64_t r = 0; !p.a[e].along_rank && r < p.a[e].rank; r++)
        __builtin_memcpy(p.da[e] + r * p.K + k, from + r * kGroup, columns * sizeof(float));
    }
  }
}
