// The loops that the vector instruction sets share for int8 activations, as a template over the vectors V:
//   kRows, Sum, widen, zero, set1, mul, fma, store   as in tile_gemm.h
//   Integers      int32 sums, or the bytes of one lane of codes a row, or four codes of x in every lane
//   kTokens       rows of x a block takes: as many as there are registers for
//   kDecodeVectors[m - 1]: vectors of rows to work on for m <= kDecodeTokens rows of x, at most those of
//                 tiles_together(m) tiles, so that more sums are in flight
//   kByteBias     what `dot_bytes` subtracts from each 8-bit code
//   dot_nibbles(sum, lanes, x0, x1)  low nibbles times x0 and high ones times x1
//   dot_bytes(sum, lanes, x)         (bytes - kByteBias) times x
//   less_bytes(i, bytes)             i - consecutive bytes, one a row
//   times(a, b)                      of integers, wrapping
#pragma once
#include <cstdint>
#include <cstring>

#include "kernels.h"
#include "rows_int8.h"
#include "tile_gemm.h"

namespace qkernels::cpu {
namespace {

enum class Zeros { kNone, kIntegers, kRest };

// Sums start at what the products leave out: (kByteBias - zero) * (sum of x over the group). Symmetric weights have one
// zero, 2^(bits-1), which costs nothing; integer zero points are one a row. Floating zero points and offsets leave the
// zero at 2^(bits-1), and add sum(x) * rest_of (tile_gemm.h). Integer sums may wrap on the way; the true sum fits
// (layouts/cpu_tile_a8.py bounds the group).
template <class V, bool kBytes, Zeros kZeros, int kVectors, int kTokens>
void multiply_int8_rows(const Problem& p, int64_t tile, int64_t next_tile, int64_t m0) {
  using Sum = typename V::Sum;
  using Integers = typename V::Integers;
  constexpr int kPerTile = kTileRows / V::kRows, kQuadBytes = kTileRows * kLaneBytes;
  constexpr int kOctetBytes = kBytes ? 2 * kQuadBytes : kQuadBytes;
  // Codes are fetched 2 KB ahead, and at the end of a tile of 4 bits from `next_tile`: see prefetch_codes in
  // tile_gemm.h. 8-bit tiles are twice as long, and the address that varies cost them 2 %.
  constexpr int64_t kAhead = 2048;
  const int64_t tile_end = p.tile_bytes - kAhead, to_next = (next_tile - tile - 1) * p.tile_bytes + kAhead;
  const int32_t start = (kBytes ? V::kByteBias : 0) - (1 << (p.bits - 1));
  const uint8_t* vectors[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    vectors[v] = p.qweight + (tile + v / kPerTile) * p.tile_bytes + v % kPerTile * V::kRows * kLaneBytes;
  }
  const int8_t* rows = static_cast<const int8_t*>(p.staged.data) + m0 * p.staged.row_stride;
  // The fp32 totals stay in L1: the empty asm keeps gcc from giving them the registers that the integer sums need
  // (M = 4, codes in L2: 51 GB/s with both in registers, and half of the sums on the stack in the inner loop).
  constexpr int kCount = kVectors * V::kRows;
  alignas(64) float total[kTokens * kCount] = {};
  for (int64_t g = 0; g < p.G; ++g) {
    asm volatile("" : : "r"(total) : "memory");
    const Group group = group_of(p, g);
    for (int t = 0; t * kPerTile < kVectors; ++t) {
      prefetch_group(p, p.scales, p.scale_type, tile + t, next_tile + t, g);
      if (kZeros != Zeros::kNone) prefetch_group(p, p.zeros, p.zero_type, tile + t, next_tile + t, g);
    }
    const auto at = [&](int v) {  // the first row's scale and zero
      return ((tile + v / kPerTile) * p.G + g) * kTileRows + v % kPerTile * V::kRows;
    };
    const int32_t* x_sums = p.x_sums + m0 * p.G + g;
    Integers acc[kTokens][kVectors];
    if constexpr (kZeros == Zeros::kIntegers) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        const Integers bias = V::integers(kBytes ? V::kByteBias : 0);
        const Integers from = V::less_bytes(bias, static_cast<const uint8_t*>(p.zeros) + at(v));
#pragma GCC unroll 8
        for (int r = 0; r < kTokens; ++r) acc[r][v] = V::times(from, V::integers(x_sums[r * p.G]));
      }
    } else {
#pragma GCC unroll 8
      for (int r = 0; r < kTokens; ++r) {
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) acc[r][v] = V::integers(start * x_sums[r * p.G]);
      }
    }
    for (int64_t o = group.first / kOctet; o < group.first / kOctet + group.octets; ++o) {
      const int8_t* x = rows + o * kOctet;
      const int64_t ahead = kBytes || o * kOctetBytes < tile_end ? kAhead : to_next;
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        const uint8_t* codes = vectors[v] + o * kOctetBytes;
        if (v * V::kRows * kLaneBytes % 64 == 0) __builtin_prefetch(codes + ahead);
        if constexpr (kBytes) {
          if (v * V::kRows * kLaneBytes % 64 == 0) __builtin_prefetch(codes + kQuadBytes + ahead);
          const Integers first = V::lanes_at(codes), second = V::lanes_at(codes + kQuadBytes);
#pragma GCC unroll 8
          for (int r = 0; r < kTokens; ++r) {
            acc[r][v] = V::dot_bytes(acc[r][v], first, V::quad(x + r * p.staged.row_stride));
            acc[r][v] = V::dot_bytes(acc[r][v], second, V::quad(x + r * p.staged.row_stride + 4));
          }
        } else {
          const Integers lanes = V::lanes_at(codes);
#pragma GCC unroll 8
          for (int r = 0; r < kTokens; ++r) {
            const int8_t* octet = x + r * p.staged.row_stride;
            acc[r][v] = V::dot_nibbles(acc[r][v], lanes, V::quad(octet), V::quad(octet + 4));
          }
        }
      }
    }
    // The empty asms are where the octets' loop ends for gcc. Without them it kept each sum in a second register, or on
    // the stack, and copied it in the loop: 12 of 71 instructions for 6 rows of x and 4 bits, 24 of 96 for 4 rows. Time
    // at M = 4: 0.90 to 0.92.
    if constexpr (kZeros == Zeros::kRest) asm("" : "+r"(x_sums));
