// NEON, which every aarch64 CPU has: 4 rows a vector, fp32 products. Serves fp32 and fp16 activations everywhere, and
// bf16 ones on CPUs without FEAT_BF16. No speed was ever measured: written by count of instructions, tested under qemu.
#include <cstdint>

#include "experts_loops.h"
#include "kernels.h"
#include "neon_vectors.h"

namespace qkernels::cpu {
namespace {

struct Neon : NeonSums {
  using X = float;
  using Weight = float32x4_t;
  using Input = float32x4_t;
  static constexpr int kStep = 1;
  static constexpr bool kPairs = false;
  // 32 registers: 6 rows x 4 vectors of sums, 4 of weights, 1 of x.
  static constexpr int kTokens = 6, kHalf = 4;
  static constexpr int kDecodeVectors[kMaxDecodeTokens] = {8, 8, 4, 4, 4, 2, 2, 2}, kRunsTogether = 1;

  static QK_INLINE Input broadcast(const X* x) { return vld1q_dup_f32(x); }
  static QK_INLINE Sum multiply_add(Sum sum, Weight w, Input x) { return vfmaq_f32(sum, w, x); }
  static QK_INLINE Weight load_weight(const uint8_t* p) { return vreinterpretq_f32_u8(vld1q_u8(p)); }
  static QK_INLINE void store_weight(uint8_t* p, Weight w) { vst1q_u8(p, vreinterpretq_u8_f32(w)); }
};

// A panel for every kind: to unpack a vector takes three instructions or more, and it meets 8 rows of x at most.
struct Nibbles : RawNibbles, FloatZeros {
  static constexpr bool kPanel = true;
  using FloatZeros::FloatZeros;
  QK_INLINE float32x4_t value(Raw raw, int s, Zero zero) const {
    return code_value(raw, 16 * (s & 1) + 4 * (s >> 1), 4, zero);
  }
};

struct Bytes : RawBytes, FloatZeros {
  static constexpr bool kPanel = true;
  using FloatZeros::FloatZeros;
  QK_INLINE float32x4_t value(const Raw& raw, int s, Zero zero) const {
    return code_value(raw.quad[s >> 2], 16 * (s & 1) + 8 * (s >> 1 & 1), 8, zero);
  }
};

template <int kBits>
struct FromPlanes : RawPlanes<kBits>, FloatZeros {
  static constexpr bool kPanel = true;
  using FloatZeros::FloatZeros;
  QK_INLINE float32x4_t value(const typename RawPlanes<kBits>::Raw& raw, int s, Zero zero) const {
    return code_value(RawPlanes<kBits>::pair(raw, s >> 1), 16 * (s & 1), kBits, zero);
  }
};

// Of a codebook with 16 values, whose 64 bytes are in four registers: tbl takes the index of each byte of a float.
struct Table : RawNibbles, NoZeros {
  static constexpr bool kPanel = true;
  uint8x16x4_t table;
  explicit Table(const Call& call) {
    float values[16];
    for (int i = 0; i < 16; ++i) values[i] = plain_value(call, i);
    for (int i = 0; i < 4; ++i) table.val[i] = vreinterpretq_u8_f32(vld1q_f32(values + 4 * i));
  }
  QK_INLINE float32x4_t value(Raw raw, int s, Zero) const {
    const uint32x4_t code = vandq_u32(raw >> (16 * (s & 1) + 4 * (s >> 1)), vdupq_n_u32(15));
    const uint32x4_t bytes = vmlaq_n_u32(vdupq_n_u32(0x03020100), code, 0x04040404);
    return vreinterpretq_f32_u8(vqtbl4q_u8(table, vreinterpretq_u8_u32(bytes)));
  }
};

// An 8-bit float of a quad
struct Floats : RawBytes, NoZeros {
  static constexpr bool kPanel = true;
  const int shift;
  const float unit;
  explicit Floats(const Call& c)
      : shift(c.codebook == Codebook::kE4M3 ? 20 : 21), unit(c.codebook == Codebook::kE4M3 ? 0x1p120f : 0x1p112f) {}
  QK_INLINE float32x4_t value(const Raw& raw, int s, Zero) const {
    return Neon::small_floats(raw.quad[s >> 2] >> (16 * (s & 1) + 8 * (s >> 1 & 1)), shift, unit);
  }
};

constexpr auto kMultiply = multiply<Neon, Nibbles, Nibbles, Bytes, Table, Floats, FromPlanes, FromPlanes>;

}  // namespace

// Three names for one: what they differ in are the kernels for int8 activations (int8_kernels).
const Kernels kNeon = {"neon", Type::kFloat, stage<float>, kMultiply, kLittleWork / 4, activate, weigh};
const Kernels kNeonDotprod = {"neon_dotprod", Type::kFloat, stage<float>, kMultiply, kLittleWork / 4, activate, weigh};
const Kernels kNeonI8mm = {"neon_i8mm", Type::kFloat, stage<float>, kMultiply, kLittleWork / 4, activate, weigh};

}  // namespace qkernels::cpu
