// lora_routed: entry points, autograd formula, autocast.
#include "routed.h"

#include <torch/csrc/autograd/custom_function.h>

#include "autograd.h"
#include "check.h"
#include "dispatch.h"

namespace fastlora {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

using Op = Tensor(FASTLORA_ROUTED_ARGS);
using ForwardOp = RoutedForward(FASTLORA_ROUTED_ARGS);
using BackwardOp = RoutedBackward(FASTLORA_ROUTED_BACKWARD_ARGS);

RoutedForward run(FASTLORA_ROUTED_ARGS, bool want_z) {
  check::routed(FASTLORA_ROUTED);
  return x.is_cpu() ? cpu::routed_forward(FASTLORA_ROUTED, want_z) : composed::routed_forward(FASTLORA_ROUTED);
}

struct Function : torch::autograd::Function<Function> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight, TensorList lora_A, TensorList lora_B,
                        const Tensor& scaling, const MaybeTensor& bias, const Tensor& gates, const variable_list& route,
                        const variable_list& column_scale, const variable_list& pages, const std::vector<int64_t>& slices) {
    static const auto op = find_op<ForwardOp>("fastlora::lora_routed_forward");
    at::AutoDispatchBelowADInplaceOrView below;
    auto [y, z] = op.call(FASTLORA_ROUTED);
    variable_list saved{x, weight, scaling, gates, z};
    for (auto list : {lora_A, lora_B, TensorList(route), TensorList(column_scale), TensorList(pages)})
      saved.insert(saved.end(), list.begin(), list.end());
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["pairs"] = static_cast<int64_t>(lora_A.size());
    ctx->saved_data["columns"] = static_cast<int64_t>(column_scale.size());
    ctx->saved_data["slices"] = slices;
    ctx->saved_data["has_bias"] = bias.has_value();
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& dys) {
    static const auto op = find_op<BackwardOp>("fastlora::lora_routed_backward");
    const auto saved = ctx->get_saved_variables();
    const size_t pairs = ctx->saved_data["pairs"].toInt(), columns = ctx->saved_data["columns"].toInt();
    const bool has_bias = ctx->saved_data["has_bias"].toBool();
    size_t at = 5;
    const auto next = [&](size_t n) { return TensorList(saved).slice((at += n) - n, n); };
    const auto A = next(pairs), B = next(pairs), route = next(5), c = next(columns), pages = next(saved.size() - at);
    const auto any = [&](size_t first) {
      for (size_t e = 0; e < pairs; e++)
        if (ctx->needs_input_grad(first + e)) return true;
      return false;
    };
    const auto edge = 3 + 2 * pairs;
    const std::array<bool, 7> needs{ctx->needs_input_grad(0), ctx->needs_input_grad(1), any(2), any(2 + pairs),
                                    ctx->needs_input_grad(edge - 1), has_bias && ctx->needs_input_grad(edge),
                                    ctx->needs_input_grad(edge + has_bias)};
    auto [dx, dweight, dA, dB, dscaling, dbias, dgates] =
        op.call(dys[0], saved[0], saved[1], A, B, saved[2], route, saved[3], c, ctx->saved_data["slices"].toIntVector(),
                pages, saved[4], needs);
    const auto given = [](bool need, Tensor& t) { return need ? std::move(t) : Tensor(); };
    variable_list grads{given(needs[0], dx), given(needs[1], dweight)};
    for (size_t e = 0; e < pairs; e++) grads.push_back(ctx->needs_input_grad(2 + e) ? dA[e] : Tensor());
    for (size_t e = 0; e < pairs; e++) grads.push_back(ctx->needs_input_grad(2 + pairs + e) ? dB[e] : Tensor());
    for (auto&& g : {given(needs[4], dscaling), given(needs[5], dbias), given(needs[6], dgates)}) grads.push_back(g);
    grads.resize(grads.size() + 4);
    return grads;
  }
};

}  // namespace

Tensor lora_routed(FASTLORA_ROUTED_ARGS) {
  if (pinned_elsewhere) return in_python<Op>("fastlora::lora_routed").call(FASTLORA_ROUTED);
  return std::get<0>(run(FASTLORA_ROUTED, false));
}

RoutedForward lora_routed_forward(FASTLORA_ROUTED_ARGS) {
  if (pinned_elsewhere) return in_python<ForwardOp>("fastlora::lora_routed_forward").call(FASTLORA_ROUTED);
  return run(FASTLORA_ROUTED, true);
}

RoutedBackward lora_routed_backward(FASTLORA_ROUTED_BACKWARD_ARGS) {
  if (pinned_elsewhere) return in_python<BackwardOp>("fastlora::lora_routed_backward").call(FASTLORA_ROUTED_BACKWARD);
  return x.is_cpu() ? cpu::routed_backward(FASTLORA_ROUTED_BACKWARD) : composed::routed_backward(FASTLORA_ROUTED_BACKWARD);
}

Tensor lora_routed_autograd(FASTLORA_ROUTED_ARGS) {
  refuse_forward_mode(x, weight, lora_A, lora_B, scaling, bias, gates);
  if (!torch::autograd::compute_requires_grad(x, weight, lora_A, lora_B, scaling, bias, gates)) {
    static const auto op = find_op<Op>("fastlora::lora_routed");
    at::AutoDispatchBelowADInplaceOrView below;
    return op.call(FASTLORA_ROUTED);
  }
  return Function::apply(x, weight, lora_A, lora_B, scaling, bias, gates, route.vec(), column_scale.vec(), pages.vec(),
                         slices.vec());
}

template <at::DeviceType device>
Tensor lora_routed_autocast(FASTLORA_ROUTED_ARGS) {
  static const auto op = find_op<Op>("fastlora::lora_routed");
  c10::impl::ExcludeDispatchKeyGuard no_autocast(at::autocast::get_autocast_dispatch_key_from_device_type(device));
  const auto dtype = at::autocast::get_autocast_dtype(device);
  const auto cast = [&](const Tensor& t) { return at::autocast::cached_cast(dtype, t, device); };
  return op.call(cast(x), cast(weight), autocast_adapters(lora_A, dtype, device), autocast_adapters(lora_B, dtype, device),
                 scaling, bias ? MaybeTensor(cast(*bias)) : bias, route, gates, column_scale, slices, pages);
}

template Tensor lora_routed_autocast<at::kCPU>(FASTLORA_ROUTED_ARGS);
template Tensor lora_routed_autocast<at::kCUDA>(FASTLORA_ROUTED_ARGS);

}  // namespace fastlora
