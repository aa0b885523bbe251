// What one warp does with 64 rows and 64 columns of a weight as files hold it: codes in planes of 1, 2 and 4 bits, and
// scales that are products of a small integer and an outer factor for 256 weights (k-quants, IQ4_XS). For decode up to
// 8 tokens, and for gemm_sm80.
//
// A code stays in the constant that it is dropped into, as in multiply_biased.cuh: the tensor core sums (code + kBias)
// x. What it lacks is one mma of a constant matrix for 16 columns and 8 tokens, in fp32 the sum of -kBias x. Sums of a
// group's products begin there; and, kBias being a power of two, a zero or an offset multiplies the same sums:
//
//   y += scale (sum of (code + kBias) x - kBias sum of x) + rest (-kBias sum of x),   rest = what is added / -kBias
//
// A symmetric weight has -(2^(bits - 1) + kBias) in that matrix, and no rest. Groups come first and rows second: so the
// sums of x of one group alone are in registers. The codes of the step all are, from its beginning.
//
// Factors: small * outer is one product in fp32, exact where the outer one is fp16 (6 or 8 bits times 11), and it goes
// on the fp32 sum of a group's products, as every scale does. The outer factors come with every step, of which four
// have the same: 128 bytes from L2 each, for a ring that needs no second rhythm.
//
//   instructions per 8 codes of a lane, from its words to the A operand
//   2 or 3 bits   10    a nibble is put together (a shift, a choice by mask), and then as 4 bits
//   4 bits        7
//   5 or 6 bits   15    two masks and two shifts a pair
#pragma once
#include "multiply_biased.cuh"

namespace qkernels::cuda {

// How the codes of an instance lie: which planes there are is known, whether the narrower one is full is not.
enum class Planes { k2And3, k4, k5And6, kIq4Nl };

// kGroups: of a step. 4 serve groups of 32, too, but for 4 bits. Without outer factors there are scales of 16 or 32
// bits, and zeros of any kind. With 4 bits there always are factors, with groups of 64 and more never.
template <class Activation, Planes kOf_, int kGroups_>
struct PlanesFormat {
  using T = Activation;
  static constexpr bool kBiased = false;
  static constexpr bool kPlanes = true;
  static constexpr Coding kCoding = Coding::kIntegers;
  static constexpr Planes kOf = kOf_;
  static constexpr int kGroups = kGroups_;
  static constexpr bool kTable = kOf == Planes::kIq4Nl;
  static constexpr int kLeastWidth = kOf == Planes::k2And3 ? 2 : kOf == Planes::k5And6 ? 5 : 4;
  static constexpr int kWidth = kOf == Planes::k2And3 ? 3 : kOf == Planes::k5And6 ? 6 : 4;  // at most
  static constexpr bool kFactored = kLeastWidth == 4, kFactors = kGroups > 1;               // surely, perhaps
  static constexpr int kStepBytes = step_bytes(kWidth);                                     // at most
  static constexpr int kMostChunks = kGroups * 32;  // of scales and zeros of a step, but for factors
};

// Whether there may be outer factors; how few bytes the codes of a step may be.
template <class F>
QK_CONSTEXPR bool has_factors() {
  if constexpr (F::kPlanes) {
    return F::kFactors;
  } else {
    return false;
  }
}
template <class F>
QK_CONSTEXPR int least_step_bytes() {
  if constexpr (F::kPlanes) {
    return step_bytes(F::kLeastWidth);
  } else {
    return F::kStepBytes;
  }
}

constexpr int kChooseByMask = 0xe2;  // b ? a : c

// A lane's codes of 64 rows and columns. `at`: of its first 16 bytes.
template <class F>
struct PlaneCodes {
  static constexpr int kLow = low_plane(F::kWidth), kHigh = high_plane(F::kWidth);
  uint32_t low[kTilesPerStrip][kLow], high[kTilesPerStrip][kHigh == 0 ? 1 : kHigh];

  template <int kBits, int kWords>
  static QK_DEVICE void load_plane(uint32_t (&plane)[kTilesPerStrip][kWords], uint32_t at) {
#pragma unroll
    for (int chunk = 0; chunk < kBits; ++chunk) {
      const Words4 v = load_shared16(at + chunk * kTileBytes);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int word = 4 * chunk + i;
        plane[word / kBits][word % kBits] = v.word[i];
      }
    }
  }
  // Of 4 bits and a single tile.
  QK_DEVICE void load_low(uint32_t at, int tile) {
    const Words4 v = load_shared16(at + tile * kTileBytes);
#pragma unroll
    for (int i = 0; i < 4; ++i) low[tile][i] = v.word[i];
  }
  // `kLater`: but for low planes of 4 bits.
  template <bool kLater>
  QK_DEVICE void load(const GroupFormat& f, uint32_t at) {
    if constexpr (!kLater) load_plane<kLow>(low, at);
    if constexpr (F::kOf == Planes::k5And6) {
      if (f.code_bytes == F::kStepBytes) {
        load_plane<2>(high, at + kLow * kTileBytes);
      } else {  // bits of runs 0 and 1, of 2 and 3
        const Words4 v = load_shared16(at + kLow * kTileBytes);
#pragma unroll
        for (int tile = 0; tile < kTilesPerStrip; ++tile) {
          high[tile][0] = v.word[tile] & 0x55555555u, high[tile][1] = v.word[tile] >> 1 & 0x55555555u;
        }
      }
    } else if constexpr (F::kOf == Planes::k2And3) {
      if (f.code_bytes == F::kStepBytes) {
        load_plane<1>(high, at + kLow * kTileBytes);
      } else {
#pragma unroll
        for (int tile = 0; tile < kTilesPerStrip; ++tile) high[tile][0] = 0;
      }
    }
  }
};

