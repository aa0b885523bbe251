// The loops of rounding.h in plain vectors of four floats: SSE2, NEON, or whatever the compiler makes of them.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "target.h"
QK_UNCONTRACTED_BEGIN

#define QK_PART 4
#include "rounding_loops.h"

namespace qkernels::cpu {
const RoundingLoops kRoundingScalar{round_rows, fit_rows};
}  // namespace qkernels::cpu

QK_UNCONTRACTED_END
