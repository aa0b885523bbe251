// What some roundings of x (../activations.h) leave to be added to the sums of the int8 products, before y is rounded:
//
//   zero points  codes q of x stand for (q - z) s. The products give s sum(q w); a row of ones beside those of x gives
//                sum(w) for every row of the weight, and z s times it is subtracted.
//   kOutliers    columns of x with an entry of 6 or more are multiplied here, as they are, in fp32; their codes are 0.
//
// The kernels then write fp32 sums without bias. For files that are compiled for no instruction set in particular.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "kernels.h"
#include "rows.h"

namespace qkernels::cpu {
namespace {

int64_t rows_of_sums(const Call& call) { return call.M + (has_zero_points(call.rounding) ? 1 : 0); }
int64_t lines(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// Sums and marks, in front of what the product itself wants.
int64_t apart_bytes(const Call& call) {
  return has_apart(call) ? lines(rows_of_sums(call) * call.N * 4) + lines(call.K) : 0;
}

// The product of the int8 kernels alone.
Call without_apart(const Call& call, void* memory) {
  Call inner = call;
  inner.M = rows_of_sums(call);
  inner.bias = nullptr, inner.bias_type = Type::kNone;
  inner.y = memory, inner.y_type = Type::kFloat;
  inner.marked = static_cast<uint8_t*>(memory) + lines(inner.M * call.N * 4);
  return inner;
}

// marked[k] |= whether |x| of a row is an outlier, by the bits of its magnitude: from `least` on; infinities are, NaNs,
// which come after them, are not.
template <class Bits>
void mark_row(const Bits* x, int64_t stride, Bits least, Bits infinity, uint8_t* __restrict marked, int64_t n) {
  constexpr Bits kMagnitude = static_cast<Bits>(~Bits{0}) >> 1;
  const auto is_outlier = [=](Bits bits) {
    const Bits magnitude = bits & kMagnitude;
    return static_cast<uint8_t>((magnitude >= least) & (magnitude <= infinity));
  };
  if (stride == 1) {
    for (int64_t k = 0; k < n; ++k) marked[k] |= is_outlier(x[k]);
  } else {
    for (int64_t k = 0; k < n; ++k) marked[k] |= is_outlier(x[k * stride]);
  }
}

// Whether columns k0 ... k1 - 1 of x have an outlier.
void mark_columns(const Call& call, uint8_t* marked, int64_t k0, int64_t k1) {
  std::memset(marked + k0, 0, static_cast<size_t>(k1 - k0));
  for (int64_t m = 0; m < call.M; ++m) {
    const int64_t at = m * call.x_row_stride + k0 * call.x_column_stride;
    const int64_t stride = call.x_column_stride, n = k1 - k0;
    if (call.x_type == Type::kFloat) {
      mark_row(static_cast<const uint32_t*>(call.x) + at, stride, as_bits(kBecomesOutlier), uint32_t{0x7f800000},
               marked + k0, n);
    } else if (call.x_type == Type::kHalf) {
      mark_row(static_cast<const uint16_t*>(call.x) + at, stride, to_half(kBecomesOutlier), uint16_t{0x7c00},
               marked + k0, n);
    } else {
      mark_row(static_cast<const uint16_t*>(call.x) + at, stride, to_bf16(kBecomesOutlier), uint16_t{0x7f80},
               marked + k0, n);
    }
  }
}

// Marked columns that are added together: where they are stored, and x there, as floats [M, kTogether].
struct Columns {
  static constexpr int kTogether = 32;
  const int64_t* at;
  int count;
  const float* x;
};

// `kTileRows` scales, or floating zeros, of a type that one question is asked about.
void widen_group(Type type, const void* base, int64_t at, float* to) {
  const auto* halves = static_cast<const uint16_t*>(base);
  if (type == Type::kFloat) {
    std::memcpy(to, static_cast<const float*>(base) + at, kTileRows * 4);
  } else if (type == Type::kBFloat16) {
    for (int r = 0; r < kTileRows; ++r) to[r] = from_bf16(halves[at + r]);
  } else if (type == Type::kHalf) {
    for (int r = 0; r < kTileRows; ++r) to[r] = from_half(halves[at + r]);
  } else {
    for (int r = 0; r < kTileRows; ++r) to[r] = load(type, base, at + r);
  }
}

// The weights of a tile in stored columns, [count][kTileRows].
void weights_of_columns(const Call& call, int64_t tile, const Columns& columns, float (*w)[kTileRows]) {
  const bool bytes = planes_of(call.bits).low == 8, stored = call.factors == Factors::kNone;
  const bool plain = stored && call.codebook == Codebook::kIntegers && call.zero_type == Type::kNone;
  float scales[kTileRows], zeros[kTileRows] = {};
  for (int64_t i = 0, group = -1; i < columns.count; ++i) {
    const int64_t k = columns.at[i], g = k / call.group, of_group = (tile * call.G + g) * kTileRows;
    if (g != group && stored) {
      widen_group(call.scale_type, call.scales, of_group, scales);
      if (call.zero_type != Type::kNone) widen_group(call.zero_type, call.zeros, of_group, zeros);
    } else if (g != group) {
      for (int r = 0; r < kTileRows; ++r) {
        scales[r] = scale_of(call, tile, g, r), zeros[r] = zero_of(call, tile, g, r);
      }
    }
    group = g;
    uint8_t codes[kTileRows];
    const uint8_t* at = call.qweight + tile * call.tile_bytes + k / 4 * kLineBytes + k % 4;
    for (int r = 0; r < kTileRows; ++r) {
      codes[r] = bytes ? at[r * kLaneBytes] : static_cast<uint8_t>(int8_code_at(call, tile, r, k));
    }
    if (plain) {
      const int mid = 1 << (call.bits - 1);
      for (int r = 0; r < kTileRows; ++r) w[i][r] = static_cast<float>(codes[r] - mid) * scales[r];
    } else {
      for (int r = 0; r < kTileRows; ++r) w[i][r] = weight_of(call, codes[r], scales[r], zeros[r]);
    }
  }
}

// sum[r] += x[i] w[i][r], in registers: the compiler keeps an array of floats in memory, 8 loads and stores a column.
void add_columns(const float* x, const float (*w)[kTileRows], int count, float* sum) {
  using Four = float __attribute__((vector_size(16)));
  constexpr int kFours = kTileRows / 4;
  Four total[kFours];
  std::memcpy(total, sum, sizeof total);
  for (int i = 0; i < count; ++i) {
    Four of_column[kFours];
    std::memcpy(of_column, w[i], sizeof of_column);
#pragma GCC unroll 8
    for (int j = 0; j < kFours; ++j) total[j] += x[i] * of_column[j];
  }
  std::memcpy(sum, total, sizeof total);
}

// Adds marked columns to the sums of tiles t0 ... t1 - 1. `inner`: without_apart, when its product is there. `last`:
// makes y of them.
void finish(const Call& call, const Call& inner, const Columns& columns, bool last, int64_t t0, int64_t t1) {
  float* sums = static_cast<float*>(inner.y);
  const float* ones = sums + call.M * call.N;  // only where there are zero points
  const bool zero_points = has_zero_points(call.rounding);
  float bias[kTileRows], sum[kTileRows] = {}, w[Columns::kTogether][kTileRows];
  for (int64_t tile = t0; tile < t1; ++tile) {
    const int64_t n0 = tile * kTileRows, valid = std::min<int64_t>(kTileRows, call.N - n0);
    weights_of_columns(call, tile, columns, w);
    load_bias(call, n0, kTileRows, bias);
    for (int64_t m = 0; m < call.M; ++m) {
      float* from = sums + m * call.N + n0;
      std::memcpy(sum, from, static_cast<size_t>(valid) * 4);
      for (int64_t n = 0; zero_points && n < valid; ++n) sum[n] -= inner.x_zeros[m] * ones[n0 + n];
      if (columns.count > 0) add_columns(columns.x + m * Columns::kTogether, w, columns.count, sum);
      if (last) {
        store_row(call, m, n0, kTileRows, sum, bias);
      } else {
        std::memcpy(from, sum, static_cast<size_t>(valid) * 4);
      }
    }
  }
}

}  // namespace
}  // namespace qkernels::cpu
