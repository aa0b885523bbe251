// Up to kMaxDecodeTokens rows of x: unpacked weights go from a register straight into the products.
#pragma once
#include <cstdint>

#include "tile_sums.h"

namespace qkernels::cpu {
namespace {

template <class V>
constexpr int runs_together(int tokens) {
  return tokens <= 3 ? V::kRunsTogether : 1;
}

// From the run that kVectors vectors of rows are at to the next one, in a tile's last run that of the tiles that
// follow.
template <class V, class U, int kVectors>
QK_INLINE int64_t to_next_run(const Call& call, bool last) {
  constexpr int kTiles = kVectors * V::kRows / kTileRows;
  if constexpr (kTiles > 1) return kRunBytes<U> + (last ? (kTiles - 1) * call.tile_bytes : 0);
  return kRunBytes<U>;
}

// What runs add to the totals, one after another, as if they had been summed in turns.
template <class V, class U, int kVectors, int kTokens, int kRuns>
QK_INLINE void add_runs(const Call& call, const U& unpacker, int64_t tile, int row, int64_t m0,
                        const Run (&runs)[kRuns], typename V::Sum (&total)[kTokens][kVectors]) {
  using Sum = typename V::Sum;
  constexpr int kPerTile = kTileRows / V::kRows;
  const auto at = [&](int n, int v) {
    const int64_t t = tile + v / kPerTile, r = row + (v % kPerTile) * V::kRows;
    return (t * call.G + runs[n].g) * kTileRows + r;
  };
  typename U::Zero zero[kRuns][kVectors];
  const typename V::X* x[kRuns];
  Sum scale[kRuns][kVectors], acc[kRuns][kTokens][kVectors];
#pragma GCC unroll 2
  for (int n = 0; n < kRuns; ++n) {
    for (int t = 0; t * kPerTile < kVectors; ++t) {
      prefetch_group(call, call.scales, call.scale_bytes, tile + t, tile + t + 1, runs[n].g);
      prefetch_group(call, call.zeros, call.zero_bytes, tile + t, tile + t + 1, runs[n].g);
    }
    x[n] = static_cast<const typename V::X*>(call.staged.data) + staged_at(call, m0, runs[n].first * kOctet);
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      zero[n][v] = unpacker.zero(at(n, v));
      scale[n][v] = V::widen(call.scale_type, call.scales, at(n, v));
    }
    for (auto& of_token : acc[n])
      for (Sum& sum : of_token) sum = V::zero();
  }
  const Run& last = runs[kRuns - 1];
  const int64_t ahead = to_next_run<V, U, kVectors>(call, last.ends_group && last.g + 1 == call.G);
  const uint8_t* codes = call.qweight + tile * call.tile_bytes + row * kLaneBytes + runs[0].first * U::kOctetBytes;
  accumulate<V, U, kVectors, kTokens, kRuns>(unpacker, zero, codes, call.tile_bytes, ahead, x, call.staged.row_stride,
                                             runs[0].first, static_cast<int>(runs[0].octets), acc);
#pragma GCC unroll 2
  for (int n = 0; n < kRuns; ++n) {
#pragma GCC unroll 8
    for (int r = 0; r < kTokens; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) total[r][v] = V::fma(acc[n][r][v], scale[n][v], total[r][v]);
    }
    if (call.sums != nullptr && runs[n].ends_group) {
      for (int v = 0; v < kVectors; ++v) {
        const Sum rest = stored_rest_of<V>(call, scale[n][v], at(n, v));
        for (int r = 0; r < kTokens; ++r) {
          total[r][v] = V::fma(rest, V::set1(call.sums[(m0 + r) * call.G + runs[n].g]), total[r][v]);
        }
      }
    }
  }
}

template <class V, class U, int kVectors, int kTokens>
void decode_rows(const Call& call, const U& unpacker, int64_t tile, int row, int64_t m0) {
  using Sum = typename V::Sum;
  constexpr int kPerTile = kTileRows / V::kRows;
  Sum total[kTokens][kVectors];
  for (auto& of_token : total)
    for (Sum& sum : of_token) sum = V::zero();
  for (Run run = run_from(call, 0, 0); run.g < call.G;) {
    const Run second = run_after(call, run);
    if constexpr (runs_together<V>(kTokens) > 1) {
      if (second.g < call.G && second.octets == run.octets) {
        add_runs<V, U, kVectors, kTokens, 2>(call, unpacker, tile, row, m0, {run, second}, total);
        run = run_after(call, second);
        continue;
      }
    }
    add_runs<V, U, kVectors, kTokens, 1>(call, unpacker, tile, row, m0, {run}, total);
    run = second;
  }
  constexpr int kCount = kVectors * V::kRows;
  const int64_t n0 = tile * kTileRows + row;
  float bias[kCount], sum[kCount];
  load_bias(call, n0, kCount, bias);
  for (int r = 0; r < kTokens; ++r) {
    for (int v = 0; v < kVectors; ++v) {
      const int first = row + (v % kPerTile) * V::kRows;
      V::store(sum + v * V::kRows, finished<V>(call, tile + v / kPerTile, first, total[r][v]));
    }
    store_row(call, m0 + r, n0, kCount, sum, bias);
  }
}

}  // namespace
}  // namespace qkernels::cpu
