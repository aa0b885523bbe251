// The loops of tile_decode.h and tile_panel.h where scales (and offsets) are products of a small factor a group and
// an outer one of several groups, a span: GGUF's super-blocks.
//
// Sums of groups meet the small factors, which are integers, in fp32, and what a span comes to meets the outer factor:
// neither is asked for, converted and multiplied for every group. Where there are offsets, codes are multiplied as
// they are stored, from 0 (mid_of), so that offsets are the small factors times sum(x) alone, summed over a span. At
// M = 1 with the weight in L2 that is 11 % of the time of Q4_K and 20 % of Q6_K's (Zen 4).
//
// Where a vector set works on several tiles, two at a time, not four: four streams of memory 32 KB apart are read at 14
// GB/s by a core that sums at 35, two at 22 (Q4_K, Zen 4), one, with two groups at a time, at 28 (kRunsTogether).
#pragma once
#include <cstdint>

#include "tile_decode.h"
#include "tile_panel.h"

namespace qkernels::cpu {
namespace {

struct Span {
  int64_t first, groups;
};
QK_INLINE Span span_of(const Call& call, int64_t s) {
  const int64_t first = s << call.outer_shift, left = call.G - first, most = int64_t{1} << call.outer_shift;
  return {first, left < most ? left : most};
}

// total[r] -= (sum over a span of the small factors of offsets times sums of x) times their outer factor. `sums`: of
// the first row of x and group.
template <class V, int kTokens>
QK_INLINE void subtract_offsets(const Call& call, int64_t tile, Span span, int64_t row, const float* sums,
                                typename V::Sum (&total)[kTokens]) {
  typename V::Sum offset[kTokens];
  for (auto& of_token : offset) of_token = V::zero();
  int64_t at = (tile * call.G + span.first) * kTileRows + row;
  for (int64_t g = span.first; g < span.first + span.groups; ++g, at += kTileRows) {
    const typename V::Sum small = V::widen(Type::kUInt8, call.zeros, at);
    for (int r = 0; r < kTokens; ++r) offset[r] = V::fma(small, V::set1(sums[r * call.G + g]), offset[r]);
  }
  const typename V::Sum outer = V::widen(call.outer_type, call.outer_zeros, outer_at(call, tile, span.first, row));
  const typename V::Sum negative = V::sub(V::zero(), outer);
  for (int r = 0; r < kTokens; ++r) total[r] = V::fma(offset[r], negative, total[r]);
}

// What groups g ... g + kRuns - 1 add to the sums of their span, one after another.
template <class V, class U, int kVectors, int kTokens, int kRuns>
QK_INLINE void add_groups(const Call& call, const U& unpacker, int64_t tile, int row, int64_t m0, int64_t g,
                          typename V::Sum (&sum)[kTokens][kVectors]) {
  using Sum = typename V::Sum;
  constexpr int kPerTile = kTileRows / V::kRows;
  constexpr FactorKind kKind = kind_of(U::kFactors);
  // A group is a block of planes, or half a one: wrong_factors in checks.h.
  constexpr int kGroupOctets = (256 >> kKind.outer_shift) / kOctet, kKnown = U::kBlockOctets > 1 ? kGroupOctets : 0;
  const Group group = group_of(call, g);
  typename U::Zero zero[kRuns][kVectors];
  const typename V::X* x[kRuns];
  Sum acc[kRuns][kTokens][kVectors];
#pragma GCC unroll 2
  for (int n = 0; n < kRuns; ++n) {
    for (int t = 0; t * kPerTile < kVectors; ++t) {
      prefetch_group(call, call.scales, kTileRows, tile + t, tile + t + 1, g + n);
      if (kKind.offsets) prefetch_group(call, call.zeros, kTileRows, tile + t, tile + t + 1, g + n);
    }
    for (auto& of_vector : zero[n]) of_vector = unpacker.zero(0);  // the same for all: there are no zero points
    x[n] = static_cast<const typename V::X*>(call.staged.data) + staged_at(call, m0, group.first + n * call.group);
    for (auto& of_token : acc[n])
      for (Sum& one : of_token) one = V::zero();
  }
  const uint8_t* codes = call.qweight + tile * call.tile_bytes + row * kLaneBytes;
  const int64_t ahead = to_next_run<V, U, kVectors>(call, group.first + kRun >= call.K_pad);
  const auto add = [&](auto begin) __attribute__((always_inline)) {
    accumulate<V, U, kVectors, kTokens, kRuns, kKnown, decltype(begin)::value>(
        unpacker, zero, codes + group.first / kOctet * U::kOctetBytes, call.tile_bytes, ahead, x,
        call.staged.row_stride, 0, kKnown > 0 ? kKnown : static_cast<int>(group.octets), acc);
  };
  if (kRuns == 1 && kKnown > 0 && kKnown < U::kBlockOctets && g % 2 != 0) {
    add(Number<kKnown % U::kBlockOctets>());
  } else {  // two groups begin with an even one: spans have an even number
    add(Number<0>());
  }
#pragma GCC unroll 2
  for (int n = 0; n < kRuns; ++n) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      const int64_t at = ((tile + v / kPerTile) * call.G + g + n) * kTileRows + row + v % kPerTile * V::kRows;
      const Sum small = V::widen(kKind.small, call.scales, at);
#pragma GCC unroll 8
      for (int r = 0; r < kTokens; ++r) sum[r][v] = V::fma(acc[n][r][v], small, sum[r][v]);
    }
  }
}

