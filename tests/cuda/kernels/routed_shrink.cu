// z = x aᵀ where every token has adapters of its own. A block has a tile of tokens, 32 rank rows and a part of K, and goes
// through the list; its warps share K, straight from global memory, and each adds up one page.
#include "reduce.cuh"
#include "routed.cuh"

constexpr int PAGES = 4, THREADS = 32 * PAGES, BK = 32 * PAGES;

template <class T>
static __global__ void __launch_bounds__(THREADS, 4)
routed_shrink_kernel(const __grid_constant__ Routed_shrinkParams p) {
  SHARED_DYNAMIC(memory);
  auto* sums = reinterpret_cast<Vector<float, 4>(*)[PAGES][32]>(memory);  // of each warp
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, splits = gridDim.z, wide = int(cdiv(p.route.pages, PAGES));
  const int slice = blockIdx.y / wide, rank0 = blockIdx.y % wide * PAGES * 8, column = rank0 + warp * 8 + lane % 4 * 2;
  const long long each = cdiv(cdiv(p.k, BK), splits) * BK;
  const int begin = int(min(p.k, blockIdx.z * each)), end = int(min(p.k, begin + each));
  const Tile tile = tile_of(p.route, blockIdx.x, lane);
  ROLLED for (int j = 0; j < tile.length; j++) {
    const int slot = p.route.slots[tile.head + j], rank = rank_of(p.route, slot);
    const T* a[PAGES];
    UNROLL for (int i = 0, row = rank0 + lane / 4; i < PAGES; i++, row += 8)
      a[i] = row < rank ? rank_row<T>(p.a, p.route, slot, slice, row) : nullptr;
    Vector<float, 4> acc[PAGES] = {};
    ROLLED for (int first = begin + warp * 32; rank0 < rank && first < end; first += BK) {
      const int k = first + lane % 4 * 8, count = end - k;
      Vector<T, 8> x[2];
      UNROLL for (int i = 0; i < 2; i++) x[i] = load<8>(at<T>(p.x, tile.token[i], 0), k, tile.token[i] < 0 ? 0 : count);
      UNROLL for (int i = 0; i < PAGES && rank0 + i * 8 < rank; i++) multiply(acc[i].v, x, load<8>(a[i], k, a[i] ? count : 0));
    }
    __syncthreads();  // nobody reads the sums of the adapter before any more
    UNROLL for (int i = 0; i < PAGES; i++) sums[warp][i][lane] = acc[i];
    __syncthreads();
    Vector<float, 4> z[1] = {};
    UNROLL for (int i = 0; i < 4 * PAGES; i++) z[0].v[i % 4] += sums[i / 4][warp][lane].v[i % 4];
    // One counter for each entry of the tile's first token, which is in no other tile.
    const int own = (tile.head + j) * gridDim.y + blockIdx.y;
    if (splits > 1 && !reduce<THREADS>(p.partial, p.arrived, own, blockIdx.z, splits, z, rank0 < rank)) continue;
    for (int i = 0; i < 4; i++)
      if (tile.token[i / 2] >= 0 && column < p.route.pages * 8)
        *at<float>(p.z, tile.entry[i / 2] + j, slice * p.route.pages * 8 + column + i % 2) = z[0].v[i];
  }
}

extern "C" int launch_routed_shrink(const Routed_shrinkParams* params, void* stream) {
  Check check(params);
  if (check.status) return check.status;
  const Routed_shrinkParams& p = *params;
  check.size(p.slices);
  check.refuse(p.splits < 1 || p.splits > 65535, FASTLORA_SHAPE);
  if (!check_route(check, p.route, p.a, p.k, p.type) || !p.slices) return check.status;
  const long long blocks = p.slices * cdiv(p.route.pages, PAGES), tiles = p.route.entries * min(blocks, 65536ll);
  check.refuse(blocks > 65535, FASTLORA_TOO_LARGE);
  check.size(tiles);
  check.matrix(p.x, p.route.m, p.k, 2);
  check.matrix(p.z, p.route.entries, p.slices * p.route.pages * 8, 4, true);
  if (p.splits > 1) check.workspace(p, tiles * p.splits * FASTLORA_ROUTED_TILE, tiles);
  if (check.status) return check.status;
  auto* kernel = p.type == FASTLORA_BF16 ? routed_shrink_kernel<bf16> : routed_shrink_kernel<fp16>;
  const dim3 grid(unsigned(p.route.count), unsigned(blocks), p.splits);
  return check.launch(kernel, grid, THREADS, PAGES * PAGES * 32 * int(sizeof(Vector<float, 4>)), p, stream);
}
