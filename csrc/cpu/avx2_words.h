// AVX2's loops for int8 activations. vpmaddubsw multiplies unsigned with signed bytes and adds two products in an
// int16, a *word*; four columns of a row, a quad, are two words. Words are summed as they are for as long as they fit,
// and one vpmaddwd adds the two of a lane in int32 and multiplies them with what the group asks for: 1, or its small
// factor. A core of a Zen 4 does two of either a cycle and four additions, so that widening every product would be half
// the time.
//
//   codes           largest  2 * largest * 128 * quads
//   2 to 4 bits     15       8 quads: 30720
//   5 bits          31       4: 31744
//   6 bits          63       2: 32256
//   a short table   24       4: 24576        (e2m1: twice its values, plus 12)
//   bytes, tables   15, 15   8: 30720, each of two digits of four bits, of which the high one counts sixteenfold
//
// The last are 18 multiplications for 32 columns. Signed bytes (vpsignb, which has the multipliers' ports, vpmaddubsw
// and vpmaddwd for every quad) were 24.
//
// Where scales are products, a span's sums are integers to its end: at most 256 columns of 63 * 31 * 127, or 128 * 63 *
// 127, or 32 * 127 * 127, far below 2^31. Its outer factors meet them once.
//
// Up to eight rows of x take codes as they come; more meet codes that are taken apart once, a part at a time, as digits
// in L1 (multiply_tile). All add in the same order: a row of y does not depend on M.
#pragma once
#include <cstdint>
#include <cstring>

#include "avx2_digits.h"

namespace qkernels::cpu {
namespace {

// Not std::min: its symbol, compiled for AVX2, could be the one that the linker keeps for all.
constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

QK_INLINE Words products(Words codes, Words x) { return (Words)_mm256_maddubs_epi16((__m256i)codes, (__m256i)x); }
QK_INLINE Words add_words(Words a, Words b) {
  Words sum = (Words)_mm256_add_epi16((__m256i)a, (__m256i)b);
  asm("" : "+x"(sum));  // gcc 12 would add products to each other first, all of which it keeps for that
  return sum;
}
QK_INLINE Words widened(Words words, Words factor) { return (Words)_mm256_madd_epi16((__m256i)words, (__m256i)factor); }

// sums[t][v] += factor[v] times the sum over kOctets octets, whose words fit.
template <Fit kFit, int kOctets, int kVectors, int kTokens, class Source>
QK_INLINE void add_run(const Source& source, const uint8_t* codes, int64_t octet, const int8_t* x, int64_t x_stride,
                       const Words (&factor)[kVectors], Words (&sums)[kTokens][kVectors]) {
  constexpr int kAtOnce = kTokens == 1 ? kFit.digits : 1;  // digits; as many as there are registers for
#pragma GCC unroll 2
  for (int begin = 0; begin < kFit.digits; begin += kAtOnce) {
    asm("" : "+r"(x));  // the second digit loads x again: gcc would keep all of it, on the stack
    Words words[kAtOnce][kTokens][kVectors];
#pragma GCC unroll 4
    for (int i = 0; i < kOctets; ++i) {
#pragma GCC unroll 2
      for (int q = 0; q < 2; ++q) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
#pragma GCC unroll 2
          for (int d = 0; d < kAtOnce; ++d) {
            Words quad[2];
            source.quads(codes + i * Source::kOctetBytes + v * Avx2Words::kRows * kLaneBytes, octet + i, begin + d,
                         quad);
#pragma GCC unroll 4
            for (int t = 0; t < kTokens; ++t) {
              const Words product = products(quad[q], Avx2Words::quad(x + t * x_stride + i * kOctet + 4 * q));
              words[d][t][v] = i + q == 0 ? product : add_words(words[d][t][v], product);
            }
          }
        }
      }
    }
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
#pragma GCC unroll 2
      for (int d = 0; d < kAtOnce; ++d) {
        const Words times = begin + d == 0 ? factor[v] : (Words)_mm256_slli_epi16((__m256i)factor[v], 4);
#pragma GCC unroll 4
        for (int t = 0; t < kTokens; ++t) sums[t][v] += widened(words[d][t][v], times);
      }
    }
  }
}

