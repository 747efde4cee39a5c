#include "composed.h"

#include <ATen/ops/addmm.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>

#include "dispatch.h"
#include "gate.h"

namespace fastlora::composed {
namespace {

// a b in the accumulation dtype, for operands of one dtype
Tensor mm_wide(const Tensor& a, const Tensor& b) {
  const auto wide = accumulate_type(a.scalar_type());
  if (a.scalar_type() == wide) return at::mm(a, b);
  return a.is_cuda() ? at::mm(a, b, wide) : at::mm(a.to(wide), b.to(wide));
}

Tensor dropout(const Tensor& x, double p, const MaybeTensor& seed) {
  if (p == 0) return x;
  static const auto op = find_op<Tensor(const Tensor&, double, const Tensor&)>("fastlora::lora_dropout");
  return op.call(x, p, *seed);
}

// The adapters' column blocks of a (M, R) tensor, with each adapter's index.
template <class F>
void for_columns(const Tensor& rows, TensorList adapters, int64_t dim, F&& f) {
  int64_t start = 0;
  for (size_t e = 0; e < adapters.size(); e++) {
    const auto r = adapters[e].size(dim);
    f(e, rows.narrow(1, start, r));
    start += r;
  }
}

// (M, R): z = d lora_A^T or t = dv lora_B
Tensor project(const Tensor& rows, TensorList adapters, bool transposed) {
  Tensors parts;
  for (const auto& adapter : adapters) {
    const auto t = adapter.to(rows.scalar_type());
    parts.push_back(mm_wide(rows, transposed ? t.t() : t));
  }
  if (parts.empty()) return at::empty({rows.size(0), 0}, rows.options().dtype(accumulate_type(rows.scalar_type())));
  return parts.size() == 1 ? parts[0] : at::cat(parts, 1);
}

// y += zg lora_B^T, where an undefined y stands for the bias, or for zeros
void add_update(Tensor& y, const Tensor& zg, TensorList lora_B, const MaybeTensor& bias = {}) {
  for_columns(zg, lora_B, 1, [&](size_t e, const Tensor& part) {
    const auto bt = lora_B[e].to(part.scalar_type()).t();
    if (y.defined()) {
      y.addmm_(part, bt);
    } else {
      y = bias ? at::addmm(*bias, part, bt) : at::mm(part, bt);
    }
  });
}

// One product for all adapters: for a lone rank row BLAS takes a matrix-vector form, whose sums are less exact. Copies, as
// outputs of an op share no memory.
Tensors apart(const Tensor& sum, TensorList adapters, int64_t dim) {
  Tensors grads;
  int64_t start = 0;
  for (const auto& t : adapters) {
    const auto part = sum.narrow(dim, start, t.size(dim));
    grads.push_back(at::empty(part.sizes(), t.options()).copy_(part));
    start += t.size(dim);
  }
  return grads;
}

Tensors grads_of_B(const Tensor& dv, const Tensor& zg, TensorList lora_B) {
  return apart(mm_wide(dv.t(), zg), lora_B, 1);
}

Tensors grads_of_A(const Tensor& dz, const Tensor& d, TensorList lora_A) {
  return apart(mm_wide(dz.t(), d), lora_A, 0);
}

// D(dz lora_A) in dz's dtype, fresh
Tensor branch_dx(const Tensor& dz, TensorList lora_A, int64_t in, double p, const MaybeTensor& seed) {
  Tensor dx;
  for_columns(dz, lora_A, 0, [&](size_t e, const Tensor& part) {
    const auto a = lora_A[e].to(dz.scalar_type());
    dx = dx.defined() ? dx.addmm_(part, a) : at::mm(part, a);
  });
  return dx.defined() ? dropout(dx, p, seed) : at::zeros({dz.size(0), in}, dz.options());
}

}  // namespace

LinearForward linear_forward(FASTLORA_LINEAR_ARGS) {
  const auto dtype = x.scalar_type(), wide = accumulate_type(dtype);
  const auto x2 = flat(x);
  const auto R = total_rank(lora_A, 0), out = weight.size(0);
  const auto shape = with_last(x.sizes(), out);
  auto z = project(dropout(x2, dropout_p, seed), lora_A, true);
  const auto zg = make_gate(scaling, gates, ranks, R, x, wide).times(z).to(dtype);
  const auto added_bias = column_scale ? MaybeTensor() : bias;
  Tensor y;
  add_update(y, zg, lora_B, added_bias);
  y = y.defined() ? y.addmm_(x2, weight.t()) : at::linear(x2, weight, added_bias);
  z = z.reshape(with_last(x.sizes(), R));
  if (!column_scale) return {y.reshape(shape), z, at::empty({0}, x.options())};
  auto scaled = y.to(wide) * column_scale->to(wide);
  if (bias) scaled = scaled + bias->to(wide);
  return {scaled.to(dtype).reshape(shape), z, y.reshape(shape)};
}

LinearBackward linear_backward(FASTLORA_LINEAR_BACKWARD_ARGS) {
  const auto [need_x, need_weight, need_A, need_B, need_scaling, need_bias, need_gates, need_column] = needs;
  const auto dtype = x.scalar_type(), wide = accumulate_type(dtype);
  const auto empty = [&] { return at::empty({0}, x.options()); };
  const auto x2 = flat(x), dy2 = flat(dy), z2 = flat(z);
  const auto dv = column_scale ? (dy2.to(wide) * column_scale->to(wide)).to(dtype) : dy2;
  const auto gate = make_gate(scaling, gates, ranks, z.size(-1), x, wide);
  Tensor dx = empty(), dweight = empty(), dbias = empty(), dcolumn = empty(), dscaling = empty(), dgates = empty();
  Tensors dA, dB;
  if (need_x || need_A || need_scaling || need_gates) {
    const auto t = project(dv, lora_B, false);
    const auto dz = gate.times(t).to(dtype);
    if (need_x) dx = branch_dx(dz, lora_A, x.size(-1), dropout_p, seed).addmm_(dv, weight).reshape(x.sizes());
    if (need_A) dA = grads_of_A(dz, dropout(x2, dropout_p, seed), lora_A);
    if (need_scaling || need_gates)
      std::tie(dscaling, dgates) = gate_backward(t * z2, scaling, gates, ranks, x, need_scaling, need_gates);
  }
  if (need_B) dB = grads_of_B(dv, gate.times(z2).to(dtype), lora_B);
  if (need_weight) dweight = at::mm(dv.t(), x2);
  if (need_bias) dbias = dy2.sum(0);
  if (need_column) dcolumn = (dy2.to(wide) * flat(u)).sum(0).to(column_scale->scalar_type());
  return {dx, dweight, dA, dB, dscaling, dbias, dgates, dcolumn};
}

Tensor shrink(FASTLORA_SHRINK_ARGS) {
  return project(dropout(flat(x), dropout_p, seed), lora_A, true).reshape(with_last(x.sizes(), total_rank(lora_A, 0)));
}

ShrinkBackward shrink_backward(FASTLORA_SHRINK_BACKWARD_ARGS) {
  const auto low = flat(dz).to(x.scalar_type());
  auto dx = at::empty({0}, x.options());
  if (needs[0]) dx = branch_dx(low, lora_A, x.size(-1), dropout_p, seed).reshape(x.sizes());
  return {dx, needs[1] ? grads_of_A(low, dropout(flat(x), dropout_p, seed), lora_A) : Tensors{}};
}

Tensor expand(FASTLORA_EXPAND_ARGS) {
  const auto dtype = y.scalar_type();
  const auto gate = make_gate(scaling, gates, ranks, z.size(-1), y, accumulate_type(dtype));
  const auto out = y.size(-1), start = columns.empty() ? 0 : columns[0], stop = columns.empty() ? out : columns[1];
  auto result = at::empty(y.sizes(), y.options()).copy_(y);
  auto cut = flat(result).narrow(1, start, stop - start);
  add_update(cut, gate.times(flat(z)).to(dtype), lora_B);
  return result;
}

ExpandBackward expand_backward(FASTLORA_EXPAND_BACKWARD_ARGS) {
  const auto [need_z, need_B, need_scaling, need_gates] = needs;
  const auto dtype = dy.scalar_type(), wide = accumulate_type(dtype);
  const auto out = dy.size(-1), start = columns.empty() ? 0 : columns[0], stop = columns.empty() ? out : columns[1];
  const auto dv = flat(dy).narrow(1, start, stop - start), z2 = flat(z).to(wide);
  const auto gate = make_gate(scaling, gates, ranks, z.size(-1), dy, wide);
  const auto empty = [&] { return at::empty({0}, z.options()); };
  auto dz = empty(), dscaling = empty(), dgates = empty();
  if (need_z || need_scaling || need_gates) {
    const auto t = project(dv, lora_B, false);
    if (need_z) dz = gate.times(t).to(z.scalar_type()).reshape(z.sizes());
    std::tie(dscaling, dgates) = gate_backward(t * z2, scaling, gates, ranks, dy, need_scaling, need_gates);
  }
  return {dz, need_B ? grads_of_B(dv, gate.times(z2).to(dtype), lora_B) : Tensors{}, dscaling, dgates};
}

}  // namespace fastlora::composed
