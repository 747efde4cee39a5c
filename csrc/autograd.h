// What the autograd formulas share.
#pragma once
#include <ATen/autocast_mode.h>
#include <torch/csrc/autograd/FunctionsManual.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>

#include "types.h"

namespace fastlora {

inline bool has_tangent(const Tensor& t) { return torch::autograd::isFwGradDefined(t); }
inline bool has_tangent(const MaybeTensor& t) { return torch::autograd::isFwGradDefined(t); }
inline bool has_tangent(TensorList ts) { return torch::autograd::isFwGradDefinedTensorList(ts); }

// A C++ autograd Function drops tangents without a word.
template <class... Inputs>
void refuse_forward_mode(const Inputs&... inputs) {
  TORCH_CHECK_NOT_IMPLEMENTED(!(has_tangent(inputs) || ...), "fastlora: forward-mode AD (jvp) is not implemented");
}

// Under autocast float32 masters stay, which the kernels take; adapters in another half type follow the autocast dtype.
inline Tensors autocast_adapters(TensorList adapters, at::ScalarType dtype, at::DeviceType device) {
  Tensors cast;
  for (const auto& t : adapters)
    cast.push_back(t.scalar_type() == at::kFloat ? t : at::autocast::cached_cast(dtype, t, device));
  return cast;
}

}  // namespace fastlora
