// What one warp does with 64 rows of the weight, 64 columns and 8 * kTokenTiles tokens, all in shared memory: the inner
// part of decode (decode.cuh) and of the large-M kernel (gemm_sm80.cuh).
//
// y^T = W x^T: weights are the A operand, so that tokens ride on the n of mma.m16n8k16 in steps of eight and one token
// costs one n8 tile, not sixteen rows of zeros. Lane 4 r + c holds rows r and r + 8 of each 16-row tile, and tokens 2 c
// and 2 c + 1 of each n8 tile.
//
// Numbers: code - zero is exact (dequantize.cuh), products are summed in fp32 over the columns of one group within the
// 64, and that sum is multiplied by the group's scale in fp32 and added to the total, by one fused multiply-add. So a
// scale is never rounded to the type of the activations, and works over the whole range of its own. It costs one FMA
// per mma and lane (two, in groups of 32; four, in groups of 16), where scaling the fragments would cost four
// multiplications per fragment and a rounding. Floating zeros: w = (code - mid) scale + rest, and rest times the sum of
// x over the group is added likewise; that sum is one more mma per n8 tile, of a matrix of ones.
#pragma once
#include <type_traits>

#include "codes.cuh"

namespace qkernels::cuda {

constexpr int kTilesPerStrip = kStripRows / kTileRows;
constexpr int kStepsOf16 = kStepColumns / 16;
constexpr int kTokenBytes = kStepColumns * 2;  // a token's 64 columns in an x tile: one row of 128 bytes

// A family of weights and activations that one kernel instance handles.
template <class Activation, int kWidth_, bool kShortGroups_>
struct Format {
  using T = Activation;
  static constexpr int kWidth = kWidth_;
  static constexpr Coding kCoding = Coding::kIntegers;
  static constexpr bool kBiased = false;               // multiply_biased.cuh
  static constexpr bool kPlanes = false;               // multiply_planes.cuh
  static constexpr bool kShortGroups = kShortGroups_;  // of 16 or 32 columns
  static constexpr int kStepBytes = step_bytes(kWidth);
  static constexpr int kMostChunks = kShortGroups ? 128 : 32;  // of scales and zeros of a step, 16 bytes each
};

// The same of weights whose codes are no integers, and have no zeros.
template <class Activation, Coding kCoding_, bool kShortGroups_>
struct CodedFormat : Format<Activation, kCoding_ == Coding::kFloat8 ? 8 : 4, kShortGroups_> {
  static constexpr Coding kCoding = kCoding_;
};

// How scales and zeros lie behind a strip's codes in a stage, and what they mean.
struct GroupFormat {
  Type scale_type, zero_type;
  bool zeros_are_offsets;
  int mid;
  int groups_per_step;
  int scale_bytes, zero_bytes;  // of one strip and step
  int scale_size, zero_size;    // bytes of a value
  CodeValues values;            // of codes that are no integers
  int code_bytes;               // of one strip and step
  Type outer_type, outer_zero_type;
  int outer_bytes, outer_zero_bytes;  // of one strip; 0: none that each step brings
};

// `type`: of x.
inline GroupFormat group_format(const Weight& w, Type type) {
  const GroupBytes bytes = group_bytes(w);
  return {w.scale_type,         w.zero_type,          w.zeros_are_offsets, w.mid,
          w.groups_per_step,    bytes.scales,         bytes.zeros,         size_of(w.scale_type),
          size_of(w.zero_type), code_values(w, type), step_bytes(w.width), w.outer_type,
          w.outer_zero_type,    bytes.outer,          bytes.outer_zeros};
}

// Bytes of a strip's codes, scales and zeros for 64 columns.
inline int stage_bytes(const Weight& w) { return step_bytes(w.width) + group_bytes(w).all(); }

// x tiles are swizzled: 16 bytes `chunk` of token t are at chunk ^ (t % 8), so that the eight rows of 128 bytes that
// one ldmatrix reads meet all 32 banks.
QK_DEVICE uint32_t swizzled(int token, int chunk) { return token * kTokenBytes + ((chunk ^ (token & 7)) << 4); }

// Two floating values next to each other in shared memory: rows r and r + 8 of a tile. kCoded: of 8 bits, too.
template <bool kCoded = false>
QK_DEVICE void load_pair(Type type, uint32_t base, int index, float& low, float& high) {
  if (kCoded && is_small(type)) {
    const uint32_t v = load_shared2(base + index);
    low = small_to_float(type, v & 0xff), high = small_to_float(type, v >> 8);
  } else if (type == Type::kFloat) {
    const Words2 v = load_shared8(base + index * 4);
    low = bits_to_float(v.word[0]), high = bits_to_float(v.word[1]);
  } else {
    const uint32_t v = load_shared4(base + index * 2);
    if (type == Type::kHalf) {
      low = f16_to_float(static_cast<uint16_t>(v)), high = f16_to_float(static_cast<uint16_t>(v >> 16));
    } else {
      low = bits_to_float(v << 16), high = bits_to_float(v & 0xffff0000u);
    }
  }
}

// Eight fp16 or bf16 that lie in a row.
QK_DEVICE void unpack_eight(bool half, const Words4& v, float (&value)[8]) {
  if (half) {
#pragma unroll
    for (int i = 0; i < 8; ++i) value[i] = f16_to_float(static_cast<uint16_t>(v.word[i / 2] >> (i % 2 * 16)));
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      value[i] = bits_to_float(i % 2 ? v.word[i / 2] & 0xffff0000u : v.word[i / 2] << 16);
    }
  }
}

