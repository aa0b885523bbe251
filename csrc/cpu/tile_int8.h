// The loops that the vector instruction sets share for int8 activations, as a template over the vectors V:
//   kRows, Sum, widen, zero, set1, mul, fma, store   as in tile_gemm.h
//   Integers      int32 sums, or the bytes of one lane of codes a row, or four codes of x in every lane. A vector of
//                 int32_t: of sums in an __m512i, whose lanes are 64-bit to it, gcc 12 makes a copy at every
//                 multiplication and spills some (3 rows x 4 vectors 10 % slower, 4 x 4 15 %)
//   kTokens       rows of x a block takes: as many as there are registers for
//   kDecodeVectors[m - 1]: vectors of rows to work on for m <= kDecodeTokens rows of x, at most those of
//                 tiles_together(m) tiles, so that more sums are in flight
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

#include "kernels.h"
#include "rows_int8.h"
#include "tile_gemm.h"

namespace qkernels::cpu {
namespace {

enum class Zeros { kNone, kIntegers, kRest };
// kProducts: of two factors a group. What a group asks at run time costs its loop registers: W4A8 with groups of 32, M
// = 16 was 1.4 x slower, 128 1.5 x.
enum class Scales { kStored, kProducts };
// kTable: nibbles that are indices into a codebook of integers; the last three: in planes
enum class Codes { kNibbles, kBytes, kTable, kTwo, kFive, kSix };

// Bits of a code, as it is stored.
constexpr int width_of(Codes codes) {
  switch (codes) {
    case Codes::kBytes:
      return 8;
    case Codes::kTwo:
      return 2;
    case Codes::kFive:
      return 5;
    case Codes::kSix:
      return 6;
    default:
      return 4;
  }
}

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

constexpr int32_t kLow = 0x0f0f0f0f;  // low nibbles

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

// Sums start at what the products leave out: (kByteBias - zero) * (sum of x over the group). Symmetric weights have one
// zero, 2^(bits-1), which costs nothing; integer zero points are one a row. Floating zero points and offsets leave the
// zero at 2^(bits-1), and add sum(x) * rest_of (tile_gemm.h). Integer sums may wrap on the way; the true sum fits
// (layouts/cpu_tile_a8.py bounds the group).
//
// The fp32 totals are in registers as long as there are enough, for a store costs the multipliers 0.8 of a cycle (Zen
// 5) where a sum over a group of 32 takes 4: with all totals in L1, 16 rows and groups of 32 were 10 % slower.
template <class V, Codes kCodes, Zeros kZeros, Scales kScales, int kVectors, int kTokens>
void multiply_int8_rows(const Call& call, int64_t tile, int64_t next_tile, int64_t m0) {
  using Sum = typename V::Sum;
  using Integers = typename V::Integers;
  constexpr int kPerTile = kTileRows / V::kRows, kVectorBytes = V::kRows * kLaneBytes;
  constexpr bool kBytes = kCodes == Codes::kBytes, kTable = kCodes == Codes::kTable;
  constexpr int kWidth = width_of(kCodes);
  constexpr bool kPlanes = planes_of(kWidth).high != 0 || kWidth == 2;
  constexpr bool kPairs = V::kPairs && kTokens % 2 == 0;
  constexpr int kQuadBytes = kLineBytes, kOctetBytes = kTileRows * kWidth;
  const int32_t start = (kBytes || kTable ? V::kByteBias : 0) - (kTable ? kTableBias : 1 << (call.bits - 1));
  const Integers table = table_of<V>(call);
  const int64_t row_bytes = call.staged.row_stride, G = call.G, M = call.M;
  const uint8_t* codes = call.qweight + tile * call.tile_bytes;  // of the first vector of rows
  int64_t vector_at[kVectors];
  for (int v = 0; v < kVectors; ++v) vector_at[v] = v / kPerTile * call.tile_bytes + v % kPerTile * kVectorBytes;
  const int8_t* x = static_cast<const int8_t*>(call.staged.data) + m0 * row_bytes;

  // Codes are fetched 3 KB ahead, and at the end of a tile from `next_tile`: see prefetch_codes in tile_gemm.h. Where
  // memory gives 90 GB/s, M = 4 reads 75 with 2 KB, 80 with 3 or 4; where it gives 55, 53, 52 and 51.
  constexpr int64_t kAhead = 3072;
  const uint8_t* ahead = codes + kAhead;
  const int64_t to_next = (next_tile - tile - 1) * call.tile_bytes;
  int64_t until_next = (call.tile_bytes > kAhead ? call.tile_bytes - kAhead : 0) / kOctetBytes + 1;

  Sum total[kTokens][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kTokens; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) total[r][v] = V::zero();
  }
  const int32_t* x_sums = call.x_sums + m0;
  for (int64_t g = 0; g < G; ++g, x_sums += M) {
    for (int t = 0; t * kPerTile < kVectors; ++t) {
      prefetch_group(call, call.scales, call.scale_bytes, tile + t, next_tile + t, g);
      if (kZeros != Zeros::kNone) prefetch_group(call, call.zeros, call.zero_bytes, tile + t, next_tile + t, g);
    }
    const auto scale_at = [&](int v) {  // the first row's scale and zero
      return ((tile + v / kPerTile) * G + g) * kTileRows + v % kPerTile * V::kRows;
    };
    Integers acc[kTokens][kVectors];
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
    [[maybe_unused]] int64_t octet = group_of(call, g).first / kOctet;
    for (int64_t octets = group_of(call, g).octets; octets > 0; --octets) {
      if (--until_next == 0) ahead += to_next;
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        const uint8_t* at = codes + vector_at[v];
        if (v * kVectorBytes % 64 == 0) __builtin_prefetch(ahead + vector_at[v]);
        if constexpr (kPairs) {
          if (kBytes && v * kVectorBytes % 64 == 0) __builtin_prefetch(ahead + vector_at[v] + kQuadBytes);
          Integers first, second;
          quads_at<V, kCodes>(at, octet, table, first, second);
#pragma GCC unroll 8
          for (int r = 0; r < kTokens; r += 2) {
            const int8_t* row = x + r * row_bytes;
            V::multiply_pairs(acc[r][v], acc[r + 1][v], first, second, row, row + row_bytes);
          }
        } else if constexpr (kPlanes) {
          constexpr int kBlock = BlockOf<kWidth>::kBlockOctets;
          const int i = static_cast<int>(octet % kBlock);
          const Integers first = quad_of<V, kWidth>(at - i * kOctetBytes, i, 0);
          const Integers second = quad_of<V, kWidth>(at - i * kOctetBytes, i, 1);
#pragma GCC unroll 8
          for (int r = 0; r < kTokens; ++r) {
            acc[r][v] = V::dot_small(acc[r][v], first, V::quad(x + r * row_bytes));
            acc[r][v] = V::dot_small(acc[r][v], second, V::quad(x + r * row_bytes + 4));
          }
        } else if constexpr (kBytes) {
          if (v * kVectorBytes % 64 == 0) __builtin_prefetch(ahead + vector_at[v] + kQuadBytes);
          const Integers first = V::lanes_at(at), second = V::lanes_at(at + kQuadBytes);
#pragma GCC unroll 8
          for (int r = 0; r < kTokens; ++r) {
            acc[r][v] = V::dot_bytes(acc[r][v], first, V::quad(x + r * row_bytes));
            acc[r][v] = V::dot_bytes(acc[r][v], second, V::quad(x + r * row_bytes + 4));
          }
        } else {
          const Integers lanes = V::lanes_at(at);
#pragma GCC unroll 8
          for (int r = 0; r < kTokens; ++r) {
            const int8_t* octet = x + r * row_bytes;
            if constexpr (kTable) {
              acc[r][v] = V::dot_bytes(acc[r][v], V::look_up(table, lanes & kLow), V::quad(octet));
              acc[r][v] = V::dot_bytes(acc[r][v], V::look_up(table, lanes >> 4 & kLow), V::quad(octet + 4));
            } else {
              acc[r][v] = V::dot_nibbles(acc[r][v], lanes, V::quad(octet), V::quad(octet + 4));
            }
          }
        }
      }
      ++octet;
      x += kOctet;
      codes += kOctetBytes;
      ahead += kOctetBytes;
    }
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      [[maybe_unused]] const int64_t t = tile + v / kPerTile, row = v % kPerTile * V::kRows;
      Sum scale, rest = V::zero();
      if constexpr (kScales == Scales::kProducts) {
        scale = products_of<V>(call, scale_at(v), t, g, row);
        if (kZeros == Zeros::kRest) rest = product_rest_of<V>(call, scale, scale_at(v), t, g, row);
      } else {
        scale = V::widen(call.scale_type, call.scales, scale_at(v));
        if (kZeros == Zeros::kRest) rest = stored_rest_of<V>(call, scale, scale_at(v));
      }
      if constexpr (kPairs) {
        for (int r = 0; r < kTokens; r += 2) V::part(acc[r][v], acc[r + 1][v]);
      }
#pragma GCC unroll 8
      for (int r = 0; r < kTokens; ++r) {
        total[r][v] = V::fma(V::to_sum(acc[r][v]), scale, total[r][v]);
        if (kZeros == Zeros::kRest) total[r][v] = V::fma(V::to_sum(V::integers(x_sums[r])), rest, total[r][v]);
      }
    }
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
    multiply_int8_rows<V, kCodes, kZeros, kScales, kVectors, kTokens>(call, tile, tile + kTiles, m0);
  }
  return tiles;
}

