// AVX-512 with VNNI: int8 activations, 16 rows a vector. vpdpbusd multiplies unsigned bytes (codes, as they are stored)
// with signed ones (x) and adds four products to each int32 lane.
#include <cstdint>
#include <cstring>

#include "target.h"
QK_TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")

#include "avx512_vectors.h"
#include "kernels.h"
#include "tile_int8.h"

namespace qkernels::cpu {
namespace {

struct Vnni : Avx512Sums {
  using Integers = int32_t __attribute__((vector_size(64)));
  // 32 registers: 6 rows x 2 vectors of sums, as many fp32 totals, codes and x. One to four rows of x work on one tile
  // at a time, since one stream of memory is read faster than two or four (Zen 4, one core, W4A8 in groups of 128: one
  // row 31 GB/s, with two tiles and codes fetched 3 KB ahead 24, where a plain sum reads 33; four rows 24 and 20).
  static constexpr int kTokens = 6, kDecodeTokens = 4, kByteBias = 0;
  static constexpr bool kPairs = false, kOneStream = true;
  static constexpr int kDecodeVectors[kDecodeTokens] = {2, 2, 2, 2};

  static QK_INLINE Integers integers(int32_t i) { return (Integers)_mm512_set1_epi32(i); }
  static QK_INLINE Integers lanes_at(const uint8_t* at) { return (Integers)lanes(at); }
  static QK_INLINE Integers widen_bytes(const uint8_t* at) {
    return (Integers)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
  }
  static QK_INLINE Integers quad(const int8_t* x) {
    int32_t four;
    std::memcpy(&four, x, 4);
    return integers(four);
  }
  static QK_INLINE Sum to_sum(Integers i) { return _mm512_cvtepi32_ps((__m512i)i); }
  static QK_INLINE Integers dot_bytes(Integers sum, Integers bytes, Integers x) {
    return (Integers)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)bytes, (__m512i)x);
  }
  static QK_INLINE Integers dot_small(Integers sum, Integers bytes, Integers x) { return dot_bytes(sum, bytes, x); }
  static QK_INLINE Integers look_up(Integers table, Integers indices) {
    return (Integers)_mm512_shuffle_epi8((__m512i)table, (__m512i)indices);
  }
  static QK_INLINE Integers dot_nibbles(Integers sum, Integers nibbles, Integers x0, Integers x1) {
    return dot_bytes(dot_bytes(sum, nibbles & kLow, x0), nibbles >> 4 & kLow, x1);
  }
};

}  // namespace

const Kernels kAvx512Vnni = {"avx512_vnni", Type::kFloat, stage_int8, multiply_int8<Vnni>, kLittleWork};

}  // namespace qkernels::cpu

QK_TARGET_END
