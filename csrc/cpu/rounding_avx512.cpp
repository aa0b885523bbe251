// The loops of rounding.h with AVX-512, which has FMA: QK_UNCONTRACTED keeps the compiler from it.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "target.h"
QK_UNCONTRACTED_BEGIN
QK_TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx2,f16c")

#define QK_PART 16
#include "rounding_loops.h"

namespace qkernels::cpu {
const RoundingLoops kRoundingAvx512{round_rows, fit_rows};
}  // namespace qkernels::cpu

QK_TARGET_END
QK_UNCONTRACTED_END
