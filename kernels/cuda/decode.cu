// y = c ⊙ (x w + Σ adapters) + bias for few tokens, in one launch. The rows of w are the M side of the mma, the tokens its N
// side. K is split; as the update is linear in z, each split applies b to its own part of z and waits for nobody.
#include "check.h"
#include "reduce.cuh"

// A warp has 16 columns of y and, in each pass over x, 16 rank rows: a piece. Four stages leave room for three blocks or more.
constexpr int BN = 64, TOKENS = FASTLORA_TILE / BN, TILES = TOKENS / 8, PIECES = 4, RANKS = PIECES * 16, THREADS = 128;
constexpr int BK = 64, CHUNKS = BK / 8, ROW = BK * 2, STAGES = 4;
using Accumulator = Vector<float, 4>[TILES];

// Rank rows from `first` on of number `entry` in the lists of a tile's tokens, which stand in `order` from `position` on.
struct Piece { int slot, first, rank, entry, position, tokens; };
template <class T> struct alignas(128) Table {
  const T* rows[BN + TOKENS + 2 * RANKS];  // of w, x, a and b; null is a row of zeros
  const float* gates[TOKENS];              // null: 1
  float factors[PIECES][TOKENS];           // of what a piece adds to a token; 0 where it is not the token's
  Piece pieces[PIECES];
  int counts[THREADS];
};

// A thread has a tile of the route: where its tokens' list starts, its length, and how many pieces come before its own.
struct List { int head, length, before, all; };
DEVICE int rank_of(const Route& r, int slot) { return slot >= 0 && slot < r.known ? r.ranks[slot] : 0; }
DEVICE List find_list(const Route& r, int* counts) {
  const int thread = threadIdx.x, *tile = r.tiles + 3 * thread;
  List list = {};
  if (thread < r.count && tile[1] > 0) list = {r.offsets[r.order[tile[0]]], tile[2], 0, 0};
  counts[thread] = 0;
  for (int i = 0; i < list.length; i++) counts[thread] += int(cdiv(rank_of(r, r.slots[list.head + i]), 16));
  __syncthreads();
  for (int i = 0; i < r.count; i++) list.all += counts[i], list.before += i < thread ? counts[i] : 0;
  return list;
}

// The rows of a and b, and the factors, of `count` pieces from number `first` on.
template <class T> DEVICE void route(const DecodeParams& p, Table<T>& table, const List& list, int first, int count, int a_row) {
  const Route& r = p.route;
  const int thread = threadIdx.x, *tile = r.tiles + 3 * thread;
  for (int i = 0, piece = list.before - first; i < list.length; i++) {
    const int slot = r.slots[list.head + i], rank = rank_of(r, slot);
    for (int row = 0; row < rank; row += 16, piece++)
      if (piece >= 0 && piece < count) table.pieces[piece] = {slot, row, rank, i, tile[0], tile[1]};
  }
  for (int i = thread; i < PIECES * TOKENS; i += THREADS) table.factors[i / TOKENS][i % TOKENS] = 0.f;
  __syncthreads();
  if (thread >= RANKS) return;
  const T *a = nullptr, *b = nullptr;
  if (thread / 16 < count) {
    const Piece& piece = table.pieces[thread / 16];
    const int row = piece.first + thread % 16;
    if (row < piece.rank) {
      const long long page = r.table[piece.slot * r.table_stride + row / 8];
      a = at<T>(p.parts[blockIdx.y].m, row % 8, 0) + page * r.a_page;
      b = at<T>(p.b[blockIdx.y], row % 8, 0) + page * r.b_page;
    }
    if (thread % 16 < piece.tokens) {
      const int token = int(r.order[piece.position + thread % 16]);
      table.factors[thread / 16][token] = r.gates[r.offsets[token] + piece.entry] * r.scales[piece.slot];
    }
  }
  table.rows[a_row + thread] = a, table.rows[a_row + RANKS + thread] = b;
}

template <class T>
DEVICE void copy_rows(unsigned char* to, const T* const* rows, int count, const T* valid, int first, int columns) {
  for (int i = threadIdx.x; i < count * CHUNKS; i += THREADS) {
    const T* row = rows[i / CHUNKS];
    const int column = first + i % CHUNKS * 8;
    copy_chunk(to + swizzle<CHUNKS>(i / CHUNKS, i % CHUNKS), row ? row : valid, column, row ? columns - column : 0);
  }
}

