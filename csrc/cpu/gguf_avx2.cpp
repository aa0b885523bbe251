// The searches with AVX2; without FMA, so that nothing can be contracted.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "target.h"
QK_UNCONTRACTED_BEGIN
QK_TARGET_BEGIN("avx2,f16c")

#define QK_PART 8
#include "gguf_blocks.h"

namespace qkernels::cpu {
const GgufSearches kGgufAvx2{row_variances, search_blocks};
}  // namespace qkernels::cpu

QK_TARGET_END
QK_UNCONTRACTED_END
