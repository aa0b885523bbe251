// The loops in plain vectors of four floats: SSE2, NEON, or whatever the compiler makes of them.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "target.h"
QK_UNCONTRACTED_BEGIN

#include "between_loops.h"

namespace qkernels::cpu {
const BetweenLoops kBetweenScalar{norm_rows, gate_values, rotate_heads, attend_groups};
}  // namespace qkernels::cpu

QK_UNCONTRACTED_END
