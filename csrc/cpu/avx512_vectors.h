// AVX-512 with 16 rows a vector: what products in fp32 (avx512.cpp) and in bf16 (avx512_bf16.cpp) have in common.
#pragma once
#include <immintrin.h>

#include "tile_gemm.h"

namespace qkernels::cpu {
namespace {

using Lanes = uint32_t __attribute__((vector_size(64)));  // so that `>> n` takes any n and still becomes an immediate

struct Avx512Sums {
  using Sum = __m512;
  static constexpr int kRows = 16;
  // 32 registers: 12 rows x 2 vectors of sums, 2 of weights, and room to load the next ones.
  static constexpr int kTokens = 12, kHalf = 2;

  static QK_INLINE Sum zero() { return _mm512_setzero_ps(); }
  static QK_INLINE Sum set1(float f) { return _mm512_set1_ps(f); }
  static QK_INLINE Sum load(const float* p) { return _mm512_loadu_ps(p); }
  static QK_INLINE void store(float* p, Sum v) { _mm512_storeu_ps(p, v); }
  static QK_INLINE Sum sub(Sum a, Sum b) { return _mm512_sub_ps(a, b); }
  static QK_INLINE Sum mul(Sum a, Sum b) { return _mm512_mul_ps(a, b); }
  static QK_INLINE Sum div(Sum a, Sum b) { return _mm512_div_ps(a, b); }
  static QK_INLINE Sum fma(Sum a, Sum b, Sum c) { return _mm512_fmadd_ps(a, b, c); }

  // 8-bit floats: see from_e8m0 and from_e4m3 in rows.h
  static QK_INLINE Sum widen_bytes_of(Type type, const uint8_t* at) {
    const __m512i byte = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
    if (type == Type::kE8M0) {
      const __mmask16 least = _mm512_testn_epi32_mask(byte, byte);
      return _mm512_castsi512_ps(_mm512_mask_mov_epi32(_mm512_slli_epi32(byte, 23), least, _mm512_set1_epi32(1 << 22)));
    }
    const __m512i magnitude = _mm512_slli_epi32(_mm512_and_si512(byte, _mm512_set1_epi32(0x7f)), 20);
    const __m512i sign = _mm512_slli_epi32(_mm512_and_si512(byte, _mm512_set1_epi32(0x80)), 24);
    const Sum value = _mm512_mul_ps(_mm512_castsi512_ps(magnitude), set1(0x1p120f));
    return _mm512_castsi512_ps(_mm512_or_si512(_mm512_castps_si512(value), sign));
  }

  // 16 consecutive values as fp32
  static QK_INLINE Sum widen(Type type, const void* base, int64_t i) {
    if (type == Type::kFloat) return load(static_cast<const float*>(base) + i);
    if (type == Type::kHalf || type == Type::kBFloat16) {
      const auto* at = static_cast<const uint16_t*>(base) + i;
      const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
      if (type == Type::kHalf) return _mm512_cvtph_ps(words);
      return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16));
    }
    const auto* at = static_cast<const uint8_t*>(base) + i;
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
    if (type == Type::kUInt8) return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes));
    if (type == Type::kInt8) return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
    return widen_bytes_of(type, at);
  }
};

QK_INLINE __m512i lanes(const uint8_t* at) { return _mm512_loadu_si512(at); }
QK_INLINE __m512i shifted(__m512i v, int n) { return (__m512i)((Lanes)v >> n); }

struct RawNibbles : BlockOf<4> {
  using Raw = __m512i;
  static constexpr bool kPanel = false;  // 128 rows of bf16 6 % faster than with one, 16 rows 24 %
  static QK_INLINE Raw load(const uint8_t* at, int) { return lanes(at); }
};

struct RawBytes : BlockOf<8> {
  struct Raw {
    __m512i quad[2];
  };
  static QK_INLINE Raw load(const uint8_t* at, int) { return {{lanes(at), lanes(at + kLineBytes)}}; }
};

// Codes in planes: the octet's fields of each plane at the bottom of a lane's words, those of the high plane where they
// stand in a code.
template <int kBits>
struct RawPlanes : BlockOf<kBits> {
  using Block = BlockOf<kBits>;
  static constexpr Planes planes = Block::planes;
  static constexpr bool kPanel = kBits > 2;  // four instructions a pair and more
  struct Raw {
    __m512i low, high;
  };
  static QK_INLINE __m512i line(const uint8_t* at, int n, int left) {
    return _mm512_rolv_epi32(lanes(at + n * kLineBytes), _mm512_set1_epi32(left));
  }
  static QK_INLINE Raw load(const uint8_t* at, int i) {
    const __m512i low = line(at, Block::low_line(i), Block::low_left(i));
    if constexpr (planes.high == 0) return {low, low};
    return {low, line(at, Block::high_line(i), Block::high_left(i))};
  }
  // The code of the column or pair p of a word, in its low bits; what is above is left over.
  static QK_INLINE __m512i code(const Raw& raw, int p, int word) {
    const __m512i low = shifted(raw.low, 16 * word + planes.low * p);
    if constexpr (planes.high == 0) return low;
    const __m512i high = shifted(raw.high, 16 * word + planes.high * p);
    constexpr int kMask = (1 << planes.low) - 1;
    return _mm512_ternarylogic_epi32(_mm512_set1_epi32(kMask << 16 | kMask), low, high, 0xca);  // mask ? low : high
  }
};

