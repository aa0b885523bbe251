// The loops with AVX-512, which has FMA: QK_UNCONTRACTED keeps the compiler from it.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "target.h"
QK_UNCONTRACTED_BEGIN
QK_TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx2,f16c")

#include "between_loops.h"

namespace qkernels::cpu {
const BetweenLoops kBetweenAvx512{norm_rows, gate_values, rotate_heads, attend_groups};
}  // namespace qkernels::cpu

QK_TARGET_END
QK_UNCONTRACTED_END
