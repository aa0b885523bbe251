// AVX-512 with 16 rows a vector: the fp32 sums, which both of its kernel tables use, and products in fp32.
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
  static constexpr int kDecodeVectors[kDecodeRows] = {4, 4, 4, 4, 2, 2, 2, 2};

  static QK_INLINE Sum zero() { return _mm512_setzero_ps(); }
  static QK_INLINE Sum set1(float f) { return _mm512_set1_ps(f); }
  static QK_INLINE Sum load(const float* p) { return _mm512_loadu_ps(p); }
  static QK_INLINE void store(float* p, Sum v) { _mm512_storeu_ps(p, v); }
  static QK_INLINE Sum sub(Sum a, Sum b) { return _mm512_sub_ps(a, b); }
  static QK_INLINE Sum mul(Sum a, Sum b) { return _mm512_mul_ps(a, b); }
  static QK_INLINE Sum fma(Sum a, Sum b, Sum c) { return _mm512_fmadd_ps(a, b, c); }

  // 16 consecutive values as fp32
  static QK_INLINE Sum widen(Type type, const void* base, int64_t i) {
    if (type == Type::kFloat) return load(static_cast<const float*>(base) + i);
    if (type == Type::kUInt8) {
      const auto* bytes = reinterpret_cast<const __m128i*>(static_cast<const uint8_t*>(base) + i);
      return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(bytes)));
    }
    const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(static_cast<const uint16_t*>(base) + i));
    if (type == Type::kHalf) return _mm512_cvtph_ps(words);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16));
  }
};

QK_INLINE __m512i lanes(const uint8_t* at) { return _mm512_loadu_si512(at); }
QK_INLINE __m512i shifted(__m512i v, int n) { return (__m512i)((Lanes)v >> n); }

struct RawNibbles {
  using Raw = __m512i;
  static constexpr int64_t kOctetBytes = kTileRows * kLaneBytes, kMemoryBytes = kOctetBytes;
  static QK_INLINE Raw load(const uint8_t* at) { return lanes(at); }
};

struct RawBytes {
  struct Raw {
    __m512i quad[2];
  };
  static constexpr int64_t kOctetBytes = 2 * kTileRows * kLaneBytes, kMemoryBytes = kOctetBytes;
  static QK_INLINE Raw load(const uint8_t* at) { return {{lanes(at), lanes(at + kTileRows * kLaneBytes)}}; }
};

// Zeros in fp32: integer zero points, or 2^(bits-1)
struct FloatZeros {
  using Zero = __m512;
  const Problem& p;
  explicit FloatZeros(const Problem& problem) : p(problem) {}
  QK_INLINE Zero zero(int64_t at) const {
    return p.zero_type == Type::kUInt8 ? Avx512Sums::widen(Type::kUInt8, p.zeros, at)
                                       : Avx512Sums::set1(static_cast<float>(1 << (p.bits - 1)));
  }
};

// code - zero of the byte at bits shift ... shift + 7 of each lane, in fp32
QK_INLINE __m512 byte_value(__m512i lanes, int shift, __m512 zero) {
  const __m512i code = _mm512_and_si512(shifted(lanes, shift), _mm512_set1_epi32(255));
  return _mm512_sub_ps(_mm512_cvtepi32_ps(code), zero);
}

// --- products in fp32
// ---------------------------------------------------------------------------------------------------

struct Avx512 : Avx512Sums {
  using X = float;
  using Weight = __m512;
  using Input = __m512;
  static constexpr int kStep = 1;
  static QK_INLINE Input broadcast(const X* x) { return _mm512_set1_ps(*x); }
  static QK_INLINE Sum multiply_add(Sum sum, Weight w, Input x) { return _mm512_fmadd_ps(w, x, sum); }
  static QK_INLINE Weight load_weight(const uint8_t* p) { return _mm512_loadu_ps(p); }
  static QK_INLINE void store_weight(uint8_t* p, Weight w) { _mm512_storeu_ps(p, w); }
};

// A look-up by the low 4 bits of each lane needs no mask: vpermps ignores the others.
QK_INLINE __m512 table_of(int zero) {
  alignas(64) float values[16];
  for (int i = 0; i < 16; ++i) values[i] = static_cast<float>(i - zero);
  return _mm512_load_ps(values);
}
QK_INLINE __m512 nibble_value(__m512i lanes, int s, __m512 table) {
  return _mm512_permutexvar_ps(shifted(lanes, 16 * (s & 1) + 4 * (s >> 1)), table);
}

struct SymmetricNibbles : RawNibbles {
  struct Zero {};
  __m512 table;
  explicit SymmetricNibbles(const Problem& p) : table(table_of(1 << (p.bits - 1))) {}
  QK_INLINE Zero zero(int64_t) const { return {}; }
  QK_INLINE __m512 value(Raw raw, int s, Zero) const { return nibble_value(raw, s, table); }
};

struct NibblesWithZeros : RawNibbles, FloatZeros {
  __m512 table;
  explicit NibblesWithZeros(const Problem& p) : FloatZeros(p), table(table_of(0)) {}
  QK_INLINE __m512 value(Raw raw, int s, Zero zero) const { return _mm512_sub_ps(nibble_value(raw, s, table), zero); }
};

struct FloatBytes : RawBytes, FloatZeros {
  using FloatZeros::FloatZeros;
  QK_INLINE __m512 value(const Raw& raw, int s, Zero zero) const {
    return byte_value(raw.quad[s >> 2], 16 * (s & 1) + 8 * (s >> 1 & 1), zero);
  }
};

constexpr auto multiply_fp32 = multiply<Avx512, SymmetricNibbles, NibblesWithZeros, FloatBytes>;

}  // namespace
}  // namespace qkernels::cpu
