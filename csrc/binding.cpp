// The Python module, and the registration of all kernels.
#include <ATen/autocast_mode.h>
#include <pybind11/stl.h>

#include <atomic>
#include <memory>

#include "cpu/cpu.h"
#include "cuda.h"
#include "ops.h"

namespace fastlora {
namespace {

// True while a back-end other than `native` is pinned for the process (fastlora/backends.py sets it).
std::atomic<bool> pinned_elsewhere{false};

// Registers the kernel `run`. Another back-end that is pinned, and arguments that are not taken, lead to Python.
template <Name op, auto run, auto takes = nullptr>
void add(torch::Library& m) {
  const auto kernel = []<class Result, class... Args>(Result (*)(Args...)) {
    return [](Args... args) -> Result {
      bool taken = !pinned_elsewhere;
      if constexpr (takes != nullptr) taken = taken && takes(args...);
      return taken ? run(args...) : call<op, Result(Args...), "python">(args...);
    };
  };
  m.impl(op.text, kernel(run));
}

void compute(torch::Library& m) {
  add<"fastlora::lora_linear", lora_linear, check::linear>(m);
  add<"fastlora::lora_linear_forward", lora_linear_forward, check::linear>(m);
  add<"fastlora::lora_linear_backward", lora_linear_backward>(m);
  add<"fastlora::lora_shrink", lora_shrink, check::shrink>(m);
  add<"fastlora::lora_shrink_backward", lora_shrink_backward>(m);
  add<"fastlora::lora_expand", lora_expand, check::expand>(m);
  add<"fastlora::lora_expand_backward", lora_expand_backward>(m);
  add<"fastlora::lora_embedding", lora_embedding, check::embedding>(m);
  add<"fastlora::lora_routed", lora_routed, check::routed>(m);
  add<"fastlora::lora_routed_forward", lora_routed_forward, check::routed>(m);
  add<"fastlora::lora_routed_backward", lora_routed_backward>(m);
  m.impl("draw_seed", draw_seed);
}

// x, weight, bias and adapters of another half type go to autocast's dtype; float32 masters, which the kernels take, stay.
template <at::DeviceType device>
void autocast(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const c10::impl::ExcludeDispatchKeyGuard off(at::autocast::get_autocast_dispatch_key_from_device_type(device));
  const auto cast = [dtype = at::autocast::get_autocast_dtype(device)](const Tensor& t) {
    return at::autocast::cached_cast(dtype, t, device);
  };
  const auto& arguments = op.schema().arguments();
  auto value = stack->end() - arguments.size();
  for (const auto& argument : arguments) {
    const auto& name = argument.name();
    if ((name == "x" || name == "weight" || name == "bias") && value->isTensor()) *value = cast(value->toTensor());
    if (name == "lora_A" || name == "lora_B") {
      auto adapters = value->toTensorVector();
      for (auto& t : adapters)
        if (t.scalar_type() != at::kFloat) t = cast(t);
      *value = adapters;
    }
    value++;
  }
  op.callBoxed(stack);
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
  add<"fastlora::lora_dropout", lora_dropout>(on_cpu);
  compute(library(DispatchKey::CUDA));
  register_autograd(library(DispatchKey::Autograd));
  auto &cpu_cast = library(DispatchKey::AutocastCPU), &cuda_cast = library(DispatchKey::AutocastCUDA);
  for (auto op : {"lora_linear", "lora_shrink", "lora_routed"}) {
    cpu_cast.impl(op, torch::CppFunction::makeFromBoxedFunction<&autocast<at::kCPU>>());
    cuda_cast.impl(op, torch::CppFunction::makeFromBoxedFunction<&autocast<at::kCUDA>>());
  }
}

}  // namespace
}  // namespace fastlora

PYBIND11_MODULE(_C, m) {
  m.doc() = "fastlora's native back-end: kernels and autograd formulas of the ops in torch.ops.fastlora.";
  m.def("torch_version", [] { return FASTLORA_TORCH_VERSION; }, "The torch it was built for.");
  m.def("cpu_name", [] { return fastlora::cpu::cpu().name; }, "The form of the CPU kernels that runs here.");
  m.def("register_ops", fastlora::register_ops, "Register the kernels with torch's dispatcher, once.");
  m.def("load_cuda", fastlora::cuda::load, "Open the library of CUDA kernels; what went wrong, or nothing.");
  m.def("pin_gpu", fastlora::cuda::pin, "What FASTLORA_GPU says: kernels, where there are, composed, or nothing.");
  m.def("cuda_statuses", [] { return fastlora::cuda::statuses; });
  m.def("cuda_objection", fastlora::cuda::objection, "Why the kernels of a status do not run; empty where they do.");
  m.def("pin_elsewhere", [](bool on) { fastlora::pinned_elsewhere = on; }, "Send every op to a back-end in Python.");
}
