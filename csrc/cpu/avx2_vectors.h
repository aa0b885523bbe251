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
  static QK_INLINE Sum fma(Sum a, Sum b, Sum c) { return _mm256_fmadd_ps(a, b, c); }

  // 8 consecutive values as fp32
  static QK_INLINE Sum widen(Type type, const void* base, int64_t i) {
    if (type == Type::kFloat) return load(static_cast<const float*>(base) + i);
    if (type == Type::kUInt8) {
      const auto* bytes = reinterpret_cast<const __m128i*>(static_cast<const uint8_t*>(base) + i);
      return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(bytes)));
    }
    const __m128i words = _mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const uint16_t*>(base) + i));
    if (type == Type::kHalf) return _mm256_cvtph_ps(words);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(words), 16));
  }
};

}  // namespace
}  // namespace qkernels::cpu
