// fp16 and bf16 arithmetic in software, rounded once to nearest even, as the hardware does it.
#pragma once
#include <bit>
#include <cmath>
#include <cstdint>
#ifdef __F16C__
#include <immintrin.h>
#endif

namespace qkernels::host {

inline uint32_t float_bits(float f) { return std::bit_cast<uint32_t>(f); }
inline float bits_float(uint32_t u) { return std::bit_cast<float>(u); }

// double to float, rounded to odd: an inexact result takes the neighbour with an odd last bit. Rounding that once more
// to a format with at least two bits less rounds the double correctly (Boldo, Melquiond: "Emulation of FMA and
// correctly rounded sums", 2008), where double -> float -> half to nearest would round ties twice.
inline float round_to_odd(double d) {
  const auto f = static_cast<float>(d);
  if (static_cast<double>(f) == d || !std::isfinite(f)) return f;
  uint32_t bits = float_bits(f);
  if (std::fabs(static_cast<double>(f)) > std::fabs(d)) --bits;
  return bits_float(bits | 1);
}

struct Fp16 {
#ifdef __F16C__
  static float to_float(uint16_t h) { return _cvtsh_ss(h); }
  static uint16_t from_float(float f) { return _cvtss_sh(f, _MM_FROUND_TO_NEAREST_INT); }
#else
  static float to_float(uint16_t h) { return static_cast<float>(std::bit_cast<_Float16>(h)); }
  static uint16_t from_float(float f) { return std::bit_cast<uint16_t>(static_cast<_Float16>(f)); }
#endif
};

struct Bf16 {
  static float to_float(uint16_t h) { return bits_float(static_cast<uint32_t>(h) << 16); }
  static uint16_t from_float(float f) {
    if (std::isnan(f)) return 0x7fff;  // what cvt.rn.bf16.f32 gives for every NaN
    const uint32_t bits = float_bits(f);
    return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
  }
};

template <class T>
inline uint32_t pack(float low, float high) {
  return T::from_float(low) | static_cast<uint32_t>(T::from_float(high)) << 16;
}
template <class T>
inline float low(uint32_t pair) {
  return T::to_float(static_cast<uint16_t>(pair));
}
template <class T>
inline float high(uint32_t pair) {
  return T::to_float(static_cast<uint16_t>(pair >> 16));
}

// a * b + c: the product of two 11-bit (8-bit) significands is exact in double; the sum may not be, but double has more
// than two bits to spare over the exact sum's rounding to odd only if the sum is exact or its tail is sticky. For fp16
// the exponents span 2^-48 ... 2^32, so product and sum fit 53 bits but for a tail below half a unit in the last place;
// for bf16 the spread is unbounded, so the tail is made sticky by hand.
template <class T>
inline uint16_t fma(uint16_t a, uint16_t b, uint16_t c) {
  const double product = static_cast<double>(T::to_float(a)) * T::to_float(b);
  const double addend = T::to_float(c);
  double sum = product + addend;
  // The error of the sum, exactly (Knuth's TwoSum). It is 0 where the sum is.
  const double part = sum - product;
  const double error = (product - (sum - part)) + (addend - part);
  if (error != 0 && std::isfinite(sum)) {
    auto bits = std::bit_cast<uint64_t>(sum);
    if ((error < 0) != (sum < 0)) --bits;  // towards zero
    sum = std::bit_cast<double>(bits | 1);
  }
  return T::from_float(round_to_odd(sum));
}

template <class T>
inline uint32_t fma2(uint32_t a, uint32_t b, uint32_t c) {
  const auto half = [&](int s) {
    return static_cast<uint32_t>(
        fma<T>(static_cast<uint16_t>(a >> s), static_cast<uint16_t>(b >> s), static_cast<uint16_t>(c >> s)));
  };
  return half(0) | half(16) << 16;
}

}  // namespace qkernels::host
