// Argument checks of the ops, by name: what was given and what was expected (fastlora/ops/check.py is the same in Python).
#pragma once
#include "routed.h"

#define FASTLORA_VALUE(ok, name, got, ...) \
  TORCH_CHECK_VALUE(ok, "fastlora: ", name, ": got ", got, ", expected ", __VA_ARGS__)
#define FASTLORA_TYPE(ok, name, got, ...) \
  TORCH_CHECK_TYPE(ok, "fastlora: ", name, ": got ", got, ", expected ", __VA_ARGS__)

namespace fastlora::check {

void linear(FASTLORA_LINEAR_ARGS);
void shrink(FASTLORA_SHRINK_ARGS);
void expand(FASTLORA_EXPAND_ARGS);
void routed(FASTLORA_ROUTED_ARGS);
void dropout(double p, const MaybeTensor& seed, const Tensor& x);

}  // namespace fastlora::check
