// Any compiler target, four lanes.
#include "cpu.h"
#define VL 4
#include "table.inc.h"
const fastlora::cpu::Kernels* fastlora::cpu::portable() { return &table; }
