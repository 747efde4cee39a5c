// What a warp knows of a tile: at most 16 tokens that use the same list of adapters, whose rank rows lie in pages.
#pragma once
#include "check.h"
#include "direct.cuh"

// The lane's tokens, of rows lane / 4 and lane / 4 + 8, −1 for none, and where their lists start; the first token's list.
struct Tile { long long token[2]; int entry[2], head, length; };
DEVICE Tile tile_of(const Routed& route, int tile, int lane) {
  const int *at = route.tiles + 3ll * tile, first = at[0], count = at[1];
  Tile t = {{-1, -1}, {0, 0}, count ? route.offsets[route.order[first]] : 0, count ? at[2] : 0};
  UNROLL for (int i = 0; i < 2; i++) {
    if (lane / 4 + i * 8 >= count) continue;
    t.token[i] = route.order[first + lane / 4 + i * 8];
    t.entry[i] = route.offsets[t.token[i]];
  }
  return t;
}
DEVICE int rank_of(const Routed& route, int slot) {
  return slot < 0 || slot >= route.adapters ? 0 : min(route.ranks[slot], 8 * int(route.pages));
}
template <class T> DEVICE const T* rank_row(const Pages& pages, const Routed& route, int slot, int slice, int row) {
  return static_cast<const T*>(pages.data) + *at<int>(route.table, slot, row / 8) * pages.page + slice * pages.slice + row % 8 * pages.row;
}
// Column `column` of a slot's c − 1, or null where it is no DoRA: as everywhere, the device decides, so a graph may be replayed.
template <class T> DEVICE const T* dora_row(const Pages& b, const Routed& route, int slot, long long column) {
  const int page = route.columns && slot >= 0 && slot < route.adapters ? route.columns[slot] : -1;
  return page < 0 ? nullptr : static_cast<const T*>(b.data) + page * b.page + column;
}
// Whether any token may have an adapter.
__host__ __device__ inline bool routes(const Routed& r) { return r.m && r.count && r.entries && r.pages; }

static void check_pages(Check& check, const Routed& r, const Pages& pages, long long columns) {
  for (long long n : {pages.page, pages.slice, pages.row, columns}) check.size(n);
  if (routes(r) && r.adapters && columns) check.pointer(pages.data, 2);
}
// False where there is nothing to do. `columns`: of a rank row.
static bool check_route(Check& check, const Routed& r, const Pages& pages, long long columns, int type) {
  check.refuse(type != FASTLORA_BF16 && type != FASTLORA_FP16, FASTLORA_SHAPE);
  for (long long n : {r.m, r.count, r.entries, r.adapters, r.pages * 8}) check.size(n);
  check_pages(check, r, pages, columns);
  if (check.status || !routes(r)) return false;
  check.pointer(r.order, sizeof *r.order);
  for (const int* p : {r.tiles, r.offsets, r.slots}) check.pointer(p, sizeof *p);
  if (r.adapters) check.pointer(r.ranks, sizeof *r.ranks);
  if (r.columns) check.pointer(r.columns, sizeof *r.columns);
  check.matrix(r.table, r.adapters, r.pages, 4);
  return true;
}