// The A operand of 16 rows and the 16 columns `run`, with kBias in it.
template <class F>
QK_DEVICE void unpack_planes(const GroupFormat& f, const PlaneCodes<F>& q, int tile, int run, uint32_t (&a)[4]) {
  using C = Codes<typename F::T, 4>;
  constexpr bool kHalf = F::T::kType == Type::kHalf;
  constexpr int kAt = kHalf ? 4 : 0;  // the lowest bit of a one in kBias
  constexpr uint32_t kMagic = kHalf ? 0x54005400u : 0x43004300u;
  if constexpr (F::kOf == Planes::k4 || F::kTable) {
    const uint32_t word[1] = {q.low[tile][run]};
    if constexpr (F::kTable) {
      Values<typename F::T, Coding::kTable>::unpack(f.values, word, a);
    } else {
      C::unpack_biased(word, a);
    }
  } else if constexpr (F::kOf == Planes::k2And3) {
    const uint32_t above = shifted_right(q.high[tile][0], plane_bit(run, 1) - 2);
    const uint32_t nibbles =
        lop3<kChooseByMask>(shifted_right(q.low[tile][run / 2], plane_bit(run, 2)), 0x33333333u, above);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      a[i] = lop3<kAndOr>(shifted_right(nibbles, 4 * i - kAt), 0x00070007u << kAt, kMagic);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      a[i] = lop3<kAndOr>(shifted_right(q.low[tile][run], 4 * i - kAt), 0x000f000fu << kAt, kMagic);
      const uint32_t above = shifted_right(q.high[tile][run / 2], 4 * i + plane_bit(run, 2) - kAt - 4);
      a[i] = lop3<kAndOr>(above, 0x00300030u << kAt, a[i]);
    }
  }
}

// Of a lane's eight rows of a strip: row r of tile 0, row r + 8, row r of tile 1 and so on.
constexpr int kRowsOfLane = 2 * kTilesPerStrip;

// Eight small integers in a row. 2^23 has a one as the last bit of its mantissa; kInt8 is moved to 0 ... 255.
QK_DEVICE void load_small(Type type, uint32_t at, float (&value)[kRowsOfLane]) {
  const Words2 v = load_shared8(at);
  const bool has_sign = type == Type::kInt8;
  const uint32_t flip = has_sign ? 0x80808080u : 0;
  const float none = has_sign ? 8388608.0f + 128.0f : 8388608.0f;
#pragma unroll
  for (int i = 0; i < kRowsOfLane; ++i) {
    value[i] = bits_to_float(permute_bytes(v.word[i / 4] ^ flip, 0x4b000000u, 0x7650 + i % 4)) - none;
  }
}

template <class F>
QK_DEVICE bool is_factored(const GroupFormat& f) {
  return F::kFactored || (F::kFactors && f.outer_bytes != 0);
}
// Of group `g` of the step, where its row r is among the step's values.
template <class F>
QK_DEVICE int index_of(const GroupFormat& f, int g, int r) {
  return g * f.groups_per_step / F::kGroups * kStripRows + 8 * r;
}

// `scales`: address of the strip's, which zeros and outer factors follow.
template <class F>
QK_DEVICE void load_scales(const GroupFormat& f, uint32_t scales, int g, int r, float (&scale)[kRowsOfLane]) {
  const int index = index_of<F>(f, g, r);
  if (is_factored<F>(f)) {
    float factor[kRowsOfLane];
    load_small(f.scale_type, scales + index, scale);
    load_eight(f.outer_type, scales + f.scale_bytes + f.zero_bytes, 8 * r, factor);
#pragma unroll
    for (int i = 0; i < kRowsOfLane; ++i) scale[i] *= factor[i];
  } else {
    load_eight(f.scale_type, scales, index, scale);
  }
}

