// What a warp of decode does with 64 rows and 64 columns for up to 16 tokens, where instructions are what is short: an
// H200 brings a multiprocessor 2176 bytes every 105 to 118 cycles, in which its four schedulers issue 420 to 470. It is
// multiply_step (multiply.cuh) with two differences.
//
// The constant that a code is dropped into stays in it (dequantize.cuh): the tensor core sums (code + kBias) x, and its
// accumulator starts at -(zero + kBias) times the sum of x over the group, so that what comes out is the sum of
// (code - zero) x. The sum of x is one mma of a matrix of ones for 16 columns, which serves all 64 rows: four a step,
// for 64 subtractions. A symmetric weight's -(2^(bits - 1) + kBias) stands in that matrix instead of the ones, and
// costs nothing more. From 32 tokens on that is too many mma (80 a step), and multiply_step subtracts.
//
// Numbers: what is summed is a little larger than (code - zero) x, at most 1280 |x| for 8 bit in fp16 and 144 |x| else,
// over the columns of a group in one step. Integers stay exact as long as such a sum stays below 2^22; fp32 rounds else
// at 2^-24 of it, far below the rounding of y. An infinite x gives NaN.
//
// And where the scales are of 16 bit, and the zeros integers or none, the kernel knows it (GroupKind), and has no
// branch on types but one between the two kinds of 16 bit. All rows' scales are loaded once for each group of the step.
#pragma once
#include "multiply.cuh"

