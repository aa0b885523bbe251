// What some roundings of x (../activations.h) leave to be added to the sums of the int8 products, before y is rounded:
//
//   kZeroPoint  codes q of x stand for (q - z) s. The products give s sum(q w); a row of ones beside those of x gives
//               sum(w) for every row of the weight, and z s times it is subtracted.
//   kOutliers   columns of x with an entry of 6 or more are multiplied here, as they are, in fp32; their codes are 0.
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

int64_t rows_of_sums(const Call& call) { return call.M + (call.rounding == Rounding::kZeroPoint ? 1 : 0); }
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

// Whether columns k0 ... k1 - 1 of x have an outlier; infinities are, NaNs are not.
void mark_columns(const Call& call, uint8_t* marked, int64_t k0, int64_t k1) {
  std::memset(marked + k0, 0, static_cast<size_t>(k1 - k0));
  const auto mark = [&](auto value) {
    for (int64_t m = 0; m < call.M; ++m) {
      for (int64_t k = k0; k < k1; ++k) {
        const uint32_t magnitude = as_bits(value(m * call.x_row_stride + k * call.x_column_stride)) & 0x7fffffff;
        marked[k] |= magnitude >= as_bits(kBecomesOutlier) && magnitude <= 0x7f800000;
      }
    }
  };
  const auto* floats = static_cast<const float*>(call.x);
  const auto* halves = static_cast<const uint16_t*>(call.x);
  if (call.x_type == Type::kFloat) {
    mark([=](int64_t i) { return floats[i]; });
  } else if (call.x_type == Type::kHalf) {
    mark([=](int64_t i) { return from_half(halves[i]); });
  } else {
    mark([=](int64_t i) { return from_bf16(halves[i]); });
  }
}

// One stored column of a tile.
void weights_of_column(const Call& call, int64_t tile, int64_t k, const float* scales, const float* zeros, float* w) {
  if (planes_of(call.bits).low != 8) {
    for (int r = 0; r < kTileRows; ++r) w[r] = weight_of(call, int8_code_at(call, tile, r, k), scales[r], zeros[r]);
    return;
  }
  const uint8_t* at = call.qweight + tile * call.tile_bytes + k / 4 * kLineBytes + k % 4;
  for (int r = 0; r < kTileRows; ++r) w[r] = weight_of(call, at[r * kLaneBytes], scales[r], zeros[r]);
}

// Adds the marked columns to the sums of a tile; `columns`: where they are stored.
void add_marked(const Call& call, const int64_t* columns, int64_t count, int64_t tile, float* sums) {
  const int64_t valid = std::min<int64_t>(kTileRows, call.N - tile * kTileRows);
  float scales[kTileRows], zeros[kTileRows], w[kTileRows];
  for (int64_t i = 0, group = -1; i < count; ++i) {
    const int64_t k = columns[i], g = k / call.group;
    for (int r = 0; g != group && r < kTileRows; ++r) {
      scales[r] = scale_of(call, tile, g, r), zeros[r] = zero_of(call, tile, g, r);
    }
    group = g;
    weights_of_column(call, tile, k, scales, zeros, w);
    const int64_t column = column_of(call, k) * call.x_column_stride;
    for (int64_t m = 0; m < call.M; ++m) {
      const float x = load(call.x_type, call.x, m * call.x_row_stride + column);
      float* to = sums + m * call.N + tile * kTileRows;
      for (int64_t n = 0; n < valid; ++n) to[n] += x * w[n];
    }
  }
}

// y of the rows of tiles t0 ... t1 - 1. `inner`: without_apart, when its product is there.
void finish(const Call& call, const Call& inner, const int64_t* columns, int64_t count, int64_t t0, int64_t t1) {
  float* sums = static_cast<float*>(inner.y);
  const float* ones = sums + call.M * call.N;  // only where there are zero points
  float bias[kTileRows], sum[kTileRows];
  for (int64_t tile = t0; tile < t1; ++tile) {
    const int64_t n0 = tile * kTileRows, valid = std::min<int64_t>(kTileRows, call.N - n0);
    if (count > 0) add_marked(call, columns, count, tile, sums);
    load_bias(call, n0, kTileRows, bias);
    for (int64_t m = 0; m < call.M; ++m) {
      const float* from = sums + m * call.N + n0;
      for (int64_t n = 0; n < valid; ++n) {
        sum[n] = call.rounding == Rounding::kZeroPoint ? from[n] - inner.x_zeros[m] * ones[n0 + n] : from[n];
      }
      for (int64_t n = valid; n < kTileRows; ++n) sum[n] = 0.0f;
      store_row(call, m, n0, kTileRows, sum, bias);
    }
  }
}

}  // namespace
}  // namespace qkernels::cpu
