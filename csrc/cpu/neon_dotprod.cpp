// NEON with FEAT_DotProd, int8 activations: sdot multiplies signed bytes and adds four products to each int32 lane.
// Codes of up to 6 bits are such bytes as they are, 8-bit ones less 128.
#include <cstdint>

#include "target.h"
QK_TARGET_BEGIN("arch=armv8.2-a+dotprod")

#include "kernels.h"
#include "neon_int8.h"

namespace qkernels::cpu {
namespace {

struct NeonDotprod : NeonIntegers {
  static constexpr int kByteBias = 128;
  static constexpr bool kPairs = false;

  static QK_INLINE Integers dot_small(Integers sum, Integers bytes, Integers x) {
    return (Integers)vdotq_s32((int32x4_t)sum, (int8x16_t)bytes, (int8x16_t)x);
  }
  static QK_INLINE Integers dot_bytes(Integers sum, Integers bytes, Integers x) {
    return (Integers)vdotq_s32((int32x4_t)sum, as_signed(bytes), (int8x16_t)x);
  }
  static QK_INLINE Integers dot_nibbles(Integers sum, Integers nibbles, Integers x0, Integers x1) {
    return dot_small(dot_small(sum, nibbles & kLow, x0), nibbles >> 4 & kLow, x1);
  }
};

}  // namespace

const Kernels kNeonDotprodInt8 = {"neon_dotprod", Type::kFloat, stage_int8, multiply_int8<NeonDotprod>, kLittleWork};

}  // namespace qkernels::cpu

QK_TARGET_END