// What rows of x come to, [token][row of the tile]: groups that are done, in fp32, and the one that goes on.
struct Totals {
  float* done;
  int32_t* open;
};

// Where a call of the loops below is: a tile, rows m ... of x, a part of the columns, whose codes are at `codes`. For
// every chunk `fetched` bytes from `ahead` on are fetched, one stretch after the other.
struct Place {
  int64_t tile, m;
  Stretch part;
  const uint8_t *codes, *ahead;
  int64_t fetched;

  QK_INLINE void fetch() {
    for (int64_t line = 0; line < fetched; line += 64) __builtin_prefetch(ahead + line);
    ahead += fetched;
  }
};

// Groups with scales of their own.
template <Fit kFit, Zeros kZeros, int kVectors, int kTokens, class Source>
void multiply_groups(const Call& call, const Source& source, Place place, const Totals& totals) {
  using V = Avx2Words;
  const int64_t x_stride = call.staged.row_stride;
  const int8_t* x = static_cast<const int8_t*>(call.staged.data) + place.m * x_stride;
  const Stretch part = place.part;
  const int32_t bias = bias_of(call);
  Words ones[kVectors];
  for (Words& one : ones) one = V::integers(0x00010001);
  for (int row = 0; row < kTileRows; row += kVectors * V::kRows) {
    const uint8_t* codes = place.codes + row * kLaneBytes;
    int64_t octet = part.first, g = call.G == 1 ? 0 : octet * kOctet / call.group;
    for (; octet < part.end; ++g) {
      const Group group = group_of(call, g);
      const int64_t first = group.first / kOctet, end = first + group.octets, stop = least(end, part.end);
      prefetch_group(call, call.scales, call.scale_bytes, place.tile, place.tile + 1, g);
      Words sums[kTokens][kVectors];
#pragma GCC unroll 4
      for (int t = 0; t < kTokens; ++t) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          const int32_t* open = totals.open + t * kTileRows + row + v * V::kRows;
          sums[t][v] = octet == first ? V::integers(0) : V::lanes_at(reinterpret_cast<const uint8_t*>(open));
        }
      }
      while (octet < stop) {
        if (octet + kChunk <= stop && (!Source::kPlanes || octet % kChunk == 0)) {
          constexpr int kRunOctets = kFit.quads / 2;
          place.fetch();
#pragma GCC unroll 4
          for (int i = 0; i < kChunk; i += kRunOctets) {
            add_run<kFit, kRunOctets, kVectors, kTokens>(source, codes + i * Source::kOctetBytes, i,
                                                         x + (octet + i) * kOctet, x_stride, ones, sums);
          }
          octet += kChunk, codes += kChunk * Source::kOctetBytes;
        } else {
          add_run<kFit, 1, kVectors, kTokens>(source, codes, octet, x + octet * kOctet, x_stride, ones, sums);
          octet += 1, codes += Source::kOctetBytes;
        }
      }
      const int32_t* x_sums = call.x_sums + g * call.M + place.m;
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const int64_t of_tile = row + v * V::kRows;
        if (octet < end) {
          for (int t = 0; t < kTokens; ++t) {
            std::memcpy(totals.open + t * kTileRows + of_tile, &sums[t][v], sizeof sums[t][v]);
          }
          continue;
        }
        const Scaling<V> by = scaling_of<V, kZeros, Scales::kStored>(call, place.tile, g, of_tile);
        Words zero = V::integers(bias);
        if constexpr (kZeros == Zeros::kIntegers) {
          zero =
              V::widen_bytes(static_cast<const uint8_t*>(call.zeros) + (place.tile * call.G + g) * kTileRows + of_tile);
        }
#pragma GCC unroll 4
        for (int t = 0; t < kTokens; ++t) {
          float* total = totals.done + t * kTileRows + of_tile;
          const Words left_out = kZeros == Zeros::kIntegers ? zero * x_sums[t] : V::integers(bias * x_sums[t]);
          V::Sum sum = V::fma(V::to_sum(sums[t][v] - left_out), by.scale, V::load(total));
          if (kZeros == Zeros::kRest) sum = V::fma(V::to_sum(V::integers(x_sums[t])), by.rest, sum);
          V::store(total, sum);
        }
      }
    }
  }
}