// Bytes of a value that is not of 8 bits but an integer. Four answers, not two: that is what ptxas finds 128 registers
// for.
QK_DEVICE int value_size(Type type) {
  return type == Type::kNone ? 0 : type == Type::kUInt8 ? 1 : type == Type::kFloat ? 4 : 2;
}

// Eight floating values in a row: a lane's rows of a whole strip. kCoded: of 8 bits, too.
template <bool kCoded = false>
QK_DEVICE void load_eight(Type type, uint32_t base, int index, float (&value)[8]) {
  if (kCoded && is_small(type)) {
    const Words2 v = load_shared8(base + index);
#pragma unroll
    for (int i = 0; i < 8; ++i) value[i] = small_to_float(type, v.word[i / 4] >> (i % 4 * 8) & 0xff);
    return;
  }
  const Words4 v = load_shared16(base + index * value_size(type));
  if (type == Type::kFloat) {
    const Words4 w = load_shared16(base + index * 4 + 16);
#pragma unroll
    for (int i = 0; i < 4; ++i) value[i] = bits_to_float(v.word[i]), value[4 + i] = bits_to_float(w.word[i]);
  } else {
    unpack_eight(type == Type::kHalf, v, value);
  }
}

// Scale, zero and rest of a lane's rows r and r + 8.
struct RowGroup {
  float scale, scale8;
  float rest, rest8;  // only with floating zeros
  uint32_t zero, zero8;
};

// What a floating zero point or offset adds to (code - mid) * scale.
QK_DEVICE float rest_of(const GroupFormat& f, float scale, float zero) {
  const float mid = static_cast<float>(f.mid);
  return f.zeros_are_offsets ? fmaf(mid, scale, zero) : (mid - zero) * scale;
}

// `index`: of row r among the values of the step (group_place in layout.h; row r + 8 is next to it).
template <bool kCoded = false>
QK_DEVICE RowGroup load_group(const GroupFormat& f, uint32_t scales, int index) {
  RowGroup g;
  load_pair<kCoded>(f.scale_type, scales, index, g.scale, g.scale8);
  g.zero = g.zero8 = f.mid;
  g.rest = g.rest8 = 0.0f;
  if constexpr (kCoded) return g;
  const uint32_t zeros = scales + f.scale_bytes;
  if (f.zero_type == Type::kUInt8) {
    const uint32_t pair = load_shared2(zeros + index);
    g.zero = pair & 0xff, g.zero8 = pair >> 8;
  } else if (f.zero_type != Type::kNone) {
    float zero, zero8;
    load_pair(f.zero_type, zeros, index, zero, zero8);
    g.rest = rest_of(f, g.scale, zero), g.rest8 = rest_of(f, g.scale8, zero8);
  }
  return g;
}

