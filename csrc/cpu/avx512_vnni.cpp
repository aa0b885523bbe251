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
  using Integers = __m512i;
  // 32 registers: 6 rows x 2 vectors of sums, as many fp32 totals, and codes; 10 rows spilled and were slower.
  static constexpr int kTokens = 6, kDecodeTokens = 4, kByteBias = 0;
  static constexpr int kDecodeVectors[kDecodeTokens] = {8, 4, 4, 4};

  static QK_INLINE Integers integers(int32_t i) { return _mm512_set1_epi32(i); }
  static QK_INLINE Integers lanes_at(const uint8_t* at) { return lanes(at); }
  static QK_INLINE Integers quad(const int8_t* x) {
    int32_t four;
    std::memcpy(&four, x, 4);
    return _mm512_set1_epi32(four);
  }
  static QK_INLINE Sum to_sum(Integers i) { return _mm512_cvtepi32_ps(i); }
  static QK_INLINE Integers dot_bytes(Integers sum, Integers bytes, Integers x) {
    return _mm512_dpbusd_epi32(sum, bytes, x);
  }
  static QK_INLINE Integers dot_nibbles(Integers sum, Integers nibbles, Integers x0, Integers x1) {
    const Integers mask = _mm512_set1_epi8(15);
    sum = _mm512_dpbusd_epi32(sum, _mm512_and_si512(nibbles, mask), x0);
    return _mm512_dpbusd_epi32(sum, _mm512_and_si512(shifted(nibbles, 4), mask), x1);
  }
};

}  // namespace

const Kernels kAvx512Vnni = {"avx512_vnni", Type::kFloat, stage_int8, multiply_int8<Vnni>, kLittleWork};

}  // namespace qkernels::cpu

QK_TARGET_END
