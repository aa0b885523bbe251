// The loops that the vector instruction sets share for int8 activations, as a template over the vectors V:
//   kRows, Sum, widen, zero, set1, mul, fma, store   as in tile_sums.h
//   Integers      int32 sums, or the bytes of one lane of codes a row, or four codes of x in every lane. A vector of
//                 int32_t: of sums in an __m512i, whose lanes are 64-bit to it, gcc 12 makes a copy at every
//                 multiplication and spills some (3 rows x 4 vectors 10 % slower, 4 x 4 15 %)
//   kTokens       rows of x a block takes: as many as there are registers for
//   kDecodeVectors[m - 1]: vectors of rows to work on for m <= kDecodeTokens rows of x, at most those of
//                 tiles_together(m) tiles, so that more sums are in flight
//   kOneStream    whether few rows of x read a weight as one stream, tile after tile: one row then leaves it to the
//                 hardware to fetch codes, unless they are in planes, and sums the first and the second four columns of
//                 octets apart, so that as many sums are in flight as two tiles have; `dot_small` then multiplies any
//                 bytes, and kByteBias is 0
//   kByteBias     what `dot_bytes` subtracts from each 8-bit code
//   dot_nibbles(sum, lanes, x0, x1)  low nibbles times x0 and high ones times x1
//   dot_bytes(sum, lanes, x)         (bytes - kByteBias) times x
//   dot_small(sum, lanes, x)         bytes of at most 6 bits times x
//   look_up(table, indices)          bytes of a table of 16
//   widen_bytes   consecutive bytes as int32, one a row
//   kPairs        whether two rows of x meet two rows of the weight, eight columns an instruction, where there is an
//                 even number of rows of x: `pair` and `part` as in tile_pairs.h, and
//   multiply_pairs(a, b, first, second, x0, x1)  adds octets x0 and x1 of two rows of x, times bytes that are unsigned,
//                 to the sums a and b of both
#pragma once
#include <cstdint>
#include <cstring>

#include "int8_kinds.h"
#include "kernels.h"
#include "rows_int8.h"
#include "tile_gemm.h"

