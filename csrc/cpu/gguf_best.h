// The better search of each type, and the choice between what it finds and what llama.cpp's finds.
#pragma once
#include "gguf_better.h"

namespace qkernels::cpu {
namespace {

constexpr float kIq4Ends[] = {-127, 113};

inline void search_anew(GgufType type, const Chunk& c, Found& found) {
  const auto integers = [](int half) {
    return Integers{static_cast<float>(-half), static_cast<float>(half - 1), static_cast<float>(half)};
  };
  const auto scaled = [&](int half) {
    const Integers grid = integers(half);
    const float ends[] = {grid.low, grid.high};
    better_scale(c, grid, ends, 2, found);
  };
  const auto scaled_blocks = [&](int half, int half_small) {
    const Integers grid = integers(half);
    const float ends[] = {grid.low, grid.high};
    better_signed_blocks<16>(c, grid, ends, half_small, found);
  };
  constexpr float end_of_q8_0 = 127;
  switch (type) {
    case GgufType::kQ4_0:
      return scaled(8);
    case GgufType::kQ4_1:
      return better_line(c, 15, found);
    case GgufType::kQ5_0:
      return scaled(16);
    case GgufType::kQ5_1:
      return better_line(c, 31, found);
    case GgufType::kQ8_0:
      return better_scale(c, Integers{-127, 127, 128}, &end_of_q8_0, 1, found);
    case GgufType::kQ2K:
      return better_line_blocks<16>(c, 3, 15, found);
    case GgufType::kQ3K:
      return scaled_blocks(4, 32);
    case GgufType::kQ4K:
      return better_line_blocks<32>(c, 15, 63, found);
    case GgufType::kQ5K:
      return better_line_blocks<32>(c, 31, 63, found);
    case GgufType::kQ6K:
      return scaled_blocks(32, 128);
    case GgufType::kIq4Nl:
      return better_scale(c, Iq4{}, kIq4Ends, 2, found);
    case GgufType::kIq4Xs:
      return better_signed_blocks<32>(c, Iq4{}, kIq4Ends, 32, found);
    case GgufType::kMxfp4:
      return better_mxfp4(c, found);
  }
}

// What code i of a type is worth before it is scaled.
inline void values_of(GgufType type, float* values) {
  const float zero = type == GgufType::kQ4_0   ? 8
                     : type == GgufType::kQ5_0 ? 16
                     : type == GgufType::kQ8_0 ? 128
                     : type == GgufType::kQ3K  ? 4
                     : type == GgufType::kQ6K  ? 32
                                               : 0;
  for (int i = 0; i < 256; ++i) {
    values[i] = type == GgufType::kIq4Nl || type == GgufType::kIq4Xs ? kIq4Table[i & 15]
                : type == GgufType::kMxfp4                           ? kE2M1[i & 15]
                                                                     : static_cast<float>(i) - zero;
  }
}

// The weighted error of each block, of the weights as they are decoded.
template <int kSize>
Lanes error_of_blocks(GgufType type, const Chunk& c, const Found& found) {
  const int per = c.per(), groups = c.groups();
  const Lanes d = as_half(load16(found.d)), dmin = as_half(load16(found.dmin));
  alignas(64) float values[256], ds[kBlocks], dmins[kBlocks], decoded[kLanes * kSize];
  values_of(type, values);
  store16(ds, d), store16(dmins, dmin);
  if (type == GgufType::kMxfp4) {
    for (int b = 0; b < kBlocks; ++b) ds[b] = half_of_e8m0(static_cast<int>(found.small[b]));
  }
  ByGroup error;
  Lanes x[kSize], w[kSize], v[kSize];
  for (int first = 0; first < groups; first += kLanes) {
    load_members<kSize>(c.x + first * kSize, x);
    if (c.weighted) load_members<kSize>(c.importance + first * kSize, w);
    for (int i = 0; i < kLanes * kSize; ++i) decoded[i] = values[found.codes[first * kSize + i]];
    load_members<kSize>(decoded, v);
    Lanes step = for_groups(ds, per, first), low = all(0.0f);
    if (per > 1) step = step * load16(found.small + first);
    if (has_minima(type)) {
      low = for_groups(dmins, per, first);
      low = per > 1 ? low * load16(found.minima + first) : -low;
    }
    error.put(first, total(kSize, [&](int i) {
                const Lanes difference = step * v[i] - low - x[i];
                return (c.weighted ? w[i] : all(1.0f)) * difference * difference;
              }));
  }
  return block_total(error, per);
}

// Block by block, what has less error: what llama.cpp finds (in `found`), or what is found anew.
inline void search_best(GgufType type, const Chunk& c, Found& found) {
  Found anew;
  search_anew(type, c, anew);
  const bool short_groups = c.shape.group == 16;
  const Lanes before = short_groups ? error_of_blocks<16>(type, c, found) : error_of_blocks<32>(type, c, found);
  const Lanes after = short_groups ? error_of_blocks<16>(type, c, anew) : error_of_blocks<32>(type, c, anew);
  alignas(64) float better[kBlocks];
  store16(better, select(after < before, all(1.0f), all(0.0f)));
  const int per = c.per(), elements = c.shape.elements;
  for (int b = 0; b < kBlocks; ++b) {
    if (better[b] == 0.0f) continue;
    std::memcpy(found.codes + b * elements, anew.codes + b * elements, elements);
    std::memcpy(found.small + b * per, anew.small + b * per, per * sizeof(float));
    std::memcpy(found.minima + b * per, anew.minima + b * per, per * sizeof(float));
    found.d[b] = anew.d[b], found.dmin[b] = anew.dmin[b];
  }
}

}  // namespace
}  // namespace qkernels::cpu
