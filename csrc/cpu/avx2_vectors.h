// AVX2 with 8 rows a vector: what products in fp32 (avx2.cpp) and in int8 (avx2_int8.cpp) have in common.
#pragma once
#include <immintrin.h>

#include "tile_gemm.h"

namespace qkernels::cpu {
namespace {

struct Avx2Sums {
  using Sum = __m256;
  static constexpr int kRows = 8;

  static QK_INLINE Sum zero() { return _mm256_setzero_ps(); }
  static QK_INLINE Sum set1(float f) { return _mm256_set1_ps(f); }
  static QK_INLINE Sum load(const float* p) { return _mm256_loadu_ps(p); }
  static QK_INLINE void store(float* p, Sum v) { _mm256_storeu_ps(p, v); }
  static QK_INLINE Sum sub(Sum a, Sum b) { return _mm256_sub_ps(a, b); }
  static QK_INLINE Sum mul(Sum a, Sum b) { return _mm256_mul_ps(a, b); }
  static QK_INLINE Sum div(Sum a, Sum b) { return _mm256_div_ps(a, b); }
  static QK_INLINE Sum fma(Sum a, Sum b, Sum c) { return _mm256_fmadd_ps(a, b, c); }

  // 8-bit floats: see from_e8m0 and from_e4m3 in rows.h
  static QK_INLINE Sum widen_bytes_of(Type type, const uint8_t* at) {
    const __m256i byte = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(at)));
    if (type == Type::kE8M0) {
      const __m256i least = _mm256_cmpeq_epi32(byte, _mm256_setzero_si256());
      const __m256i subnormal = _mm256_and_si256(least, _mm256_set1_epi32(1 << 22));
      return _mm256_castsi256_ps(_mm256_or_si256(_mm256_slli_epi32(byte, 23), subnormal));
    }
    return small_floats(byte, 20, 0x1p120f);
  }
  // The low byte of each lane: sign, then 7 bits that `shift` puts where a float's exponent ends; `unit` repairs the
  // bias
  static QK_INLINE Sum small_floats(__m256i byte, int shift, float unit) {
    const __m256i magnitude = _mm256_slli_epi32(_mm256_and_si256(byte, _mm256_set1_epi32(0x7f)), shift);
    const __m256i sign = _mm256_slli_epi32(_mm256_and_si256(byte, _mm256_set1_epi32(0x80)), 24);
    return _mm256_or_ps(_mm256_mul_ps(_mm256_castsi256_ps(magnitude), set1(unit)), _mm256_castsi256_ps(sign));
  }

  // 8 consecutive values as fp32
  static QK_INLINE Sum widen(Type type, const void* base, int64_t i) {
    if (type == Type::kFloat) return load(static_cast<const float*>(base) + i);
    if (type == Type::kHalf || type == Type::kBFloat16) {
      const auto* at = static_cast<const uint16_t*>(base) + i;
      const __m128i words = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
      if (type == Type::kHalf) return _mm256_cvtph_ps(words);
      return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(words), 16));
    }
    const auto* at = static_cast<const uint8_t*>(base) + i;
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(at));
    if (type == Type::kUInt8) return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes));
    if (type == Type::kInt8) return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
    return widen_bytes_of(type, at);
  }
};

}  // namespace
}  // namespace qkernels::cpu
