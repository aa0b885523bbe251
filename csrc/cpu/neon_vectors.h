// NEON (Advanced SIMD) with 4 rows a vector: what products in fp32 (neon.cpp), in bf16 (neon_bf16.cpp) and in int8
// (neon_int8.h) have in common. A tile is eight vectors. Every aarch64 CPU has what is used here.
#pragma once
#include <arm_neon.h>

#include <cstring>

#include "tile_gemm.h"

namespace qkernels::cpu {
namespace {

struct NeonSums {
  using Sum = float32x4_t;
  static constexpr int kRows = 4;

  static QK_INLINE Sum zero() { return vdupq_n_f32(0.0f); }
  static QK_INLINE Sum set1(float f) { return vdupq_n_f32(f); }
  static QK_INLINE Sum load(const float* p) { return vld1q_f32(p); }
  static QK_INLINE void store(float* p, Sum v) { vst1q_f32(p, v); }
  static QK_INLINE Sum sub(Sum a, Sum b) { return vsubq_f32(a, b); }
  static QK_INLINE Sum mul(Sum a, Sum b) { return vmulq_f32(a, b); }
  static QK_INLINE Sum div(Sum a, Sum b) { return vdivq_f32(a, b); }
  static QK_INLINE Sum fma(Sum a, Sum b, Sum c) { return vfmaq_f32(c, a, b); }

  // The same four bytes in every lane
  static QK_INLINE uint32x4_t four_bytes(const void* at) {
    uint32_t four;
    std::memcpy(&four, at, 4);
    return vdupq_n_u32(four);
  }
  static QK_INLINE uint16x8_t words_of(const uint8_t* at) {
    return vmovl_u8(vget_low_u8(vreinterpretq_u8_u32(four_bytes(at))));
  }
  static QK_INLINE uint32x4_t lanes_of(const uint8_t* at) { return vmovl_u16(vget_low_u16(words_of(at))); }

  // 8-bit floats: see from_e8m0 and from_e4m3 in rows.h
  static QK_INLINE Sum widen_bytes_of(Type type, const uint8_t* at) {
    const uint32x4_t byte = lanes_of(at);
    if (type == Type::kE8M0) {
      const uint32x4_t subnormal = vandq_u32(vceqzq_u32(byte), vdupq_n_u32(1 << 22));
      return vreinterpretq_f32_u32(vorrq_u32(vshlq_n_u32(byte, 23), subnormal));
    }
    return small_floats(byte, 20, 0x1p120f);
  }
  // The low byte of each lane: sign, then 7 bits that `shift` puts where a float's exponent ends; `unit` repairs the
  // bias
  static QK_INLINE Sum small_floats(uint32x4_t byte, int shift, float unit) {
    const uint32x4_t magnitude = (byte & vdupq_n_u32(0x7f)) << shift;
    const uint32x4_t sign = vshlq_n_u32(byte & vdupq_n_u32(0x80), 24);
    return vreinterpretq_f32_u32(vreinterpretq_u32_f32(vmulq_n_f32(vreinterpretq_f32_u32(magnitude), unit)) | sign);
  }

