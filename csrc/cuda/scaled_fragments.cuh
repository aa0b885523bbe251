// The A operand of gemm_sm90 where fragments are scaled: of every kind of weight that mma_tile has, in two families.
//
//   narrow   codes of 2 to 6 bits, integers and entries of tables, under scales, zeros and factors of every type
//   wide     codes of 8 bits, integers and floats, likewise but for factors
//
// A step's codes become one form when they are loaded: a nibble each, as codes of 4 bits lie, and the two bits above
// it. What differs from weight to weight is the same for all lanes: a branch for a step, one for the codes of 16
// columns, one for a group. They take the place of five times as many instances, and of none of the instructions around
// wgmma.
//
// A weight is rounded once to the type of x, as dequantize + mm does: (code - zero) scale + rest in fp32, where scale,
// and the minimum that is the rest, are products of their two factors. Factors of rows (NVFP4) go on sums: e2m1 times
// e4m3 has six bits, so that such fragments are exact.
//
//   instructions per 8 codes of a lane, from its words to the scaled A operand, bf16
//   2 to 4 bits 31    5 and 6 bits 39    tables 45    8 bits 34    8-bit floats 44
#pragma once
#include "multiply.cuh"

namespace qkernels::cuda {

// Where a lane finds the planes of its tile's codes behind the first one of a strip: 16 bytes of a plane of four bits,
// 8 of two, 4 of one.
QK_DEVICE int plane_offset(int plane, int tile, int lane) {
  return plane == 4 ? tile * kTileBytes + lane * 16 : tile * plane / 4 * kTileBytes + lane * 16 + tile * plane % 4 * 4;
}

// Codes of 2 to 6 bits of a lane's tile and 64 columns: nibbles, and of runs 0 and 1, 2 and 3 the bits above.
struct NarrowCodes {
  uint32_t nibbles[kStepsOf16], above[2];

