// The loops of rounding.h with AVX2.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "target.h"
QK_UNCONTRACTED_BEGIN
QK_TARGET_BEGIN("avx2,f16c")

#define QK_PART 8
#include "rounding_loops.h"

namespace qkernels::cpu {
const RoundingLoops kRoundingAvx2{round_rows, fit_rows};
}  // namespace qkernels::cpu

QK_TARGET_END
QK_UNCONTRACTED_END