// The same for a lane's eight rows of a strip, which lie next to each other: one load and one branch on the type where
// tile by tile would take four of each, in the middle of the mma.
template <bool kCoded>
QK_DEVICE void load_groups(const GroupFormat& f, uint32_t scales, int r, RowGroup (&g)[kTilesPerStrip]) {
  float scale[8];
  load_eight<kCoded>(f.scale_type, scales, 8 * r, scale);
#pragma unroll
  for (int tile = 0; tile < kTilesPerStrip; ++tile) {
    const uint32_t mid = f.mid;
    g[tile] = {scale[2 * tile], scale[2 * tile + 1], 0.0f, 0.0f, mid, mid};
  }
  if constexpr (kCoded) return;
  const uint32_t zeros = scales + f.scale_bytes;
  if (f.zero_type == Type::kUInt8) {
    const Words2 v = load_shared8(zeros + 8 * r);
#pragma unroll
    for (int tile = 0; tile < kTilesPerStrip; ++tile) {
      const uint32_t pair = v.word[tile / 2] >> (tile % 2 * 16);
      g[tile].zero = pair & 0xff, g[tile].zero8 = pair >> 8 & 0xff;
    }
  } else if (f.zero_type != Type::kNone) {
    float zero[8];
    load_eight(f.zero_type, zeros, 8 * r, zero);
#pragma unroll
    for (int tile = 0; tile < kTilesPerStrip; ++tile) {
      g[tile].rest = rest_of(f, g[tile].scale, zero[2 * tile]);
      g[tile].rest8 = rest_of(f, g[tile].scale8, zero[2 * tile + 1]);
    }
  }
}

QK_DEVICE bool has_rest(const GroupFormat& f) { return f.zero_type != Type::kNone && f.zero_type != Type::kUInt8; }

// The A operand of 16 rows and columns.
template <class F>
QK_DEVICE void unpack(const GroupFormat& f, const RowGroup& g, const uint32_t (&q)[F::kWidth / 4], uint32_t (&a)[4]) {
  using C = Codes<typename F::T, F::kWidth>;
  if constexpr (is_coded(F::kCoding)) {
    Values<typename F::T, F::kCoding>::unpack(f.values, q, a);
  } else {
    C::unpack(q, C::zeros(g.zero, g.zero8), a);
  }
}

// Never. But ptxas does not know it, and moves nothing past a branch: without one between two tiles it brings so much
// forward that it spills, where 16 warps of 16 tokens have 128 registers each.
QK_DEVICE bool ends_here(const GroupFormat& f) { return f.mid == 0; }

// Sums of codes times x over the columns of one group, for one 16-row tile: in fp32, or in fp16 at twice the speed on
// GeForce cards. Over 64 columns |code - zero| |x| must then stay within fp16's 65504 and 11 bits: an opt-in.
template <class T, int kTokenTiles, bool kHalfAccumulate>
struct PartialSums {
  float sum[kTokenTiles][4] = {};
  QK_DEVICE void add(int tile, const uint32_t (&a)[4], const uint32_t (&b)[2]) { T::mma(sum[tile], a, b); }
  QK_DEVICE float get(int tile, int i) const { return sum[tile][i]; }
};
template <int kTokenTiles>
struct PartialSums<Half, kTokenTiles, true> {
  uint32_t sum[kTokenTiles][2] = {};
  QK_DEVICE void add(int tile, const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma_f16_accumulate_f16(sum[tile], a, b);
  }
  QK_DEVICE float get(int tile, int i) const {
    return f16_to_float(static_cast<uint16_t>(sum[tile][i / 2] >> (i % 2 * 16)));
  }
};