  // `low`, `high`: shared addresses of the lane's planes.
  QK_DEVICE void load(int width, uint32_t low, uint32_t high) {
    if (width >= 4) {
      const Words4 v = load_shared16(low);
#pragma unroll
      for (int run = 0; run < kStepsOf16; ++run) nibbles[run] = v.word[run];
      if (width == 5) {  // bits of runs 0 2 1 3
        const uint32_t bits = load_shared4(high);
        above[0] = bits & 0x55555555u, above[1] = bits >> 1 & 0x55555555u;
      } else if (width == 6) {
        const Words2 bits = load_shared8(high);
        above[0] = bits.word[0], above[1] = bits.word[1];
      }
    } else {
      const Words2 v = load_shared8(low);
      const uint32_t third = width == 3 ? load_shared4(high) : 0;
#pragma unroll
      for (int run = 0; run < kStepsOf16; ++run) {
        nibbles[run] = shifted_right(v.word[run / 2], plane_bit(run, 2)) & 0x33333333u;
        nibbles[run] = lop3<kAndOr>(shifted_right(third, plane_bit(run, 1) - 2), 0x44444444u, nibbles[run]);
      }
    }
  }
};

QK_DEVICE uint32_t subtract_pair(Half, uint32_t a, uint32_t b) { return sub_f16x2(a, b); }
QK_DEVICE uint32_t subtract_pair(BFloat16, uint32_t a, uint32_t b) { return sub_bf16x2(a, b); }

// What code - zero is made with: a code in the lowest bits of this is 1024, or 128, and the code.
template <class T>
constexpr uint32_t kNarrowMagic = T::kType == Type::kHalf ? 0x64006400u : 0x43004300u;

template <class T>
QK_DEVICE Zeros narrow_zeros(uint32_t z, uint32_t z8) {
  return {z | z << 16 | kNarrowMagic<T>, z8 | z8 << 16 | kNarrowMagic<T>};
}

// code - zero of 16 columns `run`, or the entries of a table.
template <class T>
QK_DEVICE void unpack_narrow(const GroupFormat& f, int width, bool table, const NarrowCodes& q, int run, const Zeros& z,
                             uint32_t (&a)[4]) {
  if (table) {
    const uint32_t word[1] = {q.nibbles[run]};
    Values<T, Coding::kTable>::unpack(f.values, word, a);
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) a[i] = lop3<kAndOr>(q.nibbles[run] >> (4 * i), 0x000f000fu, kNarrowMagic<T>);
  if (width > 4) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      a[i] = lop3<kAndOr>(shifted_right(q.above[run / 2], 4 * i + plane_bit(run, 2) - 4), 0x00300030u, a[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) a[i] = subtract_pair(T{}, a[i], i % 2 == 0 ? z.row : z.row8);
}

// The same of 8 bits, or 8-bit floats.
template <class T>
QK_DEVICE void unpack_wide(const GroupFormat& f, bool floats, const uint32_t (&q)[2], const Zeros& z,
                           uint32_t (&a)[4]) {
  if (floats) {
    Values<T, Coding::kFloat8>::unpack(f.values, q, a);
  } else {
    Codes<T, 8>::unpack(q, z, a);
  }
}

// Of rows r and r + 8: a pair of small integers. 2^23 has a one as the last bit of its mantissa; kInt8 is moved to
// 0 ... 255.
QK_DEVICE void load_small_pair(Type type, uint32_t at, float& low, float& high) {
  const uint32_t pair = load_shared2(at);
  const bool has_sign = type == Type::kInt8;
  const uint32_t bytes = has_sign ? pair ^ 0x8080u : pair;
  const float none = has_sign ? 8388608.0f + 128.0f : 8388608.0f;
  low = bits_to_float(permute_bytes(bytes, 0x4b000000u, 0x7650)) - none;
  high = bits_to_float(permute_bytes(bytes, 0x4b000000u, 0x7651)) - none;
}

// Outer factors of rows r and r + 8, of 256 columns.
struct OuterPairs {
  float scale, scale8, zero, zero8;

  QK_DEVICE void load(const GroupFormat& f, uint32_t scales, int index) {
    const uint32_t at = scales + f.scale_bytes + f.zero_bytes;
    load_pair(f.outer_type, at, index, scale, scale8);
    if (f.outer_zero_bytes != 0) load_pair(f.outer_zero_type, at + f.outer_bytes, index, zero, zero8);
  }
};

// As load_group, for all types of scales; kFactors: and for factors, whose minima are subtracted from code * scale.
template <bool kFactors>
QK_DEVICE RowGroup load_any_group(const GroupFormat& f, uint32_t scales, int index, const OuterPairs& outer) {
  RowGroup g;
  g.zero = g.zero8 = f.mid;
  g.rest = g.rest8 = 0.0f;
  if (kFactors && f.outer_bytes != 0) {
    load_small_pair(f.scale_type, scales + index, g.scale, g.scale8);
    g.scale *= outer.scale, g.scale8 *= outer.scale8;
    if (f.zero_type != Type::kNone) {
      load_small_pair(f.zero_type, scales + f.scale_bytes + index, g.rest, g.rest8);
      g.rest *= -outer.zero, g.rest8 *= -outer.zero8;
      g.zero = g.zero8 = 0;
    }
    return g;
  }
  if (is_small(f.scale_type)) {
    load_pair<true>(f.scale_type, scales, index, g.scale, g.scale8);
    return g;
  }
  return load_group(f, scales, index);
}

// A fragment of code - zero becomes one of weights: scaled in fp32, and rounded once to the type of the activations.
template <class T>
QK_DEVICE void scale_fragment(uint32_t (&a)[4], const RowGroup& g) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {  // registers 0 and 2 are row r, 1 and 3 row r + 8
    const float scale = i % 2 == 0 ? g.scale : g.scale8, rest = i % 2 == 0 ? g.rest : g.rest8;
    a[i] = T::pack(fmaf(T::low(a[i]), scale, rest), fmaf(T::high(a[i]), scale, rest));
  }
}

}  // namespace qkernels::cuda
