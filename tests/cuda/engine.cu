// A kernel of small cases whose verdict is known, for the emulator's own tests: test_engine.py says what each must give.
#include "tile.cuh"

namespace {
struct Probe {
  int* data;
  unsigned* count;
  const int* input;
  int which;
};

// Blocks leave parts, the last one to arrive adds them. What is left out, if anything, is wrong.
enum Missing { NOTHING, RELEASE, ACQUIRE, BARRIER, AGAIN, COUNT_PAST_L1 };
__device__ void last_arriver(const Probe& p, Missing missing, bool everybody_fences) {
  SHARED(last, bool);
  const int t = threadIdx.x;
  p.data[64 + blockIdx.x * 64 + t] = t;
  if (everybody_fences) __threadfence();
  if (missing != BARRIER) __syncthreads();
  if (t == 0) {
    if (!everybody_fences && missing != RELEASE) __threadfence();
    last = atomicInc(p.count, gridDim.x - 1) == gridDim.x - 1;
    if (missing != ACQUIRE) __threadfence();
  }
  if (missing != AGAIN) __syncthreads();
  if (!last) return;
  int sum = 0;
  for (unsigned b = 0; b < gridDim.x; b++) {
    const int* part = p.data + 64 + b * 64 + (t + 1) % 64;
    sum += missing == COUNT_PAST_L1 ? __ldg(part) : __ldcg(part);
  }
  p.data[t] = sum;
}

// Sixteen bytes a thread and step through a ring of two stages; `wait` and `early` spoil it.
template <int LEFT>
__device__ void ring(const Probe& p, unsigned char* memory, bool wait, bool barrier, bool early) {
  const int t = threadIdx.x, steps = 4;
  auto fill = [&](int step) {
    if (step < steps) copy_async(memory + step % 2 * 1024 + t * 16, p.input + step * 256 + t * 4, 16);
    copy_async_commit();
  };
  fill(0);
  int sum = 0;
  for (int step = 0; step < steps; step++) {
    if (early) fill(step + 1);
    if (wait) copy_async_wait<LEFT>();
    if (barrier) __syncthreads();
    if (!early) fill(step + 1);
    sum += reinterpret_cast<const int*>(memory + step % 2 * 1024)[(t * 4 + 5) % 256];
  }
  p.data[t] = sum;
}

__device__ void matrices(const Probe& p, unsigned char* memory, int row_bytes) {
  const int t = threadIdx.x, lane = t % 32;
  unsigned char* mine = memory + t / 32 * 8192;
  for (int i = lane; i < 32 * 4; i += 32)
    reinterpret_cast<int*>(mine + i / 4 * row_bytes)[i % 4] = p.input[i];
  __syncwarp();
  uint32_t a[4], b[4];
  float d[4] = {1.f, 2.f, 3.f, 4.f};
  ldmatrix(a, mine + lane * row_bytes);
  ldmatrix_trans(b, mine + lane * row_bytes);
  mma(d, a, b[0], b[1], bf16{});
  for (int i = 0; i < 4; i++) {
    p.data[t * 12 + i] = int(a[i]);
    p.data[t * 12 + 4 + i] = int(b[i]);
    p.data[t * 12 + 8 + i] = int(d[i]);
  }
}

__global__ void engine_kernel(const Probe p) {
  SHARED_DYNAMIC(memory);
  SHARED(line, int[64]);
  SHARED(pair, int[2]);
  const int t = threadIdx.x, lane = t % 32;
  int* out = p.data + blockIdx.x * 64 + t;
  switch (p.which) {
    case 0: *out = __shfl_xor_sync(~0u, lane, 5) + 100 * __shfl_sync(~0u, lane, 3); return;
    case 1: line[t] = t, __syncwarp(), *out = line[t ^ 31]; return;
    case 2: line[t] = t, *out = line[t ^ 31]; return;
    case 3: line[t] = t, __syncwarp(), *out = line[t ^ 32]; return;
    case 4: line[t] = t, __syncthreads(), *out = line[t ^ 33]; return;
    case 5:
      if (t < 32) __syncthreads();
      else
        __syncthreads();
      return;
    case 6:
      if (t == 7) return;
      __syncthreads();
      return;
    case 7:
      if (lane < 16) __syncwarp();
      else __shfl_sync(~0u, lane, 0);
      return;
    case 8:
      if (lane < 16) __syncwarp();
      return;
    case 9: return last_arriver(p, NOTHING, false);
    case 10: return last_arriver(p, NOTHING, true);
    case 11: return last_arriver(p, RELEASE, false);
    case 12: return last_arriver(p, ACQUIRE, false);
    case 13: return last_arriver(p, BARRIER, false);
    case 14: return last_arriver(p, AGAIN, false);
    case 15: return last_arriver(p, COUNT_PAST_L1, false);
    case 16: atomicAdd(p.count + 1, 1); return;
    case 17: p.count[1] += 1; return;
    case 18: p.data[2048 + t] = 0; return;
    case 19: *out = pair[2 + t % 2]; return;
    case 20: *out = line[t]; return;
    case 21: const_cast<int*>(p.input)[t] = 0; return;
    case 22: *out = *reinterpret_cast<const int*>(reinterpret_cast<const char*>(p.input) + 2); return;
    case 23: return ring<0>(p, memory, true, true, false);
    case 24: return ring<0>(p, memory, false, true, false);
    case 25: return ring<1>(p, memory, true, true, false);
    case 26: return ring<0>(p, memory, true, false, false);
    case 27: return ring<1>(p, memory, true, true, true);
    case 28: return matrices(p, memory, 16);
    case 29: return matrices(p, memory, 128);
    case 30: memory[16384 + 4 * t] = 1; return;
    case 31: copy_async(memory + 16 * t, p.input + 4 * t + 1, 16); return;
    case 32: line[0] = t; return;
    case 33: copy_async(memory + 16384, p.input, 16); return;
  }
}
}  // namespace

extern "C" int launch_engine(const Probe* p, int blocks, int bytes) {
  if (bytes) cudaFuncSetAttribute(engine_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  LAUNCH(engine_kernel, dim3(blocks), dim3(64), 16384, nullptr, *p);
  return cudaGetLastError();
}
