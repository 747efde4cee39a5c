// Whether an op takes these arguments. Where one does not, its Python overload is called, which says why by name
// (fastlora/ops/check.py): what is refused here must be refused there.
#pragma once
#include "types.h"

namespace fastlora::check {

bool linear(FASTLORA_LINEAR_ARGS);
bool shrink(FASTLORA_SHRINK_ARGS);
bool expand(FASTLORA_EXPAND_ARGS);
bool dropout(double p, const MaybeTensor& seed, const Tensor& x);

}  // namespace fastlora::check
