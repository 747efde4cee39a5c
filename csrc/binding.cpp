// What torch's dispatcher knows of the ops: kernels, autocast, the autograd formula; and the Python module.
#include <ATen/autocast_mode.h>
#include <pybind11/stl.h>
#include <torch/csrc/autograd/FunctionsManual.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>

#include <atomic>
#include <list>

#include "cpu/cpu.h"
#include "cuda.h"
#include "ops.h"

namespace fastlora {
namespace {

using torch::autograd::AutogradContext, torch::autograd::isFwGradDefinedTensorList;

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
  add<"fastlora::lora_routed", lora_routed, check::routed>(m);
  add<"fastlora::lora_routed_forward", lora_routed_forward, check::routed>(m);
  add<"fastlora::lora_routed_backward", lora_routed_backward>(m);
  add<"fastlora::lora_norm", lora_norm>(m);
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

// The autograd formula, once for all ops: an op's `_backward` takes dy, the op's arguments but the one at `apart`, the
// results of its `_forward` but y, and which gradients are needed. (fastlora/ops/library.py says the same in Python.)

// An input's tensors, each of which has an edge: an optional one that is missing has none.
TensorList tensors_of(const Tensor& t) { return t; }
TensorList tensors_of(const MaybeTensor& t) { return t ? TensorList(*t) : TensorList(); }
TensorList tensors_of(TensorList list) { return list; }

// What backward takes of the forward: written in an order, read in the same.
struct Saved {
  Tensors tensors = {};
  std::vector<int64_t> integers = {};   // lists, their lengths first
  double real = 0;                      // no op has two
  size_t tensor = 0, integer = 0;       // those that are read

  void add(const Tensor& t) { tensors.push_back(t); }
  void add(const MaybeTensor& t) { tensors.push_back(t.value_or(Tensor())); }
  void add(TensorList list) {
    integers.push_back(list.size());
    tensors.insert(tensors.end(), list.begin(), list.end());
  }
  void add(IntArrayRef list) {
    integers.push_back(list.size());
    integers.insert(integers.end(), list.begin(), list.end());
  }
  void add(double number) { real = number; }

