// From codes to the A operand of the tensor cores, exactly: code - zero is an integer of at most 8 bits and a sign,
// which fp16 and bf16 hold without rounding. Scales are not applied here; they go on fp32 sums (multiply.cuh).
//
// A floating number whose mantissa field is filled with a code *is* 2^p + code, p chosen so that the mantissa counts in
// ones. So a conversion is a mask and an OR (one lop3) that drops the code into a constant, and a subtraction that
// takes 2^p and the zero point away together. fp16 has 10 bits of mantissa: 0x6400 is 1024, and codes of 8 bits fit.
// bf16 has 7: 0x4300 is 128, codes of 4 bits fit, and the eighth bit of a longer code needs a step of its own.
//
// The subtraction may be left out: then the tensor core sums (code + kBias) x, and who knows the sum of x puts it right
// (multiply_biased.cuh). kBias is small where the mantissa has room: fp16 counts codes of 4 bits from 64, not from
// 1024.
//
//   instructions per 8 codes     fp16   bf16   of these on the pipe of lop3 and shifts, two cycles a warp
//   4 bit                        9      11     5, 7     256 weights of a warp, then one mma per 8 tokens
//   8 bit                        8      14     4, 10
//   4 bit, with kBias            7      7      5, 5     (shifts by multiplication, but for one)
//   8 bit, with kBias            4      14     4, 10    (bf16 has no zero to subtract left: 12)
#pragma once
#include "problem.h"
#include "ptx.cuh"

