#include "check.h"

#include "tile.cuh"

namespace {
// Indices are computed as 32-bit integers up to a tile beyond the end.
constexpr long long MOST = INT_MAX - 1024;
}  // namespace

Check::Check() {
  const bool none = cudaGetDevice(&device) != cudaSuccess;
  if (none) cudaGetLastError();
  refuse(none, FASTLORA_NO_DEVICE);
}

void Check::size(long long n) {
  refuse(n < 0, FASTLORA_SHAPE);
  refuse(n > MOST, FASTLORA_TOO_LARGE);
}

void Check::pointer(const void* p, int alignment) {
  refuse(!p, FASTLORA_NULL);
  refuse(reinterpret_cast<size_t>(p) % alignment, FASTLORA_MISALIGNED);
  if (status) return;
  cudaPointerAttributes a;
  const bool known = cudaPointerGetAttributes(&a, p) == cudaSuccess;
  refuse(!known || a.device != device || (a.type != cudaMemoryTypeDevice && a.type != cudaMemoryTypeManaged),
         FASTLORA_FOREIGN);
}

void Check::matrix(const Matrix& m, long long rows, long long columns, int element) {
  if (rows && columns) pointer(m.data, element);
  size(m.stride);
}

void Check::output(const Matrix& m, long long rows, long long columns, int element) {
  matrix(m, rows, columns, element);
  refuse(rows > 1 && m.stride < columns, FASTLORA_SHAPE);
}

void Check::dropout(const long long* seed, int dropped) {
  if (seed) pointer(seed, sizeof *seed);
  refuse(dropped < 0 || dropped > 65536, FASTLORA_SHAPE);
}

int Check::launched() {
  const int error = cudaGetLastError();
  return error ? FASTLORA_CUDA + error : FASTLORA_OK;
}

extern "C" const char* fastlora_error(int status) {
  static const char* const sentences[] = {
      "success",
      "there is no CUDA device, or no driver for it",
      "a pointer is null",
      "a pointer is not a multiple of its element's size",
      "a pointer is not memory of the current CUDA device",
      "sizes, distances of rows, the type or the dropout do not fit together",
      "a size or a distance of rows is beyond 2^31",
      "the workspace is too small",
  };
  if (status >= FASTLORA_CUDA) return cudaGetErrorString(static_cast<cudaError_t>(status - FASTLORA_CUDA));
  return status >= 0 && status <= FASTLORA_WORKSPACE ? sentences[status] : "an unknown status";
}
