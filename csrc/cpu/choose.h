// The host's half of cpu.h: what the CPU does, and which form a product takes.
#pragma once
#include <string>

#include "cpu.h"

namespace fastlora::cpu {

struct Cpu {
  const Kernels* table[3];   // by Type
  Isa isa;
  std::string name;
  bool dot_bf16;             // vdpbf16ps is worth using
  bool intel;                // MKL's sgemm reaches its peak there only
  bool amx;                  // products of bf16 run on tiles, several times as fast as in any vector form
  bool composed;             // FASTLORA_CPU=composed: no kernel of ours
  bool pinned;               // FASTLORA_CPU names an instruction set
};
const Cpu& cpu();            // throws where FASTLORA_CPU names what this CPU lacks

struct Shape {
  Type type;
  int64_t M, N, K, R;
  bool w_along_k, masked;
};
Form choose(const Shape&, const Cpu&);

int64_t scratch_bytes(const Gemm&);
int64_t scratch_bytes(const Shrink&);
int64_t scratch_bytes(const Outer&);

}  // namespace fastlora::cpu
