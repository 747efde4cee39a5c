// The ops on CPU tensors, through our kernels where they apply, else composed of ATen calls. Arguments are checked already.
#pragma once
#include "../types.h"

namespace fastlora::cpu {

LinearForward linear_forward(FASTLORA_LINEAR_ARGS, bool want_z);
LinearBackward linear_backward(FASTLORA_LINEAR_BACKWARD_ARGS);
Tensor shrink(FASTLORA_SHRINK_ARGS);
ShrinkBackward shrink_backward(FASTLORA_SHRINK_BACKWARD_ARGS);
Tensor expand(FASTLORA_EXPAND_ARGS);
ExpandBackward expand_backward(FASTLORA_EXPAND_BACKWARD_ARGS);
Tensor dropout(const Tensor& x, double dropout_p, const Tensor& seed);

}  // namespace fastlora::cpu