template <class T>
static __global__ void __launch_bounds__(THREADS, 3) decode_kernel(const __grid_constant__ DecodeParams p) {
  SHARED_DYNAMIC(memory);
  Table<T>& table = *reinterpret_cast<Table<T>*>(memory);
  const Part& part = p.parts[blockIdx.y];
  const Matrix& b = p.b[blockIdx.y];
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, n0 = blockIdx.x * BN;
  const int columns = int(part.columns), m = int(p.m), a_row = BN + int(cdiv(m, 16)) * 16, tiles = (a_row - BN) / 8;
  if (n0 >= columns) return;  // the grid is as wide as the widest part
  const bool routed = p.route.count > 0;
  const float scale = routed ? 1.f : p.scale;
  const int all = int(cdiv(p.k, BK)), each = int(cdiv(all, gridDim.z));
  const int begin = min(int(blockIdx.z) * each, all), end = min(begin + each, all);
  const int stage_bytes = (a_row + (routed ? RANKS : min(RANKS, int(cdiv(part.ranks, 16)) * 16))) * ROW;
  // BN + TOKENS threads: each has a row of w or of x.
  const int token = thread - BN;
  const bool there = token < 0 ? n0 + thread < columns : token < m;
  if (token >= 0) table.gates[token] = there && p.g.data ? at<float>(p.g, token, part.rank) : nullptr;
  table.rows[thread] = !there ? nullptr : token < 0 ? at<T>(p.w, part.column + n0 + thread, 0) : at<T>(p.x, token, 0);
  const List list = routed ? find_list(p.route, table.counts) : List{0, 0, 0, int(cdiv(part.ranks, 16))};
  Accumulator acc = {};
  ROLLED for (int first = 0; begin < end && (!first || first < list.all); first += PIECES) {
    const int pieces = min(PIECES, list.all - first), rank0 = first * 16;
    __syncthreads();  // nobody reads the tables and stages of the pass before any more
    if (routed) {
      route(p, table, list, first, pieces, a_row);
    } else if (thread < RANKS) {
      table.rows[a_row + thread] = rank0 + thread < part.ranks ? at<T>(part.m, rank0 + thread, 0) : nullptr;
      table.rows[a_row + RANKS + thread] = n0 + thread < columns ? at<T>(b, n0 + thread, 0) : nullptr;
      for (int i = 0; i < PIECES; i++) table.factors[i][thread] = 1.f;
    }
    __syncthreads();
    auto stage_of = [&](int block) { return memory + sizeof table + (block - begin) % STAGES * stage_bytes; };
    auto fill = [&](int block) {
      unsigned char* stage = stage_of(block);
      const int skip = first ? BN : 0, depth = routed ? columns : int(part.ranks);
      const T* x = at<T>(p.x, 0, 0);
      if (block < end) copy_rows(stage + skip * ROW, table.rows + skip, a_row - skip + pieces * 16, x, block * BK, int(p.k));
      if (block == end && pieces) copy_rows(stage, table.rows + a_row + RANKS, RANKS, x, routed ? n0 : rank0, depth);
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
        if (!first) ldmatrix(w, stage + swizzle<CHUNKS>(warp * 16 + lane % 16, step * 2 + lane / 16));
        if (ranked) ldmatrix(a, stage + swizzle<CHUNKS>(a_row + warp * 16 + lane % 16, step * 2 + lane / 16));
        UNROLL for (int j = 0; j < TILES; j += 2) {
          if (j >= tiles) break;
          ldmatrix(x, stage + swizzle<CHUNKS>(BN + j * 8 + lane / 16 * 8 + lane % 8, step * 2 + lane / 8 % 2));
          if (!first) mma(acc[j].v, w, x[0], x[1], T{}), mma(acc[j + 1].v, w, x[2], x[3], T{});
          if (ranked) mma(z[j].v, a, x[0], x[1], T{}), mma(z[j + 1].v, a, x[2], x[3], T{});
        }
      }
    }
    if (!pieces) continue;
    // b lies where w's rows would, and z comes to where x's would.
    copy_async_wait<STAGES - 2>();
    unsigned char* stage = stage_of(end);
    UNROLL for (int i = 0; i < TILES * 4; i++) {
      const int token = lane % 4 * 2 + i % 2, rank = warp * 16 + lane / 4 + i % 4 / 2 * 8;
      if (!ranked || i / 4 >= tiles) break;
      const float* g = table.gates[i / 4 * 8 + token];
      const float zg = z[i / 4].v[i % 4] * scale * (g && table.rows[a_row + rank] ? g[rank0 + rank] : 1.f);
      unsigned char* to = stage + (BN + i / 4 * 8) * ROW + swizzle<CHUNKS>(token, rank / 8) + rank % 8 * 2;
      *reinterpret_cast<T*>(to) = T(table.rows[a_row + rank] ? zg : 0.f);
    }
    __syncthreads();
    ROLLED for (int i = 0; i < pieces; i++) {
      uint32_t left[4], right[4];
      if (routed) ldmatrix_trans(left, stage + swizzle<CHUNKS>(i * 16 + lane / 16 * 8 + lane % 8, warp * 2 + lane / 8 % 2));
      else ldmatrix(left, stage + swizzle<CHUNKS>(warp * 16 + lane % 16, i * 2 + lane / 16));
      UNROLL for (int j = 0; j < TILES; j += 2) {
        if (j >= tiles) break;
        Vector<float, 4> update[2] = {};
        ldmatrix(right, stage + swizzle<CHUNKS>(BN + j * 8 + lane / 16 * 8 + lane % 8, i * 2 + lane / 8 % 2));
        mma(update[0].v, left, right[0], right[1], T{}), mma(update[1].v, left, right[2], right[3], T{});
        UNROLL for (int e = 0; e < 8; e++) {
          // A factor of 0 is no product: what another token's adapter holds may be infinite.
          const float factor = table.factors[i][j * 8 + e / 4 * 8 + lane % 4 * 2 + e % 2];
          acc[j + e / 4].v[e % 4] += factor != 0.f ? factor * update[e / 4].v[e % 4] : 0.f;
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
      const int token = i / 2 * 8 + lane % 4 * 2 + i % 2;
      if (token < m) *at<T>(p.y, token, column) = T(acc[i / 2].v[half * 2 + i % 2] * c + bias);
    }
  }
}

extern "C" long long fastlora_decode_counters(long long parts, long long widest) { return parts * cdiv(widest, BN); }

extern "C" int launch_decode(const DecodeParams* params, void* stream) {
  Check check(params);
  if (check.status) return check.status;
  const DecodeParams& p = *params;
  const Route& r = p.route;
  check.operands(p, p.k, false);
  check.refuse(check.columns != p.n || p.splits < 1 || p.splits > 65535 || r.count < 0, FASTLORA_SHAPE);
  check.refuse(r.count && (check.ranks || p.g.data), FASTLORA_SHAPE);
  check.refuse(p.m > TOKENS || r.count > THREADS, FASTLORA_TOO_LARGE);
  const long long tiles = check.status || !p.m ? 0 : fastlora_decode_counters(p.count, check.widest);
  check.matrix(p.w, p.n, p.k, 2);
  check.matrix(p.y, p.m, p.n, 2, true);
  if (p.g.data) check.matrix(p.g, p.m, check.ranks, 4);
  if (p.bias) check.pointer(p.bias, 2);
  if (p.column_scale) check.pointer(p.column_scale, sizeof *p.column_scale);
  for (int i = 0; !check.status && i < p.count; i++) {
    const Part& part = p.parts[i];
    check.matrix(p.b[i], part.columns, r.count ? 1 : part.ranks, 2);
    if (r.count) check.matrix(part.m, part.columns, p.k, 2);
  }
  for (const int* list : {r.tiles, r.offsets, r.slots, r.table, r.ranks}) if (r.count) check.pointer(list, 4);
  for (const float* list : {r.gates, r.scales}) if (r.count) check.pointer(list, 4);
  if (r.count) check.pointer(r.order, 8);
  for (long long stride : {r.a_page, r.b_page, r.table_stride}) check.size(stride);
  if (p.splits > 1 && tiles) check.workspace(p, tiles * p.splits * FASTLORA_TILE, tiles);
  if (check.status || !tiles) return check.status;
  const long long rows = BN + cdiv(p.m, 16) * 16 + (r.count ? RANKS : min(RANKS, int(cdiv(check.ranks, 16)) * 16));
  const int bytes = int(sizeof(Table<bf16>) + STAGES * rows * ROW);
  auto* kernel = p.type == FASTLORA_BF16 ? decode_kernel<bf16> : decode_kernel<fp16>;
  const dim3 grid(unsigned(cdiv(check.widest, BN)), p.count, p.splits);
  return check.launch(kernel, grid, THREADS, bytes, p, stream);
}
