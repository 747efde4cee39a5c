// The products composed of ATen calls. Expand first, then the base GEMM with beta = 1, whose epilogue hides the read of y.
#include <ATen/ops/addmm.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/mm.h>

#include "products.h"

namespace fastlora::composed {

// One product for all: for a lone rank row BLAS takes a matrix-vector form, whose sums are less exact.
Tensor joined(TensorList f, bool last_is_rank, int64_t n, const Tensor& like) {
  if (f.empty()) return at::empty({0, n}, like.options());
  Tensors parts;
  for (const auto& t : f) parts.push_back(t.to(like.scalar_type()));
  const auto all = parts.size() == 1 ? parts[0] : at::cat(parts, last_is_rank);
  return last_is_rank ? all.t() : all;
}

Tensors cut(const Tensor& sum, TensorList f, bool last_is_rank) {
  Tensors grads;
  int64_t start = 0;
  for (const auto& factor : f) {
    const auto part = sum.narrow(last_is_rank, start, factor.size(last_is_rank));
    grads.push_back(at::empty(part.sizes(), factor.options()).copy_(part));   // outputs of an op share no memory
    start += factor.size(last_is_rank);
  }
  return grads;
}

namespace {

// a b in the accumulation dtype, for operands of one dtype
Tensor mm_wide(const Tensor& a, const Tensor& b) {
  const auto wide = accumulate_type(a.scalar_type());
  if (a.scalar_type() == wide) return at::mm(a, b);
  return a.is_cuda() ? at::mm(a, b, wide) : at::mm(a.to(wide), b.to(wide));
}

Tensor dropped(const Tensor& x, const Dropout& d) {
  return d.p == 0 ? x : call<"fastlora::lora_dropout", Tensor(const Tensor&, double, const Tensor&)>(x, d.p, *d.seed);
}

void project(Gated& z, const Tensor& x, TensorList f, bool last_is_rank, const Dropout& d) {
  const auto rows = dropped(flat(x), d), found = mm_wide(rows, joined(f, last_is_rank, rows.size(1), rows).t());
  z.z = found.reshape(with_last(x.sizes(), found.size(1)));
}

Tensors outer(const Gated& t, const Tensor& x, TensorList f, bool last_is_rank, const Dropout& d) {
  const auto rows = dropped(flat(x), d), tg = t.in(x.scalar_type());
  const auto sum = last_is_rank ? mm_wide(rows.t(), tg) : mm_wide(tg.t(), rows);
  return cut(sum, f, last_is_rank);
}

Tensor product(Product& p) {
  const auto dtype = p.like.scalar_type(), wide = accumulate_type(dtype);
  if (!p.z.z.defined()) project(p.z, p.x, p.a, false, {});
  const auto zg = p.z.in(dtype), f = joined(p.f, p.last_is_rank, p.N, zg);
  if (p.start) {
    auto out = at::empty(p.like.sizes(), p.like.options()).copy_(p.like);
    flat(out).narrow(1, *p.start, p.N).addmm_(zg, f);
    return out;
  }
  auto y = dropped(p.bias && !p.column_scale ? at::addmm(*p.bias, zg, f) : at::mm(zg, f), p.dropout);
  if (p.x.defined()) y.addmm_(flat(p.x), p.w.t());
  if (p.column_scale) {
    p.u = y.reshape(with_last(p.like.sizes(), p.N));
    y = y.to(wide) * p.column_scale->to(wide);
    y = (p.bias ? y + p.bias->to(wide) : y).to(dtype);
  }
  return y.reshape(with_last(p.like.sizes(), p.N));
}

}  // namespace

const Products products = {project, outer, product};

}  // namespace fastlora::composed
