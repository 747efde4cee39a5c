// y = c ⊙ (x w + Σ adapters) + bias for few tokens, in one launch. w's rows are the mma's M side, the tokens its N side.
// K is split; as y is linear in z and in x w, each split applies b, and DoRA, to its own part of both and waits for nobody.
#include "reduce.cuh"
#include "routed.cuh"

// A warp has 16 columns of y and, in each pass over x, a piece: 16 rank rows. A thread has a row of w or of x.
constexpr int BN = 64, TOKENS = FASTLORA_TILE / BN, TILES = TOKENS / 8, PIECES = 4, RANKS = PIECES * 16;
constexpr int BK = 64, CHUNKS = BK / 8, ROW = BK * 2, STAGES = 4, THREADS = BN + TOKENS;
using Accumulator = Vector<float, 4>[TILES];

// Rank rows from `first` on of number `entry` in the list of a tile's tokens, which stand in `order` at `position`.
struct Piece { int slot, first, rank, entry, position, tokens; };
template <class T> struct alignas(128) Table {
  const T* rows[BN + TOKENS + 2 * RANKS];  // of w, x, a and b, x's only as many as there are; null is a row of zeros
  const float* gates[TOKENS];              // null: 1
  float factors[PIECES][TOKENS];           // of what a piece adds to a token; 0: it is not the token's
  Piece pieces[PIECES];
  int counts[THREADS];
};

// Fills in the rows of a and b, and the factors, of the pieces from number `skip` on, in the order of tiles and lists;
// how many there are, and whether any adapter is DoRA's. A thread has a tile, then a rank row and a token of a piece.
template <class T> DEVICE int route(const DecodeParams& p, Table<T>& table, int skip, int a_row, bool& dora) {
  const Routed& r = p.route;
  const int thread = threadIdx.x, *tile = r.tiles + 3 * thread, length = thread < r.count && tile[1] > 0 ? tile[2] : 0;
  const int* slots = r.slots + (length ? r.offsets[r.order[tile[0]]] : 0);
  int mine = 0, before = -skip, all = -skip;
  for (int i = 0; i < length; i++) {
    mine += int(cdiv(rank_of(r, slots[i]), 16));
    dora = dora || dora_row<T>(p.b_pages, r, slots[i], 0);
  }
  table.counts[thread] = mine;
  for (int i = 0; i < PIECES; i++) if (thread < TOKENS) table.factors[i][thread] = 0.f;
  dora = __syncthreads_or(dora);
  for (int i = 0; i < r.count; i++) all += table.counts[i], before += i < thread ? table.counts[i] : 0;
  for (int i = 0; i < length; i++)
    for (int row = 0, rank = rank_of(r, slots[i]); row < rank; row += 16, before++)
      if (before >= 0 && before < PIECES) table.pieces[before] = {slots[i], row, rank, i, tile[0], tile[1]};
  __syncthreads();
  if (thread >= RANKS) return all;
  const T *&a = table.rows[a_row + thread], *&b = table.rows[a_row + RANKS + thread];
  a = b = nullptr;
  if (thread / 16 >= all) return all;
  const Piece& piece = table.pieces[thread / 16];
  const int row = piece.first + thread % 16;
  if (row < piece.rank) {
    a = rank_row<T>(p.a_pages, r, piece.slot, blockIdx.y, row);
    b = rank_row<T>(p.b_pages, r, piece.slot, 0, row) + p.parts[blockIdx.y].column;
  }
  if (thread % 16 < piece.tokens) {
    const int token = int(r.order[piece.position + thread % 16]);
    table.factors[thread / 16][token] = p.gates[r.offsets[token] + piece.entry] * p.scales[piece.slot];
  }
  return all;
}

// c − 1 of two columns of a part, those of a thread's accumulators; 0 without DoRA and beyond the part.
template <class T> DEVICE Vector<float, 2> dora_of(const DecodeParams& p, const Part& part, int slot, int column) {
  const T* row = dora_row<T>(p.b_pages, p.route, slot, part.column);
  Vector<float, 2> d = {};
  UNROLL for (int i = 0; i < 2; i++) if (row && column + i * 8 < part.columns) d.v[i] = float(row[column + i * 8]);
  return d;
}