// Small factors of eight rows at `at`, each in both words of a lane.
template <bool kSigned>
QK_INLINE Words doubled(const void* base, int64_t at) {
  int64_t eight;
  std::memcpy(&eight, static_cast<const uint8_t*>(base) + at, 8);
  const __m256i bytes = _mm256_set1_epi64x(eight);
  constexpr char kNone = -128;
  if constexpr (kSigned) {
    const __m256i high =
        _mm256_setr_epi8(kNone, 0, kNone, 0, kNone, 1, kNone, 1, kNone, 2, kNone, 2, kNone, 3, kNone, 3, kNone, 4,
                         kNone, 4, kNone, 5, kNone, 5, kNone, 6, kNone, 6, kNone, 7, kNone, 7);
    return (Words)_mm256_srai_epi16(_mm256_shuffle_epi8(bytes, high), 8);
  }
  const __m256i low = _mm256_setr_epi8(0, kNone, 0, kNone, 1, kNone, 1, kNone, 2, kNone, 2, kNone, 3, kNone, 3, kNone,
                                       4, kNone, 4, kNone, 5, kNone, 5, kNone, 6, kNone, 6, kNone, 7, kNone, 7, kNone);
  return (Words)_mm256_shuffle_epi8(bytes, low);
}

// Those of two groups, a lane's low and high word.
template <bool kSigned>
QK_INLINE Words paired(const void* base, int64_t at, int64_t other) {
  const auto* bytes = static_cast<const uint8_t*>(base);
  const __m128i low = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes + at));
  const __m128i high = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes + other));
  const __m128i both = _mm_unpacklo_epi8(low, high);
  return (Words)(kSigned ? _mm256_cvtepi8_epi16(both) : _mm256_cvtepu8_epi16(both));
}