namespace qkernels::cuda {

// (a & b) | c  and  (a & b) ^ c
constexpr int kAndOr = 0xea;
constexpr int kAndXor = 0x6a;

QK_DEVICE uint32_t shifted_right(uint32_t v, int bits) { return bits >= 0 ? v >> bits : v << -bits; }

// The two types of activations: their arithmetic in pairs, and what the tricks above need.
struct Half {
  static constexpr Type kType = Type::kHalf;
  static constexpr uint32_t kOnes = 0x3c003c00;
  static QK_DEVICE uint32_t pack(float low, float high) { return pack_f16x2(low, high); }
  static QK_DEVICE float low(uint32_t pair) { return f16_to_float(static_cast<uint16_t>(pair)); }
  static QK_DEVICE float high(uint32_t pair) { return f16_to_float(static_cast<uint16_t>(pair >> 16)); }
  static QK_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { mma_f16(d, a, b); }
};
struct BFloat16 {
  static constexpr Type kType = Type::kBFloat16;
  static constexpr uint32_t kOnes = 0x3f803f80;
  static QK_DEVICE uint32_t pack(float low, float high) { return pack_bf16x2(low, high); }
  static QK_DEVICE float low(uint32_t pair) { return bits_to_float(pair << 16); }
  static QK_DEVICE float high(uint32_t pair) { return bits_to_float(pair & 0xffff0000u); }
  static QK_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { mma_bf16(d, a, b); }
};

// What is subtracted from the codes of rows r and r + 8, in both halves of a register.
struct Zeros {
  uint32_t row, row8;
};

// One kernel's kind of weight. `T` is the type of activations.
template <class T, int kWidth>
struct Codes;

template <>
struct Codes<Half, 4> {
  // Codes in bits 0 ... 3 of a half become 1024 + code; those in bits 4 ... 7 become 1024 + 16 code, and a multiply-add
  // brings them back: (1024 + 16 code) / 16 - (64 + zero) = code - zero, every step exact. The low ones are always
  // row r, the high ones row r + 8, so each row needs only one form of its zero.
  static QK_DEVICE Zeros zeros(uint32_t z, uint32_t z8) {  // bytes, 0 ... 255
    const uint32_t magic = z | z << 16 | 0x64006400u, magic8 = z8 | z8 << 16 | 0x64006400u;
    return {magic, sub_f16x2(0x63806380u, magic8)};  // 1024 + z, and 960 - (1024 + z8) = -(64 + z8)
  }
  static QK_DEVICE void unpack(const uint32_t (&q)[1], const Zeros& z, uint32_t (&a)[4]) {
    const uint32_t right = q[0] >> 8, sixteenth = 0x2c002c00u;
    a[0] = sub_f16x2(lop3<kAndOr>(q[0], 0x000f000fu, 0x64006400u), z.row);
    a[1] = fma_f16x2(lop3<kAndOr>(q[0], 0x00f000f0u, 0x64006400u), sixteenth, z.row8);
    a[2] = sub_f16x2(lop3<kAndOr>(right, 0x000f000fu, 0x64006400u), z.row);
    a[3] = fma_f16x2(lop3<kAndOr>(right, 0x00f000f0u, 0x64006400u), sixteenth, z.row8);
  }
  // 0x5400 is 64, and bit 4 of its mantissa a one.
  static constexpr int kBias = 64;
  static QK_DEVICE void unpack_biased(const uint32_t (&q)[1], uint32_t (&a)[4]) {
    a[0] = lop3<kAndOr>(q[0] << 4, 0x00f000f0u, 0x54005400u);
    a[1] = lop3<kAndOr>(q[0], 0x00f000f0u, 0x54005400u);
    a[2] = lop3<kAndOr>(shift_right_by_multiplying<4>(q[0]), 0x00f000f0u, 0x54005400u);
    a[3] = lop3<kAndOr>(q[0] >> 8, 0x00f000f0u, 0x54005400u);
  }
};

template <>
struct Codes<BFloat16, 4> {
  // Bits 4 ... 7 would reach into the exponent: every nibble is shifted down instead.
  static QK_DEVICE Zeros zeros(uint32_t z, uint32_t z8) {  // bytes, 0 ... 127
    return {z | z << 16 | 0x43004300u, z8 | z8 << 16 | 0x43004300u};
  }
  static QK_DEVICE void unpack(const uint32_t (&q)[1], const Zeros& z, uint32_t (&a)[4]) {
    a[0] = sub_bf16x2(lop3<kAndOr>(q[0], 0x000f000fu, 0x43004300u), z.row);
    a[1] = sub_bf16x2(lop3<kAndOr>(q[0] >> 4, 0x000f000fu, 0x43004300u), z.row8);
    a[2] = sub_bf16x2(lop3<kAndOr>(q[0] >> 8, 0x000f000fu, 0x43004300u), z.row);
    a[3] = sub_bf16x2(lop3<kAndOr>(q[0] >> 12, 0x000f000fu, 0x43004300u), z.row8);
  }
  static constexpr int kBias = 128;
  static QK_DEVICE void unpack_biased(const uint32_t (&q)[1], uint32_t (&a)[4]) {
    a[0] = lop3<kAndOr>(q[0], 0x000f000fu, 0x43004300u);
    a[1] = lop3<kAndOr>(shift_right_by_multiplying<4>(q[0]), 0x000f000fu, 0x43004300u);
    a[2] = lop3<kAndOr>(q[0] >> 8, 0x000f000fu, 0x43004300u);
    a[3] = lop3<kAndOr>(shift_right_by_multiplying<12>(q[0]), 0x000f000fu, 0x43004300u);
  }
};

template <>
struct Codes<Half, 8> {
  // Bytes 0 and 2 of a word are row r, bytes 1 and 3 row r + 8. A byte permutation moves any two under 0x64.
  static QK_DEVICE Zeros zeros(uint32_t z, uint32_t z8) {
    return {z | z << 16 | 0x64006400u, z8 | z8 << 16 | 0x64006400u};
  }
  static QK_DEVICE void unpack(const uint32_t (&q)[2], const Zeros& z, uint32_t (&a)[4]) {
#pragma unroll
    for (int right = 0; right < 2; ++right) {
      a[2 * right] = sub_f16x2(permute_bytes(q[right], 0x64646464u, 0x4240), z.row);
      a[2 * right + 1] = sub_f16x2(permute_bytes(q[right], 0x64646464u, 0x4341), z.row8);
    }
  }
  static constexpr int kBias = 1024;
  static QK_DEVICE void unpack_biased(const uint32_t (&q)[2], uint32_t (&a)[4]) {
#pragma unroll
    for (int right = 0; right < 2; ++right) {
      a[2 * right] = permute_bytes(q[right], 0x64646464u, 0x4240);
      a[2 * right + 1] = permute_bytes(q[right], 0x64646464u, 0x4341);
    }
  }
};

template <>
struct Codes<BFloat16, 8> {
  // code = low + 128 high with seven bits in `low`. The OR makes 128 + low. Bit 7 is the lowest of the exponent: XOR
  // with 0x4380 makes 256 out of high = 0 and 128 out of high = 1, and the difference of the two is code - 128, at
  // once.
  static QK_DEVICE uint32_t minus_128(uint32_t bytes) {  // in bytes 0 and 2
    return sub_bf16x2(lop3<kAndOr>(bytes, 0x007f007fu, 0x43004300u), lop3<kAndXor>(bytes, 0x00800080u, 0x43804380u));
  }
  static QK_DEVICE Zeros zeros(uint32_t z, uint32_t z8) { return {minus_128(z | z << 16), minus_128(z8 | z8 << 16)}; }
  static QK_DEVICE void unpack(const uint32_t (&q)[2], const Zeros& z, uint32_t (&a)[4]) {
#pragma unroll
    for (int right = 0; right < 2;
         ++right) {  // code - 128 and zero - 128 are exact, and so is their difference, up to 255
      a[2 * right] = sub_bf16x2(minus_128(q[right]), z.row);
      a[2 * right + 1] = sub_bf16x2(minus_128(q[right] >> 8), z.row8);
    }
  }
  static constexpr int kBias = -128;
  static QK_DEVICE void unpack_biased(const uint32_t (&q)[2], uint32_t (&a)[4]) {
#pragma unroll
    for (int right = 0; right < 2; ++right) {
      a[2 * right] = minus_128(q[right]);
      a[2 * right + 1] = minus_128(shift_right_by_multiplying<8>(q[right]));
    }
  }
};

}  // namespace qkernels::cuda
