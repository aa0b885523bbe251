// AVX-512 F, BW, VL, DQ: 16 rows a vector, fp32 products. Serves fp32 and fp16 activations on every AVX-512 CPU, and
// bf16 ones on those without AVX512_BF16.
#include <cstdint>
#include <cstring>

#include "target.h"
QK_TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")

#include "avx512_vectors.h"
#include "kernels.h"

namespace qkernels::cpu {

const Kernels kAvx512 = {"avx512", Type::kFloat, stage<float>, multiply_fp32};

}  // namespace qkernels::cpu

QK_TARGET_END