// Groups whose scales, and offsets (kRest), are small factors times those of a span. A part is one span.
// kGroups: of a chunk.
template <Fit kFit, Zeros kZeros, int kGroups, int kVectors, int kTokens, class Source>
void multiply_span(const Call& call, const Source& source, Place place, const Totals& totals) {
  using V = Avx2Words;
  constexpr bool kOffsets = kZeros == Zeros::kRest, kSigned = !kOffsets;
  constexpr int kGroupOctets = kChunk / kGroups, kRunOctets = static_cast<int>(least(kFit.quads / 2, kGroupOctets));
  constexpr int kMostGroups = kPartOctets / kGroupOctets;
  const int64_t x_stride = call.staged.row_stride, M = call.M;
  const int8_t* x = static_cast<const int8_t*>(call.staged.data) + place.m * x_stride;
  const Stretch part = place.part;
  const int64_t g0 = part.first / kGroupOctets, groups = (part.end - part.first + kGroupOctets - 1) / kGroupOctets;

  for (int64_t line = 0; line < kMostGroups * kTileRows; line += 64) {
    const int64_t at = (place.tile * call.G + g0 + kMostGroups) * kTileRows + line;
    __builtin_prefetch(static_cast<const uint8_t*>(call.scales) + at);
    if (kOffsets) __builtin_prefetch(static_cast<const uint8_t*>(call.zeros) + at);
  }

  // Sums of x over two groups, each a word: at most 32 * 128.
  int32_t x_pairs[kTokens][kMostGroups / 2];
  for (int64_t pair = 0; 2 * pair < groups; ++pair) {
    const int32_t* of_group = call.x_sums + (g0 + 2 * pair) * M + place.m;
    const bool both = 2 * pair + 1 < groups;
    for (int t = 0; t < kTokens; ++t) {
      const uint32_t second = both ? static_cast<uint32_t>(of_group[M + t]) : 0;
      x_pairs[t][pair] = static_cast<int32_t>((second << 16) | (static_cast<uint32_t>(of_group[t]) & 0xffff));
    }
  }

  for (int row = 0; row < kTileRows; row += kVectors * V::kRows) {
    const uint8_t* codes = place.codes + row * kLaneBytes;
    const int64_t small = (place.tile * call.G + g0) * kTileRows + row;
    Words sums[kTokens][kVectors], of_x[kTokens][kVectors];
    for (int t = 0; t < kTokens; ++t) {
      for (int v = 0; v < kVectors; ++v) sums[t][v] = of_x[t][v] = V::integers(0);
    }
    int64_t octet = part.first;
    const auto factors_of = [&](int64_t g, Words(&factor)[kVectors]) __attribute__((always_inline)) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        factor[v] = doubled<kSigned>(call.scales, small + g * kTileRows + v * V::kRows);
      }
    };
    for (; octet + kChunk <= part.end; octet += kChunk, codes += kChunk * Source::kOctetBytes) {
      place.fetch();
#pragma GCC unroll 2
      for (int n = 0; n < kGroups; ++n) {
        Words factor[kVectors];
        factors_of((octet - part.first) / kGroupOctets + n, factor);
#pragma GCC unroll 4
        for (int i = n * kGroupOctets; i < (n + 1) * kGroupOctets; i += kRunOctets) {
          add_run<kFit, kRunOctets, kVectors, kTokens>(source, codes + i * Source::kOctetBytes, i,
                                                       x + (octet + i) * kOctet, x_stride, factor, sums);
        }
      }
    }
    for (; octet < part.end; ++octet, codes += Source::kOctetBytes) {
      Words factor[kVectors];
      factors_of((octet - part.first) / kGroupOctets, factor);
      add_run<kFit, 1, kVectors, kTokens>(source, codes, octet, x + octet * kOctet, x_stride, factor, sums);
    }
    for (int64_t pair = 0; 2 * pair < groups; ++pair) {
      const int64_t first = small + 2 * pair * kTileRows, second = 2 * pair + 1 < groups ? first + kTileRows : first;
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const Words factor =
            paired<kSigned>(kOffsets ? call.zeros : call.scales, first + v * V::kRows, second + v * V::kRows);
#pragma GCC unroll 4
        for (int t = 0; t < kTokens; ++t) of_x[t][v] += widened(factor, V::integers(x_pairs[t][pair]));
      }
    }
    const int64_t span = outer_at(call, place.tile, g0, row);
    for (int v = 0; v < kVectors; ++v) {
      const V::Sum outer = V::widen(call.outer_type, call.outer_scales, span + v * V::kRows);
      V::Sum of_offset = V::zero();
      if (kOffsets) of_offset = V::sub(V::zero(), V::widen(call.outer_type, call.outer_zeros, span + v * V::kRows));
      for (int t = 0; t < kTokens; ++t) {
        float* total = totals.done + t * kTileRows + row + v * V::kRows;
        const Words all = kOffsets ? sums[t][v] : sums[t][v] - of_x[t][v] * bias_of(call);
        V::Sum sum = V::fma(V::to_sum(all), outer, V::load(total));
        if (kOffsets) sum = V::fma(V::to_sum(of_x[t][v]), of_offset, sum);
        V::store(total, sum);
      }
    }
  }
}

template <Fit kFit, Zeros kZeros, Scales kScales, int kGroups, int kVectors, int kTokens, class Source>
QK_INLINE void multiply_part(const Call& call, const Source& source, Place place, const Totals& totals) {
  if constexpr (kScales == Scales::kProducts) {
    multiply_span<kFit, kZeros, kGroups, kVectors, kTokens>(call, source, place, totals);
  } else {
    multiply_groups<kFit, kZeros, kVectors, kTokens>(call, source, place, totals);
  }
}

void finish_rows(const Call& call, int64_t tile, int64_t m0, int64_t m1, const float* totals) {
  using V = Avx2Words;
  const float step = call.codebook == Codebook::kIntegers ? 1.0f : integer_step(call.codebook);  // a power of two
  float bias[kTileRows], sum[kTileRows];
  load_bias(call, tile * kTileRows, kTileRows, bias);
  for (int64_t m = m0; m < m1; ++m, totals += kTileRows) {
    for (int row = 0; row < kTileRows; row += V::kRows) {
      const V::Sum whole = finished<V>(call, tile, row, V::load(totals + row));
      V::store(sum + row, V::mul(whole, V::set1(call.x_scales[m] * step)));
    }
    // The compiler would make this product and the bias one FMA.
    asm volatile("" : : "r"(sum) : "memory");
    store_row(call, m, tile * kTileRows, kTileRows, sum, bias);
  }
}

// Groups of a chunk where scales are products: 16 columns or 32 (wrong_factors in checks.h).
constexpr int groups_of(Codes codes) {
  return codes == Codes::kTwo || codes == Codes::kThree || codes == Codes::kSix ? 2 : 1;
}

