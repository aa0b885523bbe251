// e^x for loops that a compiler makes vectors of. In an unnamed namespace, as rows.h and for its reason.
#pragma once
#include <cstdint>
#include <limits>

namespace qkernels::cpu {
namespace {

// x = n ln 2 + r with |r| <= ln 2 / 2, 2^n from its bits, e^r by a polynomial (relative error below 2^-22). +inf and
// NaN as they are, e^-87 for what is less.
inline float exponential(float x) {
  constexpr float kShift = 12582912.0f;  // 1.5 2^23: its last bits are whole numbers
  const float bounded = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
  const float shifted = bounded * 1.44269504f + kShift, n = shifted - kShift;
  const float r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  uint32_t bits;
  __builtin_memcpy(&bits, &shifted, 4);
  bits = (bits + 127) << 23;
  float power;
  __builtin_memcpy(&power, &bits, 4);
  return x > 88.0f ? std::numeric_limits<float>::infinity() : p * power;
}

inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

}  // namespace
}  // namespace qkernels::cpu
