// Codes that are indices into tables: of IQ4_NL and IQ4_XS, and E2M1 with its powers of two.
#pragma once
#include <cmath>

#include "gguf_lanes.h"
#include "rows.h"

namespace qkernels::cpu {
namespace {

// --- IQ4's table: which entry is nearest, the upper one of two that are as near ---

alignas(64) constexpr float kIq4Table[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
// Entry i + 1 is nearer from here on; the last stands for none.
alignas(64) constexpr float kIq4Between[16] = {-115.5f, -93.5f, -74,   -57,   -42, -28.5f, -16, -4.5f,
                                               7,       19,     31.5f, 45.5f, 61,  79,     101, INFINITY};

struct Entry {
  Lanes index, value;
};
QK_LANE_INLINE Entry nearest_entry(Lanes x) {
#if QK_PART == 16
  const __m512 between = _mm512_load_ps(kIq4Between), table = _mm512_load_ps(kIq4Table);
  const __m512 v = (__m512)x.part[0];
  __m512i index = _mm512_setzero_si512();
  for (int bit = 8; bit > 0; bit /= 2) {
    const __m512i at = _mm512_add_epi32(index, _mm512_set1_epi32(bit - 1));
    const __mmask16 upper = _mm512_cmp_ps_mask(v, _mm512_maskz_permutexvar_ps(0xffff, at, between), _CMP_GE_OQ);
    index = _mm512_mask_add_epi32(index, upper, index, _mm512_set1_epi32(bit));
  }
  Entry out;
  out.index.part[0] = (FloatPart)_mm512_maskz_cvtepi32_ps(0xffff, index);
  out.value.part[0] = (FloatPart)_mm512_maskz_permutexvar_ps(0xffff, index, table);
  return out;
#else
  Lanes index = all(0.0f), value = all(kIq4Table[0]);
  for (int i = 0; i < 15; ++i) {
    const Mask upper = x >= all(kIq4Between[i]);
    index = select(upper, all(static_cast<float>(i + 1)), index);
    value = select(upper, all(kIq4Table[i + 1]), value);
  }
  return {index, value};
#endif
}

inline float half_of_e8m0(int e) { return as_float(e < 2 ? 0x00200000u << e : static_cast<uint32_t>(e - 1) << 23); }

constexpr float kE2M1[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

// Codes of E2M1 with scale d, the first of those with the least error, and that error.
QK_LANE_INLINE void e2m1_codes(const Lanes* x, Lanes d, Lanes* codes, Lanes* errors) {
  for (int i = 0; i < 32; ++i) {
    Lanes code = all(0.0f), best = magnitude(x[i]);
    for (int k = 0; k < 16; ++k) {
      const Lanes error = magnitude(all(kE2M1[k]) * d - x[i]);
      const Mask better = error < best;
      code = select(better, all(static_cast<float>(k)), code), best = select(better, error, best);
    }
    codes[i] = code, errors[i] = best;
  }
}

// floor(log2(largest)) + 125, 0 ... 254: the exponent whose largest value, 12, is just above.
inline float mxfp4_exponent(float largest) {
  if (!(largest > 0.0f)) return 0.0f;
  const float power = std::floor(static_cast<float>(std::log2(static_cast<double>(largest)))) + 125.0f;
  return power < 0.0f ? 0.0f : power > 254.0f ? 254.0f : power;
}

}  // namespace
}  // namespace qkernels::cpu