  // 4 consecutive values as fp32
  static QK_INLINE Sum widen(Type type, const void* base, int64_t i) {
    if (type == Type::kFloat) return load(static_cast<const float*>(base) + i);
    if (type == Type::kHalf || type == Type::kBFloat16) {
      const uint16x4_t words = vld1_u16(static_cast<const uint16_t*>(base) + i);
      if (type == Type::kHalf) return vcvt_f32_f16(vreinterpret_f16_u16(words));
      return vreinterpretq_f32_u32(vshll_n_u16(words, 16));
    }
    const auto* at = static_cast<const uint8_t*>(base) + i;
    if (type == Type::kUInt8) return vcvtq_f32_u32(lanes_of(at));
    if (type == Type::kInt8) {
      const int16x8_t words = vmovl_s8(vget_low_s8(vreinterpretq_s8_u32(four_bytes(at))));
      return vcvtq_f32_s32(vmovl_s16(vget_low_s16(words)));
    }
    return widen_bytes_of(type, at);
  }
};

QK_INLINE uint32x4_t lanes(const uint8_t* at) { return vreinterpretq_u32_u8(vld1q_u8(at)); }

// Integers of some bits whose lowest is bit `shift` of a lane, as fp32: ucvtf divides by a power of two on its way, so
// that no shift is needed. It takes it as an immediate, which `shift` becomes where the loops are unrolled.
QK_INLINE float32x4_t whole_numbers(uint32x4_t fields, int shift) {
  switch (shift) {
    case 4:
      return vcvtq_n_f32_u32(fields, 4);
    case 8:
      return vcvtq_n_f32_u32(fields, 8);
    case 12:
      return vcvtq_n_f32_u32(fields, 12);
    case 16:
      return vcvtq_n_f32_u32(fields, 16);
    case 20:
      return vcvtq_n_f32_u32(fields, 20);
    case 24:
      return vcvtq_n_f32_u32(fields, 24);
    case 28:
      return vcvtq_n_f32_u32(fields, 28);
    default:
      return vcvtq_f32_u32(fields);
  }
}

struct NoZeros {
  struct Zero {};
  QK_INLINE Zero zero(int64_t) const { return {}; }
};

// Zeros in fp32: integer zero points, or mid_of
struct FloatZeros {
  using Zero = float32x4_t;
  const Call& call;
  explicit FloatZeros(const Call& c) : call(c) {}
  QK_INLINE Zero zero(int64_t at) const {
    return call.zero_type == Type::kUInt8 ? NeonSums::widen(Type::kUInt8, call.zeros, at)
                                          : NeonSums::set1(static_cast<float>(mid_of(call)));
  }
};

// code - zero of the `bits` bits from `shift` on
QK_INLINE float32x4_t code_value(uint32x4_t lanes, int shift, int bits, float32x4_t zero) {
  const uint32x4_t mask = vdupq_n_u32(((1u << bits) - 1) << shift);
  return vsubq_f32(whole_numbers(vandq_u32(lanes, mask), shift), zero);
}

struct RawNibbles : BlockOf<4> {
  using Raw = uint32x4_t;
  static QK_INLINE Raw load(const uint8_t* at, int) { return lanes(at); }
};

struct RawBytes : BlockOf<8> {
  struct Raw {
    uint32x4_t quad[2];
  };
  static QK_INLINE Raw load(const uint8_t* at, int) { return {{lanes(at), lanes(at + kLineBytes)}}; }
};

// Codes in planes: the octet's fields of each plane at the bottom of a lane's words. Which octet of the block it is, is
// known at run time alone: by shifts to the left of less than nothing.
template <int kBits>
struct RawPlanes : BlockOf<kBits> {
  using Block = BlockOf<kBits>;
  static constexpr Planes planes = Block::planes;
  struct Raw {
    uint32x4_t low, high;
  };
  static QK_INLINE uint32x4_t line(const uint8_t* at, int n, int right) {
    return vshlq_u32(lanes(at + n * kLineBytes), vdupq_n_s32(-right));
  }
  static QK_INLINE Raw load(const uint8_t* at, int i) {
    const uint32x4_t low = line(at, Block::low_line(i), 32 - Block::low_left(i));
    if constexpr (planes.high == 0) return {low, low};
    return {low, line(at, Block::high_line(i), i * planes.high * 4)};
  }
  // The codes of pair p: one in the low bits of each word
  static QK_INLINE uint32x4_t pair(const Raw& raw, int p) {
    const auto field = [](uint32x4_t lanes, int width) {
      const uint32_t mask = (1u << width) - 1;
      return vandq_u32(lanes, vdupq_n_u32(mask << 16 | mask));
    };
    const uint32x4_t low = field(raw.low >> (planes.low * p), planes.low);
    if constexpr (planes.high == 0) return low;
    return low | field(raw.high >> (planes.high * p), planes.high) << planes.low;
  }
};

// Of 3 bits: an octet has its line, but for the last one, whose bits the lines had left over.
template <>
struct RawPlanes<3> : BlockOf<3> {
  struct Raw {
    uint32x4_t pairs[4];
  };
  static QK_INLINE Raw load(const uint8_t* at, int i) {
    if (i < 3) {
      const uint32x4_t line = lanes(at + i * kLineBytes);
      return {{line, line >> 3, line >> 6, line >> 9}};
    }
    const uint32x4_t line[3] = {lanes(at), lanes(at + kLineBytes), lanes(at + 2 * kLineBytes)};
    const auto bit = [&](int n) { return vandq_u32(line[n] >> (15 - n), vdupq_n_u32(0x00010001u << n)); };
    return {{line[0] >> 12, line[1] >> 12, line[2] >> 12, bit(0) | bit(1) | bit(2)}};
  }
  static QK_INLINE uint32x4_t pair(const Raw& raw, int p) { return vandq_u32(raw.pairs[p], vdupq_n_u32(0x00070007)); }
};

}  // namespace
}  // namespace qkernels::cpu
