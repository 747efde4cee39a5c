// A sum that is split over blocks, in one launch and always in the same order: each block leaves its part, and the block of a
// tile that arrives last adds all parts in their order, so that the bits do not depend on who is last.
#pragma once
#include "tile.cuh"

// `acc` is this block's part number `split` of `tile`; pieces from `used` on are zero and stay so. True in the block that
// arrives last, which then has the sum. `partial`: for each tile splits · PIECES · THREADS pieces; `arrived`: a zero a tile.
template <int THREADS, int PIECES>
DEVICE bool reduce(float* partial, unsigned* arrived, int tile, int split, int splits, Vector<float, 4> (&acc)[PIECES], int used) {
  constexpr int part = PIECES * THREADS;
  Vector<float, 4>* parts = reinterpret_cast<Vector<float, 4>*>(partial) + size_t(tile) * splits * part + threadIdx.x;
  UNROLL for (int j = 0; j < PIECES; j++)
    if (j < used) parts[split * part + j * THREADS] = acc[j];
  __threadfence();  // the part is out before the block arrives
  __syncthreads();
  // The last arrival makes zero of the counter again.
  const bool last = threadIdx.x == 0 && atomicInc(arrived + tile, splits - 1) == unsigned(splits - 1);
  if (!__syncthreads_or(last)) return false;
  __threadfence();  // and the others' parts are read after they have
  UNROLL for (int j = 0; j < PIECES; j++) {
    acc[j] = {};
    for (int i = 0; j < used && i < splits; i++) {
      const Vector<float, 4> other = parts[i * part + j * THREADS];
      UNROLL for (int e = 0; e < 4; e++) acc[j].v[e] += other.v[e];
    }
  }
  return true;
}
