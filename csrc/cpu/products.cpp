// The products on CPU tensors, through our kernels.
#include <ATen/ops/ones.h>

#include "../products.h"
#include "host.h"

namespace fastlora::cpu {
namespace {

void project(Gated& g, const Tensor& x, TensorList f, bool last_is_rank, const Dropout& d) {
  const Rows rows(x);
  const Factors factors(f, last_is_rank);
  const auto R = total_rank(f, last_is_rank);
  g.z = make(with_last(x.sizes(), R), x, at::kFloat);
  run(Shrink{type_of(x), rows.M, rows.n, R, rows.data, rows.ld, factors.count(), factors.list.data(),
             mask_of(d.p, d.seed, rows.n), g.z.data_ptr<float>()});
}

Tensors outer(const Gated& t, const Tensor& x, TensorList f, bool last_is_rank, const Dropout& d) {
  const Rows rows(x);
  const Factors factors(f, last_is_rank);
  return run(Outer{type_of(x), rows.M, rows.n, total_rank(f, last_is_rank), t.z.const_data_ptr<float>(), gates_of(t.gate),
                   rows.data, rows.ld, mask_of(d.p, d.seed, rows.n), factors.count(), factors.list.data()}, f);
}

Tensor product(Product& q) {
  const Factors a(q.a, false), f(q.f, q.last_is_rank);
  const auto R = total_rank(q.f, q.last_is_rank);
  const auto width = q.start ? q.like.size(-1) : q.N;
  auto y = make(with_last(q.like.sizes(), width), q.like, q.like.scalar_type());
  const Rows rows(q.x.defined() ? q.x : q.start ? q.like : y);
  Tensor keep, c, bias;
  Gemm p{};
  p.type = type_of(y);
  p.M = rows.M, p.N = q.N, p.R = R;
  set_factors(p, f);
  p.g = gates_of(q.z.gate);
  p.mask = mask_of(q.dropout.p, q.dropout.seed, p.N);
  p.y = y.mutable_data_ptr(), p.ldy = width;
  if (q.z.z.defined()) {
    p.z = q.z.z.const_data_ptr<float>();
  } else {
    if (q.want_z) q.z.z = make(with_last(q.like.sizes(), R), q.like, at::kFloat);
    p.z_out = q.want_z ? q.z.z.data_ptr<float>() : nullptr;
    p.a = R ? a.list.data() : nullptr;
  }
  if (q.start) {
    const int64_t bytes = *q.start * y.element_size();
    p.add = static_cast<const char*>(rows.data) + bytes, p.ldadd = rows.ld;
    p.y = static_cast<char*>(p.y) + bytes;
    if (p.N < width) y.copy_(q.like);
  }
  if (!q.x.defined()) {
    if (p.N) run_update(p);
    return y;
  }
  p.K = rows.n, p.x = rows.data, p.ldx = rows.ld;
  set_weight(p, q.w, keep);
  if (q.column_scale) {
    c = q.column_scale->to(at::kFloat).contiguous();
    q.u = make(y.sizes(), y, y.scalar_type());
    p.c = c.data_ptr<float>(), p.u = q.u.mutable_data_ptr();
  }
  if (q.bias) bias = q.bias->contiguous(), p.bias = bias.const_data_ptr();
  run(p, rows.tensor, q.w, y);
  return y;
}

}  // namespace

const Products products = {project, outer, product};

Tensor dropout(const Tensor& x, double p, const Tensor& seed) {
  const auto mask = mask_of(p, seed, x.size(-1));
  if (x.scalar_type() == at::kDouble) {
    const auto kept = dropout(at::ones(x.sizes(), x.options().dtype(at::kFloat)), p, seed);
    return x.masked_fill(kept == 0, 0).mul_(mask.threshold ? 65536.0 / (65536 - std::min(mask.threshold, 65535u)) : 1.0);
  }
  auto y = make(x.sizes(), x, x.scalar_type());
  if (x.numel()) run_dropout(Rows(x), y, mask);
  return y;
}

}  // namespace fastlora::cpu
