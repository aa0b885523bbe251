// Activations to int8, one scale per token: scale = max |x| / 127 in fp32, q = x / scale rounded to nearest, ties to
// even. `wide`: as compressed-tensors has it, scale = max |x| / 127.5 and x / scale rounded to the type of x, q from
// -128 to 127. One block a token reads it twice, the second time from L2. The other roundings of ../activations.h have
// a kernel of their own, quantize_as, so that these two pay for none of their questions.
//
// Within each 16 columns q is stored as a lane of the int8 tensor core instruction meets it beside a lane's codes
// (gemm_a8.cuh): position 4 c + j holds column 2 c + {0, 8, 1, 9}[j].
//
// A token of zeros has scale 0 and codes 0. One with NaN or infinity in it has that scale and codes 0, so its y is NaN.
#pragma once
#include <cmath>

#include "copy.cuh"

namespace qkernels::cuda {

constexpr int kQuantizeThreads = 256;

QK_DEVICE Words4 load_tokens8(const Activations& a, bool aligned, int m, int k) {
  if (!aligned) return gather8(a, m, k);
  if (k >= a.K) return {};
  return load_global16(a.x + m * a.row_stride + k);
}

QK_DEVICE uint32_t half_of(const Words4& v, int i) { return v.word[i / 2] >> (i % 2 * 16) & 0xffffu; }

QK_DEVICE float rounded_to(bool half, float f) {
  const auto low = static_cast<uint16_t>(half ? pack_f16x2(f, 0.0f) : pack_bf16x2(f, 0.0f));
  return half ? f16_to_float(low) : bf16_to_float(low);
}

// Code i of 16 columns, to the place above.
QK_DEVICE void place_code(Words4& q, int i, int code) {
  const int j = i / 8 + i % 2 * 2;  // column 2 c + 8 right + odd is byte right + 2 odd of word c
  q.word[i % 8 / 2] |= (static_cast<uint32_t>(code) & 0xffu) << (8 * j);
}

__global__ void __launch_bounds__(kQuantizeThreads)
    quantize_tokens(const Activations a, bool aligned, bool half, bool wide, int steps, int8_t* to, float* scales) {
  QK_SHARED(shared);
  const int m = blockIdx.x, thread = threadIdx.x, columns = steps * kStepColumns;
  // Bits of magnitudes order as the values do, and NaN comes above infinity: nothing is lost in the maximum.
  uint32_t most = 0;
  for (int k = thread * 8; k < columns; k += kQuantizeThreads * 8) {
    const Words4 v = load_tokens8(a, aligned, m, k);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const uint32_t bits = half_of(v, i) & 0x7fffu;
      most = bits > most ? bits : most;
    }
  }
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) {
    const uint32_t other = shuffle_xor(most, mask);
    most = other > most ? other : most;
  }
  const uint32_t warps = shared_address(shared);
  if (thread % 32 == 0) store_shared4(warps + thread / 32 * 4, most);
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kQuantizeThreads / 32; ++i) {
    const uint32_t other = load_shared4(warps + i * 4);
    most = other > most ? other : most;
  }
  const uint16_t bits = static_cast<uint16_t>(most);
  const float largest = half ? f16_to_float(bits) : bf16_to_float(bits);
  const float scale = wide ? rounded_to(half, largest / 127.5f) : largest / 127.0f;
  if (thread == 0) store_global4(scales + m, float_to_bits(scale));
  const bool finite = most < (half ? 0x7c00u : 0x7f80u) && scale > 0.0f;  // a wide scale may underflow

  for (int k = thread * 16; k < columns; k += kQuantizeThreads * 16) {
    const Words4 low = load_tokens8(a, aligned, m, k), high = load_tokens8(a, aligned, m, k + 8);
    Words4 q = {};
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const uint16_t value = static_cast<uint16_t>(half_of(i < 8 ? low : high, i % 8));
      // The smallest scale, 2^-133 / 127, still has nine bits: 127.1 is the most that comes out before rounding.
      const float v = half ? f16_to_float(value) : bf16_to_float(value);
      float level = v / scale;
      if (wide) {
        level = rounded_to(half, level);
        level = level < -128.0f ? -128.0f : level > 127.0f ? 127.0f : level;
      }
      const int code = finite ? static_cast<int>(rintf(level)) : 0;
      place_code(q, i, code);
    }
    store_global16(to + static_cast<int64_t>(m) * columns + k, q);
  }
}

// --- the others: zero points, outliers, a scale from the file; bit for bit as ../cpu/rows_int8.h has them ---

// Magnitudes of a type by their bits: NaNs come after infinity.
QK_DEVICE uint32_t infinity_of(bool half) { return half ? 0x7c00u : 0x7f80u; }

// To nearest, ties to even, -128 to 127.
QK_DEVICE float clamped_level(float f) { return rintf(f < -128.0f ? -128.0f : f > 127.0f ? 127.0f : f); }

struct QuantizeAs {
  Activations x;
  bool aligned, half;
  Rounding rounding;
  int steps;
  int8_t* to;             // [rows, steps * 64]: those of x and, where there are zero points, a row of ones behind them
  float* scales;          // [rows]
  float* zeros;           // [rows] zero points times scales; 0 where there are none
  const uint16_t* marks;  // kOutliers: of 16 stored columns, a bit each (apart_a8.cuh)
  const float* given;     // static ones: scale and zero point
};

