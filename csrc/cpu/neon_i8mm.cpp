// NEON with FEAT_I8MM, int8 activations: usdot for one row of x, usmmla for two; both multiply unsigned bytes (codes,
// as they are stored) with signed ones (x).
#include <cstdint>

#include "target.h"
QK_TARGET_BEGIN("arch=armv8.2-a+dotprod+i8mm")

#include "kernels.h"
#include "neon_int8.h"

namespace qkernels::cpu {
namespace {

struct NeonI8mm : NeonIntegers {
  static constexpr int kByteBias = 0;

  static QK_INLINE Integers dot_bytes(Integers sum, Integers bytes, Integers x) {
    return (Integers)vusdotq_s32((int32x4_t)sum, (uint8x16_t)bytes, (int8x16_t)x);
  }
  static QK_INLINE Integers dot_small(Integers sum, Integers bytes, Integers x) { return dot_bytes(sum, bytes, x); }
  static QK_INLINE Integers dot_nibbles(Integers sum, Integers nibbles, Integers x0, Integers x1) {
    return dot_bytes(dot_bytes(sum, nibbles & kLow, x0), nibbles >> 4 & kLow, x1);
  }
};

}  // namespace

const Kernels kNeonI8mmInt8 = {"neon_i8mm", Type::kFloat, stage_int8, multiply_int8<NeonI8mm>, kLittleWork};

}  // namespace qkernels::cpu

QK_TARGET_END
