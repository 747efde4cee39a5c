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
  DO(launch_linear) DO(launch_shrink) DO(launch_decode) DO(launch_shrink_backward) DO(fastlora_shrink_counters) \
  DO(fastlora_decode_counters) DO(fastlora_shrink_backward_counters) DO(fastlora_device) DO(fastlora_error)
#define MEMBER(name) decltype(&::name) name = nullptr;
struct Library {
  FUNCTIONS(MEMBER)
  void (*forget)() = nullptr;   // and the next, of the emulator: which memory is the device's
  void (*buffer)(const void*, size_t, int, int) = nullptr;
} library;
std::string pinned;
constexpr int64_t LARGEST = INT32_MAX - 1024;

// One launch, on the device and the current stream of x.
struct Launch {
  c10::DeviceGuard guard;
  void* stream = nullptr;
  int architecture = 0, multiprocessors = 0;
  Tensor partial, arrived, bias, c;   // what is made for the launch alone
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
  Matrix rows(const Tensor& t) { return {at(t), t.size(0) > 1 ? t.stride(0) : 0}; }
  // Cuts a sum of `length` elements so that each multiprocessor has `blocks` to do, of 256 elements at least.
  template <class P> void split(P& p, int64_t blocks, int64_t tiles, int64_t length, int64_t floats, const Tensor& like) {
    const int64_t fill = blocks * multiprocessors / std::max<int64_t>(tiles, 1);
    p.splits = int(std::clamp<int64_t>(fill, 1, std::max<int64_t>(length / 256, 1)));
    if (p.splits == 1) return;
    partial = at::empty({tiles * p.splits * floats}, like.options().dtype(at::kFloat));
    arrived = at::zeros({tiles}, like.options().dtype(at::kInt));
    p.partial = static_cast<float*>(at(partial)), p.partials = partial.numel();
    p.arrived = static_cast<unsigned*>(at(arrived)), p.counters = tiles;
  }
  template <class P> void gate(P& p, const Gate& g, int64_t R) {
    p.scale = float(g.scalar);
    if (g.rows.defined()) p.g = {at(g.rows), g.rows.dim() == 2 ? R : 0};
  }
  template <class P> void epilogue(P& p, const Product& q) {
    if (q.bias) p.bias = at(bias = q.bias->contiguous());
    if (q.column_scale) p.column_scale = static_cast<float*>(at(c = q.column_scale->to(at::kFloat).contiguous()));
  }
  template <class P> void operator()(int (*launch)(const P*, void*), P& p, at::ScalarType type, const Dropout& d = {}) {
    p.type = type == at::kHalf ? FASTLORA_FP16 : FASTLORA_BF16;
    if constexpr (requires { p.seed; }) p.dropped = int(std::nearbyint(d.p * 65536));
    if constexpr (requires { p.seed; }) p.seed = d.p > 0 ? static_cast<const long long*>(at(*d.seed)) : nullptr;
    check(launch(&p, stream));
  }
};

bool has_rows(const Tensor& t) { return t.stride(1) == 1 && (t.size(0) < 2 || t.stride(0) <= LARGEST); }
Tensor with_rows(const Tensor& t) { return has_rows(t) ? t : t.contiguous(); }

void project(Gated& z, const Tensor& given, TensorList f, bool last_is_rank, const Dropout& dropout) {
  const auto x = with_rows(flat(given)), a = with_rows(composed::joined(f, last_is_rank, x.size(1), x));
  const int64_t M = x.size(0), K = x.size(1), R = a.size(0);
  const auto zs = at::empty({M, R}, x.options().dtype(at::kFloat)), zg = at::empty({M, R}, x.options());
  Launch launch(x);
  ShrinkParams p{};
  p.x = launch.rows(x), p.z = launch.rows(zs), p.zg = launch.rows(zg);
  launch.gate(p, z.gate, R);
  p.parts[0] = {launch.rows(a), 0, R, 0, 0}, p.count = 1, p.m = M, p.k = K;
  launch.split(p, 3, library.fastlora_shrink_counters(M, R), K, FASTLORA_TILE, x);
  launch(library.launch_shrink, p, x.scalar_type(), dropout);
  z.z = zs.reshape(with_last(given.sizes(), R)), z.product = zg;
}