// A split's part of x w, before any update is there, times 1 + Σ gate · (c − 1) of each token's own list.
template <class T> DEVICE void scale_base(const DecodeParams& p, const Part& part, int column, Accumulator& acc) {
  UNROLL for (int i = 0; i < TILES * 2; i++) {
    const int row = i / 2 * 8 + threadIdx.x % 4 * 2 + i % 2;
    if (row >= p.m) continue;
    float scale[2] = {1.f, 1.f};
    for (int entry = p.route.offsets[row]; entry < p.route.offsets[row + 1]; entry++) {
      const Vector<float, 2> d = dora_of<T>(p, part, p.route.slots[entry], column);
      // Not a product with 0: the gate of an adapter that is no DoRA may be infinite.
      UNROLL for (int half = 0; half < 2; half++) scale[half] += d.v[half] != 0.f ? p.gates[entry] * d.v[half] : 0.f;
    }
    UNROLL for (int half = 0; half < 2; half++) acc[i / 2].v[half * 2 + i % 2] *= scale[half];
  }
}

template <class T>
static __global__ void __launch_bounds__(THREADS, 3) decode_kernel(const __grid_constant__ DecodeParams p) {
  SHARED_DYNAMIC(memory);
  Table<T>& table = *reinterpret_cast<Table<T>*>(memory);
  const Part& part = p.parts[blockIdx.y];
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, n0 = blockIdx.x * BN, token = thread - BN;
  const int columns = int(part.columns), ranks = int(part.ranks), m = int(p.m), tiles = int(cdiv(m, 16)) * 2;
  if (n0 >= columns) return;  // the grid is as wide as the widest part
  const int all = int(cdiv(p.k, BK)), each = int(cdiv(all, gridDim.z));
  const int begin = min(int(blockIdx.z) * each, all), end = min(begin + each, all);
  const bool routed = routes(p.route), there = token < 0 ? n0 + thread < columns : token < m;
  const int a_row = BN + tiles * 8, stage_rows = a_row + (routed ? RANKS : min(RANKS, int(cdiv(ranks, 16)) * 16));
  if (token >= 0) table.gates[token] = there && p.g.data ? at<float>(p.g, token, part.rank) : nullptr;
  table.rows[thread] = !there ? nullptr : token < 0 ? at<T>(p.w, part.column + n0 + thread, 0) : at<T>(p.x, token, 0);
  Accumulator acc = {};
  ROLLED for (int rank0 = 0, left = begin < end; left > 0; rank0 += RANKS, left -= PIECES) {
    __syncthreads();  // nobody is in the pass before any more
    bool dora = false;
    left = routed ? route(p, table, rank0 / 16, a_row, dora) : int(cdiv(ranks - rank0, 16));
    for (int i = 0; i < PIECES && !routed && thread < RANKS; i++) {
      table.rows[a_row + thread] = rank0 + thread < ranks ? at<T>(part.m, rank0 + thread, 0) : nullptr;
      table.rows[a_row + RANKS + thread] = n0 + thread < columns ? at<T>(p.b[blockIdx.y], n0 + thread, 0) : nullptr;
      table.factors[i][thread] = 1.f;
    }
    __syncthreads();
    const int pieces = min(PIECES, left);
    auto stage_of = [&](int block) { return memory + sizeof table + (block - begin) % STAGES * stage_rows * ROW; };
    auto fill = [&](int block) {
      const bool last = block == end;  // b: it lies where w's rows would
      const int row = last ? a_row + RANKS : rank0 ? BN : 0, count = last ? RANKS : a_row + pieces * 16 - row;
      const int column = !last ? block * BK : routed ? n0 : rank0, depth = int(!last ? p.k : routed ? columns : ranks);
      for (int i = thread; i < count * CHUNKS && block < end + (pieces > 0); i += THREADS) {
        const T* from = table.rows[row + i / CHUNKS];
        const int to = swizzle<CHUNKS>((last ? 0 : row) + i / CHUNKS, i % CHUNKS), first = column + i % CHUNKS * 8;
        copy_chunk(stage_of(block) + to, from ? from : at<T>(p.x, 0, 0), first, from ? depth - first : 0);
      }
      copy_async_commit();
    };
    ROLLED for (int i = 0; i < STAGES - 1; i++) fill(begin + i);
    Accumulator z = {};
    const bool ranked = warp < pieces;
    ROLLED for (int block = begin; block < end; block++) {
      copy_async_wait<STAGES - 2>();
      __syncthreads();  // all copies of this block have landed, and nobody reads the block before it any more
      fill(block + STAGES - 1);
      const unsigned char* stage = stage_of(block);
      UNROLL for (int step = 0; step < BK / 16; step++) {
        uint32_t w[4], a[4], x[4];
        if (!rank0) ldmatrix(w, stage + swizzle<CHUNKS>(warp * 16 + lane % 16, step * 2 + lane / 16));
        if (ranked) ldmatrix(a, stage + swizzle<CHUNKS>(a_row + warp * 16 + lane % 16, step * 2 + lane / 16));
        UNROLL for (int j = 0; j < TILES; j += 2) {
          if (j >= tiles) break;
          ldmatrix(x, stage + swizzle<CHUNKS>(BN + j * 8 + lane / 16 * 8 + lane % 8, step * 2 + lane / 8 % 2));
          if (!rank0) mma(acc[j].v, w, x[0], x[1], T{}), mma(acc[j + 1].v, w, x[2], x[3], T{});
          if (ranked) mma(z[j].v, a, x[0], x[1], T{}), mma(z[j + 1].v, a, x[2], x[3], T{});
        }
      }
    }
    const int own = n0 + warp * 16 + lane / 4;  // and own + 8: the columns of the thread's accumulators
    if (dora && !rank0) scale_base<T>(p, part, own, acc);
    if (pieces <= 0) break;
    copy_async_wait<STAGES - 2>();
    // z lies where x's rows would, and in the next stage what is left of it by rounding: a split's z may be much larger than
    // the sum of all, so it must not be rounded by itself.
    unsigned char *stage = stage_of(end), *rest = stage_of(end + 1);
    UNROLL for (int i = 0; i < TILES * 4; i++) {
      const int row = lane % 4 * 2 + i % 2, rank = warp * 16 + lane / 4 + i % 4 / 2 * 8;
      if (!ranked || i / 4 >= tiles) break;
      const float* g = table.gates[i / 4 * 8 + row];
      const bool real = table.rows[a_row + rank];
      const float zg = z[i / 4].v[i % 4] * (routed ? 1.f : p.scale) * (g && real ? g[rank0 + rank] : 1.f);
      const int to = (BN + i / 4 * 8) * ROW + swizzle<CHUNKS>(row, rank / 8) + rank % 8 * 2;
      const T high = T(real ? zg : 0.f);
      const bool finite = float(high) - float(high) == 0.f;  // nothing is left of an infinity
      *reinterpret_cast<T*>(stage + to) = high;
      *reinterpret_cast<T*>(rest + to) = T(real && finite ? zg - float(high) : 0.f);
    }
    __syncthreads();
    ROLLED for (int i = 0; i < pieces; i++) {
      uint32_t b[4], high[4], low[4];
      const Vector<float, 2> d = dora ? dora_of<T>(p, part, table.pieces[i].slot, own) : Vector<float, 2>{};
      const int row = i * 16 + lane / 16 * 8 + lane % 8;
      if (routed) ldmatrix_trans(b, stage + swizzle<CHUNKS>(row, warp * 2 + lane / 8 % 2));
      else ldmatrix(b, stage + swizzle<CHUNKS>(warp * 16 + lane % 16, i * 2 + lane / 16));
      UNROLL for (int j = 0; j < TILES; j += 2) {
        if (j >= tiles) break;
        Vector<float, 4> update[2] = {};
        const int from = swizzle<CHUNKS>(BN + j * 8 + lane / 16 * 8 + lane % 8, i * 2 + lane / 8 % 2);
        ldmatrix(high, stage + from), ldmatrix(low, rest + from);
        mma(update[0].v, b, high[0], high[1], T{}), mma(update[1].v, b, high[2], high[3], T{});
        mma(update[0].v, b, low[0], low[1], T{}), mma(update[1].v, b, low[2], low[3], T{});
        UNROLL for (int e = 0; e < 8; e++) {
          // Not a product with 0: what another token's adapter gives may be infinite.
          const float factor = table.factors[i][(j + e / 4) * 8 + lane % 4 * 2 + e % 2];
          acc[j + e / 4].v[e % 4] += factor != 0.f ? factor * (1.f + d.v[e % 4 / 2]) * update[e / 4].v[e % 4] : 0.f;
        }
      }
    }
  }
  const int tile = blockIdx.y * gridDim.x + blockIdx.x, splits = gridDim.z;
  if (splits > 1 && !reduce<THREADS>(p.partial, p.arrived, tile, blockIdx.z, splits, acc, tiles)) return;
  UNROLL for (int half = 0; half < 2; half++) {
    const int inside = n0 + warp * 16 + lane / 4 + half * 8, column = int(part.column) + inside;
    if (inside >= columns) continue;
    const float c = p.column_scale ? p.column_scale[column] : 1.f;
    const float bias = p.bias ? float(static_cast<const T*>(p.bias)[column]) : 0.f;
    UNROLL for (int i = 0; i < TILES * 2; i++) {
      const int row = i / 2 * 8 + lane % 4 * 2 + i % 2;
      if (row < m) *at<T>(p.y, row, column) = T(acc[i / 2].v[half * 2 + i % 2] * c + bias);
    }
  }
}

