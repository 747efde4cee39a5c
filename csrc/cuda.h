// The kernels of tests/cuda/kernels, which lie in a library of their own: what has been seen of them, and when they run.
#pragma once
#include <string>

#include "products.h"

namespace fastlora::cuda {

// An op, its kernels, the architecture (80, 90) on which they ran and were faster, or 0, and from how many to how many rows.
using Status = std::tuple<std::string, std::string, int, int64_t, int64_t>;
// docs/gpu-status.md says the same.
inline const std::vector<Status> statuses = {
    {"lora_linear_forward", "decode_kernel (few rows, no gradients) or shrink_kernel, linear_kernel", 0, 0, 0},
    {"lora_linear_backward", "expand_backward_kernel (t and dB) or shrink_kernel (t), linear_kernel (dx), "
                             "shrink_backward_kernel (dA)", 0, 0, 0},
    {"lora_shrink", "shrink_kernel", 0, 0, 0},
    {"lora_shrink_backward", "linear_kernel (dx), shrink_backward_kernel (dA)", 0, 0, 0},
    {"lora_expand", "expand_kernel, or gather_kernel (ids)", 0, 0, 0},
    {"lora_expand_backward", "expand_backward_kernel (t and dB), shrink_kernel (t) or shrink_backward_kernel (dB)", 0, 0, 0},
    {"lora_norm", "norms_kernel", 0, 0, 0},
    {"lora_routed_forward", "decode_kernel (few rows, no gradients) or routed_shrink_kernel, routed_expand_kernel", 0, 0, 0},
};

// Why these kernels do not run this, empty where they do. sizes: M first; form: as for pin(), nothing for what is pinned.
std::string objection(const Status&, const std::vector<int64_t>& sizes, bool half, int architecture,
                      const std::optional<std::string>& form);
bool takes(const char* op, const Tensor& x);

Tensor norm(const Tensor& weight, TensorList lora_A, TensorList lora_B, const Gate& gate);
// lora_routed of adapters that all lie in pages
bool takes_routed(const Tensor& x, TensorList lora_A, TensorList pages);
RoutedForward routed(const Tensor& x, const Tensor& weight, const MaybeTensor& bias, TensorList route, const Tensor& gates,
                     IntArrayRef slices, TensorList pages, bool want_z);

std::string load(const std::string& path);   // opens the library and says what went wrong
void pin(const std::string& form);           // what FASTLORA_GPU says: composed, kernels, or nothing

}  // namespace fastlora::cuda
