// What codes mean, by the numbers of types.h: the values of qkernels/codebooks.py, which a test compares with these. No
// torch and no CUDA in here.
#pragma once
#include <cstdint>

#include "types.h"

namespace qkernels {

// Each with its sources in qkernels/codebooks.py. static, as in types.h.
static constexpr float kNf4Values[16] = {-1.0f,
                                         -0.6961928009986877f,
                                         -0.5250730514526367f,
                                         -0.39491748809814453f,
                                         -0.28444138169288635f,
                                         -0.18477343022823334f,
                                         -0.09105003625154495f,
                                         0.0f,
                                         0.07958029955625534f,
                                         0.16093020141124725f,
                                         0.24611230194568634f,
                                         0.33791524171829224f,
                                         0.44070982933044434f,
                                         0.5626170039176941f,
                                         0.7229568362236023f,
                                         1.0f};
static constexpr float kFp4Values[8] = {0.0f,      0.0625f / 12, 8.0f / 12, 12.0f / 12,
                                        4.0f / 12, 6.0f / 12,    2.0f / 12, 3.0f / 12};
static constexpr float kE2M1Values[8] = {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f};
static constexpr float kIq4NlValues[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

// 8-bit floats, magnitudes 0 ... 127. The patterns that mean NaN or infinity are in no weight, and 0 here.
static constexpr float small_float(int magnitude, int mantissa, int bias, int last) {
  if (magnitude > last) return 0.0f;
  const int exponent = magnitude >> mantissa, steps = 1 << mantissa;
  float value = static_cast<float>((magnitude & (steps - 1)) + (exponent == 0 ? 0 : steps));
  int shift = (exponent == 0 ? 1 : exponent) - bias - mantissa;
  for (; shift > 0; --shift) value *= 2.0f;
  for (; shift < 0; ++shift) value *= 0.5f;
  return value;
}

// The value of a code; an unknown codebook has none but 0.
static constexpr float codebook_value(Codebook codebook, int code) {
  switch (codebook) {
    case Codebook::kNf4:
      return kNf4Values[code & 15];
    case Codebook::kFp4:
      return (code & 8) != 0 ? -kFp4Values[code & 7] : kFp4Values[code & 7];
    case Codebook::kE2M1:
      return (code & 8) != 0 ? -kE2M1Values[code & 7] : kE2M1Values[code & 7];
    case Codebook::kIq4Nl:
      return kIq4NlValues[code & 15];
    case Codebook::kE4M3:
      return (code & 128) != 0 ? -small_float(code & 127, 3, 7, 126) : small_float(code & 127, 3, 7, 126);
    case Codebook::kE5M2:
      return (code & 128) != 0 ? -small_float(code & 127, 2, 15, 123) : small_float(code & 127, 2, 15, 123);
    default:
      return 0.0f;
  }
}

// Bits of a code; 0: integers, of any width.
static constexpr int codebook_bits(Codebook codebook) {
  if (codebook == Codebook::kIntegers) return 0;
  return codebook == Codebook::kE4M3 || codebook == Codebook::kE5M2 ? 8 : 4;
}

// What int8 activations multiply: integers times this. 0: they cannot.
static constexpr float integer_step(Codebook codebook) {
  return codebook == Codebook::kE2M1 ? 0.5f : codebook == Codebook::kIq4Nl ? 1.0f : 0.0f;
}

}  // namespace qkernels
