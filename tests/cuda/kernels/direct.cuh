// Products of what comes straight from global memory, 16 bytes a lane: where few warps share an element, registers do without
// shared memory and its barriers. A sum over k runs in an order of its own, the same on both sides. A strip is what a
// warp has of 16 rows and 64 columns: d[j][2 i + e] is row lane / 4 + 8 i, column lane % 4 · 16 + 8 e + j.
#pragma once
#include "tile.cuh"

// N elements at `from` + offset, zeros from the count-th on: at once where all are there and on their grid.
template <int N, class T> DEVICE Vector<T, N> load(const T* from, long long offset, int count) {
  Vector<T, N> v = {};
  from += count > 0 ? offset : 0;
  const bool whole = count >= N && reinterpret_cast<size_t>(from) % sizeof v == 0;
  if (whole) v = *reinterpret_cast<const Vector<T, N>*>(from);
  if (!whole && count > 0)
    UNROLL for (int i = 0; i < N; i++) if (i < count) v.v[i] = from[i];
  return v;
}

template <class T, int N> DEVICE uint32_t word(const Vector<T, N>& v, int i) {
  uint32_t two;
  memcpy(&two, v.v + i, sizeof two);
  return two;
}

// d += l rᵀ, 16 × 32 by 8 × 32: k = lane % 4 · 8 … + 7 of rows lane / 4 and lane / 4 + 8 of l and of row lane / 4 of r.
template <class T> DEVICE void multiply(float (&d)[4], const Vector<T, 8> (&l)[2], const Vector<T, 8>& r) {
  UNROLL for (int i = 0; i < 8; i += 4) {
    const uint32_t left[4] = {word(l[0], i), word(l[1], i), word(l[0], i + 2), word(l[1], i + 2)};
    mma(d, left, word(r, i), word(r, i + 2), T{});
  }
}

// d += l r, 16 × 16 by 16 × 64: k = lane % 4 · 4 … + 3, rows lane / 4 and lane / 4 + 8 of l, lane / 4 · 8 … + 7 of r's columns.
template <class T> DEVICE void multiply(float (&d)[8][4], const Vector<T, 4> (&l)[2], const Vector<T, 8> (&r)[4]) {
  const uint32_t left[4] = {word(l[0], 0), word(l[1], 0), word(l[0], 2), word(l[1], 2)};
  UNROLL for (int j = 0; j < 8; j++) {
    const Vector<T, 4> k = {{r[0].v[j], r[1].v[j], r[2].v[j], r[3].v[j]}};
    mma(d[j], left, word(k, 0), word(k, 2), T{});
  }
}

// A lane's half `i` of a strip onto its row of y, of which `count` columns are left where the strip begins. What is loaded by
// hand is stored by hand, in one branch: nvcc makes eight stores of a chunk that may have come either way.
template <class T> DEVICE void add(T* y, const float (&d)[8][4], int i, int column, int count) {
  UNROLL for (int e = 0; e < 2; e++, column += 8) {
    T* to = y + column;
    if (count - column >= 8 && reinterpret_cast<size_t>(to) % sizeof(Vector<T, 8>) == 0) {
      Vector<T, 8> sum = *reinterpret_cast<Vector<T, 8>*>(to);
      UNROLL for (int j = 0; j < 8; j++) sum.v[j] = T(float(sum.v[j]) + d[j][2 * i + e]);
      *reinterpret_cast<Vector<T, 8>*>(to) = sum;
    } else UNROLL for (int j = 0; j < 8; j++) if (column + j < count) to[j] = T(float(to[j]) + d[j][2 * i + e]);
  }
}
