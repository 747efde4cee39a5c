// The Python module, and the only file that registers kernels.
#include <pybind11/pybind11.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include <memory>

#include "cpu/choose.h"
#include "dispatch.h"
#include "ops.h"

namespace fastlora {
namespace {

void compute(torch::Library& m) {
  m.impl("lora_linear", lora_linear);
  m.impl("lora_linear_forward", lora_linear_forward);
  m.impl("lora_linear_backward", lora_linear_backward);
  m.impl("lora_shrink", lora_shrink);
  m.impl("lora_shrink_backward", lora_shrink_backward);
  m.impl("lora_expand", lora_expand);
  m.impl("lora_expand_backward", lora_expand_backward);
  m.impl("draw_seed", draw_seed);
}

void autograd(torch::Library& m) {
  m.impl("lora_linear", lora_linear_autograd);
  m.impl("lora_shrink", lora_shrink_autograd);
  m.impl("lora_expand", lora_expand_autograd);
  m.impl("lora_routed", lora_routed_autograd);
  // double backward raises by name instead of being silently wrong
  for (auto op : {"lora_linear_forward", "lora_linear_backward", "lora_shrink_backward", "lora_expand_backward",
                  "lora_routed_forward", "lora_routed_backward"})
    m.impl(op, torch::autograd::autogradNotImplementedFallback());
}

template <at::DeviceType device>
void autocast(torch::Library& m) {
  m.impl("lora_linear", lora_linear_autocast<device>);
  m.impl("lora_shrink", lora_shrink_autocast<device>);
  m.impl("lora_routed", lora_routed_autocast<device>);
}

// Called once, after the torch version was compared and the schemas are declared; static so that it lasts the process.
void register_ops() {
  using c10::DispatchKey;
  static std::vector<std::unique_ptr<torch::Library>> libraries;
  if (!libraries.empty()) return;
  const auto library = [](DispatchKey key) -> torch::Library& {
    return *libraries.emplace_back(
        std::make_unique<torch::Library>(torch::Library::IMPL, "fastlora", key, __FILE__, __LINE__));
  };
  auto& on_cpu = library(DispatchKey::CPU);
  compute(on_cpu);
  on_cpu.impl("lora_dropout", lora_dropout);
  on_cpu.impl("lora_routed", lora_routed);
  on_cpu.impl("lora_routed_forward", lora_routed_forward);
  on_cpu.impl("lora_routed_backward", lora_routed_backward);
  compute(library(DispatchKey::CUDA));
  autograd(library(DispatchKey::Autograd));
  autocast<at::kCPU>(library(DispatchKey::AutocastCPU));
  autocast<at::kCUDA>(library(DispatchKey::AutocastCUDA));
}

}  // namespace
}  // namespace fastlora

PYBIND11_MODULE(_C, m) {
  m.doc() = "fastlora's native back-end: kernels and autograd formulas of the ops in torch.ops.fastlora.";
  m.def("torch_version", [] { return FASTLORA_TORCH_VERSION; }, "The torch it was built for.");
  m.def("cpu_name", [] { return fastlora::cpu::cpu().composed ? std::string("composed") : fastlora::cpu::cpu().name; },
        "The form of the CPU kernels that runs here.");
  m.def("register_ops", fastlora::register_ops, "Register the kernels with torch's dispatcher, once.");
  m.def("pin_elsewhere", [](bool on) { fastlora::pinned_elsewhere = on; }, "Send every op to a back-end in Python.");
}
