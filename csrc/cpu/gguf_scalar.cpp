// The searches in plain vectors of four floats: SSE2, NEON, or whatever the compiler makes of them.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "target.h"
QK_UNCONTRACTED_BEGIN

#define QK_PART 4
#include "gguf_blocks.h"

namespace qkernels::cpu {
const GgufSearches kGgufScalar{row_variances, search_blocks};
}  // namespace qkernels::cpu

QK_UNCONTRACTED_END