namespace qkernels::cuda {

enum class GroupKind {
  kSymmetric16,  // scales of 16 bit
  kInteger16,    // scales of 16 bit, zeros of uint8
  kAny           // whatever GroupFormat says
};

// A family of weights and activations that one kernel instance handles. kGroups: of a step of 64 columns.
template <class Activation, int kWidth_, int kGroups_, GroupKind kKind_>
struct BiasedFormat {
  using T = Activation;
  static constexpr bool kBiased = true;
  static constexpr bool kPlanes = false;
  static constexpr Coding kCoding = Coding::kIntegers;
  static constexpr int kWidth = kWidth_, kGroups = kGroups_;
  static constexpr GroupKind kKind = kKind_;
  static constexpr int kStepBytes = step_bytes(kWidth);
  // Of scales and zeros of a step, 16 bytes each: 4 bytes a value at most, or 2 and 1.
  static constexpr int kMostChunks = kGroups * (kKind == GroupKind::kAny ? 32 : 12);
};

// A lane's eight rows of a strip for one group: row r of tile 0, row r + 8, row r of tile 1 and so on.
struct BiasedGroup {
  float scale[2 * kTilesPerStrip];
  Words2 zeros;                     // a byte each; only for kInteger16
  float start[2 * kTilesPerStrip];  // -(zero + kBias), and
  float rest[2 * kTilesPerStrip];   // what floating zeros add; only for kAny
};

// -(byte i of `zeros` + kBias). 0x4b000000 is 2^23, and the last bit of its mantissa a one.
template <int kBias>
QK_DEVICE float start_of(uint32_t zeros, int i) {
  return (8388608.0f - kBias) - bits_to_float(permute_bytes(zeros, 0x4b000000u, 0x7650 + i));
}

// `index`: of the lane's first row among the values of the step.
template <class F>
QK_DEVICE void load_biased_group(const GroupFormat& f, uint32_t scales, int index, BiasedGroup& g) {
  constexpr int kRows = 2 * kTilesPerStrip, kBias = Codes<typename F::T, F::kWidth>::kBias;
  const uint32_t zeros = scales + f.scale_bytes;
  if constexpr (F::kKind != GroupKind::kAny) {
    const Words4 v = load_shared16(scales + index * 2);
    unpack_eight(f.scale_type == Type::kHalf, v, g.scale);
    if constexpr (F::kKind == GroupKind::kInteger16) g.zeros = load_shared8(zeros + index);
  } else {
    load_eight(f.scale_type, scales, index, g.scale);
    if (f.zero_type == Type::kUInt8) {
      const Words2 v = load_shared8(zeros + index);
#pragma unroll
      for (int i = 0; i < kRows; ++i) g.start[i] = start_of<kBias>(v.word[i / 4], i % 4), g.rest[i] = 0.0f;
    } else {
#pragma unroll
      for (int i = 0; i < kRows; ++i) g.start[i] = static_cast<float>(-kBias - f.mid), g.rest[i] = 0.0f;
      if (f.zero_type != Type::kNone) {
        float zero[kRows];
        load_eight(f.zero_type, zeros, index, zero);
#pragma unroll
        for (int i = 0; i < kRows; ++i) g.rest[i] = rest_of(f, g.scale[i], zero[i]);
      }
    }
  }
}

// The same of rows r and r + 8 of one tile, which are next to each other.
struct BiasedRows {
  float scale[2], start[2], rest[2];
};

template <class F>
QK_DEVICE BiasedRows rows_of(const BiasedGroup& g, int tile) {
  constexpr int kBias = Codes<typename F::T, F::kWidth>::kBias;
  BiasedRows rows{};
#pragma unroll
  for (int high = 0; high < 2; ++high) {
    const int row = 2 * tile + high;
    rows.scale[high] = g.scale[row];
    if constexpr (F::kKind == GroupKind::kInteger16) rows.start[high] = start_of<kBias>(g.zeros.word[row / 4], row % 4);
    if constexpr (F::kKind == GroupKind::kAny) rows.start[high] = g.start[row], rows.rest[high] = g.rest[row];
  }
  return rows;
}

template <class F>
QK_DEVICE BiasedRows load_biased_rows(const GroupFormat& f, uint32_t scales, int index) {
  constexpr int kBias = Codes<typename F::T, F::kWidth>::kBias;
  const RowGroup g = load_group(f, scales, index);
  BiasedRows rows{{g.scale, g.scale8}, {}, {g.rest, g.rest8}};
  rows.start[0] = static_cast<float>(-kBias - static_cast<int>(g.zero));
  rows.start[1] = static_cast<float>(-kBias - static_cast<int>(g.zero8));
  return rows;
}

// totals += 64 rows x 64 columns of the weight times x. `codes`: shared address of the lane's 16 bytes of the first
// tile's codes for these columns; `scales`: of the strip's scales, which its zeros follow.
template <class F, int kTokenTiles>
QK_DEVICE void multiply_biased(Totals<kTokenTiles>& totals, const GroupFormat& format, uint32_t codes, uint32_t scales,
                               const TokenFragments<kTokenTiles>& b, int lane) {
  using T = typename F::T;
  using C = Codes<T, F::kWidth>;
  constexpr bool kSymmetric = F::kKind == GroupKind::kSymmetric16;
  constexpr int kStepsOfGroup = kStepsOf16 / F::kGroups;
  // The codes of a tile are loaded while those of the tile before are multiplied, where 128 registers hold both.
  constexpr bool kAhead = kTokenTiles == 1;
  CodesRing<F::kWidth> ring;
  load_codes<F::kWidth>(ring[0], codes, 0, 0);
  // Of all rows and groups at once, unless that takes more than the 128 registers that 16 warps have.
  constexpr bool kAny = F::kKind == GroupKind::kAny;
  constexpr bool kByTile = kAny && (F::kGroups > 1 || (kTokenTiles == 2 && F::kWidth == 8));
  [[maybe_unused]] BiasedGroup groups[F::kGroups];
  if constexpr (!kByTile) {
#pragma unroll
    for (int g = 0; g < F::kGroups; ++g) {
      load_biased_group<F>(format, scales, g * kStripRows + 8 * (lane >> 2), groups[g]);
    }
  }

  // Columns of y^T are tokens: every row of these results is the same, j and j % 2 too.
  const float symmetric = static_cast<float>(-C::kBias - format.mid);
  const uint32_t factor = kSymmetric ? T::pack(symmetric, symmetric) : T::kOnes;
  const uint32_t factors[4] = {factor, factor, factor, factor};
  float x_sums[F::kGroups][kTokenTiles][4] = {};
#pragma unroll
  for (int s = 0; s < kStepsOf16; ++s) {
#pragma unroll
    for (int i = 0; i < kTokenTiles; ++i) T::mma(x_sums[s / kStepsOfGroup][i], factors, b[i][s]);
  }

#pragma unroll
  for (int tile = 0; tile < kTilesPerStrip; ++tile) {
    const LaneCodes<F::kWidth>& q = ring[kAhead ? tile % 2 : 0];
    if (kAhead && tile + 1 < kTilesPerStrip) load_codes<F::kWidth>(ring[(tile + 1) % 2], codes, tile + 1, 0);
    if (!kAhead && tile > 0) load_codes<F::kWidth>(ring[0], codes, tile, 0);
#pragma unroll
    for (int g = 0; g < F::kGroups; ++g) {
      BiasedRows rows;
      if constexpr (kByTile) {
        rows = load_biased_rows<F>(format, scales, g * kStripRows + 8 * (lane >> 2) + 2 * tile);
      } else {
        rows = rows_of<F>(groups[g], tile);
      }
      float part[kTokenTiles][4];
#pragma unroll
      for (int i = 0; i < kTokenTiles; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          part[i][j] = kSymmetric ? x_sums[g][i][j] : rows.start[j / 2] * x_sums[g][i][j % 2];
        }
      }
#pragma unroll
      for (int s = g * kStepsOfGroup; s < (g + 1) * kStepsOfGroup; ++s) {
        uint32_t a[4];
        C::unpack_biased(q[s], a);
#pragma unroll
        for (int i = 0; i < kTokenTiles; ++i) T::mma(part[i], a, b[i][s]);
      }
#pragma unroll
      for (int i = 0; i < kTokenTiles; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) totals[tile][i][j] = fmaf(part[i][j], rows.scale[j / 2], totals[tile][i][j]);
      }
      if constexpr (kAny) {
        if (has_rest(format)) {
#pragma unroll
          for (int i = 0; i < kTokenTiles; ++i) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              totals[tile][i][j] = fmaf(x_sums[g][i][j % 2], rows.rest[j / 2], totals[tile][i][j]);
            }
          }
        }
      }
    }
  }
}

}  // namespace qkernels::cuda