#pragma GCC unroll 8
    for (int r = 0; r < kTokens; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) asm("" : "+v"(acc[r][v]));
    }
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      const Sum scale = V::widen(p.scale_type, p.scales, at(v));
      const Sum rest = kZeros == Zeros::kRest ? rest_of<V>(p, scale, at(v)) : V::zero();
#pragma GCC unroll 8
      for (int r = 0; r < kTokens; ++r) {
        float* sum = total + r * kCount + v * V::kRows;
        Sum next = V::fma(V::to_sum(acc[r][v]), scale, V::load(sum));
        if (kZeros == Zeros::kRest) next = V::fma(V::to_sum(V::integers(x_sums[r * p.G])), rest, next);
        V::store(sum, next);
      }
    }
  }
  float bias[kCount];
  load_bias(p, tile * kTileRows, kCount, bias);
  for (int r = 0; r < kTokens; ++r) {
    float* sum = total + r * kCount;
    for (int i = 0; i < kCount; ++i) sum[i] *= p.x_scales[m0 + r];
    store_row(p, m0 + r, tile * kTileRows, kCount, sum, bias);
  }
}

// As many tiles at once as kDecodeVectors says for this number of rows of x; returns how many are left.
template <class V, bool kBytes, Zeros kZeros, int kTokens>
int multiply_int8_together(const Problem& p, int64_t tile, int tiles, int64_t m0, int64_t tokens) {
  if constexpr (kTokens > 1) {
    if (tokens < kTokens) return multiply_int8_together<V, kBytes, kZeros, kTokens - 1>(p, tile, tiles, m0, tokens);
  }
  constexpr int kVectors = V::kDecodeVectors[kTokens - 1], kTiles = kVectors * V::kRows / kTileRows;
  for (const int64_t next_unit = tile + p.unit_step; tiles >= kTiles; tiles -= kTiles, tile += kTiles) {
    const int64_t next = tiles == kTiles ? next_unit : tile + kTiles;
    multiply_int8_rows<V, kBytes, kZeros, kVectors, kTokens>(p, tile, next, m0);
  }
  return tiles;
}

// At most kTokens rows of x and one tile
template <class V, bool kBytes, Zeros kZeros, int kTokens>
void multiply_int8_last(const Problem& p, int64_t tile, int64_t next_tile, int64_t m0, int64_t tokens) {
  constexpr int kPerTile = kTileRows / V::kRows;
  if (tokens == kTokens) return multiply_int8_rows<V, kBytes, kZeros, kPerTile, kTokens>(p, tile, next_tile, m0);
  if constexpr (kTokens > 1) multiply_int8_last<V, kBytes, kZeros, kTokens - 1>(p, tile, next_tile, m0, tokens);
}

template <class V, bool kBytes, Zeros kZeros>
void multiply_int8_tiles(const Problem& p, int64_t tile, int tiles, int64_t m0, int64_t m1) {
  const int64_t end = tile + tiles, next_unit = tile + p.unit_step;
  if (m1 - m0 <= V::kDecodeTokens) {
    tiles = multiply_int8_together<V, kBytes, kZeros, V::kDecodeTokens>(p, tile, tiles, m0, m1 - m0);
  }
  for (int64_t t = end - tiles; t < end; ++t) {
    for (int64_t m = m0; m < m1; m += V::kTokens) {
      const int64_t next = m + V::kTokens < m1 ? t : t + 1 < end ? t + 1 : next_unit;  // a tile stays in L2
      multiply_int8_last<V, kBytes, kZeros, V::kTokens>(p, t, next, m, m1 - m < V::kTokens ? m1 - m : V::kTokens);
    }
  }
}

template <class V, bool kBytes>
void multiply_int8_width(const Problem& p, int64_t tile, int tiles, int64_t m0, int64_t m1) {
  if (p.zero_type == Type::kNone) return multiply_int8_tiles<V, kBytes, Zeros::kNone>(p, tile, tiles, m0, m1);
  if (has_rest(p)) return multiply_int8_tiles<V, kBytes, Zeros::kRest>(p, tile, tiles, m0, m1);
  return multiply_int8_tiles<V, kBytes, Zeros::kIntegers>(p, tile, tiles, m0, m1);
}

template <class V>
void multiply_int8(const Problem& p, int64_t tile, int tiles, int64_t m0, int64_t m1) {
  if (p.bits > 4) return multiply_int8_width<V, true>(p, tile, tiles, m0, m1);
  return multiply_int8_width<V, false>(p, tile, tiles, m0, m1);
}

}  // namespace
}  // namespace qkernels::cpu