// At most kTokens rows of x and one tile
template <class V, Codes kCodes, Zeros kZeros, Scales kScales, int kTokens>
void multiply_int8_last(const Call& call, int64_t tile, int64_t next_tile, int64_t m0, int64_t tokens) {
  constexpr int kPerTile = kTileRows / V::kRows;
  if (tokens == kTokens)
    return multiply_int8_rows<V, kCodes, kZeros, kScales, kPerTile, kTokens>(call, tile, next_tile, m0);
  if constexpr (kTokens > 1)
    multiply_int8_last<V, kCodes, kZeros, kScales, kTokens - 1>(call, tile, next_tile, m0, tokens);
}

template <class V, Codes kCodes, Zeros kZeros, Scales kScales>
void multiply_int8_tiles(const Call& call, int64_t tile, int tiles, int64_t m0, int64_t m1) {
  const int64_t end = tile + tiles;
  if (m1 - m0 <= V::kDecodeTokens) {
    tiles = multiply_int8_together<V, kCodes, kZeros, kScales, V::kDecodeTokens>(call, tile, tiles, m0, m1 - m0);
  }
  for (int64_t t = end - tiles; t < end; ++t) {
    for (int64_t m = m0; m < m1; m += V::kTokens) {
      const int64_t next = m + V::kTokens < m1 ? t : t + 1;  // a tile stays in L2
      multiply_int8_last<V, kCodes, kZeros, kScales, V::kTokens>(call, t, next, m,
                                                                 m1 - m < V::kTokens ? m1 - m : V::kTokens);
    }
  }
}