  template <class T>
  auto read() {
    if constexpr (std::is_same_v<T, const Tensor&>) return tensors[tensor++];
    else if constexpr (std::is_same_v<T, const MaybeTensor&>) {
      const auto& t = tensors[tensor++];
      return t.defined() ? MaybeTensor(t) : MaybeTensor();
    } else if constexpr (std::is_same_v<T, TensorList>) {
      const size_t n = integers[integer++];
      return TensorList(tensors).slice((tensor += n) - n, n);
    } else if constexpr (std::is_same_v<T, IntArrayRef>) {
      const size_t n = integers[integer++];
      return IntArrayRef(integers).slice((integer += n) - n, n);
    } else if constexpr (std::is_same_v<T, double>) return real;
    else return T();   // which gradients are needed
  }
};

// `inputs` are the arguments that have gradients. Where `_backward` gives one gradient less, the first's is dy.
// A node computes its type's name at each backward: Self is a short one.
template <class Self, Name op, Name forward_op, Name backward_op, class Forward, class Backward, int apart, size_t... inputs>
struct Recorded;

template <class Self, Name op, Name forward_op, Name backward_op, class Results, class... Args, class Grads, class... Given,
          int apart, size_t... inputs>
struct Recorded<Self, op, forward_op, backward_op, Results(Args...), Grads(Given...), apart, inputs...>
    : torch::autograd::Function<Self> {
  using All = std::tuple<Args...>;

  static Tensor forward(AutogradContext* ctx, const All& all, const std::tuple_element_t<inputs, All>&... edges) {
    Saved saved;
    (saved.integers.push_back(tensors_of(edges).size()), ...);
    int i = 0;
    std::apply([&](const auto&... args) { ((i++ == apart ? void() : saved.add(args)), ...); }, all);
    at::AutoDispatchBelowADInplaceOrView below;
    const std::tuple results{
        std::apply([](const auto&... args) { return call<forward_op, Results(Args...)>(args...); }, all)};
    std::apply([&](const auto&, const auto&... more) { (saved.add(more), ...); }, results);
    ctx->save_for_backward(std::move(saved.tensors));
    ctx->saved_data["integers"] = std::move(saved.integers);
    ctx->saved_data["real"] = saved.real;
    return std::get<0>(results);
  }

  static Tensors backward(AutogradContext* ctx, const Tensors& dys) {
    constexpr size_t n = sizeof...(inputs), passed = n - std::tuple_size_v<Grads>;
    Saved saved{ctx->get_saved_variables(), ctx->saved_data["integers"].toIntVector(), ctx->saved_data["real"].toDouble()};
    saved.tensors.insert(saved.tensors.begin(), dys[0]);
    std::array<size_t, n> edges;
    std::array<bool, n> needs;
    for (size_t i = 0, edge = 0; i < n; edge += edges[i++]) {
      edges[i] = saved.integers[saved.integer++];
      needs[i] = ctx->needs_input_grad({{edge, edge + edges[i]}});
    }
    std::tuple given{saved.template read<Given>()...};
    std::copy_n(needs.begin() + passed, n - passed, std::get<sizeof...(Given) - 1>(given).begin());
    const auto grads = std::apply([](const auto&... args) { return call<backward_op, Grads(Given...)>(args...); }, given);

    Tensors out(1);   // `all` has none
    size_t i = 0;
    const auto add = [&](const auto& grad) {
      if constexpr (std::is_same_v<decltype(grad), const Tensors&>) {
        for (size_t e = 0; e < edges[i]; e++) out.push_back(needs[i] ? grad[e] : Tensor());
      } else {
        out.push_back(needs[i] ? grad : Tensor());
      }
      i++;
    };
    if (passed) add(dys[0]);
    std::apply([&](const auto&... all) { (add(all), ...); }, grads);
    return out;
  }

  static Tensor kernel(Args... args) {
    const All all(args...);
    // a Function would drop tangents without a word
    TORCH_CHECK_NOT_IMPLEMENTED(!(isFwGradDefinedTensorList(tensors_of(std::get<inputs>(all))) || ...),
                                "fastlora: forward-mode AD (jvp) is not implemented");
    if (torch::autograd::compute_requires_grad(std::get<inputs>(all)...)) return Self::apply(all, std::get<inputs>(all)...);
    at::AutoDispatchBelowADInplaceOrView below;
    return call<op, Tensor(Args...)>(args...);
  }
};

struct Linear : Recorded<Linear, "fastlora::lora_linear", "fastlora::lora_linear_forward", "fastlora::lora_linear_backward",
                         decltype(lora_linear_forward), decltype(lora_linear_backward), 5, 0, 1, 2, 3, 4, 5, 6, 8> {};
struct Shrink : Recorded<Shrink, "fastlora::lora_shrink", "fastlora::lora_shrink", "fastlora::lora_shrink_backward",
                         decltype(lora_shrink), decltype(lora_shrink_backward), -1, 0, 1> {};
struct Expand : Recorded<Expand, "fastlora::lora_expand", "fastlora::lora_expand", "fastlora::lora_expand_backward",
                         decltype(lora_expand), decltype(lora_expand_backward), 0, 0, 1, 2, 3, 4> {};
struct Routed : Recorded<Routed, "fastlora::lora_routed", "fastlora::lora_routed_forward", "fastlora::lora_routed_backward",
                         decltype(lora_routed_forward), decltype(lora_routed_backward), 5, 0, 1, 2, 3, 4, 5, 7> {};

void differentiate(torch::Library& m) {
  m.impl("lora_linear", Linear::kernel);
  m.impl("lora_shrink", Shrink::kernel);
  m.impl("lora_expand", Expand::kernel);
  m.impl("lora_routed", Routed::kernel);
  // double backward raises by name instead of being silently wrong
  for (auto op : {"lora_linear_forward", "lora_linear_backward", "lora_shrink_backward", "lora_expand_backward",
                  "lora_routed_forward", "lora_routed_backward", "lora_norm"})
    m.impl(op, torch::autograd::autogradNotImplementedFallback());
}

// Called once, after the torch version was compared and the schemas are declared; static so that it lasts the process.
void register_ops() {
  using c10::DispatchKey;
  static std::list<torch::Library> libraries;
  if (!libraries.empty()) return;
  const auto library = [](DispatchKey key) -> torch::Library& {
    return libraries.emplace_back(torch::Library::IMPL, "fastlora", key, __FILE__, __LINE__);
  };
  auto& on_cpu = library(DispatchKey::CPU);
  compute(on_cpu);
  add<"fastlora::lora_dropout", lora_dropout>(on_cpu);
  compute(library(DispatchKey::CUDA));
  differentiate(library(DispatchKey::Autograd));
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