// (t g)ᵀ D(x), cut into one gradient for each factor.
Tensors outer(const Gated& t, const Tensor& given, TensorList f, bool last_is_rank, const Dropout& dropout) {
  const auto x = with_rows(flat(given)), tg = t.in(x.scalar_type());
  const bool one = f.size() == 1 && !last_is_rank;   // its gradient is written where it stays
  const auto sum = at::empty({tg.size(1), x.size(1)}, x.options().dtype(one ? f[0].scalar_type() : at::kFloat));
  Launch launch(x);
  Shrink_backwardParams p{};
  p.x = launch.rows(x), p.dz = launch.rows(tg), p.m = x.size(0), p.k = x.size(1), p.count = 1;
  p.parts[0] = {launch.rows(sum), 0, tg.size(1), 0, 0}, p.fp32_da = sum.scalar_type() == at::kFloat;
  launch.split(p, 2, library.fastlora_shrink_backward_counters(p.k, tg.size(1)), p.m, 2 * FASTLORA_TILE, x);
  launch(library.launch_shrink_backward, p, x.scalar_type(), dropout);
  return one ? Tensors{sum} : composed::cut(last_is_rank ? sum.t() : sum, f, last_is_rank);
}

// One launch for few tokens, whose z nobody wants. w [N, K] and a lie along K, b along the ranks.
Tensor decode(const Product& q, const Tensor& x, const Tensor& w) {
  const auto a = with_rows(composed::joined(q.a, false, x.size(1), x));
  const auto b = with_rows(composed::joined(q.f, true, q.N, x).t()), y = at::empty({x.size(0), q.N}, x.options());
  Launch launch(x);
  DecodeParams p{};
  p.x = launch.rows(x), p.w = launch.rows(w), p.y = launch.rows(y), p.m = x.size(0), p.n = q.N, p.k = x.size(1);
  p.parts[0] = {launch.rows(a), 0, a.size(0), 0, q.N}, p.b[0] = launch.rows(b), p.count = 1;
  launch.gate(p, q.z.gate, a.size(0));
  launch.epilogue(p, q);
  launch.split(p, 3, library.fastlora_decode_counters(1, q.N), p.k, FASTLORA_TILE, x);
  launch(library.launch_decode, p, x.scalar_type());
  return y.reshape(with_last(q.like.sizes(), q.N));
}

Tensor product(Product& q) {
  const bool base = q.x.defined(), across = base ? !has_rows(q.w) : !q.last_is_rank;   // w lies, and so must b
  const auto w = base && across ? q.w.t() : q.w;
  if (q.start || (base && !has_rows(w))) return composed::products.product(q);
  if (!q.z.z.defined()) {
    const bool few = rows_of(q.x) <= (total_rank(q.a, 0) > 48 ? 48 : 64);   // 99 KiB of shared memory
    if (!q.want_z && !across && few) return decode(q, with_rows(flat(q.x)), w);
    project(q.z, q.x, q.a, false, {});
  }
  const auto zg = q.z.in(q.like.scalar_type()), f = composed::joined(q.f, q.last_is_rank, q.N, zg), b = with_rows(across ? f : f.t());
  const auto x = base ? with_rows(flat(q.x)) : zg, y = at::empty({zg.size(0), q.N}, zg.options());
  Launch launch(x);
  LinearParams p{};
  if (base) p.x = launch.rows(x), p.w = launch.rows(w), p.k = x.size(1);
  p.z = launch.rows(zg), p.y = launch.rows(y), p.m = y.size(0), p.n = q.N, p.transposed = across;
  p.parts[0] = {launch.rows(b), 0, zg.size(1), 0, q.N}, p.count = 1;
  launch.epilogue(p, q);
  if (q.column_scale) p.u = launch.rows(flat(q.u = at::empty(with_last(q.like.sizes(), q.N), y.options())));
  launch(library.launch_linear, p, zg.scalar_type(), q.dropout);
  return y.reshape(with_last(q.like.sizes(), q.N));
}

}  // namespace

const Products products = {project, outer, product};

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

bool takes(const char* op, const Tensor& x) {
  static const bool ran = std::any_of(statuses.begin(), statuses.end(), [](const Status& s) { return std::get<2>(s); });
  if (!library.fastlora_device || (pinned.empty() && !ran) || !(x.is_cuda() || library.buffer) || !x.numel()) return false;
  const c10::DeviceGuard guard(x.device());
  int architecture = 0, multiprocessors = 0, status = library.fastlora_device(&architecture, &multiprocessors);
  TORCH_CHECK(!status || pinned != "kernels", "fastlora: FASTLORA_GPU=kernels: ", library.fastlora_error(status));
  const bool half = x.scalar_type() == at::kBFloat16 || x.scalar_type() == at::kHalf;
  return !status && std::any_of(statuses.begin(), statuses.end(), [&](const Status& s) {
    return std::get<0>(s) == op && objection(s, {rows_of(x), x.size(-1)}, half, architecture, {}).empty();
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
