// NEON with FEAT_BF16: bf16 activations are multiplied as they are, two columns a lane (bfdot), and two rows by two
// (bfmmla); as in avx512_bf16.cpp, code - zero and the values of all codebooks but NF4 and FP4 are exact in bf16, and
// those two are rounded to it once. fp32 and fp16 activations keep fp32 products. No speed was ever measured.
//
// bfdot rounds the sum of two products, and adding that, to odd: each by less than 2^-23 of the value. It reads
// subnormal values as 0 and flushes such sums to 0, whatever FPCR says.
#include <cstdint>
#include <cstring>

#include "target.h"
QK_TARGET_BEGIN("arch=armv8.2-a+bf16")

#include "kernels.h"
#include "neon_vectors.h"

namespace qkernels::cpu {
namespace {

struct NeonBf16 : NeonSums {
  using X = uint16_t;
  using Weight = uint32x4_t;  // per row a pair of bf16, the lower column in the low word
  using Input = uint32x4_t;
  static constexpr int kStep = 2;
  static constexpr bool kPairs = true;
  // 32 registers: 8 rows x 2 vectors of sums, 4 operands of weights, 4 of x
  static constexpr int kTokens = 8, kHalf = 2;
  static constexpr int kDecodeVectors[kMaxDecodeTokens] = {8, 4, 4, 4, 4, 2, 2, 2}, kRunsTogether = 1;

  static QK_INLINE Input broadcast(const X* x) { return four_bytes(x); }
  static QK_INLINE Sum multiply_add(Sum sum, Weight w, Input x) {
    return vbfdotq_f32(sum, vreinterpretq_bf16_u32(w), vreinterpretq_bf16_u32(x));
  }

  // bfmmla has 2 x 2 sums, of a row of the weight with both rows of x, then of the next; each is two steps of bfdot.
  static QK_INLINE void pair(Sum& a, Sum& b) {
    const Sum first = a, second = b;
    a = vzip1q_f32(first, second), b = vzip2q_f32(first, second);
  }
  static QK_INLINE void part(Sum& a, Sum& b) {
    const Sum low = a, high = b;
    a = vuzp1q_f32(low, high), b = vuzp2q_f32(low, high);
  }
  static QK_INLINE void to_rows(Weight& a, Weight& b) {
    const Weight first = a, second = b;
    a = vzip1q_u32(first, second), b = vzip2q_u32(first, second);
  }
  static QK_INLINE Input inputs(const X* x0, const X* x1) {
    return vreinterpretq_u32_u16(vcombine_u16(vld1_u16(x0), vld1_u16(x1)));
  }
  static QK_INLINE Sum multiply_add_rows(Sum sum, Weight w, Input x) {
    return vbfmmlaq_f32(sum, vreinterpretq_bf16_u32(w), vreinterpretq_bf16_u32(x));
  }

