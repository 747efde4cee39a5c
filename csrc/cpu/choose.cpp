// Which instruction set and which form: from what the CPU can do, the type and the shape, nothing else.
#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cpu.h"

#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fastlora::cpu {
namespace {

enum Isa { kPortable, kAvx2, kAvx512, kAvx512Bf16, kAmx };
const char* const kNames[] = {"portable", "avx2", "avx512", "avx512_bf16", "amx"};
#if defined(__x86_64__)
const Kernels* const kKernels[] = {portable, avx2, avx512, avx512_bf16};
#else
const Kernels* const kKernels[] = {portable};
#endif

// The last that this CPU has: each includes those before it.
Isa best() {
#if defined(__x86_64__)
  if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))) return kPortable;
  if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq")))
    return kAvx2;
  if (!__builtin_cpu_supports("avx512bf16")) return kAvx512;
#ifdef __linux__   // a process gets tile registers on request (ARCH_REQ_XCOMP_PERM, XTILEDATA)
  if (__builtin_cpu_supports("amx-bf16") && syscall(SYS_arch_prctl, 0x1023, 18) == 0) return kAmx;
#endif
  return kAvx512Bf16;
#else
  return kPortable;
#endif
}

Cpu detect() {
  Cpu cpu{};
#if defined(__x86_64__)
  cpu.intel = __builtin_cpu_is("intel");
#endif
  const char* pin = std::getenv("FASTLORA_CPU");
  const std::string name = pin ? pin : "";
  cpu.composed = name == "composed";
  const bool pinned = !name.empty() && !cpu.composed;
  const Isa last = best(), isa = pinned ? Isa(std::find(kNames, std::end(kNames), name) - kNames) : last;
  if (isa > last)
    throw std::runtime_error("FASTLORA_CPU=" + name + ": expected portable, avx2, avx512, avx512_bf16, amx or composed, " +
                             (isa < std::size(kNames) ? "and this CPU or build lacks it" : "and this is none of them"));
  cpu.amx = isa == kAmx;
  // vdpbf16ps does two steps where FMA on split halves needs two instructions and a shift or mask. AMD runs as many of it
  // as of FMA (timed on Zen 4), Intel a quarter of them (timed on Emerald Rapids), and then splitting wins.
  cpu.dot_bf16 = cpu.amx || (isa == kAvx512Bf16 && (pinned || !cpu.intel));
  const Isa base = isa >= kAvx512Bf16 ? kAvx512 : isa;
  for (Type type : {kFloat, kBFloat16, kHalf})
    cpu.table[type] = &kKernels[type == kBFloat16 && cpu.dot_bf16 ? kAvx512Bf16 : base][type];
  cpu.name = cpu.composed ? "composed" : kNames[cpu.dot_bf16 ? isa : base];
  return cpu;
}

}  // namespace

const Cpu& cpu() {
  static const Cpu facts = detect();
  return facts;
}

// The bounds come from measurements with r = 16 on an AMD Zen 4 (full-rate vdpbf16ps); those of the split form and of Intel
// from what such kernels are known to reach there. Small M: dot and direct read w once, where it lies. Large M: packed
// reaches torch's own GEMM, except where MKL is at its best (fp32 on Intel) and where w is large and bf16: oneDNN packs it
// faster, the more so where w lies along n. Tiles, too, read w where it lies: 0.6 to 0.9 of oneDNN's time at M <= 64, above
// 0.9 to 1.4 (oneDNN's product and an update of ours: 1.1 to 1.6; Emerald Rapids).
Form choose(const Gemm& p, const Cpu& cpu) {
  const bool dot_bf16 = p.type == kBFloat16 && cpu.dot_bf16, rows = p.w_along_k && !p.mask.threshold;
  const Form vendor = p.c || p.u ? kPacked : kVendor;   // whose product has no epilogue
  if (p.type == kBFloat16 && cpu.amx && p.M > 1) {
    if (rows) return kTiles;
    if (p.M >= 8) return vendor;
  }
  if (rows && p.M <= (dot_bf16 ? 32 : 64)) return kDot;
  if (!p.w_along_k && p.M <= 4) return kDirect;
  if (p.type == kFloat && cpu.intel && p.M >= 128) return vendor;
  if (dot_bf16 && p.M >= (p.w_along_k ? 48 : 16) && p.K >= 2048) return vendor;
  return kPacked;
}

}  // namespace fastlora::cpu