// Per lane: [16-row tile][n8 tile][row r: tokens 2 c, 2 c + 1; row r + 8: the same].
template <int kTokenTiles>
using Totals = float[kTilesPerStrip][kTokenTiles][4];

// B operands of 64 columns: [n8 tile][16 columns][register].
template <int kTokenTiles>
using TokenFragments = uint32_t[kTokenTiles][kStepsOf16][2];

// They are asked for before the copies of a later step are, so that their latency passes while those are issued.
//   x       shared address of the x tile: for each n8 tile and each lane, `token_offset` is where the row starts that
//           ldmatrix asks this lane for (token 8 i + lane % 8, or a stand-in where there are fewer tokens)
// ldmatrix x4 brings 32 columns of 8 tokens, four 8 x 8 matrices. Lane l asks for row l % 8 of matrix l / 8; the
// swizzle of the row's start is in token_offset, that of the chunk is (chunk ^ token % 8) << 4.
template <int kTokenTiles>
QK_DEVICE void load_tokens(TokenFragments<kTokenTiles>& b, uint32_t x, const uint32_t (&token_offset)[kTokenTiles]) {
#pragma unroll
  for (int i = 0; i < kTokenTiles; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t m[4];
      load_matrix_x4(m, (x + token_offset[i]) ^ (half << 6));
#pragma unroll
      for (int j = 0; j < 4; ++j) b[i][2 * half + j / 2][j % 2] = m[j];
    }
  }
}

// A lane's codes of one 16-row tile and 64 columns: 16 bytes hold four steps of 16 columns in 4 bit, two in 8 bit,
// whose other two are a row of tiles further.
template <int kWidth>
using LaneCodes = uint32_t[kStepsOf16][kWidth / 4];

template <int kWidth>
QK_DEVICE void load_codes(LaneCodes<kWidth>& q, uint32_t codes, int tile, int lane) {
  constexpr int kWordsOf16 = kWidth / 4;
#pragma unroll
  for (int part = 0; part < kWordsOf16; ++part) {
    const Words4 v = load_shared16(codes + (part * kTilesPerStrip + tile) * kTileBytes + lane * 16);
#pragma unroll
    for (int j = 0; j < 4; ++j) q[(4 * part + j) / kWordsOf16][j % kWordsOf16] = v.word[j];
  }
}

// The codes of a tile are loaded while those of the tile before are multiplied.
template <int kWidth>
using CodesRing = LaneCodes<kWidth>[2];

struct Nothing {
  QK_DEVICE void operator()() const {}
};