namespace qkernels::cpu {
namespace {

// The four codes of quad q of octet i of a block of planes, a byte each: fields of the low plane's line, and of the
// high one's. Shifts cross bytes, and the masks take what came from a neighbour away.
template <class V, int kBits>
QK_INLINE typename V::Integers quad_of(const uint8_t* block, int i, int q) {
  using Block = BlockOf<kBits>;
  constexpr Planes planes = Block::planes;
  const auto low = V::lanes_at(block + Block::low_line(i) * kLineBytes);
  const int low_right = i * 2 * planes.low % 8 + planes.low * q;
  constexpr int32_t kOnes = 0x01010101;
  auto codes = (low >> low_right) & kOnes * ((1 << planes.low) - 1);
  if constexpr (planes.high != 0) {
    const auto high = V::lanes_at(block + Block::high_line(i) * kLineBytes);
    const int high_right = planes.high * (2 * i + q);
    codes |= ((high >> high_right) & kOnes * ((1 << planes.high) - 1)) << planes.low;
  }
  return codes;
}

// The same of 3 bits: an octet has its line, but for the last one, whose bits the lines had left over.
template <class V>
QK_INLINE typename V::Integers three_of(const uint8_t* block, int i, int q) {
  if (i < 3) return V::lanes_at(block + i * kLineBytes) >> (3 * q) & 0x07070707;
  const auto low = V::lanes_at(block + q * kLineBytes) >> 6 & 0x03030303;
  return low | (V::lanes_at(block + 2 * kLineBytes) >> (4 + q) & 0x04040404);
}

constexpr int32_t kLow = 0x0f0f0f0f, kHigh = static_cast<int32_t>(0xf0f0f0f0);  // nibbles

// The first and second four codes of an octet, a byte each: as stored, or as `table` has them.
template <class V, Codes kCodes>
QK_INLINE void quads_at(const uint8_t* at, [[maybe_unused]] int64_t octet, [[maybe_unused]] typename V::Integers table,
                        typename V::Integers& first, typename V::Integers& second) {
  constexpr int kWidth = width_of(kCodes);
  if constexpr (kCodes == Codes::kBytes) {
    first = V::lanes_at(at), second = V::lanes_at(at + kLineBytes);
  } else if constexpr (kWidth != 4) {
    const int i = static_cast<int>(octet % BlockOf<kWidth>::kBlockOctets);
    const uint8_t* block = at - i * kTileRows * kWidth;
    if constexpr (kCodes == Codes::kThree) {
      first = three_of<V>(block, i, 0), second = three_of<V>(block, i, 1);
      return;
    }
    first = quad_of<V, kWidth>(block, i, 0), second = quad_of<V, kWidth>(block, i, 1);
  } else {
    const auto lanes = V::lanes_at(at);
    first = lanes & kLow, second = lanes >> 4 & kLow;
    if constexpr (kCodes == Codes::kTable) first = V::look_up(table, first), second = V::look_up(table, second);
  }
}

// In a look-up, the values of a codebook in steps, plus this: bytes that `dot_bytes` takes.
constexpr int kTableBias = 128;

// 16 bytes, in every 128 bits.
template <class V>
QK_INLINE typename V::Integers table_of(const Call& call) {
  if (call.codebook == Codebook::kIntegers) return V::integers(0);
  alignas(64) uint8_t bytes[sizeof(typename V::Integers)];
  const float step = integer_step(call.codebook);
  for (size_t i = 0; i < sizeof bytes; ++i) {
    bytes[i] = static_cast<uint8_t>(static_cast<int>(codebook_value(call.codebook, i & 15) / step) + kTableBias);
  }
  return V::lanes_at(bytes);
}

// Scales of a vector of rows for group g that are products; the small factors are at `at`.
template <class V>
QK_INLINE typename V::Sum products_of(const Call& call, int64_t at, int64_t tile, int64_t g, int64_t row) {
  const typename V::Sum small = V::widen(call.scale_type, call.scales, at);
  return V::mul(small, V::widen(call.outer_type, call.outer_scales, outer_at(call, tile, g, row)));
}

// stored_rest_of where offsets are products.
template <class V>
QK_INLINE typename V::Sum product_rest_of(const Call& call, typename V::Sum scale, int64_t at, int64_t tile, int64_t g,
                                          int64_t row) {
  const typename V::Sum mid = V::set1(static_cast<float>(1 << (call.bits - 1)));
  const typename V::Sum outer = V::widen(call.outer_type, call.outer_zeros, outer_at(call, tile, g, row));
  const typename V::Sum product = V::mul(V::widen(Type::kUInt8, call.zeros, at), outer);
  return V::fma(mid, scale, V::sub(V::zero(), product));
}

// Codes in planes, taken apart once for all rows of x of a block: bytes as 8-bit codes lie, in L1, and scales in fp32
// (128 rows, one core of a Zen 4: 5 bits 1.15, 6 bits 1.17 times as fast). Bytes of a table are
// looked up again instead (128 rows of IQ4_XS took 3 % longer with a panel).
constexpr int64_t kPanelColumns = 512;
constexpr int kPanelOctetBytes = 2 * kLineBytes;

template <Codes kCodes>
constexpr bool kHasPanel = width_of(kCodes) != 4 && width_of(kCodes) != 8;

// Groups of a tile, their codes, scales and rests [group][row], and the totals [token][row] of those before, which
// these are added to.
struct Part {
  int64_t first, end;
  const uint8_t* panel;
  const float *scales, *rests;
  float* totals;
};

// `octets` octets of a tile from octet `first` on.
template <class V, Codes kCodes>
void take_apart(const Call& call, int64_t tile, int64_t first, int64_t octets, uint8_t* panel) {
  constexpr int kOctetBytes = kTileRows * width_of(kCodes), kVectorBytes = V::kRows * kLaneBytes;
  const uint8_t* codes = call.qweight + tile * call.tile_bytes + first * kOctetBytes;
  for (int64_t octet = first; octet < first + octets; ++octet) {
    for (int line = 0; line < kOctetBytes; line += 64) __builtin_prefetch(codes + octets * kOctetBytes + line);
#pragma GCC unroll 8
    for (int at = 0; at < kLineBytes; at += kVectorBytes) {
      typename V::Integers quads[2];
      quads_at<V, kCodes>(codes + at, octet, V::integers(0), quads[0], quads[1]);
      std::memcpy(panel + at, &quads[0], kVectorBytes);
      std::memcpy(panel + at + kLineBytes, &quads[1], kVectorBytes);
    }
    codes += kOctetBytes, panel += kPanelOctetBytes;
  }
}

// What the sums of a group meet: a vector of rows' scales, and what sum(x) meets (kRest).
template <class V>
struct Scaling {
  typename V::Sum scale, rest;
};
template <class V, Zeros kZeros, Scales kScales>
QK_INLINE Scaling<V> scaling_of(const Call& call, int64_t tile, int64_t g, int64_t row) {
  const int64_t at = (tile * call.G + g) * kTileRows + row;
  Scaling<V> s{V::zero(), V::zero()};
  if constexpr (kScales == Scales::kProducts) {
    s.scale = products_of<V>(call, at, tile, g, row);
    if (kZeros == Zeros::kRest) s.rest = product_rest_of<V>(call, s.scale, at, tile, g, row);
  } else {
    s.scale = V::widen(call.scale_type, call.scales, at);
    if (kZeros == Zeros::kRest) s.rest = stored_rest_of<V>(call, s.scale, at);
  }
  return s;
}

// Sums start at what the products leave out: (kByteBias - zero) * (sum of x over the group). Symmetric weights have one
// zero, 2^(bits-1), which costs nothing; integer zero points are one a row. Floating zero points and offsets leave the
// zero at 2^(bits-1), and add sum(x) * rest_of (rows.h). Integer sums may wrap on the way; the true sum fits
// (layouts/cpu_tile_a8.py bounds the group).
//
// kPanel: of groups part.first ... part.end - 1 alone, whose codes are in a panel.
//
// The fp32 totals are in registers as long as there are enough, for a store costs the multipliers 0.8 of a cycle (Zen
// 5) where a sum over a group of 32 takes 4: with all totals in L1, 16 rows and groups of 32 were 10 % slower.
template <class V, Codes kCodes, Zeros kZeros, Scales kScales, int kVectors, int kTokens, bool kPanel = false>
void multiply_int8_rows(const Call& call, int64_t tile, int64_t next_tile, int64_t m0, const Part& part) {
  using Sum = typename V::Sum;
  using Integers = typename V::Integers;
  constexpr int kPerTile = kTileRows / V::kRows, kVectorBytes = V::kRows * kLaneBytes;
  constexpr bool kBytes = kCodes == Codes::kBytes, kTable = kCodes == Codes::kTable;
  constexpr int kWidth = width_of(kCodes);
  constexpr bool kPlanes = planes_of(kWidth).high != 0 || kWidth < 4;
  constexpr bool kPairs = V::kPairs && kTokens % 2 == 0;
  constexpr bool kFetches = !kPanel && (kTokens > 1 || kPlanes || !V::kOneStream);
  constexpr bool kApart = !kPanel && kTokens == 1 && V::kOneStream;
  // High nibbles stay where they are, and their sums are 16 times too large: at most 2^16 of 240 * 128 in a group,
  // which is below 2^31.
  constexpr bool kSixteenfold = kApart && kCodes == Codes::kNibbles;
  constexpr int kQuadBytes = kLineBytes, kOctetBytes = kPanel ? kPanelOctetBytes : kTileRows * kWidth;
  const int32_t start = (kBytes || kTable ? V::kByteBias : 0) - (kTable ? kTableBias : 1 << (call.bits - 1));
  const Integers table = table_of<V>(call);
  const int64_t row_bytes = call.staged.row_stride, M = call.M, G = call.G;
  const int64_t first_group = kPanel ? part.first : 0, end_group = kPanel ? part.end : G;
  const uint8_t* codes = kPanel ? part.panel : call.qweight + tile * call.tile_bytes;  // of the first vector of rows
  int64_t vector_at[kVectors];
  for (int v = 0; v < kVectors; ++v) vector_at[v] = v / kPerTile * call.tile_bytes + v % kPerTile * kVectorBytes;
  const int8_t* x = static_cast<const int8_t*>(call.staged.data) + m0 * row_bytes + first_group * call.group;

  // Codes are fetched 3 KB ahead, and at the end of a tile from `next_tile`: see prefetch_codes in tile_sums.h. Where
  // memory gives 90 GB/s, M = 4 reads 75 with 2 KB, 80 with 3 or 4; where it gives 55, 53, 52 and 51. Where a weight is
  // one stream, few rows of x have it fetched into L2 as well, 8 KB ahead (one core of a Zen 4, M = 4: 24 GB/s, with 3
  // KB alone 23); planes and bytes do not.
  constexpr bool kFetchesTwice = kFetches && V::kOneStream && kWidth == 4 && kTokens <= V::kDecodeTokens;
  constexpr int64_t kAhead = kFetchesTwice ? 1024 : 3072, kFurther = 7168;
  [[maybe_unused]] const uint8_t* ahead = codes + kAhead;
  [[maybe_unused]] const int64_t to_next = (next_tile - tile - 1) * call.tile_bytes;
  [[maybe_unused]] int64_t until_next = (call.tile_bytes > kAhead ? call.tile_bytes - kAhead : 0) / kOctetBytes + 1;

  Sum total[kTokens][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kTokens; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      total[r][v] = kPanel && first_group > 0 ? V::load(part.totals + r * kTileRows + v * V::kRows) : V::zero();
    }
  }
  const int32_t* x_sums = call.x_sums + first_group * M + m0;
  for (int64_t g = first_group; g < end_group; ++g, x_sums += M) {
    for (int t = 0; t * kPerTile < kVectors; ++t) {
      prefetch_group(call, call.scales, call.scale_bytes, tile + t, next_tile + t, g);
      if (kZeros != Zeros::kNone) prefetch_group(call, call.zeros, call.zero_bytes, tile + t, next_tile + t, g);
    }
    const auto scale_at = [&](int v) {  // the first row's scale and zero
      return ((tile + v / kPerTile) * G + g) * kTileRows + v % kPerTile * V::kRows;
    };
    Integers acc[kTokens][kVectors], of_second[kApart ? kVectors : 1];  // kApart: of the second four columns
    if constexpr (kApart) {
      for (Integers& sum : of_second) sum = V::integers(0);
    }
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      Integers left_out = V::integers(kBytes ? V::kByteBias : 0);
      if constexpr (kZeros == Zeros::kIntegers) {
        left_out -= V::widen_bytes(static_cast<const uint8_t*>(call.zeros) + scale_at(v));
      }
#pragma GCC unroll 8
      for (int r = 0; r < kTokens; ++r) {
        acc[r][v] = kZeros == Zeros::kIntegers ? left_out * x_sums[r] : V::integers(start * x_sums[r]);
      }
      if constexpr (kPairs) {
        for (int r = 0; r < kTokens; r += 2) V::pair(acc[r][v], acc[r + 1][v]);
      }
    }
    const auto add_octet = [&](int64_t octet) __attribute__((always_inline)) {
      if (kFetches && --until_next == 0) ahead += to_next;
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        const uint8_t* at = codes + vector_at[v];
        if (kFetches && v * kVectorBytes % 64 == 0) {
          __builtin_prefetch(ahead + vector_at[v]);
          if (kBytes) __builtin_prefetch(ahead + vector_at[v] + kQuadBytes);
          if (kFetchesTwice) __builtin_prefetch(ahead + vector_at[v] + kFurther, 0, 2);
        }
        if constexpr (kCodes == Codes::kNibbles && !kApart && !kPairs) {
          const Integers lanes = V::lanes_at(at);
#pragma GCC unroll 8
          for (int r = 0; r < kTokens; ++r) {
            const int8_t* row = x + r * row_bytes;
            acc[r][v] = V::dot_nibbles(acc[r][v], lanes, V::quad(row), V::quad(row + 4));
          }
        } else {
          Integers first, second;
          if constexpr (kSixteenfold) {
            const Integers lanes = V::lanes_at(at);
            first = lanes & kLow, second = lanes & kHigh;
          } else {
            quads_at<V, kPanel ? Codes::kBytes : kCodes>(at, octet, table, first, second);
          }
#pragma GCC unroll 8
          for (int r = 0; r < kTokens; r += kPairs ? 2 : 1) {
            const int8_t* row = x + r * row_bytes;
            if constexpr (kApart) {
              acc[r][v] = V::dot_small(acc[r][v], first, V::quad(row));
              of_second[v] = V::dot_small(of_second[v], second, V::quad(row + 4));
            } else if constexpr (kPairs) {
              V::multiply_pairs(acc[r][v], acc[r + 1][v], first, second, row, row + row_bytes);
            } else if constexpr (kBytes || kTable) {
              acc[r][v] = V::dot_bytes(V::dot_bytes(acc[r][v], first, V::quad(row)), second, V::quad(row + 4));
            } else {
              acc[r][v] = V::dot_small(V::dot_small(acc[r][v], first, V::quad(row)), second, V::quad(row + 4));
            }
          }
        }
      }
      x += kOctet;
      codes += kOctetBytes;
      if (kFetches) ahead += kOctetBytes;
    };
    const Group group = group_of(call, g);
    if constexpr (kPlanes && !kPanel) {
      constexpr int kBlock = BlockOf<kWidth>::kBlockOctets;
      const int64_t first = group.first / kOctet;
      if constexpr (kCodes == Codes::kThree && kScales == Scales::kProducts) {  // half a block
        static_assert(kBlock == 4 && kind_of(Factors::kK3).outer_shift == 4);
        if (g % 2 == 0) {
          add_octet(0), add_octet(1);
        } else {
          add_octet(2), add_octet(3);
        }
      } else if (kScales == Scales::kProducts || G == 1 || call.group % (kBlock * kOctet) == 0) {
        // Whole blocks, from their beginning on.
        for (int64_t o = 0; o < group.octets; o += kBlock) {
#pragma GCC unroll 4
          for (int i = 0; i < kBlock; ++i) add_octet(i);
        }
      } else {
        for (int64_t o = 0; o < group.octets; ++o) add_octet(first + o);
      }
    } else {
      for (int64_t o = 0; o < group.octets; ++o) add_octet(0);
    }
    if constexpr (kApart) {
      for (int v = 0; v < kVectors; ++v) acc[0][v] += kSixteenfold ? of_second[v] >> 4 : of_second[v];
    }
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      [[maybe_unused]] const int64_t t = tile + v / kPerTile, row = v % kPerTile * V::kRows;
      Scaling<V> of_rows;
      if constexpr (kPanel) {
        const int64_t at = (g - first_group) * kTileRows + row;
        of_rows = {V::load(part.scales + at), V::load(part.rests + (kZeros == Zeros::kRest ? at : 0))};
      } else {
        of_rows = scaling_of<V, kZeros, kScales>(call, t, g, row);
      }
      if constexpr (kPairs) {
        for (int r = 0; r < kTokens; r += 2) V::part(acc[r][v], acc[r + 1][v]);
      }
#pragma GCC unroll 8
      for (int r = 0; r < kTokens; ++r) {
        total[r][v] = V::fma(V::to_sum(acc[r][v]), of_rows.scale, total[r][v]);
        if (kZeros == Zeros::kRest) {
          total[r][v] = V::fma(V::to_sum(V::integers(x_sums[r])), of_rows.rest, total[r][v]);
        }
      }
    }
  }
  if (kPanel && end_group < G) {
    for (int r = 0; r < kTokens; ++r) {
      for (int v = 0; v < kVectors; ++v) V::store(part.totals + r * kTileRows + v * V::kRows, total[r][v]);
    }
    return;
  }
  constexpr int kCount = kVectors * V::kRows;
  float bias[kCount], sum[kCount];
  load_bias(call, tile * kTileRows, kCount, bias);
  for (int r = 0; r < kTokens; ++r) {
    for (int v = 0; v < kVectors; ++v) {
      const float step = kTable ? integer_step(call.codebook) : 1.0f;  // a power of two
      const Sum whole = finished<V>(call, tile + v / kPerTile, v % kPerTile * V::kRows, total[r][v]);
      V::store(sum + v * V::kRows, V::mul(whole, V::set1(call.x_scales[m0 + r] * step)));
    }
    // The compiler would make this product and the bias one FMA where it has both in registers: in some of the
    // instantiations, so that bits would hang on M and on how tiles are shared out.
    asm volatile("" : : "r"(sum) : "memory");
    store_row(call, m0 + r, tile * kTileRows, kCount, sum, bias);
  }
}