// What is asked of a row before its codes are made.
struct RowRange {
  uint32_t most;    // the largest magnitude, by its bits
  float low, high;  // of the values and 0; outliers: high is the largest magnitude in fp16 that is below theirs
};

QK_DEVICE RowRange wider(const RowRange& a, const RowRange& b) {
  return {a.most > b.most ? a.most : b.most, a.low < b.low ? a.low : b.low, a.high > b.high ? a.high : b.high};
}

// Of row m, by the whole block; `shared`: 12 bytes a warp.
QK_DEVICE RowRange range_of(const QuantizeAs& p, int m, int columns, uint32_t shared) {
  const int thread = threadIdx.x;
  RowRange range{};
  for (int k = thread * 8; k < columns; k += kQuantizeThreads * 8) {
    const Words4 v = load_tokens8(p.x, p.aligned, m, k);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const uint16_t bits = static_cast<uint16_t>(half_of(v, i));
      float value = p.half ? f16_to_float(bits) : bf16_to_float(bits);
      if (p.rounding == Rounding::kOutliers) {
        value = rounded_to(true, value < 0.0f ? -value : value);
        value = value < kOutlier ? value : 0.0f;
      }
      range = wider(range, {bits & 0x7fffu, value, value});
    }
  }
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) {
    range = wider(range, {shuffle_xor(range.most, mask), shuffle_xor(range.low, mask), shuffle_xor(range.high, mask)});
  }
  if (thread % 32 == 0) {
    const uint32_t at = shared + thread / 32 * 12;
    store_shared4(at, range.most);
    store_shared4(at + 4, float_to_bits(range.low)), store_shared4(at + 8, float_to_bits(range.high));
  }
  __syncthreads();  // all warps' ranges are there
#pragma unroll
  for (int i = 0; i < kQuantizeThreads / 32; ++i) {
    const uint32_t at = shared + i * 12;
    range = wider(range, {load_shared4(at), bits_to_float(load_shared4(at + 4)), bits_to_float(load_shared4(at + 8))});
  }
  return range;
}

// What the codes of a row are made with; all are 0 unless they are `usable`.
struct RowLevels {
  float scale, zero, factor;
  bool usable;
};

QK_DEVICE RowLevels levels_of(const QuantizeAs& p, const RowRange& range) {
  const float nan = bits_to_float(0x7fc00000u), infinite = bits_to_float(0x7f800000u);
  const uint32_t infinity = infinity_of(p.half);
  if (p.rounding == Rounding::kOutliers) {  // infinities are among them
    const bool is_nan = range.most > infinity;
    return {is_nan ? nan : range.high / 127.0f, 0.0f, 1.0f / range.high * 127.0f, !is_nan && range.high > 0.0f};
  }
  if (p.given != nullptr) {
    const float scale = rounded_to(p.half, bits_to_float(load_global4(p.given)));
    const bool is_nan = range.most > infinity, usable = !is_nan && scale > 0.0f && scale < infinite;
    const float zero = p.rounding == Rounding::kStaticZero ? bits_to_float(load_global4(p.given + 1)) : 0.0f;
    const bool has_zero = zero > -infinite && zero < infinite;
    return {is_nan ? nan : scale, usable && has_zero ? clamped_level(zero) : 0.0f, 0.0f, usable};
  }
  const float scale = rounded_to(p.half, rounded_to(p.half, range.high - range.low) / 255.0f);
  const bool finite = range.most < infinity && scale < infinite, usable = finite && scale > 0.0f;
  const float low = rounded_to(p.half, range.low / scale);
  return {finite ? scale : nan, usable ? clamped_level(rounded_to(p.half, -128.0f - low)) : 0.0f, 0.0f, usable};
}

__global__ void __launch_bounds__(kQuantizeThreads) quantize_as(const QuantizeAs p) {
  QK_SHARED(shared);
  const int m = blockIdx.x, thread = threadIdx.x, columns = p.steps * kStepColumns;
  const bool ones = m == p.x.M;
  const RowLevels row =
      ones ? RowLevels{1.0f, 0.0f, 0.0f, true} : levels_of(p, range_of(p, m, columns, shared_address(shared)));
  if (thread == 0) {
    store_global4(p.scales + m, float_to_bits(row.scale));
    store_global4(p.zeros + m, float_to_bits(row.usable ? row.zero * row.scale : 0.0f));
  }
  for (int k = thread * 16; k < columns; k += kQuantizeThreads * 16) {
    Words4 low = {}, high = {}, q = {};
    if (!ones) low = load_tokens8(p.x, p.aligned, m, k), high = load_tokens8(p.x, p.aligned, m, k + 8);
    const uint32_t marks = p.marks == nullptr ? 0 : load_global2(p.marks + k / 16);
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const uint16_t bits = static_cast<uint16_t>(half_of(i < 8 ? low : high, i % 8));
      const float value = p.half ? f16_to_float(bits) : bf16_to_float(bits);
      const float level = ones ? 1.0f
                          : p.rounding == Rounding::kOutliers
                              ? rintf(rounded_to(true, value) * row.factor)
                              : clamped_level(rounded_to(p.half, rounded_to(p.half, value / row.scale) + row.zero));
      // A padded column is 0 less no zero point: its code of the weight means something.
      const bool coded = row.usable && k + i < p.x.K && (marks >> i & 1) == 0;
      place_code(q, i, coded ? static_cast<int>(level) : 0);
    }
    store_global16(p.to + static_cast<int64_t>(m) * columns + k, q);
  }
}

}  // namespace qkernels::cuda
