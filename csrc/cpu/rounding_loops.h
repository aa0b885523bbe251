// The loops of rounding.h for the instruction set of the file that includes this; sixteen rows in lanes.
#pragma once
#include <cmath>

#include "gguf_lanes.h"
#include "rounding.h"
#include "rows.h"

namespace qkernels::cpu {
namespace {

// The first `count` of sixteen values, and `rest` after them.
QK_LANE_INLINE Lanes load_some(const float* from, int64_t count, float rest) {
  if (count == kLanes) return load16(from);
  alignas(64) float values[kLanes];
  for (int i = 0; i < kLanes; ++i) values[i] = i < count ? from[i] : rest;
  return load16(values);
}
QK_LANE_INLINE void store_some(float* to, Lanes v, int64_t count) {
  if (count == kLanes) return store16(to, v);
  alignas(64) float values[kLanes];
  store16(values, v);
  for (int64_t i = 0; i < count; ++i) to[i] = values[i];
}

QK_LANE_INLINE void store_codes16(uint8_t* to, Lanes codes, int64_t count) {
  alignas(64) float values[kLanes];
  store16(values, codes);
  uint8_t bytes[kLanes];
  for (int i = 0; i < kLanes; ++i) bytes[i] = static_cast<uint8_t>(static_cast<int>(values[i]));
  std::memcpy(to, bytes, count);
}

// The nearest code times its step, less the zero point: `least` and `most` are whole, so that it does not matter what
// comes first, the rounding or the limits.
QK_LANE_INLINE Lanes steps_of(Lanes x, Lanes scale, Lanes least, Lanes most) {
  return nearest_small(clamped(x / scale, least, most));
}

void round_rows(const ColumnsCall& call, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; row += kLanes) {
    const int64_t count = std::min<int64_t>(kLanes, end - row);
    alignas(64) float tile[kMostColumns][kLanes];
    for (int64_t i = 0; i < call.n; ++i) store16(tile[i], load_some(call.columns + i * call.N + row, count, 0.0f));
    int64_t group = -1;
    Lanes scale = all(1.0f), zero = all(call.middle), least = all(0.0f), most = all(0.0f);
    for (int64_t i = 0; i < call.n; ++i) {
      if (call.groups[i] != group) {
        group = call.groups[i];
        scale = load_some(call.scales + group * call.N + row, count, 1.0f);
        if (call.zeros != nullptr) zero = load_some(call.zeros + group * call.N + row, count, 0.0f);
        least = all(0.0f) - zero, most = all(call.most) - zero;
      }
      const float* factor = call.factor + i * call.n;
      const Lanes x = load16(tile[i]);
      const Lanes steps = steps_of(x, scale, least, most);
      const Lanes value = steps * scale;
      const Lanes error = (x - value) / all(factor[i]);
      store_codes16(call.codes + i * call.N + row, steps + zero, count);
      store_some(call.values + i * call.N + row, value, count);
      store_some(call.errors + i * call.N + row, error, count);
      for (int64_t j = i + 1; j < call.n; ++j) store16(tile[j], load16(tile[j]) - all(factor[j]) * error);
    }
  }
}

// A scale as it is stored; 1 for one of 0, as grid.py has it.
QK_LANE_INLINE Lanes stored_scale(Lanes scale, Type type) {
  scale = select(scale == all(0.0f), all(1.0f), scale);
  if (type != Type::kFloat) {
    alignas(64) float values[kLanes];
    store16(values, scale);
    if (type == Type::kHalf) {
      for (float& value : values) value = from_half(to_half(value));
    } else {
      for (float& value : values) value = from_bf16(to_bf16(value));
    }
    scale = load16(values);
  }
  return select(scale == all(0.0f), all(1.0f), scale);
}

struct Fitted {
  Lanes scale, zero;
};
// Of a range from `low` (0 or less) to `high` (0 or more).
QK_LANE_INLINE Fitted grid_of(const GridCall& call, Lanes low, Lanes high) {
  const float middle = static_cast<float>((static_cast<int>(call.most) + 1) / 2);
  if (!call.zeros_too) {
    return {stored_scale(greater(-low, high) * all(2.0f / call.most), call.scale_type), all(middle)};
  }
  const Lanes scale = stored_scale((high - low) / all(call.most), call.scale_type);
  return {scale, nearest_small(clamped(-low / scale, all(0.0f), all(call.most)))};
}

void fit_rows(const GridCall& call, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; row += kLanes) {
    const int64_t count = std::min<int64_t>(kLanes, end - row);
    alignas(64) float tile[kMostMembers][kLanes], weights[kMostMembers][kLanes];
    const bool one = call.importance == nullptr || call.of == 1;
    for (int64_t r = 0; r < kLanes; ++r) {
      const float* from = call.groups + std::min(row + r, end - 1) * call.size;
      for (int64_t i = 0; i < call.size; ++i) tile[i][r] = from[i];
      if (one) continue;
      const float* weight = call.importance + std::min(row + r, end - 1) % call.of * call.size;
      for (int64_t i = 0; i < call.size; ++i) weights[i][r] = weight[i];
    }
    Lanes low = all(0.0f), high = all(0.0f), nothing = all(0.0f);  // NaN where a weight is no number
    for (int64_t i = 0; i < call.size; ++i) {
      const Lanes x = load16(tile[i]);
      low = lesser(x, low), high = greater(x, high), nothing = nothing + (x - x);
    }
    const auto loss_of = [&](const Fitted& grid) {
      const Lanes least = all(0.0f) - grid.zero, most = all(call.most) - grid.zero;
      return total(static_cast<int>(call.size), [&](int i) {
        const Lanes x = load16(tile[i]);
        const Lanes off = steps_of(x, grid.scale, least, most) * grid.scale - x;
        if (call.importance == nullptr) return off * off;
        return off * off * (one ? all(call.importance[i]) : load16(weights[i]));
      });
    };
    Fitted best = grid_of(call, low, high);
    if (any(best.scale == all(INFINITY)) || any(nothing != all(0.0f))) {
      int64_t seen = call.not_finite->load();
      while (row < seen && !call.not_finite->compare_exchange_weak(seen, row)) {
      }
    }
    if (call.count > 0) {
      Lanes least = loss_of(best);
      for (int64_t i = 0; i < call.count; ++i) {
        const Fitted trial = grid_of(call, low * all(call.shares[i]), high * all(call.shares[i]));
        const Lanes loss = loss_of(trial);
        const Mask better = loss < least;
        least = select(better, loss, least);
        best = {select(better, trial.scale, best.scale), select(better, trial.zero, best.zero)};
      }
    }
    store_some(call.scales + row, best.scale, count);
    if (call.zeros != nullptr) store_some(call.zeros + row, best.zero, count);
  }
}

}  // namespace
}  // namespace qkernels::cpu
