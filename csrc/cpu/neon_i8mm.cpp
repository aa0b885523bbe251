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
  static constexpr bool kPairs = true;

  static QK_INLINE Integers dot_bytes(Integers sum, Integers bytes, Integers x) {
    return (Integers)vusdotq_s32((int32x4_t)sum, (uint8x16_t)bytes, (int8x16_t)x);
  }
  static QK_INLINE Integers dot_small(Integers sum, Integers bytes, Integers x) { return dot_bytes(sum, bytes, x); }
  static QK_INLINE Integers dot_nibbles(Integers sum, Integers nibbles, Integers x0, Integers x1) {
    return dot_bytes(dot_bytes(sum, nibbles & kLow, x0), nibbles >> 4 & kLow, x1);
  }

  // usmmla has 2 x 2 sums: of a row of the weight with both rows of x, then of the next.
  static QK_INLINE void pair(Integers& a, Integers& b) {
    const int32x4_t first = (int32x4_t)a, second = (int32x4_t)b;
    a = (Integers)vzip1q_s32(first, second), b = (Integers)vzip2q_s32(first, second);
  }
  static QK_INLINE void part(Integers& a, Integers& b) {
    const int32x4_t low = (int32x4_t)a, high = (int32x4_t)b;
    a = (Integers)vuzp1q_s32(low, high), b = (Integers)vuzp2q_s32(low, high);
  }
  static QK_INLINE void multiply_pairs(Integers& a, Integers& b, Integers first, Integers second, const int8_t* x0,
                                       const int8_t* x1) {
    const int8x16_t x = vcombine_s8(vld1_s8(x0), vld1_s8(x1));
    const auto low = (uint8x16_t)vzip1q_s32((int32x4_t)first, (int32x4_t)second);
    const auto high = (uint8x16_t)vzip2q_s32((int32x4_t)first, (int32x4_t)second);
    a = (Integers)vusmmlaq_s32((int32x4_t)a, low, x), b = (Integers)vusmmlaq_s32((int32x4_t)b, high, x);
  }
};

}  // namespace

const Kernels kNeonI8mmInt8 = {"neon_i8mm", Type::kFloat, stage_int8, multiply_int8<NeonI8mm>, kLittleWork};

}  // namespace qkernels::cpu

QK_TARGET_END