// As many tiles at once as kDecodeVectors says for this number of rows of x; returns how many are left.
template <class V, Codes kCodes, Zeros kZeros, Scales kScales, int kTokens>
int multiply_int8_together(const Call& call, int64_t tile, int tiles, int64_t m0, int64_t tokens) {
  if constexpr (kTokens > 1) {
    if (tokens < kTokens)
      return multiply_int8_together<V, kCodes, kZeros, kScales, kTokens - 1>(call, tile, tiles, m0, tokens);
  }
  constexpr int kVectors = V::kDecodeVectors[kTokens - 1], kTiles = kVectors * V::kRows / kTileRows;
  for (; tiles >= kTiles; tiles -= kTiles, tile += kTiles) {
    multiply_int8_rows<V, kCodes, kZeros, kScales, kVectors, kTokens>(call, tile, tile + kTiles, m0, {});
  }
  return tiles;
}

// At most kTokens rows of x and one tile
template <class V, Codes kCodes, Zeros kZeros, Scales kScales, int kTokens, bool kPanel = false>
void multiply_int8_last(const Call& call, int64_t tile, int64_t next_tile, int64_t m0, int64_t tokens,
                        const Part& part) {
  constexpr int kPerTile = kTileRows / V::kRows;
  if (tokens == kTokens)
    return multiply_int8_rows<V, kCodes, kZeros, kScales, kPerTile, kTokens, kPanel>(call, tile, next_tile, m0, part);
  if constexpr (kTokens > 1)
    multiply_int8_last<V, kCodes, kZeros, kScales, kTokens - 1, kPanel>(call, tile, next_tile, m0, tokens, part);
}