  static QK_INLINE Weight load_weight(const uint8_t* p) { return lanes(p); }
  static QK_INLINE void store_weight(uint8_t* p, Weight w) { vst1q_u8(p, vreinterpretq_u8_u32(w)); }
};

// The bytes of bf16 values that tbl is to find for codes in the words of a vector
QK_INLINE uint8x16_t bytes_of(uint32x4_t codes) {
  return vreinterpretq_u8_u16(vmlaq_n_u16(vdupq_n_u16(0x0100), vreinterpretq_u16_u32(codes), 0x0202));
}

// Sixteen values in two registers
struct PairTable {
  uint8x16x2_t table;
  explicit PairTable(const Call& call) {
    uint16_t values[16];
    for (int i = 0; i < 16; ++i) values[i] = to_bf16(plain_value(call, i & ((1 << call.bits) - 1)));
    for (int i = 0; i < 2; ++i) table.val[i] = vreinterpretq_u8_u16(vld1q_u16(values + 8 * i));
  }
  QK_INLINE uint32x4_t look_up(uint32x4_t codes) const {
    return vreinterpretq_u32_u8(vqtbl2q_u8(table, bytes_of(codes)));
  }
};

struct SymmetricPairs : RawNibbles, NoZeros, PairTable {
  static constexpr bool kPanel = true;
  using PairTable::PairTable;
  QK_INLINE uint32x4_t value(Raw raw, int s, Zero) const {
    return look_up(vandq_u32(raw >> (4 * s), vdupq_n_u32(0x000f000f)));
  }
};

// Integers of at most 255 fill the top half of an fp32: two such halves are a pair.
QK_INLINE uint32x4_t top_halves(float32x4_t low, float32x4_t high) {
  return vreinterpretq_u32_u16(vtrn2q_u16(vreinterpretq_u16_f32(low), vreinterpretq_u16_f32(high)));
}

struct PairsWithZeros : RawNibbles, FloatZeros {
  static constexpr bool kPanel = true;
  using FloatZeros::FloatZeros;
  QK_INLINE uint32x4_t value(Raw raw, int s, Zero zero) const {
    return top_halves(code_value(raw, 4 * s, 4, zero), code_value(raw, 16 + 4 * s, 4, zero));
  }
};

struct BytePairs : RawBytes, FloatZeros {
  static constexpr bool kPanel = true;
  using FloatZeros::FloatZeros;
  QK_INLINE uint32x4_t value(const Raw& raw, int s, Zero zero) const {
    const uint32x4_t quad = raw.quad[s >> 1];
    return top_halves(code_value(quad, 8 * (s & 1), 8, zero), code_value(quad, 16 + 8 * (s & 1), 8, zero));
  }
};

template <int kBits>
struct PlanePairs : RawPlanes<kBits>, FloatZeros {
  static constexpr bool kPanel = true;
  using FloatZeros::FloatZeros;
  QK_INLINE uint32x4_t value(const typename RawPlanes<kBits>::Raw& raw, int s, Zero zero) const {
    const uint32x4_t pair = RawPlanes<kBits>::pair(raw, s);
    return top_halves(code_value(pair, 0, kBits, zero), code_value(pair, 16, kBits, zero));
  }
};

// An 8-bit float: bytes 0 and 2 of a lane are the pair 0, bytes 1 and 3 the pair 1; exact in bf16.
struct FloatPairs : RawBytes, NoZeros {
  static constexpr bool kPanel = true;
  const int shift;
  const float unit;
  explicit FloatPairs(const Call& c)
      : shift(c.codebook == Codebook::kE4M3 ? 20 : 21), unit(c.codebook == Codebook::kE4M3 ? 0x1p120f : 0x1p112f) {}
  QK_INLINE uint32x4_t value(const Raw& raw, int s, Zero) const {
    const uint32x4_t bytes = raw.quad[s >> 1] >> (8 * (s & 1));
    return top_halves(NeonBf16::small_floats(bytes, shift, unit), NeonBf16::small_floats(bytes >> 16, shift, unit));
  }
};

void multiply_by_type(const Call& call, int64_t tile, int tiles, int64_t m0, int64_t m1) {
  if (call.x_type != Type::kBFloat16) return kNeon.multiply(call, tile, tiles, m0, m1);
  multiply<NeonBf16, SymmetricPairs, PairsWithZeros, BytePairs, SymmetricPairs, FloatPairs, PlanePairs, PlanePairs>(
      call, tile, tiles, m0, m1);
}

void activate(const Between& between, int64_t m0, int64_t m1) { kNeon.activate(between, m0, m1); }
void weigh(const Weighing& weighing, int64_t t0, int64_t t1) { kNeon.weigh(weighing, t0, t1); }

}  // namespace

const Kernels kNeonBf16 = {"neon_bf16", Type::kBFloat16, stage<uint16_t>, multiply_by_type, kLittleWork / 4, activate,
                           weigh};

}  // namespace qkernels::cpu

QK_TARGET_END
