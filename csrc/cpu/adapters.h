// A routed call's adapters, as the kernels read them.
#pragma once
#include "../routed.h"
#include "host.h"

namespace fastlora::cpu {

constexpr int64_t kPieceRows = 16;   // most rank rows of a piece, so that few adapters still occupy all threads

// One adapter: its rank rows in pieces of consecutive ones, of x's type: a [k, rank, in], its slices `slice` bytes apart;
// b [rank, out].
struct Entry {
  int64_t rank;
  float scale;
  c10::SmallVector<Factor, 4> a, b;
  int64_t slice;
  const void* d = nullptr;   // c - 1
};

// Tokens that share a list; their z [tokens, k, R] begins at `z`, R being the sum of the list's ranks.
struct Segment {
  int64_t start, stop, R;
  const int64_t *slots, *end;
  int64_t z;
};

struct Adapters {
  Adapters(const Tensor& x, TensorList lora_A, TensorList lora_B, const Tensor& scaling, TensorList route,
           const Tensor& gates, TensorList column_scale, IntArrayRef slices, TensorList pages);
  const Entry& of(int64_t slot) const { return entries[index[slot]]; }

  Type type;
  int64_t k, total = 0;      // slices; floats of all z
  bool dora = false;
  const int32_t* offsets;
  const int64_t* order;
  const float* gates;
  c10::SmallVector<int64_t, 4> bounds;   // of the slices, in columns
  std::vector<Segment> segments;         // those with adapters

 private:
  void add_pair(Entry& entry, const Tensor& lora_A, const Tensor& lora_B, const Tensor& x, const Tensor* column_scale);
  void add_pages(Entry& entry, int64_t slot, TensorList pages, int64_t K);
  std::vector<int32_t> index;   // by slot, of entries
  std::vector<Entry> entries;
  Tensors keep;
};

}  // namespace fastlora::cpu