template <class V, Codes kCodes>
void multiply_int8_width(const Call& call, int64_t tile, int tiles, int64_t m0, int64_t m1) {
  constexpr Scales kStored = Scales::kStored;
  if (has_rest(call)) return multiply_int8_tiles<V, kCodes, Zeros::kRest, kStored>(call, tile, tiles, m0, m1);
  if (call.zero_type == Type::kUInt8) {
    return multiply_int8_tiles<V, kCodes, Zeros::kIntegers, kStored>(call, tile, tiles, m0, m1);
  }
  return multiply_int8_tiles<V, kCodes, Zeros::kNone, kStored>(call, tile, tiles, m0, m1);
}

// Scales of two factors: each kind has its width and its kind of zeros. One factor for a row waits until the end.
template <class V>
void multiply_int8_products(const Call& call, int64_t tile, int tiles, int64_t m0, int64_t m1) {
  constexpr Scales kProducts = Scales::kProducts;
  switch (call.factors) {
    case Factors::kK2:
      return multiply_int8_tiles<V, Codes::kTwo, Zeros::kRest, kProducts>(call, tile, tiles, m0, m1);
    case Factors::kK3:
      return multiply_int8_tiles<V, Codes::kNibbles, Zeros::kNone, kProducts>(call, tile, tiles, m0, m1);
    case Factors::kK45:
      if (call.bits == 4) {
        return multiply_int8_tiles<V, Codes::kNibbles, Zeros::kRest, kProducts>(call, tile, tiles, m0, m1);
      }
      return multiply_int8_tiles<V, Codes::kFive, Zeros::kRest, kProducts>(call, tile, tiles, m0, m1);
    case Factors::kK6:
      return multiply_int8_tiles<V, Codes::kSix, Zeros::kNone, kProducts>(call, tile, tiles, m0, m1);
    case Factors::kIq4Xs:
      return multiply_int8_tiles<V, Codes::kTable, Zeros::kNone, kProducts>(call, tile, tiles, m0, m1);
    default:
      return multiply_int8_tiles<V, Codes::kTable, Zeros::kNone, Scales::kStored>(call, tile, tiles, m0, m1);
  }
}

template <class V>
void multiply_int8(const Call& call, int64_t tile, int tiles, int64_t m0, int64_t m1) {
  if (call.factors != Factors::kNone) return multiply_int8_products<V>(call, tile, tiles, m0, m1);
  if (call.codebook != Codebook::kIntegers) {
    return multiply_int8_tiles<V, Codes::kTable, Zeros::kNone, Scales::kStored>(call, tile, tiles, m0, m1);
  }
  switch (call.bits) {
    case 2:
      return multiply_int8_width<V, Codes::kTwo>(call, tile, tiles, m0, m1);
    case 3:
    case 4:
      return multiply_int8_width<V, Codes::kNibbles>(call, tile, tiles, m0, m1);
    case 5:
      return multiply_int8_width<V, Codes::kFive>(call, tile, tiles, m0, m1);
    case 6:
      return multiply_int8_width<V, Codes::kSix>(call, tile, tiles, m0, m1);
    default:
      return multiply_int8_width<V, Codes::kBytes>(call, tile, tiles, m0, m1);
  }
}

}  // namespace
}  // namespace qkernels::cpu
