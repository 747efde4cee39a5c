// Which instruction set and which form: from what the CPU can do, the type and the shape, nothing else.
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

enum Isa { kPortable, kAvx2, kAvx512, kAvx512Bf16, kAmx, kIsaCount };
const char* const kNames[] = {"portable", "avx2", "avx512", "avx512_bf16", "amx"};
#if defined(__x86_64__)
const Kernels* const kKernels[] = {portable, avx2, avx512, avx512_bf16};
#else
const Kernels* const kKernels[] = {portable};
#endif

bool runs(Isa isa) {
#if defined(__x86_64__)
  switch (isa) {
    case kAvx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    case kAvx512:
      return runs(kAvx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    case kAvx512Bf16:
      return runs(kAvx512) && __builtin_cpu_supports("avx512bf16");
#ifdef __linux__
    case kAmx:   // a process gets tile registers on request (ARCH_REQ_XCOMP_PERM, XTILEDATA)
      return runs(kAvx512Bf16) && __builtin_cpu_supports("amx-bf16") && syscall(SYS_arch_prctl, 0x1023, 18) == 0;
#endif
    default:
      break;
  }
#endif
  return isa == kPortable;
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
  bool known = false;
  Isa isa = kIsaCount;
  for (int i = 0; i < kIsaCount; i++) {
    if (pinned && name != kNames[i]) continue;
    known = true;
    if (runs(Isa(i))) isa = Isa(i);
  }
  if (isa == kIsaCount)
    throw std::runtime_error("FASTLORA_CPU=" + name + ": expected portable, avx2, avx512, avx512_bf16, amx or composed, " +
                             (known ? "and this CPU or build lacks it" : "and this is none of them"));
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

// a block of x, packed for tiles
static int64_t tile_bytes(int64_t K) { return (K / (2 * kSteps) + 1) * kTileBlock * (kSteps + 2) * 4; }

int64_t scratch_bytes(const Gemm& p) {
  int64_t factors = p.R * (kGroup + kRows + kTileRows) * 4, tiles = 16 * (p.R + kSteps + 16 + 2 * kGroup) * 4;
  int64_t w = (kSteps + 2) * kGroup * 4, sums = kRows * kGroup * 4, direct = 4 * (p.R + p.K + 1024 + kGroup + 64) * 4;
  int64_t padded = p.R + 16;
  int64_t dot = kDotRows * (padded + p.R + 2 * 8 * 16) * 4 + 8 * padded * 4 + (p.a ? p.R * (p.K + 32) * 2 : 0);
  int64_t tiled = tile_bytes(p.K) + tile_bytes(padded + 16) + (6 * kTileBlock + 64) * (padded + 32) + 4096;
  return factors + tiles + w + sums + direct + dot + (p.type == kBFloat16 && cpu().amx ? tiled : 0) + 4096;
}
int64_t scratch_bytes(const Shrink& p) {
  int64_t copies = p.R * (p.K + 32) * 4 + p.adapters * (sizeof(Factor) + 64);
  return kDotRows * 8 * 64 + copies + (p.tiles ? kTileBlock : 16) * (p.K + 64) * 4 + (p.tiles ? tile_bytes(p.K) : 0) + 8192;
}
int64_t scratch_bytes(const Outer& p) { return (64 * kGroup + (p.R + 16) * (kGroup + 64)) * 4 + 4096; }

}  // namespace fastlora::cpu
