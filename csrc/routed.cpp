// lora_routed: entry points. What our kernels do not take, the reference computes.
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

}  // namespace fastlora
