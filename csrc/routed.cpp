// lora_routed: entry points and gradients. What our kernels do not take, the reference computes.
#include "routed.h"

#include "dispatch.h"
#include "ops.h"

namespace fastlora {
namespace {

using Op = Tensor(FASTLORA_ROUTED_ARGS);
using ForwardOp = RoutedForward(FASTLORA_ROUTED_ARGS);
using BackwardOp = RoutedBackward(FASTLORA_ROUTED_BACKWARD_ARGS);

RoutedForward run(FASTLORA_ROUTED_ARGS, bool want_z) {
  if (cpu::takes_routed(x, lora_A, lora_B, pages)) return cpu::routed_forward(FASTLORA_ROUTED, want_z);
  return call<"fastlora::lora_routed_forward", ForwardOp, "reference">(FASTLORA_ROUTED);
}

struct Function : torch::autograd::Function<Function> {
  // Order of the tensor arguments, which is that of the gradients.
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight, TensorList lora_A, TensorList lora_B,
                        const Tensor& scaling, const MaybeTensor& bias, const Tensor& gates, const Tensors& route,
                        const Tensors& column_scale, const Tensors& pages, const std::vector<int64_t>& slices) {
    auto [y, z] = call_below_autograd<"fastlora::lora_routed_forward", ForwardOp>(FASTLORA_ROUTED);
    save(ctx, {x, weight, scaling, gates, z}, {lora_A, lora_B, route, column_scale, pages});
    ctx->saved_data["counts"] = std::vector<int64_t>{static_cast<int64_t>(lora_A.size()), static_cast<int64_t>(column_scale.size())};
    ctx->saved_data["slices"] = slices;
    ctx->saved_data["has_bias"] = bias.has_value();
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& dys) {
    const auto saved = ctx->get_saved_variables();
    const auto counts = ctx->saved_data["counts"].toIntVector();
    const size_t pairs = counts[0];
    size_t at = 5;
    const auto next = [&](size_t n) { return TensorList(saved).slice((at += n) - n, n); };
    const auto A = next(pairs), B = next(pairs), route = next(5), columns = next(counts[1]), pages = next(saved.size() - at);
    Edges edges{ctx};
    const std::array<bool, 7> needs{edges.need(), edges.need(), edges.need(pairs), edges.need(pairs), edges.need(),
                                    edges.need(ctx->saved_data["has_bias"].toBool()), edges.need()};
    const auto grads = call<"fastlora::lora_routed_backward", BackwardOp>(
        dys[0], saved[0], saved[1], A, B, saved[2], route, saved[3], columns, ctx->saved_data["slices"].toIntVector(), pages,
        saved[4], needs);
    return flatten(grads, needs, pairs, 4);
  }
};

}  // namespace

Tensor lora_routed(FASTLORA_ROUTED_ARGS) {
  if (pinned_elsewhere || !check::routed(FASTLORA_ROUTED))
    return call<"fastlora::lora_routed", Op, "python">(FASTLORA_ROUTED);
  return std::get<0>(run(FASTLORA_ROUTED, false));
}

RoutedForward lora_routed_forward(FASTLORA_ROUTED_ARGS) {
  if (pinned_elsewhere || !check::routed(FASTLORA_ROUTED))
    return call<"fastlora::lora_routed_forward", ForwardOp, "python">(FASTLORA_ROUTED);
  return run(FASTLORA_ROUTED, true);
}

RoutedBackward lora_routed_backward(FASTLORA_ROUTED_BACKWARD_ARGS) {
  if (pinned_elsewhere) return call<"fastlora::lora_routed_backward", BackwardOp, "python">(FASTLORA_ROUTED_BACKWARD);
  if (cpu::takes_routed(x, lora_A, lora_B, pages) && slices.empty())
    if (auto grads = cpu::routed_backward(FASTLORA_ROUTED_BACKWARD)) return *grads;
  return call<"fastlora::lora_routed_backward", BackwardOp, "reference">(FASTLORA_ROUTED_BACKWARD);
}

Tensor lora_routed_autograd(FASTLORA_ROUTED_ARGS) {
  if (!records(x, weight, lora_A, lora_B, scaling, bias, gates))
    return call_below_autograd<"fastlora::lora_routed", Op>(FASTLORA_ROUTED);
  return Function::apply(x, weight, lora_A, lora_B, scaling, bias, gates, route.vec(), column_scale.vec(), pages.vec(),
                         slices.vec());
}

}  // namespace fastlora
