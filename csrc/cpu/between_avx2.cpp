// The loops with AVX2; without FMA, so that nothing can be contracted.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "target.h"
QK_UNCONTRACTED_BEGIN
QK_TARGET_BEGIN("avx2,f16c")

#include "between_loops.h"

namespace qkernels::cpu {
const BetweenLoops kBetweenAvx2{norm_rows, gate_values, rotate_heads, attend_groups};
}  // namespace qkernels::cpu

QK_TARGET_END
QK_UNCONTRACTED_END
