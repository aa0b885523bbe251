// Codes for the loops of avx2_words.h: how they are multiplied (Fit), and the digits of a quad, from codes as they are
// stored or from what take_apart left in L1.
#pragma once
#include <cstdint>
#include <cstring>

#include "avx2_vectors.h"
#include "int8_kinds.h"
#include "kernels.h"
#include "tile_int8.h"

namespace qkernels::cpu {
namespace {

struct Avx2Words : Avx2Sums {
  using Integers = int32_t __attribute__((vector_size(32)));

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
  static QK_INLINE Integers look_up(Integers table, Integers indices) {
    return (Integers)_mm256_shuffle_epi8((__m256i)table, (__m256i)indices);
  }
  static QK_INLINE Sum to_sum(Integers i) { return _mm256_cvtepi32_ps((__m256i)i); }
};
using Words = Avx2Words::Integers;

// How codes are multiplied: in so many digits, whose words are summed over so many quads.
struct Fit {
  int digits, quads;
};
constexpr Fit fit_of(Codes codes, bool short_table) {
  if (codes == Codes::kBytes || (codes == Codes::kTable && !short_table)) return {2, 8};
  if (codes == Codes::kSix) return {1, 2};
  return {1, codes == Codes::kFive || codes == Codes::kTable ? 4 : 8};
}

constexpr bool is_short(Codebook codebook) { return codebook == Codebook::kE2M1; }

// What codes, or the bytes of a table, are larger by than what they mean.
QK_INLINE int32_t bias_of(const Call& call) {
  if (call.codebook == Codebook::kIntegers) return 1 << (call.bits - 1);
  return is_short(call.codebook) ? 12 : 128;
}

// Codes as they are stored, from octet to octet of a tile.
template <Codes kCodes, Fit kFit>
struct FromCodes {
  static constexpr int kWidth = width_of(kCodes), kOctetBytes = kTileRows * kWidth;
  static constexpr bool kPlanes = kWidth != 4 && kWidth != 8, kTable = kCodes == Codes::kTable;
  // Whether codes are fetched ahead: the hardware does it better where they are read in the order of memory
  static constexpr bool kFetches = kPlanes || kTable;
  Words tables[2] = {};

  explicit FromCodes(const Call& call) {
    for (int d = 0; kTable && d < kFit.digits; ++d) {
      alignas(32) uint8_t bytes[32];
      for (int i = 0; i < 32; ++i) {
        const int value = static_cast<int>(codebook_value(call.codebook, i & 15) / integer_step(call.codebook));
        const int byte = value + bias_of(call);
        bytes[i] = static_cast<uint8_t>(kFit.digits == 1 ? byte : byte >> 4 * d & 15);
      }
      tables[d] = Avx2Words::lanes_at(bytes);
    }
  }

  // Digit d of both quads of octet `octet`, of the rows at `at`.
  QK_INLINE void quads(const uint8_t* at, int64_t octet, int d, Words (&quad)[2]) const {
    quads_at<Avx2Words, kTable ? Codes::kNibbles : kCodes>(at, octet, Avx2Words::integers(0), quad[0], quad[1]);
    for (Words& codes : quad) {
      if constexpr (kTable) codes = Avx2Words::look_up(tables[d], codes);
      if constexpr (kCodes == Codes::kBytes) codes = (d == 0 ? codes : codes >> 4) & kLow;
    }
  }
};

// Their digits, as take_apart leaves them.
template <Fit kFit>
struct FromPanel {
  static constexpr int kOctetBytes = kFit.digits * 2 * kLineBytes;
  static constexpr bool kPlanes = false;

  QK_INLINE void quads(const uint8_t* at, int64_t, int d, Words (&quad)[2]) const {
    for (int q = 0; q < 2; ++q) quad[q] = Avx2Words::lanes_at(at + (2 * d + q) * kLineBytes);
  }
};

constexpr int kChunk = 4;  // octets: the longest block of planes, and all that words are summed over

// Octets first ... end - 1 of a tile; a part is a span of 256 columns, or less at the end of a row.
struct Stretch {
  int64_t first, end;
};
constexpr int64_t kPartOctets = 32;

template <Codes kCodes, Fit kFit>
void take_apart(const FromCodes<kCodes, kFit>& from, const uint8_t* codes, int64_t octets, uint8_t* panel) {
  using From = FromCodes<kCodes, kFit>;
  const auto octet_at = [&](int64_t i) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int row = 0; row < kTileRows; row += Avx2Words::kRows) {
#pragma GCC unroll 2
      for (int d = 0; d < kFit.digits; ++d) {
        Words quad[2];
        from.quads(codes + row * kLaneBytes, i, d, quad);
        for (int q = 0; q < 2; ++q) {
          std::memcpy(panel + (2 * d + q) * kLineBytes + row * kLaneBytes, &quad[q], sizeof quad[q]);
        }
      }
    }
    codes += From::kOctetBytes, panel += FromPanel<kFit>::kOctetBytes;
  };
  for (; octets >= kChunk; octets -= kChunk) {
#pragma GCC unroll 4
    for (int i = 0; i < kChunk; ++i) octet_at(i);
  }
  for (int64_t i = 0; i < octets; ++i) octet_at(i);
}

}  // namespace
}  // namespace qkernels::cpu
