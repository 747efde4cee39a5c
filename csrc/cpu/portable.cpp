// Any compiler target, four lanes.
#define TABLE portable
#define VL 4
#include "table.inc.h"
