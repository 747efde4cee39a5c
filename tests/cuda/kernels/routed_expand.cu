// y += Σ gate · scale · z b where every token has adapters of its own. A warp has a tile of tokens and 64 columns of one slice
// and goes through the list; z is gated and rounded as it is read, y is read and written once. With DoRA b is multiplied by c
// and rounded again as it is read, and y is read once more for each such slot, for the base's part.
#include "routed.cuh"

constexpr int THREADS = 128, BN = THREADS / 32 * 64;

// acc += gate · d ⊙ (y − bias), for entry j of a tile's list; `dora`, `first`, `columns`: from the strip's first column on.
template <class T>
DEVICE void add_base(const Routed_expandParams& p, const Tile& tile, int j, const T* dora, long long first, int columns,
                     float (&acc)[8][4]) {
  UNROLL for (int i = 0; i < 4; i++) {
    if (tile.token[i / 2] < 0) continue;
    const int column = threadIdx.x % 4 * 16 + i % 2 * 8, count = columns - column;
    const float g = p.gates[tile.entry[i / 2] + j];
    const Vector<T, 8> d = load<8>(dora, column, count), y = load<8>(at<T>(p.y, tile.token[i / 2], first), column, count);
    const Vector<T, 8> bias = load<8>(static_cast<const T*>(p.bias), first + column, p.bias ? count : 0);
    UNROLL for (int e = 0; e < 8; e++) acc[e][i] += g * float(d.v[e]) * (float(y.v[e]) - float(bias.v[e]));
  }
}

template <class T>
static __global__ void __launch_bounds__(THREADS, 4)
routed_expand_kernel(const __grid_constant__ Routed_expandParams p) {
  const int lane = threadIdx.x % 32, n0 = blockIdx.y * BN + threadIdx.x / 32 * 64, slice = blockIdx.z;
  long long start = 0;
  for (int i = 0; i < slice; i++) start += p.columns[i];
  const int columns = int(p.columns[slice]) - n0;
  const Tile tile = tile_of(p.route, blockIdx.x, lane);
  if (columns <= 0 || !tile.length) return;
  float acc[8][4] = {};
  ROLLED for (int j = 0; j < tile.length; j++) {
    const int slot = p.route.slots[tile.head + j], rank = rank_of(p.route, slot);
    const T* dora = dora_row<T>(p.b, p.route, slot, start + n0);
    const Vector<T, 8> d = load<8>(dora, lane / 4 * 8, dora ? columns - lane / 4 * 8 : 0);
    ROLLED for (int first = 0; first < rank; first += 16) {
      const int k = first + lane % 4 * 4, count = rank - k;
      Vector<T, 4> z[2];
      Vector<T, 8> b[4];
      UNROLL for (int i = 0; i < 2; i++) {
        const bool some = tile.token[i] >= 0;
        const float g = some ? p.gates[tile.entry[i] + j] * p.scales[slot] : 0.f;
        const float* from = at<float>(p.z, tile.entry[i] + j, slice * p.route.pages * 8);
        const Vector<float, 4> part = load<4>(from, k, some ? count : 0);
        UNROLL for (int e = 0; e < 4; e++) z[i].v[e] = T(part.v[e] * g);
      }
      const T* from = count > 0 ? rank_row<T>(p.b, p.route, slot, 0, k) : nullptr;  // and three more rows of its page
      UNROLL for (int i = 0; i < 4; i++)
        b[i] = load<8>(from, i * p.b.row + start + n0 + lane / 4 * 8, i < count ? columns - lane / 4 * 8 : 0);
      if (dora)
        UNROLL for (int i = 0; i < 32; i++) b[i / 8].v[i % 8] = T(float(b[i / 8].v[i % 8]) * (1.f + float(d.v[i % 8])));
      multiply(acc, z, b);
    }
    if (dora) add_base(p, tile, j, dora, start + n0, columns, acc);
  }
  UNROLL for (int i = 0; i < 2; i++)
    if (tile.token[i] >= 0) add(at<T>(p.y, tile.token[i], start + n0), acc, i, lane % 4 * 16, columns);
}

extern "C" int launch_routed_expand(const Routed_expandParams* params, void* stream) {
  Check check(params);
  if (check.status) return check.status;
  const Routed_expandParams& p = *params;
  check.refuse(p.count < 0 || p.count > FASTLORA_PARTS, FASTLORA_SHAPE);
  for (int i = 0; !check.status && i < p.count; check.columns += p.columns[i++])
    check.size(p.columns[i]), check.widest = max(check.widest, p.columns[i]);
  if (!check_route(check, p.route, p.b, check.columns, p.type) || !check.widest) return check.status;
  const dim3 grid(unsigned(p.route.count), unsigned(cdiv(check.widest, BN)), p.count);
  check.refuse(grid.y > 65535, FASTLORA_TOO_LARGE);
  check.matrix(p.y, p.route.m, check.columns, 2, true);
  check.matrix(p.z, p.route.entries, p.count * p.route.pages * 8, 4);
  check.pointer(p.gates, sizeof *p.gates);
  if (p.bias) check.pointer(p.bias, 2);
  if (p.route.adapters) check.pointer(p.scales, sizeof *p.scales);
  if (check.status) return check.status;
  auto* kernel = p.type == FASTLORA_BF16 ? routed_expand_kernel<bf16> : routed_expand_kernel<fp16>;
  return check.launch(kernel, grid, THREADS, 0, p, stream);
}
