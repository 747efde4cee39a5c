// The products through the kernels of tests/cuda/kernels, whose library knows pointers alone. What they do not take is composed.
#include "cuda.h"

#include <ATen/ops/zeros.h>
#include <c10/core/DeviceGuard.h>
#include <dlfcn.h>

#include <algorithm>
#include <cmath>

#include "../tests/cuda/kernels/params.h"

namespace fastlora::cuda {
namespace {

#define FUNCTIONS(DO) \
  DO(launch_linear) DO(launch_shrink) DO(fastlora_shrink_counters) DO(fastlora_device) DO(fastlora_error)
#define MEMBER(name) decltype(&::name) name = nullptr;
struct Library {
  FUNCTIONS(MEMBER)
  // of the emulator: which memory is the device's
  void (*forget)() = nullptr;
  void (*buffer)(const void*, size_t, int, int) = nullptr;
} library;
std::string pinned;

constexpr int64_t LARGEST = INT32_MAX - 1024;

// One launch, on the device and the current stream of x.
struct Launch {
  c10::DeviceGuard guard;
  void* stream = nullptr;
  int architecture = 0, multiprocessors = 0;

  explicit Launch(const Tensor& x) : guard(x.device()) {
    if (x.is_cuda()) stream = c10::impl::VirtualGuardImpl(x.device().type()).getStream(x.device()).native_handle();
    if (library.forget) library.forget();
    check(library.fastlora_device(&architecture, &multiprocessors));
  }
  void check(int status) { TORCH_CHECK(!status, "fastlora: a CUDA kernel refused: ", library.fastlora_error(status)); }
  void* at(const Tensor& t) {
    void* data = t.numel() ? const_cast<void*>(t.const_data_ptr()) : nullptr;
    if (library.buffer && data)
      library.buffer(data, at::detail::computeStorageNbytes(t.sizes(), t.strides(), t.itemsize()), 1, 0);
    return data;
  }
  Matrix rows(const Tensor& t) { return {at(t), t.stride(0)}; }
  template <class P> void operator()(int (*launch)(const P*, void*), P& p, at::ScalarType type, const Dropout& dropout) {
    p.type = type == at::kHalf ? FASTLORA_FP16 : FASTLORA_BF16;
    p.dropped = int(std::nearbyint(dropout.p * 65536));
    if (dropout.p > 0) p.seed = static_cast<const long long*>(at(*dropout.seed));
    check(launch(&p, stream));
  }
};

bool has_rows(const Tensor& t) { return t.stride(1) == 1 && t.stride(0) <= LARGEST; }
Tensor with_rows(const Tensor& t) { return has_rows(t) ? t : t.contiguous(); }

void project(Gated& z, const Tensor& given, TensorList f, bool last_is_rank, const Dropout& dropout) {
  const auto x = with_rows(flat(given)), a = with_rows(composed::joined(f, last_is_rank, x.size(1), x));
  const int64_t M = x.size(0), K = x.size(1), R = a.size(0), counters = library.fastlora_shrink_counters(M, R);
  const auto wide = x.options().dtype(at::kFloat);
  const auto zs = at::empty({M, R}, wide), zg = at::empty({M, R}, x.options());
  Launch launch(x);
  // three blocks to a multiprocessor, of four steps along K at least
  const int64_t fill = 3 * launch.multiprocessors / std::max<int64_t>(counters, 1);
  const int64_t splits = std::clamp<int64_t>(fill, 1, std::max<int64_t>(K / 256, 1)), tiles = splits > 1 ? counters : 0;
  const auto partial = at::empty({tiles * splits * FASTLORA_TILE}, wide), arrived = at::zeros({tiles}, wide.dtype(at::kInt));
  ShrinkParams p{};
  p.x = launch.rows(x), p.z = launch.rows(zs), p.zg = launch.rows(zg), p.scale = float(z.gate.scalar);
  if (z.gate.rows.defined()) p.g = {launch.at(z.gate.rows), z.gate.rows.dim() == 2 ? R : 0};
  p.parts[0] = {launch.rows(a), 0, R, 0, 0}, p.count = 1, p.m = M, p.k = K, p.splits = int(splits);
  p.partial = static_cast<float*>(launch.at(partial)), p.partials = partial.numel();
  p.arrived = static_cast<unsigned*>(launch.at(arrived)), p.counters = tiles;
  launch(library.launch_shrink, p, x.scalar_type(), dropout);
  z.z = zs.reshape(with_last(given.sizes(), R)), z.product = zg;
}

Tensor product(Product& q) {
  const bool base = q.x.defined(), across = base ? !has_rows(q.w) : !q.last_is_rank;   // w lies, and so must b
  const auto w = base && across ? q.w.t() : q.w;
  if (q.start || (base && !has_rows(w))) return composed::products.product(q);
  if (!q.z.z.defined()) project(q.z, q.x, q.a, false, {});
  const auto type = q.like.scalar_type();
  const auto zg = q.z.in(type), f = composed::joined(q.f, q.last_is_rank, q.N, zg), b = with_rows(across ? f : f.t());
  const auto x = base ? with_rows(flat(q.x)) : zg, y = at::empty({zg.size(0), q.N}, zg.options());
  Tensor bias, c, u;
  Launch launch(x);
  LinearParams p{};
  if (base) p.x = launch.rows(x), p.w = launch.rows(w), p.k = x.size(1);
  p.z = launch.rows(zg), p.y = launch.rows(y), p.m = y.size(0), p.n = q.N, p.transposed = across;
  p.parts[0] = {launch.rows(b), 0, zg.size(1), 0, q.N}, p.count = 1;
  if (q.bias) p.bias = launch.at(bias = q.bias->contiguous());
  if (q.column_scale) {
    p.column_scale = static_cast<const float*>(launch.at(c = q.column_scale->to(at::kFloat).contiguous()));
    p.u = launch.rows(u = at::empty(y.sizes(), y.options()));
    q.u = u.reshape(with_last(q.like.sizes(), q.N));
  }
  launch(library.launch_linear, p, type, q.dropout);
  return y.reshape(with_last(q.like.sizes(), q.N));
}

}  // namespace

const Products products = {project, composed::products.outer, product};

std::string objection(const Status& status, const std::vector<int64_t>& sizes, bool half, int architecture,
                      const std::optional<std::string>& given) {
  const auto& form = given ? *given : pinned;
  const auto& [op, kernels, ran_on, from, to] = status;
  if (form == "composed") return "FASTLORA_GPU=composed";
  if (!half || architecture < 80 || *std::max_element(sizes.begin(), sizes.end()) > LARGEST)
    return "the CUDA kernels take bf16 and fp16, sizes below 2^31, and a GPU of sm_80 or later";
  if (form == "kernels" || (ran_on == architecture && from <= sizes[0] && sizes[0] <= to)) return "";
  if (!ran_on) return kernels + ": never run on a GPU";
  return c10::str(kernels, ": faster on sm_", ran_on, " for ", from, " to ", to, " rows");
}

bool takes(const char* op, const Tensor& x, int64_t N, int64_t R) {
  static const bool ran = std::any_of(statuses.begin(), statuses.end(), [](const Status& s) { return std::get<2>(s); });
  if (!library.fastlora_device || (pinned.empty() && !ran) || !(x.is_cuda() || library.buffer) || !x.numel()) return false;
  const c10::DeviceGuard guard(x.device());
  int architecture = 0, multiprocessors = 0;
  if (library.fastlora_device(&architecture, &multiprocessors)) return false;
  const bool half = x.scalar_type() == at::kBFloat16 || x.scalar_type() == at::kHalf;
  return std::any_of(statuses.begin(), statuses.end(), [&](const Status& s) {
    return std::get<0>(s) == op && objection(s, {rows_of(x), N, x.size(-1), R}, half, architecture, {}).empty();
  });
}

std::string load(const std::string& path) {
  Library found = library = {};
  void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
#define FIND(name) \
  if (!handle || !(found.name = reinterpret_cast<decltype(&::name)>(dlsym(handle, #name)))) return dlerror();
  FUNCTIONS(FIND)
  found.forget = reinterpret_cast<void (*)()>(dlsym(handle, "emulate_forget"));
  found.buffer = reinterpret_cast<decltype(found.buffer)>(dlsym(handle, "emulate_buffer"));
  library = found;
  return "";
}

void pin(const std::string& form) {
  TORCH_CHECK_VALUE(form.empty() || form == "composed" || form == "kernels", "fastlora: FASTLORA_GPU: got '", form,
                    "', expected composed or kernels");
  pinned = form;
}

}  // namespace fastlora::cuda