// Of 3 bits: an octet has its line, but for the last one, whose bits the lines had left over.
template <>
struct RawPlanes<3> : BlockOf<3> {
  static constexpr bool kPanel = false;
  struct Raw {
    __m512i line[3];
    int octet;
  };
  static QK_INLINE Raw load(const uint8_t* at, int i) {
    if (i == 3) return {{lanes(at), lanes(at + kLineBytes), lanes(at + 2 * kLineBytes)}, i};
    const __m512i line = lanes(at + i * kLineBytes);
    return {{line, line, line}, i};
  }
  static QK_INLINE __m512i code(const Raw& raw, int p, int word) {
    if (raw.octet < 3) return shifted(raw.line[0], 16 * word + 3 * p);
    if (p < 3) return shifted(raw.line[p], 16 * word + 12);
    const auto mask = [](int bits) { return _mm512_set1_epi32(bits << 16 | bits); };
    const __m512i first = shifted(raw.line[0], 16 * word + 15), second = shifted(raw.line[1], 16 * word + 14);
    const __m512i low = _mm512_ternarylogic_epi32(mask(1), first, second, 0xca);  // mask ? first : second
    return _mm512_ternarylogic_epi32(mask(3), low, shifted(raw.line[2], 16 * word + 13), 0xca);
  }
};

// The values of an 8-bit codebook, which bf16 holds exactly: magnitudes in four registers, the sign beside them.
struct WordTable {
  __m512i part[4];
  explicit WordTable(Codebook codebook) {
    alignas(64) uint16_t values[128];
    for (int i = 0; i < 128; ++i) values[i] = to_bf16(codebook_value(codebook, i));
    for (int i = 0; i < 4; ++i) part[i] = _mm512_load_si512(values + 32 * i);
  }
  // bf16 of the byte in the low half of each word; what is above it does not matter
  QK_INLINE __m512i look_up(__m512i words) const {
    const __m512i low = _mm512_permutex2var_epi16(part[0], words, part[1]);
    const __m512i high = _mm512_permutex2var_epi16(part[2], words, part[3]);
    const __m512i value = _mm512_mask_mov_epi16(low, _mm512_test_epi16_mask(words, _mm512_set1_epi16(64)), high);
    const __m512i sign = _mm512_and_si512(_mm512_slli_epi16(words, 8), _mm512_set1_epi16(INT16_MIN));
    return _mm512_or_si512(value, sign);
  }
};

struct NoZeros {
  struct Zero {};
  QK_INLINE Zero zero(int64_t) const { return {}; }
};

// Zeros in fp32: integer zero points, or mid_of
struct FloatZeros {
  using Zero = __m512;
  const Call& call;
  explicit FloatZeros(const Call& c) : call(c) {}
  QK_INLINE Zero zero(int64_t at) const {
    return call.zero_type == Type::kUInt8 ? Avx512Sums::widen(Type::kUInt8, call.zeros, at)
                                          : Avx512Sums::set1(static_cast<float>(mid_of(call)));
  }
};

// An integer below 2^23 in the mantissa of 2^23 is that much more: code - zero is one subtraction of 2^23 + zero.
struct MantissaZeros : FloatZeros {
  using FloatZeros::FloatZeros;
  QK_INLINE Zero zero(int64_t at) const { return _mm512_add_ps(FloatZeros::zero(at), _mm512_set1_ps(0x1p23f)); }
};
QK_INLINE __m512i exponent_of_2_23() { return _mm512_set1_epi32(0x4b000000); }

// code - zero of the code in a lane's low bits, in fp32, exact; zero: as MantissaZeros has it.
template <int kBits>
QK_INLINE __m512 code_value(__m512i code, __m512 zero) {
  const __m512i bits = _mm512_set1_epi32((1 << kBits) - 1);
  const __m512i value = _mm512_ternarylogic_epi32(code, bits, exponent_of_2_23(), 0xea);  // code & bits | exponent
  return _mm512_sub_ps(_mm512_castsi512_ps(value), zero);
}

// The same of byte i of each lane. Bits 8 ... 15 are units of the mantissa of 2^15, so that only bytes 2 and 3 are
// moved, both by one shift: what shuffles and shifts ports of the multipliers are wanted by.
struct ByteZeros : FloatZeros {
  struct Zero {
    __m512 even, odd;
  };
  using FloatZeros::FloatZeros;
  QK_INLINE Zero zero(int64_t at) const {
    const __m512 plain = FloatZeros::zero(at);
    return {_mm512_add_ps(plain, _mm512_set1_ps(0x1p23f)), _mm512_add_ps(plain, _mm512_set1_ps(0x1p15f))};
  }
};
QK_INLINE __m512 byte_value(__m512i lanes, int i, const ByteZeros::Zero& zero) {
  const __m512i half = i < 2 ? lanes : shifted(lanes, 16);
  if (i % 2 == 0) return code_value<8>(half, zero.even);
  const __m512i value = _mm512_ternarylogic_epi32(half, _mm512_set1_epi32(0xff00), _mm512_set1_epi32(0x47000000), 0xea);
  return _mm512_sub_ps(_mm512_castsi512_ps(value), zero.odd);
}

}  // namespace
}  // namespace qkernels::cpu
