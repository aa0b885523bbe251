// Sixteen blocks of a weight, which are searched together, and what was found for them; groups in lanes.
#pragma once
#include <cmath>

#include "gguf.h"
#include "gguf_lanes.h"
#include "rows.h"

namespace qkernels::cpu {
namespace {

constexpr int kBlocks = 16;  // that are searched together: outer scales then fill the lanes as well
constexpr int kMostElements = 256;
constexpr float kTiny = 1e-15f;

inline bool has_minima(GgufType type) {
  return type == GgufType::kQ4_1 || type == GgufType::kQ5_1 || type == GgufType::kQ2K || type == GgufType::kQ4K ||
         type == GgufType::kQ5K;
}

// What was found for kBlocks blocks. Small scales and minima by group, group = block * per + its place.
struct Found {
  alignas(64) uint8_t codes[kBlocks * kMostElements];
  alignas(64) float small[kBlocks * 16] = {}, minima[kBlocks * 16] = {};
  alignas(64) float d[kBlocks] = {}, dmin[kBlocks] = {};
};

// The weights of kBlocks blocks, [blocks][elements], and beside them the importance of each; zeros past the end.
struct Chunk {
  GgufShape shape;
  bool weighted;  // whether there is importance
  alignas(64) float x[kBlocks * kMostElements];
  alignas(64) float importance[kBlocks * kMostElements];
  alignas(64) float variance[kBlocks];  // of the row

  int per() const { return shape.elements / shape.group; }
  int groups() const { return kBlocks * per(); }
};

// Of sixteen groups, member by member.
template <int kSize>
struct Group {
  Lanes x[kSize], w[kSize];
};

template <int kSize>
QK_LANE_INLINE void load_members(const float* from, Lanes* to) {
  alignas(64) float turned[kSize][kLanes];
  for (int g = 0; g < kLanes; ++g) {
    for (int i = 0; i < kSize; ++i) turned[i][g] = from[g * kSize + i];
  }
  std::memcpy(to, turned, sizeof turned);
}
template <int kSize>
QK_LANE_INLINE void store_codes(const Lanes* codes, uint8_t* to) {
  for (int i = 0; i < kSize; ++i) {
    alignas(64) float values[kLanes];
    store16(values, codes[i]);
    for (int g = 0; g < kLanes; ++g) to[g * kSize + i] = static_cast<uint8_t>(static_cast<int>(values[g]));
  }
}

// [groups] as `per` times sixteen blocks, and back.
QK_LANE_INLINE Lanes of_blocks(const float* groups, int per, int s) {
  alignas(64) float values[kBlocks];
  for (int b = 0; b < kBlocks; ++b) values[b] = groups[b * per + s];
  return load16(values);
}
QK_LANE_INLINE void to_groups(Lanes value, float* groups, int per, int s) {
  alignas(64) float values[kBlocks];
  store16(values, value);
  for (int b = 0; b < kBlocks; ++b) groups[b * per + s] = values[b];
}
// What the blocks of sixteen groups have, from group `first` on.
QK_LANE_INLINE Lanes for_groups(const float* blocks, int per, int first) {
  alignas(64) float values[kLanes];
  for (int g = 0; g < kLanes; ++g) values[g] = blocks[(first + g) / per];
  return load16(values);
}

QK_LANE_INLINE Lanes as_half(Lanes v) {
  alignas(64) float values[kLanes];
  store16(values, v);
  for (float& value : values) value = from_half(to_half(value));
  return load16(values);
}

// 1 / x, or 0 where that is no number.
QK_LANE_INLINE Lanes inverse_of(Lanes x) {
  const Lanes inverse = all(1.0f) / x;
  return select(magnitude(inverse) < all(INFINITY), inverse, all(0.0f));
}

// The first member of largest magnitude, with its sign; no -0.
QK_LANE_INLINE Lanes peak_of(const Lanes* x, int members) {
  Lanes peak = x[0], size = magnitude(x[0]);
  for (int i = 1; i < members; ++i) {
    const Lanes m = magnitude(x[i]);
    peak = select(m > size, x[i], peak), size = greater(m, size);
  }
  return peak + all(0.0f);
}
// The first least member.
QK_LANE_INLINE Lanes least_of(const Lanes* x, int members) {
  Lanes least = x[0];
  for (int i = 1; i < members; ++i) least = lesser(x[i], least);
  return least;
}
QK_LANE_INLINE Lanes most_of(const Lanes* x, int members) {
  Lanes most = x[0];
  for (int i = 1; i < members; ++i) most = greater(x[i], most);
  return most;
}

// Members of blocks: scales or minima of up to sixteen groups, and the weight of each.
struct Factors16 {
  Lanes x[16], w[16];
};

// Sum of squares of each block, in order.
inline void block_squares(const Chunk& c, float* out) {
  for (int b = 0; b < kBlocks; ++b) out[b] = 0.0f;
  for (int i = 0; i < c.shape.elements; ++i) {
    for (int b = 0; b < kBlocks; ++b) {
      const float v = c.x[b * c.shape.elements + i];
      out[b] += v * v;
    }
  }
}

QK_LANE_INLINE Lanes member_weight(Lanes x, Lanes importance, Lanes variance) {
  return importance * root(variance + x * x);
}

// Sixteen groups from group `first` on, weighed by importance and the variance of their blocks.
template <int kSize>
QK_LANE_INLINE void load_weighted(const Chunk& c, int first, const float* variance, Group<kSize>& g) {
  load_members<kSize>(c.x + first * kSize, g.x);
  load_members<kSize>(c.importance + first * kSize, g.w);
  const Lanes v = for_groups(variance, c.per(), first);
  for (int i = 0; i < kSize; ++i) g.w[i] = member_weight(g.x[i], g.w[i], v);
}

}  // namespace
}  // namespace qkernels::cpu
