// AVX2 for int8 activations: 8 rows a vector. vpmaddubsw multiplies unsigned with signed bytes and adds two products in
// int16, where it saturates; no sum below can reach that:
//   4 bit  codes 0 ... 15 as they are: four products are at most 4 * 15 * 127 = 7620
//   8 bit  codes 0 ... 255 would give 2 * 255 * 127 = 64770. Signed codes -128 ... 127 do not: |code| times x with the
//          code's sign is at most 2 * 128 * 127 = 32512 < 32767. x is never -128, which has no negative.
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
  using Integers = __m256i;
  // 16 registers: 2 rows x 4 vectors of sums, and operands
  static constexpr int kTokens = 2, kDecodeTokens = 1, kByteBias = 128;
  static constexpr int kDecodeVectors[kDecodeTokens] = {8};

  static QK_INLINE Integers integers(int32_t i) { return _mm256_set1_epi32(i); }
  static QK_INLINE Integers lanes_at(const uint8_t* at) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
  }
  static QK_INLINE Integers quad(const int8_t* x) {
    int32_t four;
    std::memcpy(&four, x, 4);
    return _mm256_set1_epi32(four);
  }
  static QK_INLINE Sum to_sum(Integers i) { return _mm256_cvtepi32_ps(i); }
  static QK_INLINE Integers add_pairs(Integers sum, Integers words) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(words, _mm256_set1_epi16(1)));
  }
  static QK_INLINE Integers dot_bytes(Integers sum, Integers bytes, Integers x) {
    const Integers code = _mm256_xor_si256(bytes, _mm256_set1_epi8(-128));  // as signed bytes: bytes - 128
    return add_pairs(sum, _mm256_maddubs_epi16(_mm256_abs_epi8(code), _mm256_sign_epi8(x, code)));
  }
  static QK_INLINE Integers dot_nibbles(Integers sum, Integers nibbles, Integers x0, Integers x1) {
    const Integers mask = _mm256_set1_epi8(15);
    const Integers low = _mm256_maddubs_epi16(_mm256_and_si256(nibbles, mask), x0);
    const Integers high = _mm256_maddubs_epi16(_mm256_and_si256(_mm256_srli_epi16(nibbles, 4), mask), x1);
    return add_pairs(sum, _mm256_add_epi16(low, high));
  }
};

}  // namespace

const Kernels kAvx2Int8 = {"avx2", Type::kFloat, stage_int8, multiply_int8<Avx2Int8>, kLittleWork};

}  // namespace qkernels::cpu

QK_TARGET_END
