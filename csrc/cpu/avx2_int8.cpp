// AVX2 for int8 activations: 8 rows a vector, see avx2_words.h.
#include <cstdint>

#include "target.h"
QK_TARGET_BEGIN("avx2,fma,f16c")

#include <immintrin.h>

#include "avx2_words.h"
#include "int8_kinds.h"
#include "kernels.h"

namespace qkernels::cpu {

const Kernels kAvx2Int8 = {"avx2", Type::kFloat, stage_int8, multiply_its_kind<WordLoops>, kLittleWork};

}  // namespace qkernels::cpu

QK_TARGET_END