// Rows of x in turns, with a tile or with a part of it.
template <class V, Codes kCodes, Zeros kZeros, Scales kScales, bool kPanel>
void multiply_int8_block(const Call& call, int64_t tile, int64_t m0, int64_t m1, Part part) {
  for (int64_t m = m0; m < m1; m += V::kTokens) {
    const int64_t tokens = m1 - m < V::kTokens ? m1 - m : V::kTokens;
    const int64_t next = m + V::kTokens < m1 ? tile : tile + 1;  // a tile stays in L2
    multiply_int8_last<V, kCodes, kZeros, kScales, V::kTokens, kPanel>(call, tile, next, m, tokens, part);
    if (kPanel) part.totals += V::kTokens * kTileRows;
  }
}

// The same, its codes in a panel; the bits are the same: totals are added to in the same order.
template <class V, Codes kCodes, Zeros kZeros, Scales kScales>
void multiply_int8_apart(const Call& call, int64_t tile, int64_t m0, int64_t m1) {
  alignas(64) uint8_t panel[kPanelColumns / kOctet * kPanelOctetBytes];
  constexpr int64_t kMostGroups = kPanelColumns / kOctet;
  alignas(64) float scales[kMostGroups * kTileRows], rests[kMostGroups * kTileRows], totals[kBlockTokens * kTileRows];
  const int64_t groups = call.G == 1 ? 1 : kPanelColumns / call.group;  // of a part
  for (int64_t g = 0; g < call.G; g += groups) {
    const int64_t end = g + groups < call.G ? g + groups : call.G, first = group_of(call, g).first / kOctet;
    const Group last = group_of(call, end - 1);
    take_apart<V, kCodes>(call, tile, first, last.first / kOctet + last.octets - first, panel);
    for (int64_t i = g; i < end; ++i) {
      for (int row = 0; row < kTileRows; row += V::kRows) {
        const Scaling<V> of_rows = scaling_of<V, kZeros, kScales>(call, tile, i, row);
        V::store(scales + (i - g) * kTileRows + row, of_rows.scale);
        V::store(rests + (i - g) * kTileRows + row, of_rows.rest);
      }
    }
    multiply_int8_block<V, kCodes, kZeros, kScales, true>(call, tile, m0, m1, {g, end, panel, scales, rests, totals});
  }
}

