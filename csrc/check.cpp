#include "check.h"

#include <algorithm>
#include <cmath>

namespace fastlora::check {
namespace {

bool is_float(at::ScalarType t) { return t == at::kFloat || t == at::kBFloat16 || t == at::kHalf || t == at::kDouble; }

void floating(const char* name, const Tensor& t) {
  FASTLORA_TYPE(is_float(t.scalar_type()), name, t.scalar_type(), "float32, bfloat16, float16 or float64");
}

void on_device(const char* name, const Tensor& t, const Tensor& x) {
  FASTLORA_VALUE(t.device() == x.device(), name, c10::str("a tensor on ", t.device()), x.device(), ", as x");
}

void same(const char* name, const Tensor& t, const Tensor& x) {
  FASTLORA_TYPE(t.scalar_type() == x.scalar_type(), name, t.scalar_type(), x.scalar_type(), ", as x");
  on_device(name, t, x);
}

void vector(const char* name, const Tensor& t, int64_t n) {
  FASTLORA_VALUE(t.dim() == 1 && t.size(0) == n, name, c10::str("shape ", t.sizes()), "(", n, ",)");
}

// an adapter's (rows, columns), where -1 is its own rank
void adapter(const char* name, const Tensor& t, int64_t rows, int64_t columns, const Tensor& x) {
  FASTLORA_VALUE(t.dim() == 2 && (rows < 0 || t.size(0) == rows) && (columns < 0 || t.size(1) == columns), name,
                 c10::str("shape ", t.sizes()), "(", rows < 0 ? "r" : std::to_string(rows), ", ",
                 columns < 0 ? "r" : std::to_string(columns), ")");
  const auto xt = x.scalar_type(), tt = t.scalar_type();
  const bool half = xt == at::kBFloat16 || xt == at::kHalf;
  FASTLORA_TYPE(tt == xt || (half && tt == at::kFloat), name, tt, xt, ", as x", half ? ", or float32" : "");
  on_device(name, t, x);
}

void gate(const Tensor& scaling, const MaybeTensor& gates, IntArrayRef ranks, size_t count, int64_t R, const Tensor& like) {
  if (!ranks.empty()) {
    int64_t sum = 0, least = 0;
    for (auto r : ranks) sum += r, least = std::min(least, r);
    FASTLORA_VALUE(least == 0 && sum == R, "ranks", ranks, "non-negative ranks that sum to R = ", R);
  }
  FASTLORA_VALUE(!ranks.empty() || count <= 1, "ranks", ranks, "one rank per adapter, as lora_A is a sequence");
  const auto E = ranks.empty() ? R : static_cast<int64_t>(ranks.size());
  floating("scaling", scaling);
  FASTLORA_VALUE(scaling.dim() == 0 || (scaling.dim() == 1 && scaling.size(0) == E), "scaling",
                 c10::str("shape ", scaling.sizes()), "() or (", E, ",)");
  FASTLORA_VALUE(scaling.device() == like.device() || (scaling.dim() == 0 && scaling.is_cpu()), "scaling",
                 c10::str("a tensor on ", scaling.device()), like.device(), " (or a 0-d CPU tensor)");
  if (!gates) return;
  floating("gates", *gates);
  on_device("gates", *gates, like);
  const auto full = with_last(like.sizes(), E);
  bool fits = gates->dim() <= like.dim();
  for (int64_t i = 1; fits && i <= gates->dim(); i++) fits = gates->size(-i) == 1 || gates->size(-i) == full[full.size() - i];
  FASTLORA_VALUE(fits, "gates", c10::str("shape ", gates->sizes()), "a shape that broadcasts to ", IntArrayRef(full));
}

void base(const Tensor& x, const Tensor& weight, const MaybeTensor& bias) {
  floating("x", x);
  FASTLORA_VALUE(x.dim() >= 1, "x", "a 0-d tensor", "(..., in)");
  FASTLORA_VALUE(weight.dim() == 2, "weight", c10::str("shape ", weight.sizes()), "(out, in)");
  FASTLORA_VALUE(x.size(-1) == weight.size(1), "x", c10::str("shape ", x.sizes()), "(..., ", weight.size(1), "), as weight's in");
  same("weight", weight, x);
  if (bias) vector("bias", *bias, weight.size(0)), same("bias", *bias, x);
}

}  // namespace

void dropout(double p, const MaybeTensor& seed, const Tensor& x) {
  FASTLORA_VALUE(std::isfinite(p) && p >= 0 && p <= 1, "dropout_p", p, "a number from 0 to 1");
  if (p == 0) return;
  FASTLORA_VALUE(seed.has_value(), "seed", "None", "a 0-d int64 tensor when dropout_p > 0");
  FASTLORA_TYPE(seed->scalar_type() == at::kLong, "seed", seed->scalar_type(), "int64");
  FASTLORA_VALUE(seed->dim() == 0, "seed", c10::str("shape ", seed->sizes()), "a 0-d tensor");
  on_device("seed", *seed, x);
}

void shrink(FASTLORA_SHRINK_ARGS) {
  floating("x", x);
  FASTLORA_VALUE(x.dim() >= 1, "x", "a 0-d tensor", "(..., in)");
  for (const auto& a : lora_A) adapter("lora_A", a, -1, x.size(-1), x);
  dropout(dropout_p, seed, x);
}

void linear(FASTLORA_LINEAR_ARGS) {
  base(x, weight, bias);
  shrink(FASTLORA_SHRINK);
  FASTLORA_VALUE(lora_A.size() == lora_B.size(), "lora_B", c10::str(lora_B.size(), " tensors"), lora_A.size(), ", as lora_A");
  const auto out = weight.size(0);
  for (size_t e = 0; e < lora_A.size(); e++) adapter("lora_B", lora_B[e], out, lora_A[e].size(0), x);
  gate(scaling, gates, ranks, lora_A.size(), total_rank(lora_A, 0), x);
  if (column_scale) {
    vector("column_scale", *column_scale, out), floating("column_scale", *column_scale);
    on_device("column_scale", *column_scale, x);
  }
}

void routed(FASTLORA_ROUTED_ARGS) {
  base(x, weight, bias);
  const auto out = weight.size(0), in = weight.size(1), k = std::max<int64_t>(1, slices.size()), tokens = route[2].size(0);
  int64_t sum = 0, least = 0;
  for (auto width : slices) sum += width, least = std::min(least, width);
  FASTLORA_VALUE(slices.empty() || (least == 0 && sum == out), "slices", slices, "widths that sum to ", out);
  FASTLORA_VALUE(lora_A.size() == lora_B.size(), "lora_B", c10::str(lora_B.size(), " tensors"), lora_A.size(), ", as lora_A");
  for (size_t e = 0; e < lora_A.size(); e++) {
    adapter("lora_B", lora_B[e], out, -1, x);
    adapter("lora_A", lora_A[e], k * lora_B[e].size(1), in, x);
  }
  FASTLORA_VALUE(tokens == rows_of(x), "route", c10::str("a route of ", tokens, " tokens"), "one of ", rows_of(x), ", as x has");
  on_device("route", gates, x);
  const auto E = static_cast<int64_t>(lora_A.size());
  floating("scaling", scaling);
  FASTLORA_VALUE(scaling.dim() == 0 || (scaling.dim() == 1 && scaling.size(0) == E), "scaling",
                 c10::str("shape ", scaling.sizes()), "() or (", E, ",)");
  FASTLORA_VALUE(column_scale.empty() || column_scale.size() == lora_A.size(), "column_scale", column_scale.size(), E,
                 ", as lora_A");
  for (const auto& c : column_scale)
    if (c.numel()) vector("column_scale", c, out);
  if (!pages.empty()) {
    const auto &A = pages[0], &B = pages[1];
    FASTLORA_VALUE(A.dim() == 4 && B.dim() == 3 && A.size(1) == k && A.size(2) == 8 && A.size(3) == in &&
                       B.size(0) == A.size(0) && B.size(1) == 8 && B.size(2) == out,
                   "pages", c10::str("A ", A.sizes(), " and B ", B.sizes()), "A (P, ", k, ", 8, ", in, ") and B (P, 8, ", out, ")");
    on_device("pages", A, x);
  }
  const Plan plan(route);
  const auto slots = paged(pages) + E;
  for (auto slot = plan.slots; slot != plan.slots + plan.bounds[plan.G]; slot++)
    FASTLORA_VALUE(*slot < slots, "route", c10::str("slot ", *slot), "slots below ", slots);
}

void expand(FASTLORA_EXPAND_ARGS) {
  floating("y", y);
  FASTLORA_VALUE(y.dim() >= 1, "y", "a 0-d tensor", "(..., out)");
  FASTLORA_VALUE(columns.empty() || columns.size() == 2, "columns", columns, "(start, stop)");
  const auto out = y.size(-1), start = columns.empty() ? 0 : columns[0], stop = columns.empty() ? out : columns[1];
  FASTLORA_VALUE(0 <= start && start <= stop && stop <= out, "columns", columns, "0 <= start <= stop <= ", out);
  for (const auto& b : lora_B) adapter("lora_B", b, stop - start, -1, y);
  const auto R = total_rank(lora_B, 1);
  const auto expected = with_last(y.sizes(), R);
  FASTLORA_VALUE(z.sizes() == IntArrayRef(expected), "z", c10::str("shape ", z.sizes()), IntArrayRef(expected));
  const auto zt = z.scalar_type();
  FASTLORA_TYPE(zt == accumulate_type(y.scalar_type()) || zt == y.scalar_type(), "z", zt,
                accumulate_type(y.scalar_type()), " (what lora_shrink returns) or y's dtype");
  FASTLORA_VALUE(z.device() == y.device(), "z", c10::str("a tensor on ", z.device()), y.device(), ", as y");
  gate(scaling, gates, ranks, lora_B.size(), R, y);
}

}  // namespace fastlora::check