template <class V, class U, int kVectors, int kTokens>
void decode_products(const Call& call, const U& unpacker, int64_t tile, int row, int64_t m0) {
  using Sum = typename V::Sum;
  constexpr int kPerTile = kTileRows / V::kRows;
  Sum total[kVectors][kTokens];
  for (auto& of_vector : total)
    for (Sum& sum : of_vector) sum = V::zero();
  for (int64_t s = 0; s < call.S; ++s) {
    const Span span = span_of(call, s);
    const int64_t end = span.first + span.groups;
    Sum sum[kTokens][kVectors];
    for (auto& of_token : sum)
      for (Sum& one : of_token) one = V::zero();
    int64_t g = span.first;
    if constexpr (runs_together<V>(kTokens) > 1) {
      for (; g + 2 <= end && (g + 2) * call.group <= call.K; g += 2) {
        add_groups<V, U, kVectors, kTokens, 2>(call, unpacker, tile, row, m0, g, sum);
      }
    }
    for (; g < end; ++g) add_groups<V, U, kVectors, kTokens, 1>(call, unpacker, tile, row, m0, g, sum);
    for (int v = 0; v < kVectors; ++v) {
      const int64_t t = tile + v / kPerTile, first = row + v % kPerTile * V::kRows;
      const Sum outer = V::widen(call.outer_type, call.outer_scales, outer_at(call, t, span.first, first));
      for (int r = 0; r < kTokens; ++r) total[v][r] = V::fma(sum[r][v], outer, total[v][r]);
      if (kind_of(U::kFactors).offsets) {
        subtract_offsets<V, kTokens>(call, t, span, first, call.sums + m0 * call.G, total[v]);
      }
    }
  }
  constexpr int kCount = kVectors * V::kRows;
  const int64_t n0 = tile * kTileRows + row;
  float bias[kCount], sum[kCount];
  load_bias(call, n0, kCount, bias);
  for (int r = 0; r < kTokens; ++r) {
    for (int v = 0; v < kVectors; ++v) V::store(sum + v * V::kRows, total[v][r]);
    store_row(call, m0 + r, n0, kCount, sum, bias);
  }
}

// What the sums of a span add to the totals of some tokens, all rows of a tile.
template <class V, class U, int kTokens>
QK_INLINE void end_span(const Call& call, int64_t tile, Span span, int64_t m, const float* sum, float* total) {
  using Sum = typename V::Sum;
  for (int row = 0; row < kTileRows; row += V::kRows) {
    const Sum outer = V::widen(call.outer_type, call.outer_scales, outer_at(call, tile, span.first, row));
    Sum whole[kTokens];
    for (int r = 0; r < kTokens; ++r) {
      const int at = r * kTileRows + row;
      whole[r] = V::fma(V::load(sum + at), outer, V::load(total + at));
    }
    if (kind_of(U::kFactors).offsets) {
      subtract_offsets<V, kTokens>(call, tile, span, row, call.sums + m * call.G, whole);
    }
    for (int r = 0; r < kTokens; ++r) V::store(total + r * kTileRows + row, whole[r]);
  }
}

// The same in a panel, as multiply_tile.
template <class V, class U>
void multiply_products(const Call& call, const U& unpacker, int64_t tile, int64_t m0, int64_t m1) {
  constexpr int kPerTile = kTileRows / V::kRows, kRunOctets = kRun / kOctet, kAtOnce = 4;
  constexpr FactorKind kKind = kind_of(U::kFactors);
  alignas(64) uint8_t panel[kRunOctets * Panel<V>::kOctetBytes];
  alignas(64) float total[kBlockTokens * kTileRows], sum[kBlockTokens * kTileRows], small[kTileRows];
  const size_t used = static_cast<size_t>(m1 - m0) * kTileRows * sizeof(float);
  std::memset(total, 0, used);
  const uint8_t* codes = call.qweight + tile * call.tile_bytes;
  const typename V::X* x = static_cast<const typename V::X*>(call.staged.data);
  typename U::Zero zero[kPerTile];
  for (auto& of_vector : zero) of_vector = unpacker.zero(0);
  for (int64_t s = 0; s < call.S; ++s) {
    const Span span = span_of(call, s);
    std::memset(sum, 0, used);
    for (int64_t g = span.first; g < span.first + span.groups; ++g) {
      const Group group = group_of(call, g);
      const int64_t octet = group.first / kOctet;
      const int octets = static_cast<int>(group.octets);
      for (int row = 0; row < kTileRows; row += V::kRows) {
        V::store(small + row, V::widen(kKind.small, call.scales, (tile * call.G + g) * kTileRows + row));
      }
      unpack_run<V, U>(unpacker, zero, codes + octet * U::kOctetBytes, octet, octets, panel);
      multiply_panel<V>(m1 - m0, panel, octets, x + staged_at(call, m0, group.first), call.staged.row_stride, small,
                        sum);
    }
    int64_t m = 0;
    for (; m + kAtOnce <= m1 - m0; m += kAtOnce) {
      end_span<V, U, kAtOnce>(call, tile, span, m0 + m, sum + m * kTileRows, total + m * kTileRows);
    }
    for (; m < m1 - m0; ++m) {
      end_span<V, U, 1>(call, tile, span, m0 + m, sum + m * kTileRows, total + m * kTileRows);
    }
  }
  float bias[kTileRows];
  load_bias(call, tile * kTileRows, kTileRows, bias);
  for (int64_t m = m0; m < m1; ++m) {
    store_row(call, m, tile * kTileRows, kTileRows, total + (m - m0) * kTileRows, bias);
  }
}

}  // namespace
}  // namespace qkernels::cpu