// What the sums of x are multiplied by, where there are zeros.
template <class F>
QK_DEVICE void load_rests(const GroupFormat& f, uint32_t scales, int g, int r, const float (&scale)[kRowsOfLane],
                          float (&rest)[kRowsOfLane]) {
  constexpr float kPerBias = 1.0f / Codes<typename F::T, 4>::kBias;
  const int index = index_of<F>(f, g, r);
  const uint32_t zeros = scales + f.scale_bytes;
  if (is_factored<F>(f)) {
    float factor[kRowsOfLane];
    load_small(f.zero_type, zeros + index, rest);
    load_eight(f.outer_zero_type, zeros + f.zero_bytes + f.outer_bytes, 8 * r, factor);
#pragma unroll
    for (int i = 0; i < kRowsOfLane; ++i) rest[i] *= factor[i] * kPerBias;
    return;
  }
  if (f.zero_type == Type::kUInt8) {
    load_small(Type::kUInt8, zeros + index, rest);
  } else {
    load_eight(f.zero_type, zeros, index, rest);
  }
  // w = (code - zero) scale, or code scale + zero
#pragma unroll
  for (int i = 0; i < kRowsOfLane; ++i) rest[i] *= f.zeros_are_offsets ? -kPerBias : scale[i] * kPerBias;
}

// totals += 64 rows x 64 columns of the weight times x. `codes`: shared address of the lane's first 16 bytes of the
// step; `scales`: of the strip's scales. `before_last_tile`: as multiply_step (multiply.cuh) has it.
template <class F, int kTokenTiles, class Hook = Nothing>
QK_DEVICE void multiply_planes(Totals<kTokenTiles>& totals, const GroupFormat& f, uint32_t codes, uint32_t scales,
                               const TokenFragments<kTokenTiles>& b, int lane, const Hook& before_last_tile = {}) {
  using T = typename F::T;
  constexpr int kStepsOfGroup = kStepsOf16 / F::kGroups;
  // With one group, a tile's codes are done with before the next one's are needed. Elsewhere some are loaded again, and
  // the others' registers are free.
  constexpr bool kByTile = low_plane(F::kWidth) == 4 && (F::kGroups == 1 || (F::kTable && kTokenTiles > 1));
  PlaneCodes<F> q;
  q.template load<kByTile>(f, codes);
  // Where nobody waits for the step's place in shared memory, rests take the registers of scales.
  constexpr bool kRestsLater = std::is_same_v<Hook, Nothing>;
  const auto add_rests = [&](int tile, const float (&x_sums)[kTokenTiles][4], const float (&rest)[kRowsOfLane]) {
#pragma unroll
    for (int i = 0; i < kTokenTiles; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        totals[tile][i][j] = fmaf(x_sums[i][j], rest[2 * tile + j / 2], totals[tile][i][j]);
      }
    }
  };
  const bool symmetric = F::kTable || f.zero_type == Type::kNone;
  const float bias = static_cast<float>(-Codes<T, 4>::kBias - (symmetric ? f.mid : 0));
  const uint32_t factor = T::pack(bias, bias);
  const uint32_t factors[4] = {factor, factor, factor, factor};
#pragma unroll
  for (int g = 0; g < F::kGroups; ++g) {
    float scale[kRowsOfLane];
    [[maybe_unused]] float rest[kRowsOfLane];
    load_scales<F>(f, scales, g, lane >> 2, scale);
    if (!kRestsLater && !symmetric) load_rests<F>(f, scales, g, lane >> 2, scale, rest);
    // Columns of y^T are tokens: every row of these results is the same.
    float x_sums[kTokenTiles][4] = {};
    if constexpr (!F::kTable) {
#pragma unroll
      for (int s = g * kStepsOfGroup; s < (g + 1) * kStepsOfGroup; ++s) {
#pragma unroll
        for (int i = 0; i < kTokenTiles; ++i) T::mma(x_sums[i], factors, b[i][s]);
      }
    }
#pragma unroll
    for (int tile = 0; tile < kTilesPerStrip; ++tile) {
      if (F::kTable && kTokenTiles > 1 && ends_here(f)) break;  // spills else on sm_120
      if constexpr (kByTile) q.load_low(codes, tile);
      if (g == F::kGroups - 1 && tile == kTilesPerStrip - 1) before_last_tile();
      float part[kTokenTiles][4];
#pragma unroll
      for (int i = 0; i < kTokenTiles; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) part[i][j] = x_sums[i][j];
      }
#pragma unroll
      for (int s = g * kStepsOfGroup; s < (g + 1) * kStepsOfGroup; ++s) {
        uint32_t a[4];
        unpack_planes(f, q, tile, s, a);
#pragma unroll
        for (int i = 0; i < kTokenTiles; ++i) T::mma(part[i], a, b[i][s]);
      }
#pragma unroll
      for (int i = 0; i < kTokenTiles; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) totals[tile][i][j] = fmaf(part[i][j], scale[2 * tile + j / 2], totals[tile][i][j]);
      }
      if (!kRestsLater && !symmetric) add_rests(tile, x_sums, rest);
    }
    if (kRestsLater && !symmetric) {
      load_rests<F>(f, scales, g, lane >> 2, scale, rest);
#pragma unroll
      for (int tile = 0; tile < kTilesPerStrip; ++tile) add_rests(tile, x_sums, rest);
    }
  }
}

}  // namespace qkernels::cuda
