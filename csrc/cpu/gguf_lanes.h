// Sixteen floats that are computed with alike: one AVX-512 register, two of AVX2, four of SSE2 or NEON. QK_PART is the
// number of floats in a register, defined by the file that includes this.
//
// GCC's vector extension, and not intrinsics: each operation is rounded as the scalar one is, on every instruction set.
#pragma once
#include <cstdint>
#include <cstring>
#if QK_PART > 4
#include <immintrin.h>
#endif

#define QK_LANE_INLINE [[gnu::always_inline]] inline

namespace qkernels::cpu {
namespace {

constexpr int kLanes = 16;
constexpr int kParts = kLanes / QK_PART;
typedef float FloatPart __attribute__((vector_size(4 * QK_PART)));
typedef int32_t IntPart __attribute__((vector_size(4 * QK_PART)));

struct Lanes {
  FloatPart part[kParts];
};
struct Mask {
  IntPart part[kParts];  // -1 or 0
};

template <class F>
QK_LANE_INLINE Lanes each(F f) {
  Lanes out;
  for (int i = 0; i < kParts; ++i) out.part[i] = f(i);
  return out;
}
template <class F>
QK_LANE_INLINE Mask each_mask(F f) {
  Mask out;
  for (int i = 0; i < kParts; ++i) out.part[i] = f(i);
  return out;
}

QK_LANE_INLINE Lanes all(float v) {
  return each([&](int) { return v - FloatPart{}; });
}
QK_LANE_INLINE Lanes load16(const float* p) {
  Lanes out;
  std::memcpy(&out, p, sizeof out);
  return out;
}
QK_LANE_INLINE void store16(float* p, Lanes v) { std::memcpy(p, &v, sizeof v); }

QK_LANE_INLINE Lanes operator+(Lanes a, Lanes b) {
  return each([&](int i) { return a.part[i] + b.part[i]; });
}
QK_LANE_INLINE Lanes operator-(Lanes a, Lanes b) {
  return each([&](int i) { return a.part[i] - b.part[i]; });
}
QK_LANE_INLINE Lanes operator*(Lanes a, Lanes b) {
  return each([&](int i) { return a.part[i] * b.part[i]; });
}
QK_LANE_INLINE Lanes operator/(Lanes a, Lanes b) {
  return each([&](int i) { return a.part[i] / b.part[i]; });
}
QK_LANE_INLINE Lanes operator-(Lanes a) {
  return each([&](int i) { return -a.part[i]; });
}
QK_LANE_INLINE Mask operator<(Lanes a, Lanes b) {
  return each_mask([&](int i) { return a.part[i] < b.part[i]; });
}
QK_LANE_INLINE Mask operator>(Lanes a, Lanes b) { return b < a; }
QK_LANE_INLINE Mask operator>=(Lanes a, Lanes b) {
  return each_mask([&](int i) { return a.part[i] >= b.part[i]; });
}
QK_LANE_INLINE Mask operator==(Lanes a, Lanes b) {
  return each_mask([&](int i) { return a.part[i] == b.part[i]; });
}
QK_LANE_INLINE Mask operator!=(Lanes a, Lanes b) {
  return each_mask([&](int i) { return a.part[i] != b.part[i]; });
}
QK_LANE_INLINE Mask operator&(Mask a, Mask b) {
  return each_mask([&](int i) { return a.part[i] & b.part[i]; });
}
QK_LANE_INLINE Mask operator|(Mask a, Mask b) {
  return each_mask([&](int i) { return a.part[i] | b.part[i]; });
}
QK_LANE_INLINE Lanes select(Mask m, Lanes a, Lanes b) {
  return each([&](int i) { return m.part[i] ? a.part[i] : b.part[i]; });
}
QK_LANE_INLINE bool any(Mask m) {
  IntPart found = m.part[0];
  for (int i = 1; i < kParts; ++i) found |= m.part[i];
  int32_t values[QK_PART];
  std::memcpy(values, &found, sizeof found);
  int32_t sum = 0;
  for (int i = 0; i < QK_PART; ++i) sum |= values[i];
  return sum != 0;
}

// a < b ? a : b, and a > b ? a : b, which is what the instructions do with NaN, too. (Masked: GCC 12 warns of its own
// unmasked ones, which leave lanes undefined that there are none of.)
QK_LANE_INLINE Lanes lesser(Lanes a, Lanes b) {
#if QK_PART == 16
  return each([&](int i) {
    return (FloatPart)_mm512_mask_min_ps((__m512)a.part[i], 0xffff, (__m512)a.part[i], (__m512)b.part[i]);
  });
#elif QK_PART == 8
  return each([&](int i) { return (FloatPart)_mm256_min_ps((__m256)a.part[i], (__m256)b.part[i]); });
#else
  return each([&](int i) { return a.part[i] < b.part[i] ? a.part[i] : b.part[i]; });
#endif
}
QK_LANE_INLINE Lanes greater(Lanes a, Lanes b) {
#if QK_PART == 16
  return each([&](int i) {
    return (FloatPart)_mm512_mask_max_ps((__m512)a.part[i], 0xffff, (__m512)a.part[i], (__m512)b.part[i]);
  });
#elif QK_PART == 8
  return each([&](int i) { return (FloatPart)_mm256_max_ps((__m256)a.part[i], (__m256)b.part[i]); });
#else
  return each([&](int i) { return a.part[i] > b.part[i] ? a.part[i] : b.part[i]; });
#endif
}
// A NaN becomes `low`.
QK_LANE_INLINE Lanes clamped(Lanes v, Lanes low, Lanes high) { return lesser(greater(v, low), high); }

QK_LANE_INLINE Lanes magnitude(Lanes v) {
  return each([&](int i) { return (FloatPart)((IntPart)v.part[i] & 0x7fffffff); });
}
QK_LANE_INLINE Lanes root(Lanes v) {
#if QK_PART == 16
  return each([&](int i) { return (FloatPart)_mm512_mask_sqrt_ps((__m512)v.part[i], 0xffff, (__m512)v.part[i]); });
#elif QK_PART == 8
  return each([&](int i) { return (FloatPart)_mm256_sqrt_ps((__m256)v.part[i]); });
#else
  float values[kLanes];
  store16(values, v);
  for (float& value : values) value = __builtin_sqrtf(value);
  return load16(values);
#endif
}

// ggml's rounding, half to even, as the bits of v + 1.5 * 2^23 say: beyond +-2^22 that is no rounding any more.
QK_LANE_INLINE Lanes nearest(Lanes v) {
  return each([&](int i) {
    const IntPart bits = (IntPart)(v.part[i] + 12582912.0f);
    return __builtin_convertvector((bits & 0x7fffff) - 0x400000, FloatPart);
  });
}
// The same within +-2^22.
QK_LANE_INLINE Lanes nearest_small(Lanes v) {
  const Lanes shift = all(12582912.0f);
  return (v + shift) - shift;
}
QK_LANE_INLINE Lanes truncated(Lanes v) {
  return each([&](int i) { return __builtin_convertvector(__builtin_convertvector(v.part[i], IntPart), FloatPart); });
}

// Sum over members in order, of f(member).
template <class F>
QK_LANE_INLINE Lanes total(int members, F f) {
  Lanes sum = all(0.0f);
  for (int i = 0; i < members; ++i) sum = sum + f(i);
  return sum;
}

}  // namespace
}  // namespace qkernels::cpu