extern "C" long long fastlora_decode_counters(long long parts, long long widest) { return parts * cdiv(widest, BN); }

extern "C" int launch_decode(const DecodeParams* params, void* stream) {
  Check check(params);
  if (check.status) return check.status;
  const DecodeParams& p = *params;
  check.common(p, p.k, 2, false, false);
  const bool routed = check_route(check, p.route, p.a_pages, p.k, p.type);
  check_pages(check, p.route, p.b_pages, p.n);
  check.size(p.k), check.matrix(p.x, p.m, p.k, 2);
  check.refuse(check.columns != p.n || p.splits < 1 || p.splits > 65535, FASTLORA_SHAPE);
  check.refuse(routed && (check.ranks || p.g.data || p.route.m != p.m), FASTLORA_SHAPE);
  check.refuse(p.m > TOKENS || p.route.count > THREADS, FASTLORA_TOO_LARGE);
  const long long tiles = check.status || !p.m ? 0 : fastlora_decode_counters(p.count, check.widest);
  check.matrix(p.w, p.n, p.k, 2);
  check.matrix(p.y, p.m, p.n, 2, true);
  if (p.g.data) check.matrix(p.g, p.m, check.ranks, 4);
  if (p.bias) check.pointer(p.bias, 2);
  if (p.column_scale) check.pointer(p.column_scale, sizeof *p.column_scale);
  for (int i = 0; !check.status && i < p.count; i++) check.matrix(p.b[i], p.parts[i].columns, p.parts[i].ranks, 2);
  if (routed) check.pointer(p.gates, sizeof *p.gates);
  if (routed && p.route.adapters) check.pointer(p.scales, sizeof *p.scales);
  if (p.splits > 1 && tiles) check.workspace(p, tiles * p.splits * FASTLORA_TILE, tiles);
  if (check.status || !tiles) return check.status;
  const int rows = BN + int(cdiv(p.m, 16)) * 16 + (routed ? RANKS : min(RANKS, int(cdiv(check.ranks, 16)) * 16));
  auto* kernel = p.type == FASTLORA_BF16 ? decode_kernel<bf16> : decode_kernel<fp16>;
  const dim3 grid(unsigned(cdiv(check.widest, BN)), p.count, p.splits);
  return check.launch(kernel, grid, THREADS, int(sizeof(Table<bf16>)) + STAGES * rows * ROW, p, stream);
}
