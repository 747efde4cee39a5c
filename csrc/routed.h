// lora_routed's arguments. Tokens that use the same slots make a segment; routes are made by ops/route.py.
#pragma once
#include "types.h"

namespace fastlora {

using RoutedForward = std::tuple<Tensor, Tensor>;   // y, z (n, k * most ranks): an entry's image before its gate
// dx, dweight, dA, dB, dscaling, dbias, dgates: empty where not needed
using RoutedBackward = std::tuple<Tensor, Tensor, Tensors, Tensors, Tensor, Tensor, Tensor>;

#define FASTLORA_ROUTED_ARGS                                                                           \
  const Tensor &x, const Tensor &weight, TensorList lora_A, TensorList lora_B, const Tensor &scaling,  \
      const MaybeTensor &bias, TensorList route, const Tensor &gates, TensorList column_scale, IntArrayRef slices, TensorList pages
#define FASTLORA_ROUTED_BACKWARD_ARGS                                                                                    \
  const Tensor &dy, const Tensor &x, const Tensor &weight, TensorList lora_A, TensorList lora_B, const Tensor &scaling,  \
      TensorList route, const Tensor &gates, TensorList column_scale, IntArrayRef slices, TensorList pages, const Tensor &z, \
      std::array<bool, 7> needs
#define FASTLORA_ROUTED x, weight, lora_A, lora_B, scaling, bias, route, gates, column_scale, slices, pages
#define FASTLORA_ROUTED_BACKWARD \
  dy, x, weight, lora_A, lora_B, scaling, route, gates, column_scale, slices, pages, z, needs

// A route's tensors on the host: segment i is the tokens starts[i] .. starts[i + 1] of `order`, its list slots[bounds[i]] ..
struct Plan {
  explicit Plan(TensorList route)
      : G(*route[4].const_data_ptr<int64_t>()), starts(route[4].const_data_ptr<int64_t>() + 1), bounds(starts + G + 1),
        slots(bounds + G + 1) {}
  int64_t G;
  const int64_t *starts, *bounds, *slots;
};

// Slots below it are pages', the others pairs of tensors.
inline int64_t paged(TensorList pages) { return pages.empty() ? 0 : pages[2].size(0); }

}  // namespace fastlora
