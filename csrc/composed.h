// The ops composed of ATen calls: right on every device without a kernel of our own. Expand first, then the base GEMM
// with beta = 1, whose epilogue hides the read of y. Arguments are checked already.
#pragma once
#include "types.h"

namespace fastlora::composed {

LinearForward linear_forward(FASTLORA_LINEAR_ARGS);
LinearBackward linear_backward(FASTLORA_LINEAR_BACKWARD_ARGS);
Tensor shrink(FASTLORA_SHRINK_ARGS);
ShrinkBackward shrink_backward(FASTLORA_SHRINK_BACKWARD_ARGS);
Tensor expand(FASTLORA_EXPAND_ARGS);
ExpandBackward expand_backward(FASTLORA_EXPAND_BACKWARD_ARGS);

}  // namespace fastlora::composed
