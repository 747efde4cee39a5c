// Tile form, for bfloat16 on AMX: yT = w xT, so that rows of w are read where they lie, 32 at a time, and x is packed once,
// as pairs of k by 32 of its rows. The update is more steps of the same loop, with b and z g in the place of w and x.

// Rows of x packed into panels of 32, as pack_group leaves them, in blocks of kTileSteps along k that lie `depth` apart.
struct Panels {
  static constexpr int64_t kTileSteps = 2 * kSteps;
  int64_t depth;
  float* data;
  Panels(int64_t rows, int64_t K, Scratch& s)
      : depth((rows + kPanel - 1) / kPanel * kPanelStride), data(s.take<float>((K / kTileSteps + 1) * depth)) {}
  void pack(const bf16* x, int64_t ldx, int64_t rows, int64_t K) const {
    const Gemm p{.w = x, .ldw = ldx, .w_along_k = true};
    for (int64_t k = 0; k < K; k += kTileSteps)
      pack_group<bf16>(p, 0, rows, k, min(kTileSteps, K - k), data + k / kTileSteps * depth);
  }
  const float* at(int64_t row, int64_t k) const {
    return data + row / kPanel * kPanelStride + k / kTileSteps * depth + k % kTileSteps / 2 * kPanel;
  }
};

// The tiles 0 .. 3 += up to 32 rows of w times `rows` of a panel of x, both in halves of 16; edge: room for 32 x 32 of w
INLINE void multiply_tiles(const bf16* w, int64_t ldw, int64_t count, int64_t K, const Panels& x, int64_t row, int64_t rows,
                           bf16* edge) {
  const bool tall = count > VL, wide = rows > VL;
  for (int64_t k = 0; k < K; k += 32) {
    const bf16* at = w + k;
    int64_t ld = ldw;
    if (count % VL || K - k < 32) {
      for (int64_t j = 0; j < (tall ? 32 : VL); j++)
        put(edge + j * 32, j < count ? get_wide_part((const uint16_t*)at + j * ldw, min(32, K - k)) : vw{});
      at = edge, ld = 32;
    }
    const float* panel = x.at(row, k);
    asm volatile("" ::: "memory");
    _tile_loadd(4, at, ld * 2);
    _tile_loadd(6, panel, kPanel * 4);
    _tile_dpbf16ps(0, 4, 6);
    if (tall) _tile_loadd(5, at + 16 * ld, ld * 2);
    if (tall) _tile_dpbf16ps(1, 5, 6);
    if (wide) _tile_loadd(7, panel + VL, kPanel * 4);
    if (wide) _tile_dpbf16ps(2, 4, 7);
    if (wide && tall) _tile_dpbf16ps(3, 5, 7);
  }
}

// f(m, n, v, count): what the tiles hold of row m of x and up to VL rows of w from n on. They are zero then.
template <class F>
INLINE void each_row(int64_t rows, int64_t count, const F& f) {
  alignas(64) vf sums[4][VL];
  _tile_stored(0, sums[0], 64);
  _tile_zero(0);
  _tile_stored(1, sums[1], 64);
  _tile_zero(1);
  _tile_stored(2, sums[2], 64);
  _tile_zero(2);
  _tile_stored(3, sums[3], 64);
  _tile_zero(3);
  for (int64_t t = 0; t < 4; t++) {
    const int64_t m = t / 2 * VL, n = t % 2 * VL;
    if (m >= rows || n >= count) continue;
    transpose(sums[t]);
    for (int64_t i = 0; i < min(VL, rows - m); i++) f(m + i, n, sums[t][i], count - n);
  }
}

// which makes them zero
INLINE void configure_tiles() {
  struct alignas(64) {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } shape;
  asm volatile("" ::"r"(&shape) : "memory");   // gcc takes the instruction to read eight bytes of it
  _tile_loadconfig(&shape);
}

// as shrink_rows
void shrink_panels(const Gemm& p, const Factor* a, const Panels& x, int64_t rows, float* z, Scratch s) {
  bf16* edge = s.take<bf16>(32 * 32);
  const float scale = p.mask.threshold ? p.mask.scale : 1;
  for (int e = 0; e < p.adapters; z += a[e++].rank) {
    const bf16* at = (const bf16*)a[e].data;
    for (int64_t r = 0; r < a[e].rank; r += 32)
      for (int64_t m = 0; m < rows; m += kPanel) {
        multiply_tiles(at + r * a[e].ld, a[e].ld, min(32, a[e].rank - r), p.K, x, m, rows - m, edge);
        each_row(rows - m, a[e].rank - r, [&](int64_t i, int64_t n, vf v, int64_t count) __attribute__((always_inline)) {
          store_upto(z + (m + i) * p.R + r + n, v * scale, count);
        });
      }
  }
}
void shrink_tiles(const Gemm& p, const Factor* a, const bf16* x, int64_t ldx, int64_t rows, float* z, Scratch s) {
  const Panels panels(rows, p.K, s);
  configure_tiles();
  panels.pack(x, ldx, rows, p.K);
  shrink_panels(p, a, panels, rows, z, s);
  _tile_release();
}

void gemm_tiles(const Gemm& p, int64_t m0, int64_t m1, int64_t n0, int64_t n1, Scratch s) {
  const int64_t width = round_up(p.R, 32), block = min(kTileBlock, m1 - m0);
  const Panels x(block, p.K, s), z_panels(block, width, s);
  float* z = s.take<float>(block * p.R);
  const Factor* a = p.a ? factor_rows<bf16>(p, s) : nullptr;
  bf16 *zg = s.take<bf16>(block * width), *f = s.take<bf16>(32 * width + VL), *edge = s.take<bf16>(32 * 32);
  for (int64_t i = 0; i < 32 * width; i++) f[i] = {};
  configure_tiles();
  for (int64_t m = m0; m < m1; m += block) {
    const int64_t rows = min(block, m1 - m);
    x.pack((const bf16*)p.x + m * p.ldx, p.ldx, rows, p.K);
    if (p.a) shrink_panels(p, a, x, rows, z, s);
    if (p.a && p.z_out && n0 == 0) __builtin_memcpy(p.z_out + m * p.R, z, rows * p.R * sizeof(float));
    const float* own = p.a ? z : p.z + m * p.R;
    for (int64_t i = 0; i < rows; i++)
      for (int64_t r = 0; r < width; r += VL) {
        const int64_t left = p.R > r ? p.R - r : 0;
        vf g = p.g.rows ? load_upto(p.g.rows + (m + i) * p.g.stride + r, left) : vf{} + p.g.scalar;
        store(zg + i * width + r, load_upto(own + i * p.R + r, left) * g);
      }
    z_panels.pack(zg, width, rows, width);
    for (int64_t n = n0; n < n1; n += 32) {
      const int64_t count = min(32, n1 - n);
      for (int64_t j = 0; j < count; j++) factor_row<bf16>(p, n + j, f + j * width);
      for (int64_t i = 0; i < rows; i += kPanel) {
        multiply_tiles((const bf16*)p.w + n * p.ldw, p.ldw, count, p.K, x, i, rows - i, edge);
        multiply_tiles(f, width, 32, width, z_panels, i, rows - i, edge);
        each_row(rows - i, count, [&](int64_t at, int64_t c, vf v, int64_t left) __attribute__((always_inline)) {
          finish<bf16>(p, m + i + at, n + c, v, left);
        });
      }
    }
  }
  _tile_release();
}
