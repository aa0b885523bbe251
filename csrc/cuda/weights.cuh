// The value of a weight, from global memory: as QuantTensor.dequantize defines it, bit for bit. kCoded: of codes that
// are no integers; without it nothing asks which, since kernels of 128 registers have none for the question.
#pragma once
#include "codes.cuh"
#include "problem.h"
#include "ptx.cuh"

namespace qkernels::cuda {

template <bool kCoded>
QK_DEVICE float load_group_value(Type type, const uint8_t* base, int64_t i) {
  if (type == Type::kUInt8) return static_cast<float>(load_global1(base + i));
  if (kCoded && is_small(type)) return small_to_float(type, load_global1(base + i));
  if (type == Type::kFloat) return bits_to_float(load_global4(base + i * 4));
  const uint16_t bits = load_global2(base + i * 2);
  return type == Type::kHalf ? f16_to_float(bits) : bf16_to_float(bits);
}

// Scale and zero at one place of their buffers. A product (quotient) of two factors is rounded once.
struct GroupValues {
  float scale, zero;
};

template <bool kCoded>
QK_DEVICE GroupValues load_group_values(const Weight& w, int64_t place) {
  GroupValues g{load_group_value<kCoded>(w.scale_type, w.scales, place), 0.0f};
  if (!kCoded) {
    g.zero =
        w.zero_type == Type::kNone ? static_cast<float>(w.mid) : load_group_value<false>(w.zero_type, w.zeros, place);
  } else if (w.outer != nullptr) {
    const int64_t row = place / kStripRows / w.groups * kStripRows + place % kStripRows;
    const float outer = load_group_value<false>(w.outer_type, w.outer, row);
    g.scale = w.outer_divides ? divide_rounded(g.scale, outer) : multiply_rounded(g.scale, outer);
  }
  return g;
}

// What a code means, before zero and scale.
template <bool kCoded>
QK_DEVICE float code_value(const Weight& w, uint32_t code) {
  if (!kCoded) return static_cast<float>(code);
  if (w.codebook == Codebook::kE4M3) return e4m3_to_float(code);
  if (w.codebook == Codebook::kE5M2) return e5m2_to_float(code);
  return w.table[code & 15];
}

// Every operation is rounded by itself.
QK_DEVICE float dequantized(const Weight& w, float value, const GroupValues& g) {
  return w.zeros_are_offsets ? add_rounded(multiply_rounded(value, g.scale), g.zero)
                             : multiply_rounded(value - g.zero, g.scale);
}

// Row n at stored column k.
template <bool kCoded>
QK_DEVICE float weight_at(const Weight& w, int n, int k) {
  const int strip = n / kStripRows, row = n % kStripRows, step = k / kStepColumns;
  const CodePlace place = code_place(row, k, w.width);
  const int64_t first = static_cast<int64_t>(strip) * w.steps * step_bytes(w.width);
  const uint32_t code = load_global1(w.codes + first + place.byte) >> place.shift & ((1u << w.width) - 1);
  const int group = w.groups_per_step > 1 ? k / (kStepColumns / w.groups_per_step) : step / w.steps_per_group;
  const int64_t values = (static_cast<int64_t>(strip) * w.groups + group) * kStripRows;
  return dequantized(w, code_value<kCoded>(w, code), load_group_values<kCoded>(w, values + group_place(row)));
}

// --- codes in planes, and factors that are small integers ---

QK_DEVICE float small_integer(Type type, const uint8_t* base, int64_t i) {
  const uint32_t byte = load_global1(base + i);
  return type == Type::kInt8 ? static_cast<float>(static_cast<int8_t>(byte)) : static_cast<float>(byte);
}

// Of a row in its place of a strip, and a group of its step. Zeros that are products are offsets.
QK_DEVICE GroupValues load_planes_group_values(const Weight& w, int strip, int step, int in_step, int place) {
  const int group = w.groups_per_step > 1 ? step * w.groups_per_step + in_step : step / w.steps_per_group;
  const int64_t i = (static_cast<int64_t>(strip) * w.groups + group) * kStripRows + place;
  GroupValues g{0.0f, w.codebook == Codebook::kIntegers ? static_cast<float>(w.mid) : 0.0f};
  if (w.outers == 0) {
    g.scale = load_group_value<false>(w.scale_type, w.scales, i);
    if (w.zero_type != Type::kNone) g.zero = load_group_value<false>(w.zero_type, w.zeros, i);
    return g;
  }
  const int64_t o = (static_cast<int64_t>(strip) * w.outers + step / kStepsOfOuter) * kStripRows + place;
  g.scale =
      multiply_rounded(small_integer(w.scale_type, w.scales, i), load_group_value<false>(w.outer_type, w.outer, o));
  if (w.zero_type != Type::kNone) {
    g.zero = -multiply_rounded(small_integer(w.zero_type, w.zeros, i),
                               load_group_value<false>(w.outer_zero_type, w.outer_zeros, o));
  }
  return g;
}

QK_DEVICE float planes_value(const Weight& w, uint32_t code) {
  return w.codebook == Codebook::kIntegers ? static_cast<float>(code) : w.table[code & 15];
}

// Row n at stored column k.
QK_DEVICE float planes_weight_at(const Weight& w, int n, int k) {
  const int strip = n / kStripRows, row = n % kStripRows, step = k / kStepColumns, column = k % kStepColumns;
  const int low = low_plane(w.width), high = high_plane(w.width);
  const uint8_t* codes = w.codes + (static_cast<int64_t>(strip) * w.steps + step) * step_bytes(w.width);
  const auto bits = [&](const uint8_t* from, int plane) {
    const CodePlace place = plane_place(row, column, plane);
    return load_global1(from + place.byte) >> place.shift & ((1u << plane) - 1);
  };
  uint32_t code = bits(codes, low);
  if (high != 0) code |= bits(codes + low * kTileBytes, high) << low;
  const int in_step = column * w.groups_per_step / kStepColumns;
  return dequantized(w, planes_value(w, code), load_planes_group_values(w, strip, step, in_step, group_place(row)));
}

// Of rows n and n + 1, n even: what their sums are multiplied by, or divided by.
struct OuterFactors {
  float low = 1.0f, high = 1.0f;
  bool divide = false;

  QK_DEVICE void apply(float& low_sum, float& high_sum) const {
    low_sum = divide ? low_sum / low : low_sum * low, high_sum = divide ? high_sum / high : high_sum * high;
  }
};

QK_DEVICE OuterFactors outer_factors_of(const Weight& w, int n) {
  if (w.outer == nullptr) return {};
  const int64_t strip = n / kStripRows * kStripRows;
  return {load_group_value<false>(w.outer_type, w.outer, strip + group_place(n % kStripRows)),
          load_group_value<false>(w.outer_type, w.outer, strip + group_place(n % kStripRows + 1)), w.outer_divides};
}

}  // namespace qkernels::cuda