// Up to kDirect rows of x meet codes as they come, four of them at a time; more, which were taken apart once: a part is
// then stored and loaded, 8 stores where 12 instructions unpack it (4 bits), for which a core has one port.
constexpr int64_t kDirect = 8;

template <Codes kCodes, Zeros kZeros, Scales kScales, Fit kFit>
void multiply_tile(const Call& call, int64_t tile, int64_t m0, int64_t m1) {
  constexpr int kPerTile = kTileRows / Avx2Words::kRows, kTokens = 4;
  constexpr int kGroups = kScales == Scales::kProducts ? groups_of(kCodes) : 1;
  using From = FromCodes<kCodes, kFit>;
  const From from(call);
  const FromPanel<kFit> from_panel;
  alignas(32) float done[kBlockTokens * kTileRows];
  alignas(32) int32_t open[kBlockTokens * kTileRows];
  std::memset(done, 0, static_cast<size_t>(m1 - m0) * kTileRows * 4);
  const int64_t octets = (call.K + kOctet - 1) / kOctet;
  const uint8_t* codes = call.qweight + tile * call.tile_bytes;
  const auto multiply = [&](auto tokens, const auto& source, const Place& place) __attribute__((always_inline)) {
    constexpr int kTaken = decltype(tokens)::value, kVectors = kTaken == 1 ? kPerTile : 2;
    const int64_t row = (place.m - m0) * kTileRows;
    multiply_part<kFit, kZeros, kScales, kGroups, kVectors, kTaken>(call, source, place, {done + row, open + row});
  };

  // One row alone reads what the hardware fetches, but for planes and tables, which gain from 3 KB ahead. Four have the
  // next part fetched as they go, half of it for each half of the rows of a tile.
  constexpr int64_t kPartBytes = kPartOctets * From::kOctetBytes, kOfChunk = kPartBytes / (2 * kPartOctets / kChunk);
  const bool direct = m1 - m0 <= kDirect;
  const int64_t whole = kScales == Scales::kProducts ? kPartOctets : octets;
  int64_t m = m0;
  alignas(64) uint8_t panel[kPartOctets * FromPanel<kFit>::kOctetBytes];
  for (int64_t o = 0; (!direct || m1 - m0 >= kTokens) && o < octets; o += kPartOctets) {
    const uint8_t* at = codes + o * From::kOctetBytes;
    Place place = {tile, m0, {o, least(octets, o + kPartOctets)}, direct ? at : panel, at + kPartBytes, kOfChunk};
    if (!direct) take_apart<kCodes, kFit>(from, at, place.part.end - o, panel);
    for (; place.m + kTokens <= m1; place.m += kTokens, place.fetched = 0) {
      if (direct) {
        multiply(Number<kTokens>(), from, place);
      } else {
        multiply(Number<kTokens>(), from_panel, place);
      }
    }
    for (; !direct && place.m < m1; ++place.m) multiply(Number<1>(), from_panel, place);
    m = place.m;
  }
  for (; m < m1; ++m) {
    for (int64_t o = 0; o < octets; o += whole) {
      const uint8_t* at = codes + o * From::kOctetBytes;
      multiply(Number<1>(), from,
               {tile, m, {o, least(octets, o + whole)}, at, at + 3072, From::kFetches ? 2 * kOfChunk : 0});
    }
  }
  finish_rows(call, tile, m0, m1, done);
}

// As multiply_its_kind (int8_kinds.h) wants them.
struct WordLoops {
  template <Codes kCodes, Zeros kZeros, Scales kScales>
  static void multiply(const Call& call, int64_t tile, int tiles, int64_t m0, int64_t m1) {
    for (int64_t t = tile; t < tile + tiles; ++t) {
      if constexpr (kCodes == Codes::kTable && kScales == Scales::kStored) {
        if (is_short(call.codebook)) {
          multiply_tile<kCodes, kZeros, kScales, fit_of(kCodes, true)>(call, t, m0, m1);
          continue;
        }
      }
      multiply_tile<kCodes, kZeros, kScales, fit_of(kCodes, false)>(call, t, m0, m1);
    }
  }
};

}  // namespace
}  // namespace qkernels::cpu
