// AVX2 for int8 activations: 8 rows a vector. vpmaddubsw multiplies unsigned with signed bytes and adds two products in
// int16, where it saturates; no sum below can reach that:
//   4 bit  codes 0 ... 15 as they are: four products are at most 4 * 15 * 127 = 7620
//   6 bit  and less, in planes: two products are at most 2 * 63 * 127 = 16002
//   8 bit  codes 0 ... 255 would give 2 * 255 * 127 = 64770. Signed codes -128 ... 127 do not: |code| times x with the
//          code's sign is at most 2 * 128 * 127 = 32512 < 32767, as long as x is never -128, which has no negative.
// Where x may be -128, 4 bits give at most 4 * 15 * 128 = 7680 and planes 2 * 63 * 128 = 16128; Avx2Wide has the bytes.
#include <cstdint>
#include <cstring>

#include "target.h"
QK_TARGET_BEGIN("avx2,fma,f16c")

#include <immintrin.h>

#include "avx2_vectors.h"
#include "kernels.h"
#include "tile_int8.h"

namespace qkernels::cpu {
namespace {

struct Avx2Int8 : Avx2Sums {
  using Integers = int32_t __attribute__((vector_size(32)));
  // 16 registers: 2 rows x 4 vectors of sums, and operands. One row of x works on one tile, and so on one stream of
  // memory: a sum waits one cycle, for its addition alone (Zen 4, one core: Q5_K 21 GB/s, with two tiles 15, Q6_K 23
  // and 19, W4A8 26 and 24).
  static constexpr int kTokens = 2, kDecodeTokens = 1, kByteBias = 128;
  static constexpr bool kPairs = false, kOneStream = true, kApart = false;
  static constexpr int kDecodeVectors[kDecodeTokens] = {4};

  static QK_INLINE Integers integers(int32_t i) { return (Integers)_mm256_set1_epi32(i); }
  static QK_INLINE Integers lanes_at(const uint8_t* at) {
    return (Integers)_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
  }
  static QK_INLINE Integers widen_bytes(const uint8_t* at) {
    return (Integers)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(at)));
  }
  static QK_INLINE Integers quad(const int8_t* x) {
    int32_t four;
    std::memcpy(&four, x, 4);
    return integers(four);
  }
  static QK_INLINE Sum to_sum(Integers i) { return _mm256_cvtepi32_ps((__m256i)i); }
  static QK_INLINE Integers add_pairs(Integers sum, __m256i words) {
    return sum + (Integers)_mm256_madd_epi16(words, _mm256_set1_epi16(1));
  }
  static QK_INLINE Integers dot_bytes(Integers sum, Integers bytes, Integers x) {
    const __m256i code = _mm256_xor_si256((__m256i)bytes, _mm256_set1_epi8(-128));  // as signed bytes: bytes - 128
    return add_pairs(sum, _mm256_maddubs_epi16(_mm256_abs_epi8(code), _mm256_sign_epi8((__m256i)x, code)));
  }
  static QK_INLINE __m256i dot_low(Integers nibbles, Integers x) {
    return _mm256_maddubs_epi16((__m256i)(nibbles & kLow), (__m256i)x);
  }
  static QK_INLINE Integers dot_small(Integers sum, Integers bytes, Integers x) {
    return add_pairs(sum, _mm256_maddubs_epi16((__m256i)bytes, (__m256i)x));
  }
  static QK_INLINE Integers look_up(Integers table, Integers indices) {
    return (Integers)_mm256_shuffle_epi8((__m256i)table, (__m256i)indices);
  }
  static QK_INLINE Integers dot_nibbles(Integers sum, Integers nibbles, Integers x0, Integers x1) {
    return add_pairs(sum, _mm256_add_epi16(dot_low(nibbles, x0), dot_low(nibbles >> 4, x1)));
  }
};

// Bytes as they are, their low seven bits and their highest one by themselves: pairs are at most 2 * 127 * 128 = 32512,
// and 128 * x twice, which is -32768 to 32512.
struct Avx2Wide : Avx2Int8 {
  static constexpr int kByteBias = 0;

  static QK_INLINE Integers dot_bytes(Integers sum, Integers bytes, Integers x) {
    const __m256i highest = _mm256_set1_epi8(-128), codes = (__m256i)bytes;
    const __m256i high = _mm256_maddubs_epi16(_mm256_and_si256(codes, highest), (__m256i)x);
    const __m256i low = _mm256_maddubs_epi16(_mm256_andnot_si256(highest, codes), (__m256i)x);
    return add_pairs(add_pairs(sum, low), high);
  }
};

void multiply(const Call& call, int64_t tile, int tiles, int64_t m0, int64_t m1) {
  const bool table = call.codebook != Codebook::kIntegers, bytes = planes_of(call.bits).low == 8;
  if (reaches_128(call.rounding) && table) {
    if (call.factors == Factors::kIq4Xs) {
      return multiply_int8_tiles<Avx2Wide, Codes::kTable, Zeros::kNone, Scales::kProducts>(call, tile, tiles, m0, m1);
    }
    return multiply_int8_tiles<Avx2Wide, Codes::kTable, Zeros::kNone, Scales::kStored>(call, tile, tiles, m0, m1);
  }
  if (reaches_128(call.rounding) && bytes) {
    return multiply_int8_width<Avx2Wide, Codes::kBytes>(call, tile, tiles, m0, m1);
  }
  multiply_int8<Avx2Int8>(call, tile, tiles, m0, m1);
}

}  // namespace

const Kernels kAvx2Int8 = {"avx2", Type::kFloat, stage_int8, multiply, kLittleWork};

}  // namespace qkernels::cpu

QK_TARGET_END
