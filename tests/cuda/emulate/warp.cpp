// Instructions of a warp: shuffles, ldmatrix and mma.sync. The layouts are those of the PTX ISA, "Matrix multiply-
// accumulate": g = lane / 4 is a fragment's row (a column of B), t = lane % 4 counts its pairs.
#include <utility>
#include "engine.h"

namespace emulate {
namespace {
uint64_t conflicts = 0;

struct Shuffle { uint32_t value, result; int from; };
void apply_shuffle(void** operands, unsigned mask) {
  for (int l = 0; l < 32; l++) {
    if (!(mask >> l & 1)) continue;
    Shuffle* mine = static_cast<Shuffle*>(operands[l]);
    if (!(mask >> mine->from & 1)) fail("lane %d reads lane %d, which is not in mask %#x", l, mine->from, mask);
    mine->result = static_cast<Shuffle*>(operands[mine->from])->value;
  }
}

struct Matrices { uint32_t* r; const void* row; };
// Eight rows of 16 bytes come in one pass if they lie in different banks.
void count_conflicts(const Matrices* const* lanes) {
  for (int matrix = 0; matrix < 4; matrix++) {
    const void* in_bank[8] = {};
    for (int i = 0; i < 8; i++) {
      const void* row = lanes[matrix * 8 + i]->row;
      const void*& there = in_bank[reinterpret_cast<uintptr_t>(row) / 16 % 8];
      conflicts += there && there != row;
      there = row;
    }
  }
}
template <bool TRANSPOSED>
void apply_load_matrix(void** operands, unsigned) {
  Matrices** lanes = reinterpret_cast<Matrices**>(operands);
  count_conflicts(lanes);
  for (int l = 0; l < 32; l++)
    for (int matrix = 0; matrix < 4; matrix++) {
      uint32_t pair = 0;
      for (int i = 0; i < 2; i++) {
        const int g = l / 4, t = l % 4 * 2 + i;
        const int row = TRANSPOSED ? t : g, column = TRANSPOSED ? g : t;
        uint16_t element;
        std::memcpy(&element, static_cast<const char*>(lanes[matrix * 8 + row]->row) + 2 * column, 2);
        pair |= uint32_t(element) << 16 * i;
      }
      lanes[l]->r[matrix] = pair;
    }
}

struct Product { float* d; const uint32_t *a, *b; };
template <bool HALF>
float element(uint32_t pair, int i) {
  const uint16_t bits = uint16_t(pair >> 16 * i);
  std::conditional_t<HALF, __half, __nv_bfloat16> v;
  v.bits = bits;
  return float(v);
}
template <bool HALF>
void apply_mma(void** operands, unsigned) {
  float a[16][16], b[16][8], d[16][8];
  for (int l = 0; l < 32; l++) {
    const Product& lane = *static_cast<Product*>(operands[l]);
    const int g = l / 4, t = l % 4 * 2;
    for (int i = 0; i < 2; i++) {
      for (int r = 0; r < 4; r++) a[g + r % 2 * 8][t + i + r / 2 * 8] = element<HALF>(lane.a[r], i);
      for (int r = 0; r < 2; r++) b[t + i + r * 8][g] = element<HALF>(lane.b[r], i);
      for (int r = 0; r < 2; r++) d[g + r * 8][t + i] = lane.d[2 * r + i];
    }
  }
  for (int m = 0; m < 16; m++)
    for (int k = 0; k < 16; k++)
      for (int n = 0; n < 8; n++) d[m][n] += a[m][k] * b[k][n];
  for (int l = 0; l < 32; l++) {
    const Product& lane = *static_cast<Product*>(operands[l]);
    for (int i = 0; i < 4; i++) lane.d[i] = d[l / 4 + i / 2 * 8][l % 4 * 2 + i % 2];
  }
}
}  // namespace

uint64_t take_conflicts() { return std::exchange(conflicts, 0); }

uint32_t shuffle(const char* name, unsigned mask, uint32_t value, int from) {
  Shuffle mine{value, value, from};
  collective(name, mask, &mine, apply_shuffle);
  return mine.result;
}
void sync_warp(unsigned mask) {
  collective("__syncwarp", mask, nullptr, [](void**, unsigned) {}, true);
}
void load_matrix(uint32_t* r, const void* row, bool transposed) {
  if (reinterpret_cast<uintptr_t>(row) % 16) fail("ldmatrix: misaligned");
  if (emulate_on_access) emulate_on_access(row, 16, READ, nullptr);
  Matrices mine{r, row};
  if (transposed) collective("ldmatrix.trans", ~0u, &mine, apply_load_matrix<true>);
  else collective("ldmatrix", ~0u, &mine, apply_load_matrix<false>);
}
void mma(float* d, const uint32_t* a, const uint32_t* b, bool half) {
  Product mine{d, a, b};
  collective("mma.sync", ~0u, &mine, half ? apply_mma<true> : apply_mma<false>);
}
}  // namespace emulate
