// More than kMaxDecodeTokens rows of x where that pays (U::kPanel): a run of a tile is unpacked into L1, then meets all
// rows of a block.
#pragma once
#include <cstdint>
#include <cstring>

#include "tile_sums.h"

namespace qkernels::cpu {
namespace {

// Weights that `unpack_run` wrote to L1, read back as if they were codes.
template <class V>
struct Panel {
  struct Zero {};
  using Raw = const uint8_t*;
  static constexpr int kSteps = kOctet / V::kStep;
  static constexpr int64_t kOctetBytes = kSteps * kTileRows * kLaneBytes, kMemoryBytes = 0;
  static constexpr int kBlockOctets = 1;
  static constexpr bool kByBlocks = false;
  static QK_INLINE Raw load(const uint8_t* at, int) { return at; }
  QK_INLINE typename V::Weight value(Raw raw, int s, Zero) const {
    return V::load_weight(raw + s * kTileRows * kLaneBytes);
  }
};

template <class V, class U>
QK_INLINE void unpack_run(const U& unpacker, const typename U::Zero* zero, const uint8_t* codes, int64_t first,
                          int octets, uint8_t* panel) {
  constexpr int kPerTile = kTileRows / V::kRows, kVectorBytes = V::kRows * kLaneBytes;
  for (int o = 0; o < octets; ++o, codes += U::kOctetBytes, panel += Panel<V>::kOctetBytes) {
    prefetch_codes<U, 1, false>(codes + kRunBytes<U>);
#pragma GCC unroll 4
    for (int v = 0; v < kPerTile; ++v) {
      const typename U::Raw raw = load_octet<U>(codes + v * kVectorBytes, first + o);
#pragma GCC unroll 8
      for (int s = 0; s < Panel<V>::kSteps; ++s) {
        V::store_weight(panel + s * kTileRows * kLaneBytes + v * kVectorBytes, unpacker.value(raw, s, zero[v]));
      }
    }
  }
}

// total[r][row ...] += scale * (panel times rows of x), for kTokens rows of x and all rows of the tile
template <class V, int kTokens>
void multiply_block(const uint8_t* panel, int octets, const typename V::X* x, int64_t x_stride, const float* scale,
                    float* total) {
  using Sum = typename V::Sum;
  const typename Panel<V>::Zero none[1][V::kHalf] = {};
  const typename V::X* const rows[] = {x};
  for (int row = 0; row < kTileRows; row += V::kHalf * V::kRows) {
    Sum acc[1][kTokens][V::kHalf];
    for (auto& of_token : acc[0])
      for (Sum& sum : of_token) sum = V::zero();
    accumulate<V, Panel<V>, V::kHalf, kTokens, 1>(Panel<V>(), none, panel + row * kLaneBytes, 0, 0, rows, x_stride, 0,
                                                  octets, acc);
#pragma GCC unroll 16
    for (int r = 0; r < kTokens; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < V::kHalf; ++v) {
        const int at = row + v * V::kRows;
        V::store(total + r * kTileRows + at,
                 V::fma(acc[0][r][v], V::load(scale + at), V::load(total + r * kTileRows + at)));
      }
    }
  }
}

template <class V, int kTokens>
QK_INLINE void multiply_last(int64_t tokens, const uint8_t* panel, int octets, const typename V::X* x, int64_t x_stride,
                             const float* scale, float* total) {
  if (tokens == kTokens) return multiply_block<V, kTokens>(panel, octets, x, x_stride, scale, total);
  if constexpr (kTokens > 1) multiply_last<V, kTokens - 1>(tokens, panel, octets, x, x_stride, scale, total);
}

// The run of a panel with `tokens` rows of x, which begin at x.
template <class V>
void multiply_panel(int64_t tokens, const uint8_t* panel, int octets, const typename V::X* x, int64_t x_stride,
                    const float* scale, float* total) {
  for (; tokens >= V::kTokens; tokens -= V::kTokens) {
    multiply_block<V, V::kTokens>(panel, octets, x, x_stride, scale, total);
    x += V::kTokens * x_stride, total += V::kTokens * kTileRows;
  }
  multiply_last<V, V::kTokens - 1>(tokens, panel, octets, x, x_stride, scale, total);
}

template <class V, class U>
void multiply_tile(const Call& call, const U& unpacker, int64_t tile, int64_t m0, int64_t m1) {
  using Sum = typename V::Sum;
  constexpr int kPerTile = kTileRows / V::kRows, kRunOctets = kRun / kOctet;
  alignas(64) uint8_t panel[kRunOctets * Panel<V>::kOctetBytes];
  alignas(64) float total[kBlockTokens * kTileRows], scale[kTileRows];
  std::memset(total, 0, static_cast<size_t>(m1 - m0) * kTileRows * sizeof(float));
  const uint8_t* codes = call.qweight + tile * call.tile_bytes;
  const typename V::X* x = static_cast<const typename V::X*>(call.staged.data);
  for (int64_t g = 0; g < call.G; ++g) {
    const Group group = group_of(call, g);
    const int64_t at = (tile * call.G + g) * kTileRows;
    typename U::Zero zero[kPerTile];
    for (int v = 0; v < kPerTile; ++v) {
      zero[v] = unpacker.zero(at + v * V::kRows);
      V::store(scale + v * V::kRows, V::widen(call.scale_type, call.scales, at + v * V::kRows));
    }
    for (int64_t o = 0; o < group.octets; o += kRunOctets) {
      const int octets = static_cast<int>(group.octets - o < kRunOctets ? group.octets - o : kRunOctets);
      const int64_t octet = group.first / kOctet + o;
      unpack_run<V, U>(unpacker, zero, codes + octet * U::kOctetBytes, octet, octets, panel);
      multiply_panel<V>(m1 - m0, panel, octets, x + staged_at(call, m0, octet * kOctet), call.staged.row_stride, scale,
                        total);
    }
    for (int v = 0; v < kPerTile && call.sums != nullptr; ++v) {
      const Sum rest = stored_rest_of<V>(call, V::load(scale + v * V::kRows), at + v * V::kRows);
      for (int64_t m = m0; m < m1; ++m) {
        float* sum = total + (m - m0) * kTileRows + v * V::kRows;
        V::store(sum, V::fma(rest, V::set1(call.sums[m * call.G + g]), V::load(sum)));
      }
    }
  }
  float bias[kTileRows];
  load_bias(call, tile * kTileRows, kTileRows, bias);
  for (int64_t m = m0; m < m1; ++m) {
    float* sums = total + (m - m0) * kTileRows;
    for (int row = 0; row < kTileRows; row += V::kRows) {
      V::store(sums + row, finished<V>(call, tile, row, V::load(sums + row)));
    }
    store_row(call, m, tile * kTileRows, kTileRows, sums, bias);
  }
}

}  // namespace
}  // namespace qkernels::cpu
