// What each instruction-set file compiles, in an unnamed namespace of its own, and the table's functions.
#include "cpu.h"

namespace fastlora::cpu {
namespace {
#include "vector.inc.h"
#include "philox.inc.h"
#include "dot.inc.h"
#include "gemm.inc.h"
#include "packed.inc.h"
#ifdef DOT_BF16
#include "tiles.inc.h"
#endif
#include "outer.inc.h"
#include "spread.inc.h"

template <class T>
void gemm(const Gemm& p, Form form, int64_t m0, int64_t m1, int64_t n0, int64_t n1, char* scratch) {
  const Scratch s{scratch};
  if (form == kDot) return gemm_dot<T>(p, m0, m1, n0, n1, s);
#ifdef DOT_BF16
  if (form == kTiles) return gemm_tiles(p, m0, m1, n0, n1, s);
#endif
  if (form == kDirect) {
    int64_t tail = n0;
    for (int64_t m = m0; m < m1; m += 4) tail = gemm_direct<T>(p, m, min(4, m1 - m), n0, n1, s);
    n0 = tail;   // what no whole tile covers
  }
  if (n0 < n1) gemm_packed<T>(p, m0, m1, n0, n1, s);
}
template <class T>
void shrink(const Gemm& p, bool tiles, int64_t m0, int64_t m1, char* scratch) {
  Scratch s{scratch};
  const int64_t block = tiles ? kTileBlock : 16;
  int64_t ld = round_up(p.K, 32) + 32;
  const bool masked = p.mask.threshold;
  T* kept_x = s.take<T>(masked ? block * ld : 0);
  const Factor* a = factor_rows<T>(p, s);
  for (int64_t m = m0; m < m1; m += block) {
    int64_t rows = min(block, m1 - m);
    const T* x = (const T*)p.x + m * p.ldx;
    for (int64_t i = 0; masked && i < rows; i++)
      keep_row(x + i * p.ldx, kept_x + i * ld, p.K, (m + i) * p.mask.width, p.mask, 1);
    auto* run = shrink_rows<T>;
#ifdef DOT_BF16
    if (tiles) run = shrink_tiles;
#endif
    run(p, a, masked ? kept_x : x, masked ? ld : p.ldx, rows, p.z_out + m * p.R, s);
  }
}
template <class T>
void dropout(const void* x, void* y, int64_t n, int64_t i, const Mask& mask) {
  keep_row((const T*)x, (T*)y, n, i, mask, mask.scale);
}
template <class T>
constexpr Kernels kernels = {gemm<T>, shrink<T>, outer<T>, spread<T>, dropout<T>, kPanel};
}  // namespace
#ifdef DOT_BF16
const Kernels TABLE[] = {{}, kernels<bf16>, {}};
#else
const Kernels TABLE[] = {kernels<float>, kernels<bf16>, kernels<f16>};
#endif
}  // namespace fastlora::cpu
