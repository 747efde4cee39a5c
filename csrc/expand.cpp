// lora_expand: entry points and autograd formula.
#include <torch/csrc/autograd/custom_function.h>

#include "autograd.h"
#include "check.h"
#include "composed.h"
#include "cpu/native.h"
#include "dispatch.h"
#include "ops.h"

namespace fastlora {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

using Op = Tensor(FASTLORA_EXPAND_ARGS);
using BackwardOp = ExpandBackward(FASTLORA_EXPAND_BACKWARD_ARGS);

struct Attributes {
  std::vector<int64_t> ranks, columns;
};

struct Function : torch::autograd::Function<Function> {
  static Tensor forward(AutogradContext* ctx, const Tensor& y, const Tensor& z, TensorList lora_B, const Tensor& scaling,
                        const MaybeTensor& gates, const Attributes& at) {
    static const auto op = find_op<Op>("fastlora::lora_expand");
    at::AutoDispatchBelowADInplaceOrView below;
    variable_list saved{z, scaling, gates.value_or(Tensor())};
    saved.insert(saved.end(), lora_B.begin(), lora_B.end());
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["ranks"] = at.ranks;
    ctx->saved_data["columns"] = at.columns;
    return op.call(y, z, lora_B, scaling, gates, at.ranks, at.columns);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& dys) {
    static const auto op = find_op<BackwardOp>("fastlora::lora_expand_backward");
    const auto saved = ctx->get_saved_variables();
    const auto count = saved.size() - 3;
    const bool has_gates = saved[2].defined();
    bool need_B = false;
    for (size_t e = 0; e < count; e++) need_B |= ctx->needs_input_grad(2 + e);
    const std::array<bool, 4> needs{ctx->needs_input_grad(1), need_B, ctx->needs_input_grad(2 + count),
                                    has_gates && ctx->needs_input_grad(3 + count)};
    auto [dz, dB, dscaling, dgates] =
        op.call(dys[0], saved[0], TensorList(saved).slice(3, count), saved[1],
                has_gates ? MaybeTensor(saved[2]) : MaybeTensor(), ctx->saved_data["ranks"].toIntVector(),
                ctx->saved_data["columns"].toIntVector(), needs);
    variable_list grads{ctx->needs_input_grad(0) ? dys[0] : Tensor(), needs[0] ? dz : Tensor()};
    for (size_t e = 0; e < count; e++) grads.push_back(ctx->needs_input_grad(2 + e) ? dB[e] : Tensor());
    grads.push_back(needs[2] ? dscaling : Tensor());
    grads.push_back(needs[3] ? dgates : Tensor());
    grads.emplace_back();
    return grads;
  }
};

}  // namespace

Tensor lora_expand(FASTLORA_EXPAND_ARGS) {
  if (pinned_elsewhere) return in_python<Op>("fastlora::lora_expand").call(FASTLORA_EXPAND);
  check::expand(FASTLORA_EXPAND);
  return y.is_cpu() ? cpu::expand(FASTLORA_EXPAND) : composed::expand(FASTLORA_EXPAND);
}

ExpandBackward lora_expand_backward(FASTLORA_EXPAND_BACKWARD_ARGS) {
  if (pinned_elsewhere) return in_python<BackwardOp>("fastlora::lora_expand_backward").call(FASTLORA_EXPAND_BACKWARD);
  return dy.is_cpu() ? cpu::expand_backward(FASTLORA_EXPAND_BACKWARD) : composed::expand_backward(FASTLORA_EXPAND_BACKWARD);
}

Tensor lora_expand_autograd(FASTLORA_EXPAND_ARGS) {
  refuse_forward_mode(y, z, lora_B, scaling, gates);
  if (!torch::autograd::compute_requires_grad(y, z, lora_B, scaling, gates)) {
    static const auto op = find_op<Op>("fastlora::lora_expand");
    at::AutoDispatchBelowADInplaceOrView below;
    return op.call(FASTLORA_EXPAND);
  }
  return Function::apply(y, z, lora_B, scaling, gates, Attributes{ranks.vec(), columns.vec()});
}

}  // namespace fastlora
