// lora_linear: entry points, autograd formula, autocast.
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
using torch::autograd::Variable;
using torch::autograd::variable_list;

using Op = Tensor(FASTLORA_LINEAR_ARGS);
using ForwardOp = LinearForward(FASTLORA_LINEAR_ARGS);
using BackwardOp = LinearBackward(FASTLORA_LINEAR_BACKWARD_ARGS);

LinearForward run(FASTLORA_LINEAR_ARGS, bool want_z) {
  check::linear(FASTLORA_LINEAR);
  return x.is_cpu() ? cpu::linear_forward(FASTLORA_LINEAR, want_z) : composed::linear_forward(FASTLORA_LINEAR);
}

// What the formula keeps besides tensors; one argument of the Function, so one gradient slot.
struct Attributes {
  std::vector<int64_t> ranks;
  double dropout_p;
};

struct Function : torch::autograd::Function<Function> {
  // Order of the tensor arguments, which is that of the gradients.
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight, TensorList lora_A, TensorList lora_B,
                        const Tensor& scaling, const MaybeTensor& bias, const MaybeTensor& gates,
                        const MaybeTensor& column_scale, const MaybeTensor& seed, const Attributes& at) {
    static const auto op = find_op<ForwardOp>("fastlora::lora_linear_forward");
    at::AutoDispatchBelowADInplaceOrView below;
    auto [y, z, u] =
        op.call(x, weight, lora_A, lora_B, scaling, bias, gates, at.ranks, column_scale, at.dropout_p, seed);
    variable_list saved{x, weight, scaling, gates.value_or(Tensor()), column_scale.value_or(Tensor()),
                        seed.value_or(Tensor()), z, u};
    saved.insert(saved.end(), lora_A.begin(), lora_A.end());
    saved.insert(saved.end(), lora_B.begin(), lora_B.end());
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["ranks"] = at.ranks;
    ctx->saved_data["dropout_p"] = at.dropout_p;
    ctx->saved_data["has_bias"] = bias.has_value();
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& dys) {
    static const auto op = find_op<BackwardOp>("fastlora::lora_linear_backward");
    const auto saved = ctx->get_saved_variables();
    const auto maybe = [&](size_t i) { return saved[i].defined() ? MaybeTensor(saved[i]) : MaybeTensor(); };
    const auto pairs = (saved.size() - 8) / 2;
    const auto A = TensorList(saved).slice(8, pairs), B = TensorList(saved).slice(8 + pairs, pairs);
    const bool has_bias = ctx->saved_data["has_bias"].toBool(), has_gates = saved[3].defined();
    const auto edge_bias = 3 + 2 * pairs, edge_gates = edge_bias + has_bias, edge_column = edge_gates + has_gates;
    const auto any = [&](size_t first) {
      for (size_t e = 0; e < pairs; e++)
        if (ctx->needs_input_grad(first + e)) return true;
      return false;
    };
    const std::array<bool, 8> needs{ctx->needs_input_grad(0), ctx->needs_input_grad(1), any(2), any(2 + pairs),
                                    ctx->needs_input_grad(2 + 2 * pairs), has_bias && ctx->needs_input_grad(edge_bias),
                                    has_gates && ctx->needs_input_grad(edge_gates),
                                    saved[4].defined() && ctx->needs_input_grad(edge_column)};
    auto [dx, dweight, dA, dB, dscaling, dbias, dgates, dcolumn] =
        op.call(dys[0], saved[0], saved[1], A, B, saved[2], maybe(3), ctx->saved_data["ranks"].toIntVector(), maybe(4),
                ctx->saved_data["dropout_p"].toDouble(), maybe(5), saved[6], saved[7], needs);
    const auto given = [](bool need, Tensor& t) { return need ? std::move(t) : Tensor(); };
    variable_list grads{given(needs[0], dx), given(needs[1], dweight)};
    for (size_t e = 0; e < pairs; e++) grads.push_back(ctx->needs_input_grad(2 + e) ? dA[e] : Tensor());
    for (size_t e = 0; e < pairs; e++) grads.push_back(ctx->needs_input_grad(2 + pairs + e) ? dB[e] : Tensor());
    for (auto&& g : {given(needs[4], dscaling), given(needs[5], dbias), given(needs[6], dgates), given(needs[7], dcolumn),
                     Tensor(), Tensor()})
      grads.push_back(g);
    return grads;
  }
};

}  // namespace

Tensor lora_linear(FASTLORA_LINEAR_ARGS) {
  if (pinned_elsewhere) return in_python<Op>("fastlora::lora_linear").call(FASTLORA_LINEAR);
  return std::get<0>(run(FASTLORA_LINEAR, false));
}

LinearForward lora_linear_forward(FASTLORA_LINEAR_ARGS) {
  if (pinned_elsewhere) return in_python<ForwardOp>("fastlora::lora_linear_forward").call(FASTLORA_LINEAR);
  return run(FASTLORA_LINEAR, true);
}

LinearBackward lora_linear_backward(FASTLORA_LINEAR_BACKWARD_ARGS) {
  if (pinned_elsewhere) return in_python<BackwardOp>("fastlora::lora_linear_backward").call(FASTLORA_LINEAR_BACKWARD);
  return x.is_cpu() ? cpu::linear_backward(FASTLORA_LINEAR_BACKWARD) : composed::linear_backward(FASTLORA_LINEAR_BACKWARD);
}

Tensor lora_linear_autograd(FASTLORA_LINEAR_ARGS) {
  refuse_forward_mode(x, weight, lora_A, lora_B, scaling, bias, gates, column_scale);
  if (!torch::autograd::compute_requires_grad(x, weight, lora_A, lora_B, scaling, bias, gates, column_scale)) {
    static const auto op = find_op<Op>("fastlora::lora_linear");
    at::AutoDispatchBelowADInplaceOrView below;
    return op.call(FASTLORA_LINEAR);
  }
  return Function::apply(x, weight, lora_A, lora_B, scaling, bias, gates, column_scale, seed,
                         Attributes{ranks.vec(), dropout_p});
}

template <at::DeviceType device>
Tensor lora_linear_autocast(FASTLORA_LINEAR_ARGS) {
  static const auto op = find_op<Op>("fastlora::lora_linear");
  c10::impl::ExcludeDispatchKeyGuard no_autocast(at::autocast::get_autocast_dispatch_key_from_device_type(device));
  const auto dtype = at::autocast::get_autocast_dtype(device);
  const auto cast = [&](const Tensor& t) { return at::autocast::cached_cast(dtype, t, device); };
  return op.call(cast(x), cast(weight), autocast_adapters(lora_A, dtype, device),
                 autocast_adapters(lora_B, dtype, device), scaling, bias ? MaybeTensor(cast(*bias)) : bias, gates, ranks,
                 column_scale, dropout_p, seed);
}

template Tensor lora_linear_autocast<at::kCPU>(FASTLORA_LINEAR_ARGS);
template Tensor lora_linear_autocast<at::kCUDA>(FASTLORA_LINEAR_ARGS);

}  // namespace fastlora
