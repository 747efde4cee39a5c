// Any compiler target, four lanes.
#include "cpu.h"
#define VL 4
namespace fastlora::cpu {
namespace {
#include "vector.inc.h"
#include "philox.inc.h"
#include "dot.inc.h"
#include "gemm.inc.h"
#include "packed.inc.h"
#include "reduce.inc.h"
#include "spread.inc.h"
#include "table.inc.h"
}  // namespace
const Kernels* portable() { return &table; }
}  // namespace fastlora::cpu
