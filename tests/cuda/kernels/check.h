// What every launcher asks of its arguments; the first objection is the status that it returns.
#pragma once
#include "tile.cuh"

struct Check {
  int status = FASTLORA_OK, device = 0;
  long long ranks = 0, columns = 0, widest = 0, highest = 0;  // of all parts
  explicit Check(const void* params) {
    refuse(cudaGetDevice(&device) != cudaSuccess, FASTLORA_NO_DEVICE);
    refuse(!params, FASTLORA_NULL);
  }
  void refuse(bool wrong, int reason) { status = wrong && !status ? reason : status; }
  // Indices are 32-bit integers up to a tile beyond the end.
  void size(long long n) { refuse(n < 0 || n > INT32_MAX - 1024, n < 0 ? FASTLORA_SHAPE : FASTLORA_TOO_LARGE); }
  void pointer(const void* p, int alignment) {
    refuse(!p, FASTLORA_NULL);
    refuse(reinterpret_cast<size_t>(p) % alignment, FASTLORA_MISALIGNED);
    cudaPointerAttributes a;
    const bool known = !status && cudaPointerGetAttributes(&a, p) == cudaSuccess && a.device == device;
    refuse(!known || (a.type != cudaMemoryTypeDevice && a.type != cudaMemoryTypeManaged), FASTLORA_FOREIGN);
  }
  void matrix(const Matrix& m, long long rows, long long columns, int element, bool written = false) {
    if (rows && columns) pointer(m.data, element);
    size(m.stride);
    refuse(written && rows > 1 && m.stride < columns, FASTLORA_SHAPE);
  }
  template <class P> void workspace(const P& p, long long floats, long long tiles) {
    pointer(p.partial, 16);
    pointer(p.arrived, sizeof *p.arrived);
    refuse(p.partials < floats || p.counters < tiles, FASTLORA_WORKSPACE);
  }
  // What all params have in common; a row of a part's matrix has its columns, if it is `columned`, and `depth` elements more.
  template <class P>
  void common(const P& p, long long depth, int element = 2, bool written = false, bool columned = true) {
    refuse(p.count < 0 || p.count > FASTLORA_PARTS, FASTLORA_SHAPE);
    refuse(p.type != FASTLORA_BF16 && p.type != FASTLORA_FP16, FASTLORA_SHAPE);
    for (int i = 0; !status && i < p.count; i++) {
      const Part& part = p.parts[i];
      refuse(part.rank != ranks || part.column != columns, FASTLORA_SHAPE);
      matrix(part.m, part.ranks, (columned ? part.columns : 0) + depth, element, written);
      size(part.ranks), size(part.columns);
      ranks += part.ranks, columns += part.columns;
      widest = max(widest, part.columns), highest = max(highest, part.ranks);
    }
    size(ranks), size(columns), size(p.m);
  }
  // x [m, k] and its dropout
  template <class P> void dropped(const P& p) {
    refuse(p.dropped < 0 || p.dropped > 65536, FASTLORA_SHAPE);
    size(p.k), matrix(p.x, p.m, p.k, 2);
    if (p.seed) pointer(p.seed, sizeof *p.seed);
  }
  template <class P> int launch(void (*kernel)(P), dim3 grid, int threads, int bytes, const P& p, void* stream) {
    int most = 0;
    cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (bytes > most) return FASTLORA_TOO_LARGE;  // 99 KiB on sm_86, sm_89 and sm_120
    // Not `bytes`: the limit is the function's, and another thread may be about to launch it with more.
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
    LAUNCH(kernel, grid, dim3(threads), bytes, stream, p);
    const int error = cudaGetLastError();
    return error ? FASTLORA_CUDA + error : FASTLORA_OK;
  }
};
