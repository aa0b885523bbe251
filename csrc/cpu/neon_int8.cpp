// NEON for int8 activations where the CPU has no dot products of bytes (Armv8.0: Cortex-A53, A72): smull gives eight
// products in int16, which no single one overflows (128 * 128). Sums of them are taken in int16 where they fit, x =
// -128 included:
//   4 bit  four products are at most 4 * 15 * 128 = 7680
//   6 bit  and less, in planes: two products are at most 2 * 63 * 128 = 16128
//   8 bit  signed codes: two products may be 2 * 128 * 128 = 32768, so that pairs are added in int32
#include "neon_int8.h"

#include <cstdint>

#include "kernels.h"

namespace qkernels::cpu {
namespace {

struct NeonInt8 : NeonIntegers {
  static constexpr int kByteBias = 128;
  static constexpr bool kPairs = false;

  static QK_INLINE int16x8_t low_products(int8x16_t a, int8x16_t b) { return vmull_s8(vget_low_s8(a), vget_low_s8(b)); }
  // Products of rows 0, 1 and of rows 2, 3: pairs, added in int16 and in int32
  static QK_INLINE Integers add_pairs(Integers sum, int16x8_t low, int16x8_t high) {
    return (Integers)vpadalq_s16((int32x4_t)sum, vpaddq_s16(low, high));
  }
  static QK_INLINE Integers dot_bytes(Integers sum, Integers bytes, Integers x) {
    const int8x16_t code = as_signed(bytes), by = (int8x16_t)x;
    const int32x4_t low = vpaddlq_s16(low_products(code, by)), high = vpaddlq_s16(vmull_high_s8(code, by));
    return sum + (Integers)vpaddq_s32(low, high);
  }
  static QK_INLINE Integers dot_small(Integers sum, Integers bytes, Integers x) {
    const int8x16_t code = (int8x16_t)bytes, by = (int8x16_t)x;
    return add_pairs(sum, low_products(code, by), vmull_high_s8(code, by));
  }
  static QK_INLINE Integers dot_nibbles(Integers sum, Integers nibbles, Integers x0, Integers x1) {
    const int8x16_t first = (int8x16_t)(nibbles & kLow), second = (int8x16_t)(nibbles >> 4 & kLow);
    const int8x16_t by = (int8x16_t)x0, other = (int8x16_t)x1;
    const int16x8_t low = vmlal_s8(low_products(first, by), vget_low_s8(second), vget_low_s8(other));
    return add_pairs(sum, low, vmlal_high_s8(vmull_high_s8(first, by), second, other));
  }
};

}  // namespace

const Kernels kNeonInt8 = {"neon", Type::kFloat, stage_int8, multiply_int8<NeonInt8>, kLittleWork};

}  // namespace qkernels::cpu
