// CUDA's names for a plain C++ compiler: g++ compiles the .cu files that nvcc compiles, and every CUDA thread becomes a
// fiber of one OS thread. engine.cpp runs them, memory.cpp has asynchronous copies, fences and atomics, warp.cpp the
// instructions of a warp. In a checked build (-fsanitize=thread) race.cpp hears of every access as well.
#pragma once
#include <algorithm>
#include <climits>
#include <cstddef>
#include <cstdint>
#include <cstring>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define DEVICE static __forceinline__
#define __launch_bounds__(...)
#define __grid_constant__
// __shared__ and <<< >>> stay undefined: a kernel that does not go through these does not compile here.
#define SHARED(name, ...)                \
  using name##_type = __VA_ARGS__;       \
  static const char name##_identity = 0; \
  name##_type& name = *static_cast<name##_type*>(emulate::shared(&name##_identity, sizeof(name##_type)))
#define SHARED_DYNAMIC(name) unsigned char* const name = emulate::shared_dynamic()
#define LAUNCH(kernel, grid, block, bytes, stream, params) emulate::launch(#kernel, kernel, grid, block, bytes, stream, params)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
template <class T> T max(T a, T b) { return a < b ? b : a; }
template <class T> T min(T a, T b) { return b < a ? b : a; }

// Conversions only: device code keeps its arithmetic in fp32.
struct __nv_bfloat16 {
  uint16_t bits;
  __nv_bfloat16() = default;
  explicit __nv_bfloat16(float f) {
    uint32_t wide;
    std::memcpy(&wide, &f, 4);
    const uint32_t even = wide >> 16 & 1;
    bits = f == f ? uint16_t((wide + 0x7fff + even) >> 16) : 0x7fff;
  }
  explicit operator float() const {
    const uint32_t wide = uint32_t(bits) << 16;
    float f;
    std::memcpy(&f, &wide, 4);
    return f;
  }
};
struct __half {
  uint16_t bits;
  __half() = default;
  explicit __half(float f) {
    const _Float16 h = _Float16(f);
    std::memcpy(&bits, &h, 2);
  }
  explicit operator float() const {
    _Float16 h;
    std::memcpy(&h, &bits, 2);
    return float(h);
  }
};

// The part of the runtime's interface that launchers use.
using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorNoDevice = 100, cudaErrorLaunchFailure = 719 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaMemoryType { cudaMemoryTypeUnregistered, cudaMemoryTypeHost, cudaMemoryTypeDevice, cudaMemoryTypeManaged };
struct cudaPointerAttributes { cudaMemoryType type; int device; };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16, cudaDevAttrComputeCapabilityMajor = 75, cudaDevAttrComputeCapabilityMinor,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97
};
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* pointer);
cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t error);

namespace emulate {
using Body = void (*)(const void* closure);
// `const`: one activation of a kernel stays in one fiber, so the compiler may ask once. By value: nothing to check.
dim3 thread_index() __attribute__((const));
dim3 block_index() __attribute__((const));
dim3 block_shape() __attribute__((const));
dim3 grid_shape() __attribute__((const));
unsigned char* shared_dynamic() __attribute__((const));
void* shared(const void* identity, size_t bytes);
cudaError_t allow_shared(const void* kernel, int bytes);
void launch(const char* name, const void* kernel, dim3 grid, dim3 block, size_t bytes, Body body, const void* closure);

template <class P>
struct Call {
  void (*kernel)(P);
  P params;
  __attribute__((no_sanitize_thread)) static void run(const void* closure) {
    const Call* call = static_cast<const Call*>(closure);
    call->kernel(call->params);
  }
};
template <class P>
void launch(const char* name, void (*kernel)(P), dim3 grid, dim3 block, size_t bytes, void*, const P& params) {
  const Call<std::remove_const_t<P>> call{kernel, params};
  launch(name, reinterpret_cast<const void*>(kernel), grid, block, bytes, &Call<P>::run, &call);
}

[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));
void barrier(int line);
void sync_warp(unsigned mask);
void fence();
bool vote(int line, bool mine);
unsigned atomic(unsigned* place, unsigned operand, unsigned (*operation)(unsigned, unsigned));
uint32_t shuffle(const char* name, unsigned mask, uint32_t value, int from);
int lane();
void mma(float* d, const uint32_t* a, const uint32_t* b, bool half);
void load_matrix(uint32_t* r, const void* row, bool transposed);
void copy_async(void* to, const void* from, int bytes);
void copy_commit();
void copy_wait(int groups_left);
void read_constant(const void* from, size_t bytes);
}  // namespace emulate

#define threadIdx (emulate::thread_index())
#define blockIdx (emulate::block_index())
#define blockDim (emulate::block_shape())
#define gridDim (emulate::grid_shape())

template <class F>
cudaError_t cudaFuncSetAttribute(F* kernel, cudaFuncAttribute, int bytes) {
  return emulate::allow_shared(reinterpret_cast<const void*>(kernel), bytes);
}
inline void __syncthreads(int line = __builtin_LINE()) { emulate::barrier(line); }
inline void __syncwarp(unsigned mask = ~0u) { emulate::sync_warp(mask); }
inline void __threadfence() { emulate::fence(); }
inline int __syncthreads_or(int mine, int line = __builtin_LINE()) { return emulate::vote(line, mine); }
inline unsigned atomicAdd(unsigned* place, unsigned v) {
  return emulate::atomic(place, v, [](unsigned old, unsigned add) { return old + add; });
}
inline unsigned atomicInc(unsigned* place, unsigned last) {
  return emulate::atomic(place, last, [](unsigned old, unsigned most) { return old >= most ? 0 : old + 1; });
}
inline uint32_t __shfl_sync(unsigned mask, uint32_t v, int from) {
  return emulate::shuffle("__shfl_sync", mask, v, from & 31);
}
inline uint32_t __shfl_xor_sync(unsigned mask, uint32_t v, int bits) {
  return emulate::shuffle("__shfl_xor_sync", mask, v, (emulate::lane() ^ bits) & 31);
}
template <class T> T __ldcg(const T* p) { return *p; }
template <class T> T __ldg(const T* p) {
  emulate::read_constant(p, sizeof(T));
  return *p;
}

// The wrappers of tile.cuh whose other body is PTX.
inline void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, __nv_bfloat16) {
  const uint32_t b[2] = {b0, b1};
  emulate::mma(d, a, b, false);
}
inline void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, __half) {
  const uint32_t b[2] = {b0, b1};
  emulate::mma(d, a, b, true);
}
inline void ldmatrix(uint32_t (&r)[4], const void* row) { emulate::load_matrix(r, row, false); }
inline void ldmatrix_trans(uint32_t (&r)[4], const void* row) { emulate::load_matrix(r, row, true); }
inline void copy_async(void* to, const void* from, int bytes) { emulate::copy_async(to, from, bytes); }
inline void copy_async_commit() { emulate::copy_commit(); }
template <int LEFT> void copy_async_wait() { emulate::copy_wait(LEFT); }
