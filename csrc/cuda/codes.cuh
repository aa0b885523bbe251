// From codes that are no integers to the A operand of the tensor cores. dequantize.cuh has the integers.
//
// A value is what x's type holds of it: exact for the 4- and 8-bit floats and for IQ4_NL's integers, rounded once for
// NF4 and FP4. There is no zero to subtract, so a table has no place in shared memory and costs no load: it rides in
// the kernel's arguments, and byte permutations look four codes up at a time.
//
//   instructions per 8 codes              of these on the pipe of lop3, shifts and permutations, two cycles a warp
//   any 4-bit codebook, by a table   25   25
//   e2m1, by shifts                  19   15    (bf16 and fp16 hold its bits in their own, 2^126 or 2^14 too small)
//   8-bit floats, by shifts          24   20    (likewise, by 2^120 or 2^112, 2^8 or 1)
#pragma once
#include <cstring>

#include "dequantize.cuh"

namespace qkernels::cuda {

// What unpacking is told, one value for all lanes. kTable: entries 0 ... 15 in x's type, first their low bytes, then
// their high ones. kFloat8: by how much a code's magnitude is shifted, and the factor, in both halves.
struct CodeValues {
  uint32_t word[8];
};

// --- a host's part: codes in x's type ---

inline uint16_t bf16_bits(float value) {  // to nearest, ties to even; no entry is NaN
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

// Entries are 0 or of 2^-14 ... 65504 in magnitude, but for FP4's 0.0625 / 12, which is one of fp16's normals, too.
inline uint16_t f16_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude == 0) return static_cast<uint16_t>(sign);
  const uint32_t rebiased = magnitude - (112u << 23);
  return static_cast<uint16_t>(sign | (rebiased + 0x0fffu + (rebiased >> 13 & 1)) >> 13);
}

inline CodeValues code_values(const Weight& w, Type type) {
  CodeValues values{};
  const bool half = type == Type::kHalf;
  const auto both = [](uint32_t word) { return word | word << 16; };
  if (w.codebook == Codebook::kE4M3) {
    values = {{half ? 7u : 4u, both(half ? 0x5c00 : 0x7b80)}};
  } else if (w.codebook == Codebook::kE5M2) {
    values = {{half ? 8u : 5u, both(half ? 0x3c00 : 0x7780)}};
  } else {
    for (int i = 0; i < 16; ++i) {
      const uint32_t bits = half ? f16_bits(w.table[i]) : bf16_bits(w.table[i]);
      values.word[i / 4] |= (bits & 0xff) << (i % 4 * 8);
      values.word[4 + i / 4] |= (bits >> 8) << (i % 4 * 8);
    }
  }
  return values;
}

// --- a kernel's part ---

template <class T, Coding kCoding>
struct Values;

template <class T>
struct Values<T, Coding::kTable> {
  // One byte of the entries of four codes. Permutations take three bits of an index; the fourth picks between two
  // halves.
  static QK_DEVICE uint32_t look_up(const uint32_t* entries, uint32_t low_bits, uint32_t pick) {
    return permute_bytes(permute_bytes(entries[0], entries[1], low_bits),
                         permute_bytes(entries[2], entries[3], low_bits), pick);
  }
  static QK_DEVICE void unpack(const CodeValues& values, const uint32_t (&q)[1], uint32_t (&a)[4]) {
    const uint32_t low_bits = q[0] & 0x77777777u;
    const uint32_t pick = lop3<kAndOr>(q[0] >> 1, 0x44444444u, 0x32103210u);  // byte i of the first or of the second
    // Codes of even columns (a0 a2 a4 a6), then of odd ones.
    uint32_t low[2], high[2];
#pragma unroll
    for (int odd = 0; odd < 2; ++odd) {
      low[odd] = look_up(values.word, low_bits >> (16 * odd), pick >> (16 * odd));
      high[odd] = look_up(values.word + 4, low_bits >> (16 * odd), pick >> (16 * odd));
    }
#pragma unroll
    for (int right = 0; right < 2; ++right) {
      const uint32_t bytes = right == 0 ? 0x5140 : 0x7362;
      const uint32_t even_pair = permute_bytes(low[0], high[0], bytes),
                     odd_pair = permute_bytes(low[1], high[1], bytes);
      a[2 * right] = permute_bytes(even_pair, odd_pair, 0x5410);
      a[2 * right + 1] = permute_bytes(even_pair, odd_pair, 0x7632);
    }
  }
};

// Pairs of x's type times a constant, which is exact here.
QK_DEVICE uint32_t multiply_pair(Half, uint32_t a, uint32_t b) { return mul_f16x2(a, b); }
QK_DEVICE uint32_t multiply_pair(BFloat16, uint32_t a, uint32_t b) { return mul_bf16x2(a, b); }

template <class T>
struct Values<T, Coding::kE2M1> {
  static constexpr bool kHalf = T::kType == Type::kHalf;
  static constexpr int kUp =
      kHalf ? 9 : 6;  // from bits 0 ... 2 to the lowest of the exponent and the highest of the mantissa
  static constexpr uint32_t kMagnitude = kHalf ? 0x0e000e00u : 0x01c001c0u, kFactor = kHalf ? 0x74007400u : 0x7e807e80u;

  static QK_DEVICE void unpack(const CodeValues&, const uint32_t (&q)[1], uint32_t (&a)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int up = kUp - 4 * i;
      const uint32_t magnitude = (up > 0 ? q[0] << up : q[0] >> -up) & kMagnitude;
      a[i] = multiply_pair(T{}, lop3<kAndOr>(q[0] << (12 - 4 * i), 0x80008000u, magnitude), kFactor);
    }
  }
};

template <class T>
struct Values<T, Coding::kFloat8> {
  static QK_DEVICE void unpack(const CodeValues& values, const uint32_t (&q)[2], uint32_t (&a)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t bytes = i % 2 == 0 ? q[i / 2] : q[i / 2] >> 8;  // bytes 0 and 2
      const uint32_t magnitude = (bytes & 0x007f007fu) << values.word[0];
      a[i] = multiply_pair(T{}, lop3<kAndOr>(bytes << 8, 0x80008000u, magnitude), values.word[1]);
    }
  }
};

// --- one value of 8 bits ---

QK_DEVICE float e8m0_to_float(uint32_t byte) { return bits_to_float(byte == 0 ? 0x00400000u : byte << 23); }
// 2^120 puts the exponent right, and subnormals are made normal; NaN is in no weight.
QK_DEVICE float e4m3_to_float(uint32_t byte) {
  return bits_to_float((byte & 0x80) << 24 | (byte & 0x7f) << 20) * 1.329227995784916e36f;
}
QK_DEVICE float e5m2_to_float(uint32_t byte) {
  return bits_to_float((byte & 0x80) << 24 | (byte & 0x7f) << 21) * 5.192296858534828e33f;  // 2^112
}
QK_DEVICE float small_to_float(Type type, uint32_t byte) {
  return type == Type::kE8M0 ? e8m0_to_float(byte) : e4m3_to_float(byte);
}
QK_CONSTEXPR bool is_small(Type type) { return type == Type::kE8M0 || type == Type::kE4M3; }

}  // namespace qkernels::cuda
