// The products through the kernels of tests/cuda/kernels, whose library knows pointers alone. What they do not take is composed.
#include "cuda.h"

#include <ATen/ceil_div.h>
#include <ATen/ops/zeros.h>
#include <c10/core/DeviceGuard.h>
#include <dlfcn.h>

#include <algorithm>
#include <cmath>

#include "../tests/cuda/kernels/params.h"

namespace fastlora::cuda {
namespace {

#define FUNCTIONS(DO) \
  DO(launch_linear) DO(launch_shrink) DO(launch_decode) DO(launch_shrink_backward) DO(launch_expand_backward) \
  DO(launch_expand) DO(launch_routed_shrink) DO(launch_routed_expand) DO(launch_gather) DO(launch_norms) DO(fastlora_shrink_counters) \
  DO(fastlora_decode_counters) DO(fastlora_shrink_backward_counters) DO(fastlora_expand_backward_workspace) \
  DO(fastlora_device) DO(fastlora_error)
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
  // Whether a block may have more than 99 KiB of shared memory.
  bool large() { return architecture == 80 || architecture == 90 || architecture == 100; }
  void check(int status) { TORCH_CHECK(!status, "fastlora: a CUDA kernel refused: ", library.fastlora_error(status)); }
  void* at(const Tensor& t) {
    void* data = t.numel() ? const_cast<void*>(t.const_data_ptr()) : nullptr;
    if (library.buffer && data)
      library.buffer(data, at::detail::computeStorageNbytes(t.sizes(), t.strides(), t.itemsize()), 1, 0);
    return data;
  }
  Matrix rows(const Tensor& t) { return {at(t), t.size(0) > 1 ? t.stride(0) : 0}; }
  template <class T> T* as(const Tensor& t) { return static_cast<T*>(at(t)); }
  // Cuts a sum of `length` elements so that each multiprocessor has `blocks` to do, of 256 elements at least.
  int cut(int64_t blocks, int64_t tiles, int64_t length) {
    const int64_t fill = blocks * multiprocessors / std::max<int64_t>(tiles, 1);
    return int(std::clamp<int64_t>(fill, 1, std::max<int64_t>(length / 256, 1)));
  }
  template <class P> void workspace(P& p, int64_t floats, int64_t counters, const Tensor& like) {
    partial = at::empty({floats}, like.options().dtype(at::kFloat));
    arrived = at::zeros({counters}, like.options().dtype(at::kInt));
    p.partial = as<float>(partial), p.partials = floats, p.arrived = as<unsigned>(arrived), p.counters = counters;
  }
  template <class P> void split(P& p, int64_t blocks, int64_t tiles, int64_t length, int64_t floats, const Tensor& like) {
    p.splits = cut(blocks, tiles, length);
    if (p.splits > 1) workspace(p, tiles * p.splits * floats, tiles, like);
  }
  template <class P> void gate(P& p, const Gate& g, int64_t R) {
    p.scale = float(g.scalar);
    if (g.rows.defined()) p.g = {at(g.rows), g.rows.dim() == 2 ? R : 0};
  }
  template <class P> void epilogue(P& p, const Product& q) {
    if (q.bias) p.bias = at(bias = q.bias->contiguous());
    if (q.column_scale) p.column_scale = as<float>(c = q.column_scale->to(at::kFloat).contiguous());
  }
  template <class P> void operator()(int (*launch)(const P*, void*), P& p, at::ScalarType type, const Dropout& d = {}) {
    p.type = type == at::kHalf ? FASTLORA_FP16 : FASTLORA_BF16;
    if constexpr (requires { p.seed; }) p.dropped = int(std::nearbyint(d.p * 65536));
    if constexpr (requires { p.seed; }) p.seed = d.p > 0 ? as<const long long>(*d.seed) : nullptr;
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

// Its kernel takes 112 KiB of shared memory.
Tensors project_outer(Gated& t, const Gated& z, const Tensor& given, TensorList f) {
  Launch launch(given);
  if (!launch.large()) {
    project(t, given, f, true, {});
    return outer(z, given, f, true, {});
  }
  const auto dy = with_rows(flat(given)), b = with_rows(composed::joined(f, true, dy.size(1), dy).t()), zs = flat(z.z);
  const int64_t M = dy.size(0), N = dy.size(1), R = b.size(1);
  const bool one = f.size() == 1;   // its gradient is written where it stays
  const auto ts = at::empty({M, R}, zs.options()), tg = at::empty({M, R}, dy.options());
  const auto sum = at::empty({N, R}, dy.options().dtype(one ? f[0].scalar_type() : at::kFloat));
  Expand_backwardParams p{};
  p.dy = launch.rows(dy), p.z = launch.rows(zs), p.t = launch.rows(ts), p.dz = launch.rows(tg), p.db[0] = launch.rows(sum);
  p.parts[0] = {launch.rows(b), 0, R, 0, N}, p.count = 1, p.m = M, p.fp32_db = sum.scalar_type() == at::kFloat;
  launch.gate(p, z.gate, R);
  p.splits = launch.cut(2, at::ceil_div<int64_t>(M, 256) * at::ceil_div<int64_t>(R, 64), N);
  long long counters = 0, floats = library.fastlora_expand_backward_workspace(&p, &counters);
  if (floats) launch.workspace(p, floats, counters, dy);
  launch(library.launch_expand_backward, p, dy.scalar_type());
  t.z = ts.reshape(with_last(given.sizes(), R)), t.product = tg;
  return one ? Tensors{sum} : composed::cut(sum, f, true);
}

Tensor expand(const Product& q) {
  const auto out = at::empty(q.like.sizes(), q.like.options()).copy_(q.like), y = flat(out).narrow(1, *q.start, q.N);
  const auto b = with_rows(composed::joined(q.f, true, q.N, y).t());
  Launch launch(out);
  if (q.ids.defined()) {
    const auto a = q.table.t(), ids = q.ids.to(at::kLong).contiguous();
    GatherParams p{launch.rows(y), launch.rows(a), launch.rows(b)};
    p.ids = launch.as<const long long>(ids), p.m = y.size(0), p.ranks = a.size(0), p.columns = q.N, p.vocab = a.size(1);
    launch.gate(p, q.z.gate, p.ranks);
    launch(library.launch_gather, p, y.scalar_type());
    return out;
  }
  const auto zg = q.z.in(out.scalar_type());
  ExpandParams p{};
  p.y = launch.rows(y), p.z = launch.rows(zg), p.parts[0] = {launch.rows(b), 0, zg.size(1), 0, q.N};
  p.count = 1, p.m = y.size(0);
  launch(library.launch_expand, p, out.scalar_type());
  return out;
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
  if (q.start) return expand(q);
  if (base && !has_rows(w)) return composed::products.product(q);
  if (!q.z.z.defined()) {
    const bool few = rows_of(q.x) <= (total_rank(q.a, 0) > 48 ? 48 : 64);   // in 99 KiB of shared memory
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

const Products products = {project, outer, product, project_outer};

Tensor norm(const Tensor& weight, TensorList lora_A, TensorList lora_B, const Gate& gate) {
  const int64_t N = weight.size(0), K = weight.size(1);
  const auto w = with_rows(weight), norms = at::empty({N}, w.options().dtype(at::kFloat));
  const auto a = with_rows(composed::joined(lora_A, false, K, w)), b = with_rows(composed::joined(lora_B, true, N, w).t());
  Launch launch(w);
  NormsParams p{launch.rows(w), launch.rows(a), launch.rows(b), nullptr, launch.as<float>(norms)};
  p.n = N, p.k = K, p.ranks = a.size(0), p.scale = float(gate.scalar);
  if (gate.rows.defined()) p.g = launch.as<const float>(gate.rows);
  launch.split(p, 2, at::ceil_div<int64_t>(N, FASTLORA_NORMS_ROWS), K, 8 * FASTLORA_NORMS_ROWS, w);
  launch(library.launch_norms, p, w.scalar_type());
  return norms;
}

bool takes_routed(const Tensor& x, TensorList lora_A, TensorList pages) {
  const auto lies = [&](const Tensor& t) { return t.scalar_type() == x.scalar_type() && t.stride(-1) == 1; };
  return lora_A.empty() && !pages.empty() && lies(pages[0]) && lies(pages[1]) && pages[0].size(1) <= FASTLORA_PARTS &&
         pages[2].size(1) && pages[0].numel() && pages[1].numel() && takes("lora_routed_forward", x);
}

RoutedForward routed(const Tensor& given, const Tensor& weight, const MaybeTensor& bias, TensorList route, const Tensor& gates,
                     IntArrayRef slices, TensorList pages, bool want_z) {
  const auto x = with_rows(flat(given)), g = gates.to(at::kFloat).contiguous(), &A = pages[0], &B = pages[1];
  const int64_t M = x.size(0), K = x.size(1), N = weight.size(0), entries = gates.size(0), most = pages[2].size(1);
  const auto widths = slices.empty() ? IntArrayRef(N) : slices;
  const auto k = static_cast<int64_t>(widths.size()), tiles = route[3].size(0);
  Launch launch(x);
  Routed r{launch.as<const long long>(route[2]), launch.as<const int>(route[3]), launch.as<const int>(route[0]),
           launch.as<const int>(route[1]), launch.as<const int>(pages[3]), launch.as<const int>(pages[5]),
           launch.rows(pages[2]), M, tiles, entries, pages[2].size(0), most};
  const Pages a{launch.at(A), A.stride(0), A.stride(1), A.stride(2)}, b{launch.at(B), B.stride(0), 0, B.stride(1)};
  const auto *gate = launch.as<float>(g), *scales = launch.as<float>(pages[4]);
  const void* row = bias ? launch.at(launch.bias = bias->contiguous()) : nullptr;
  if (!want_z && M <= (launch.large() ? 64 : 48) && tiles <= 128 && has_rows(weight)) {
    const auto y = at::empty({M, N}, x.options());
    DecodeParams p{};
    p.x = launch.rows(x), p.w = launch.rows(weight), p.y = launch.rows(y), p.m = M, p.n = N, p.k = K;
    for (int64_t i = 0, column = 0; i < k; column += widths[i++]) p.parts[i] = {{}, 0, 0, column, widths[i]};
    p.count = k, p.route = r, p.a_pages = a, p.b_pages = b, p.gates = gate, p.scales = scales, p.bias = row;
    const auto widest = *std::max_element(widths.begin(), widths.end());
    launch.split(p, 3, library.fastlora_decode_counters(k, widest), K, FASTLORA_TILE, x);
    launch(library.launch_decode, p, x.scalar_type());
    return {y.reshape(with_last(given.sizes(), N)), nothing(x)};
  }
  const auto y = bias ? at::addmm(*bias, x, weight.t()) : at::mm(x, weight.t());
  const auto z = at::empty({entries, k * 8 * most}, g.options());
  Routed_shrinkParams s{launch.rows(x), launch.rows(z), a, r};
  // By K alone, so that z does not depend on the batch; a long one, which needs no parts, would need much room for them.
  s.k = K, s.slices = k, s.splits = entries * k > 16384 ? 1 : int(std::clamp<int64_t>(K / 1024, 1, 4));
  const int64_t counters = entries * k * at::ceil_div<int64_t>(most, 4);
  if (s.splits > 1) launch.workspace(s, counters * s.splits * FASTLORA_ROUTED_TILE, counters, x);
  launch(library.launch_routed_shrink, s, x.scalar_type());
  Routed_expandParams e{launch.rows(y), launch.rows(z), b, r, row, gate, scales};
  std::copy(widths.begin(), widths.end(), e.columns), e.count = k;
  launch(library.launch_routed_expand, e, x.scalar_type());
  return {y.reshape(with_last(given.sizes(), N)), z};
}

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
  TORCH_CHECK(library.fastlora_device || pinned != "kernels" || !x.is_cuda(), "fastlora: FASTLORA_GPU=kernels: there are none");
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
