// The value of a weight, from global memory: as QuantTensor.dequantize defines it, bit for bit.
#pragma once
#include "problem.h"
#include "ptx.cuh"

namespace qkernels::cuda {

QK_DEVICE float load_group_value(Type type, const uint8_t* base, int64_t i) {
  if (type == Type::kUInt8) return static_cast<float>(load_global1(base + i));
  if (type == Type::kFloat) return bits_to_float(load_global4(base + i * 4));
  const uint16_t bits = load_global2(base + i * 2);
  return type == Type::kHalf ? f16_to_float(bits) : bf16_to_float(bits);
}

// Scale and zero at one place of their buffers.
struct GroupValues {
  float scale, zero;
};

QK_DEVICE GroupValues load_group_values(const Weight& w, int64_t place) {
  return {load_group_value(w.scale_type, w.scales, place),
          w.zero_type == Type::kNone ? static_cast<float>(w.mid) : load_group_value(w.zero_type, w.zeros, place)};
}

// Every operation is rounded by itself.
QK_DEVICE float dequantized(const Weight& w, float code, const GroupValues& g) {
  return w.zeros_are_offsets ? add_rounded(multiply_rounded(code, g.scale), g.zero)
                             : multiply_rounded(code - g.zero, g.scale);
}

// Row n at stored column k.
QK_DEVICE float weight_at(const Weight& w, int n, int k) {
  const int strip = n / kStripRows, row = n % kStripRows, step = k / kStepColumns;
  const CodePlace place = code_place(row, k, w.width);
  const int64_t first = static_cast<int64_t>(strip) * w.steps * step_bytes(w.width);
  const uint32_t code = load_global1(w.codes + first + place.byte) >> place.shift & ((1u << w.width) - 1);
  const int group = w.groups_per_step > 1 ? k / (kStepColumns / w.groups_per_step) : step / w.steps_per_group;
  const int64_t values = (static_cast<int64_t>(strip) * w.groups + group) * kStripRows;
  return dequantized(w, static_cast<float>(code), load_group_values(w, values + group_place(row)));
}

}  // namespace qkernels::cuda
