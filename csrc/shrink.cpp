// lora_shrink, lora_dropout and draw_seed: entry points, autograd formula, autocast.
#include <ATen/ops/randint.h>
#include <torch/csrc/autograd/custom_function.h>

#include <limits>

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

using Op = Tensor(FASTLORA_SHRINK_ARGS);
using BackwardOp = ShrinkBackward(FASTLORA_SHRINK_BACKWARD_ARGS);
using DropoutOp = Tensor(const Tensor&, double, const Tensor&);

struct Function : torch::autograd::Function<Function> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, TensorList lora_A, double dropout_p, const MaybeTensor& seed) {
    static const auto op = find_op<Op>("fastlora::lora_shrink");
    at::AutoDispatchBelowADInplaceOrView below;
    variable_list saved{x, seed.value_or(Tensor())};
    saved.insert(saved.end(), lora_A.begin(), lora_A.end());
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["dropout_p"] = dropout_p;
    return op.call(FASTLORA_SHRINK);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& dzs) {
    static const auto op = find_op<BackwardOp>("fastlora::lora_shrink_backward");
    const auto saved = ctx->get_saved_variables();
    const auto count = saved.size() - 2;
    bool need_A = false;
    for (size_t e = 0; e < count; e++) need_A |= ctx->needs_input_grad(1 + e);
    const auto seed = saved[1].defined() ? MaybeTensor(saved[1]) : MaybeTensor();
    auto [dx, dA] = op.call(dzs[0], saved[0], TensorList(saved).slice(2, count), ctx->saved_data["dropout_p"].toDouble(),
                            seed, {ctx->needs_input_grad(0), need_A});
    variable_list grads{ctx->needs_input_grad(0) ? dx : Tensor()};
    for (size_t e = 0; e < count; e++) grads.push_back(ctx->needs_input_grad(1 + e) ? dA[e] : Tensor());
    grads.resize(grads.size() + 2);
    return grads;
  }
};

}  // namespace

Tensor lora_shrink(FASTLORA_SHRINK_ARGS) {
  if (pinned_elsewhere) return in_python<Op>("fastlora::lora_shrink").call(FASTLORA_SHRINK);
  check::shrink(FASTLORA_SHRINK);
  return x.is_cpu() ? cpu::shrink(FASTLORA_SHRINK) : composed::shrink(FASTLORA_SHRINK);
}

ShrinkBackward lora_shrink_backward(FASTLORA_SHRINK_BACKWARD_ARGS) {
  if (pinned_elsewhere) return in_python<BackwardOp>("fastlora::lora_shrink_backward").call(FASTLORA_SHRINK_BACKWARD);
  return x.is_cpu() ? cpu::shrink_backward(FASTLORA_SHRINK_BACKWARD) : composed::shrink_backward(FASTLORA_SHRINK_BACKWARD);
}

Tensor lora_shrink_autograd(FASTLORA_SHRINK_ARGS) {
  refuse_forward_mode(x, lora_A);
  if (!torch::autograd::compute_requires_grad(x, lora_A)) {
    static const auto op = find_op<Op>("fastlora::lora_shrink");
    at::AutoDispatchBelowADInplaceOrView below;
    return op.call(FASTLORA_SHRINK);
  }
  return Function::apply(x, lora_A, dropout_p, seed);
}

template <at::DeviceType device>
Tensor lora_shrink_autocast(FASTLORA_SHRINK_ARGS) {
  static const auto op = find_op<Op>("fastlora::lora_shrink");
  c10::impl::ExcludeDispatchKeyGuard no_autocast(at::autocast::get_autocast_dispatch_key_from_device_type(device));
  const auto dtype = at::autocast::get_autocast_dtype(device);
  return op.call(at::autocast::cached_cast(dtype, x, device), autocast_adapters(lora_A, dtype, device), dropout_p, seed);
}

template Tensor lora_shrink_autocast<at::kCPU>(FASTLORA_SHRINK_ARGS);
template Tensor lora_shrink_autocast<at::kCUDA>(FASTLORA_SHRINK_ARGS);

Tensor lora_dropout(const Tensor& x, double dropout_p, const Tensor& seed) {
  if (pinned_elsewhere) return in_python<DropoutOp>("fastlora::lora_dropout").call(x, dropout_p, seed);
  check::dropout(dropout_p, seed, x);
  return cpu::dropout(x, dropout_p, seed);
}

Tensor draw_seed(const Tensor& x) {
  return at::randint(0, std::numeric_limits<int64_t>::max(), {}, x.options().dtype(at::kLong));
}

}  // namespace fastlora