template <class V, Codes kCodes, Zeros kZeros, Scales kScales>
void multiply_int8_tiles(const Call& call, int64_t tile, int tiles, int64_t m0, int64_t m1) {
  const int64_t end = tile + tiles;
  if (m1 - m0 <= V::kDecodeTokens) {
    tiles = multiply_int8_together<V, kCodes, kZeros, kScales, V::kDecodeTokens>(call, tile, tiles, m0, m1 - m0);
  }
  for (int64_t t = end - tiles; t < end; ++t) {
    if constexpr (kHasPanel<kCodes>) {
      if (m1 - m0 > 4 * V::kTokens && (call.G == 1 ? call.K : call.group) <= kPanelColumns) {
        multiply_int8_apart<V, kCodes, kZeros, kScales>(call, t, m0, m1);
        continue;
      }
    }
    multiply_int8_block<V, kCodes, kZeros, kScales, false>(call, t, m0, m1, {});
  }
}

// As multiply_its_kind (int8_kinds.h) wants them.
template <class V>
struct TileLoops {
  template <Codes kCodes, Zeros kZeros, Scales kScales>
  static void multiply(const Call& call, int64_t tile, int tiles, int64_t m0, int64_t m1) {
    multiply_int8_tiles<V, kCodes, kZeros, kScales>(call, tile, tiles, m0, m1);
  }
};

template <class V>
void multiply_int8(const Call& call, int64_t tile, int tiles, int64_t m0, int64_t m1) {
  multiply_its_kind<TileLoops<V>>(call, tile, tiles, m0, m1);
}

}  // namespace
}  // namespace qkernels::cpu