// totals += 64 rows x 64 columns of the weight times x. `codes`: shared address of the strip's codes for these columns;
// its scales and zeros follow. `ring[0]` holds the codes of the first tile. `before_last_tile` is called when all that
// this step reads from shared memory is in registers: its place is free, and ring[0] too.
template <class F, int kTokenTiles, bool kHalfAccumulate = false, class Hook = Nothing>
QK_DEVICE void multiply_step(Totals<kTokenTiles>& totals, const GroupFormat& format, uint32_t codes,
                             CodesRing<F::kWidth>& ring, const TokenFragments<kTokenTiles>& b, int lane,
                             const Hook& before_last_tile = {}) {
  using T = typename F::T;
  constexpr bool kCoded = is_coded(F::kCoding);
  const int r = lane >> 2;
  const uint32_t scales = codes + F::kStepBytes;

  [[maybe_unused]] RowGroup groups[kTilesPerStrip];
  if constexpr (!F::kShortGroups) load_groups<kCoded>(format, scales, r, groups);

  // Groups of 32 are summed in two parts, with the same scale.
  [[maybe_unused]] auto group_of = [&](int s) { return format.groups_per_step == 4 ? s : s / 2; };
  // Of decode, which has the registers and wants few branches: 585 instructions a round of e2m1 became 547, and the
  // stalls of a warp 829 cycles of 1729.
  constexpr bool kScalesFirst = kCoded && F::kShortGroups && std::is_same_v<Hook, Nothing>;
  [[maybe_unused]] float short_scales[kStepsOf16][2 * kTilesPerStrip];
  if constexpr (kScalesFirst) {
#pragma unroll
    for (int s = 0; s < kStepsOf16; ++s) {
      load_eight<true>(format.scale_type, scales, group_of(s) * kStripRows + 8 * r, short_scales[s]);
    }
  }

  const uint32_t ones[4] = {T::kOnes, T::kOnes, T::kOnes, T::kOnes};
  [[maybe_unused]] float x_sums[kTokenTiles][4] = {};
  if constexpr (!F::kShortGroups && !kCoded) {
    if (has_rest(format)) {
#pragma unroll
      for (int s = 0; s < kStepsOf16; ++s) {
#pragma unroll
        for (int i = 0; i < kTokenTiles; ++i) T::mma(x_sums[i], ones, b[i][s]);
      }
    }
  }

#pragma unroll
  for (int tile = 0; tile < kTilesPerStrip; ++tile) {
    if (kTokenTiles == 2 && ends_here(format)) break;
    if (tile + 1 < kTilesPerStrip) load_codes<F::kWidth>(ring[(tile + 1) % 2], codes, tile + 1, lane);
    const LaneCodes<F::kWidth>& q = ring[tile % 2];
    [[maybe_unused]] auto load_short_group = [&](int s) {
      if constexpr (kScalesFirst) {
        const uint32_t mid = format.mid;
        return RowGroup{short_scales[s][2 * tile], short_scales[s][2 * tile + 1], 0.0f, 0.0f, mid, mid};
      }
      return load_group<kCoded>(format, scales, group_of(s) * kStripRows + 8 * r + 2 * tile);
    };
    const bool hooked = !std::is_same_v<Hook, Nothing> && tile == kTilesPerStrip - 1;
    [[maybe_unused]] RowGroup short_groups[kStepsOf16];
    if (hooked) {
      if constexpr (F::kShortGroups) {
#pragma unroll
        for (int s = 0; s < kStepsOf16; ++s) short_groups[s] = load_short_group(s);
      }
      before_last_tile();
    }

    if constexpr (!F::kShortGroups) {
      const RowGroup& g = groups[tile];
      PartialSums<T, kTokenTiles, kHalfAccumulate> part;
#pragma unroll
      for (int s = 0; s < kStepsOf16; ++s) {
        uint32_t a[4];
        unpack<F>(format, g, q[s], a);
#pragma unroll
        for (int i = 0; i < kTokenTiles; ++i) part.add(i, a, b[i][s]);
      }
#pragma unroll
      for (int i = 0; i < kTokenTiles; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          totals[tile][i][j] = fmaf(part.get(i, j), j < 2 ? g.scale : g.scale8, totals[tile][i][j]);
        }
      }
      if (!kCoded && has_rest(format)) {
#pragma unroll
        for (int i = 0; i < kTokenTiles; ++i) {
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            totals[tile][i][j] = fmaf(x_sums[i][j], j < 2 ? g.rest : g.rest8, totals[tile][i][j]);
          }
        }
      }
    } else {
#pragma unroll
      for (int s = 0; s < kStepsOf16; ++s) {
        const RowGroup g = hooked ? short_groups[s] : load_short_group(s);
        uint32_t a[4];
        unpack<F>(format, g, q[s], a);
#pragma unroll
        for (int i = 0; i < kTokenTiles; ++i) {
          float part[4] = {};
          T::mma(part, a, b[i][s]);
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            totals[tile][i][j] = fmaf(part[j], j < 2 ? g.scale : g.scale8, totals[tile][i][j]);
          }
          if (!kCoded &&
              has_rest(format)) {  // the sum of x again for every tile: short groups with floating zeros are rare
            float x_sum[4] = {};
            T::mma(x_sum, ones, b[i][s]);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              totals[tile][i][j] = fmaf(x_sum[j], j < 2 ? g.rest : g.rest8, totals[tile][i][j]);
            }
          }
        }
      }
    }
  }
}

}  // namespace qkernels::cuda
