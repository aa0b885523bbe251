// Conversions, staging of x and storing of y: plain loops that the compiler vectorizes for the file that includes this.
//
// Everything is in an unnamed namespace, so that each instruction set has its own copy and none can be taken for
// another's.
#pragma once
#include <cstdint>
#include <cstring>

#include "kernels.h"
#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace qkernels::cpu {
namespace {

inline float as_float(uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline uint32_t as_bits(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  return bits;
}

inline float from_bf16(uint16_t b) { return as_float(static_cast<uint32_t>(b) << 16); }
inline uint16_t to_bf16(float f) {  // to nearest, ties to even; a NaN stays one
  const uint32_t bits = as_bits(f);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16) | 0x40 : rounded);
}

inline float from_half(uint16_t h) {  // exponent and mantissa as a float, times 2^112: exact, subnormal halves included
  const uint32_t magnitude = h & 0x7fff, sign = static_cast<uint32_t>(h & 0x8000) << 16;
  const uint32_t finite = as_bits(as_float(magnitude << 13) * as_float(0x77800000));
  return as_float((magnitude >= 0x7c00 ? (magnitude << 13) | 0x7f800000 : finite) | sign);
}
inline uint16_t to_half(float f) {  // to nearest, ties to even
  const uint32_t bits = as_bits(f), magnitude = bits & 0x7fffffff, sign = (bits >> 16) & 0x8000;
  uint32_t half;
  if (magnitude > 0x7f800000) {
    half = 0x7e00;
  } else if (magnitude < 0x38800000) {  // below 2^-14: adding 0.5 leaves multiples of 2^-24 in the mantissa, rounded
    half = as_bits(as_float(magnitude) + 0.5f) - 0x3f000000;
  } else {
    half = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    if (half > 0x7c00) half = 0x7c00;
  }
  return static_cast<uint16_t>(half | sign);
}

inline float from_e8m0(uint8_t b) {  // 2^(b - 127): the exponent of a float, but for 2^-127, which is subnormal
  return as_float(b == 0 ? 0x00400000 : static_cast<uint32_t>(b) << 23);
}
inline float from_e4m3(uint8_t b) {  // exponent and mantissa as a float, times 2^120: exact, subnormals included
  const uint32_t sign = static_cast<uint32_t>(b & 0x80) << 24;
  return as_float(as_bits(as_float(static_cast<uint32_t>(b & 0x7f) << 20) * as_float(0x7b800000)) | sign);
}

inline float load(Type type, const void* base, int64_t i) {
  switch (type) {
    case Type::kUInt8:
      return static_cast<float>(static_cast<const uint8_t*>(base)[i]);
    case Type::kFloat:
      return static_cast<const float*>(base)[i];
    case Type::kHalf:
      return from_half(static_cast<const uint16_t*>(base)[i]);
    case Type::kBFloat16:
      return from_bf16(static_cast<const uint16_t*>(base)[i]);
    case Type::kInt8:
      return static_cast<float>(static_cast<const int8_t*>(base)[i]);
    case Type::kE8M0:
      return from_e8m0(static_cast<const uint8_t*>(base)[i]);
    case Type::kE4M3:
      return from_e4m3(static_cast<const uint8_t*>(base)[i]);
    default:
      return 0.0f;
  }
}

// Scale and zero point (or offset) of a row's group, as the value has them: products are rounded once.
inline float scale_of(const Call& call, int64_t tile, int64_t g, int64_t row) {
  const float small = load(call.scale_type, call.scales, (tile * call.G + g) * kTileRows + row);
  if (call.factors == Factors::kNone) return small;
  const float outer = load(call.outer_type, call.outer_scales, outer_at(call, tile, g, row));
  return call.factors == Factors::kNvfp4 ? small / outer : small * outer;
}
inline float zero_of(const Call& call, int64_t tile, int64_t g, int64_t row) {
  const int64_t at = (tile * call.G + g) * kTileRows + row;
  if (call.factors == Factors::kNone || !call.zeros_are_offsets) return load(call.zero_type, call.zeros, at);
  return -(load(Type::kUInt8, call.zeros, at) * load(call.outer_type, call.outer_zeros, outer_at(call, tile, g, row)));
}

// What a group with a rest (has_rest) adds for each unit of sum(x); `zero` is its zero point or offset.
inline float rest_of(const Problem& p, float scale, float zero) {
  const float mid = static_cast<float>(mid_of(p));
  return p.zeros_are_offsets ? mid * scale + zero : (mid - zero) * scale;
}

// The code of stored column k of a row of a tile; `bit`: where column i of a lane has its `width` bits; `three`: the
// code of a column of the block at `at`, of 3 bits.
template <class Bit, class Three>
inline int code_with(const Call& call, int64_t tile, int row, int64_t k, Bit bit, Three three) {
  const int columns = block_columns(call.bits), column = static_cast<int>(k % columns);
  const Planes planes = planes_of(call.bits);
  const uint8_t* at =
      call.qweight + tile * call.tile_bytes + k / columns * columns * stored_bits(call.bits) * 4 + row * kLaneBytes;
  if (call.bits == 3) return three(at, column);
  const auto in_plane = [&](int width) {
    const int from = bit(column % (32 / width), width);
    const int code = at[column / (32 / width) * kLineBytes + from / 8] >> (from % 8) & ((1 << width) - 1);
    at += columns * width / 32 * kLineBytes;
    return code;
  };
  const int low = in_plane(planes.low);
  return planes.high == 0 ? low : low | in_plane(planes.high) << planes.low;
}

// `width` bits of a row's lane in line `n` of a block, from bit `from` on.
inline int field_of(const uint8_t* at, int n, int from, int width) {
  uint32_t lane;
  std::memcpy(&lane, at + n * kLineBytes, 4);
  return static_cast<int>(lane >> from & ((1u << width) - 1));
}

// In layout cpu_tile_a8.
inline int int8_three_at(const uint8_t* at, int column) {
  const int octet = column / 8, quad = column / 4 % 2, byte = 8 * (column % 4);
  if (octet < 3) return field_of(at, octet, byte + 3 * quad, 3);
  return field_of(at, quad, byte + 6, 2) | field_of(at, 2, byte + 6 + quad, 1) << 2;
}
inline int int8_code_at(const Call& call, int64_t tile, int row, int64_t k) {
  return code_with(call, tile, row, k, [](int i, int width) { return 8 * (i & 3) + width * (i >> 2); }, int8_three_at);
}

// A weight, of its code and its group's scale and zero point or offset.
inline float weight_of(const Problem& p, int code, float scale, float zero) {
  if (p.zeros_are_offsets) return static_cast<float>(code) * scale + zero;
  return p.zero_type == Type::kNone ? plain_value(p, code) * scale : (static_cast<float>(code) - zero) * scale;
}

// In layout cpu_tile_a16.
inline int three_at(const uint8_t* at, int column) {
  const int octet = column / 8, pair = column / 2 % 4, word = 16 * (column % 2);
  if (octet < 3) return field_of(at, octet, word + 3 * pair, 3);
  if (pair < 3) return field_of(at, pair, word + 12, 3);
  const int bit = word + 15;
  return field_of(at, 0, bit, 1) | field_of(at, 1, bit, 1) << 1 | field_of(at, 2, bit, 1) << 2;
}
inline int code_at(const Call& call, int64_t tile, int row, int64_t k) {
  return code_with(call, tile, row, k, [](int i, int width) { return 16 * (i & 1) + width * (i >> 1); }, three_at);
}

// The column of x that stored column k meets. k_order comes from a file: a wrong entry must not become a wild read.
inline int64_t column_of(const Call& call, int64_t k) {
  if (call.k_order == nullptr) return k;
  const int64_t column = call.k_order[k];
  return column < 0 ? 0 : column >= call.K ? call.K - 1 : column;
}

// --- x ---

struct CopyBf16 {
  using From = uint16_t;
  using To = uint16_t;
  static To convert(From v) { return v; }
};
struct CopyFloat {
  using From = float;
  using To = float;
  static To convert(From v) { return v; }
};
struct WidenBf16 {
  using From = uint16_t;
  using To = float;
  static To convert(From v) { return from_bf16(v); }
};
struct WidenHalf {
  using From = uint16_t;
  using To = float;
  static To convert(From v) { return from_half(v); }
};

template <class C>
void stage_row(const Call& call, int64_t m) {
  const typename C::From* from = static_cast<const typename C::From*>(call.x) + m * call.x_row_stride;
  const int64_t K = call.K, stride = call.x_column_stride;
  for (int64_t first = 0; first < call.K_pad; first += call.staged.width) {
    typename C::To* __restrict to =
        static_cast<typename C::To*>(const_cast<void*>(call.staged.data)) + staged_at(call, m, first);
    const int64_t n = K - first < call.staged.width ? K - first : call.staged.width;
    if (call.k_order != nullptr) {
      for (int64_t i = 0; i < n; ++i) to[i] = C::convert(from[column_of(call, first + i) * stride]);
    } else if (stride == 1) {
      const typename C::From* __restrict row = from + first;
      for (int64_t i = 0; i < n; ++i) to[i] = C::convert(row[i]);
    } else {
      for (int64_t i = 0; i < n; ++i) to[i] = C::convert(from[(first + i) * stride]);
    }
    for (int64_t i = n; i < call.staged.width; ++i) to[i] = 0;
  }
}

// The sum of columns first ... first + n - 1 (one group) of row m: sixteen partial sums, then a tree, the same order on
// every instruction set. Sixteen columns in a row never cross a block: see block_width in gemm.cpp.
template <class X>
float sum_of(const Call& call, int64_t m, int64_t first, int64_t n) {
  float lane[16] = {};
  for (int64_t k = 0; k < n; k += 16) {
    const X* x = static_cast<const X*>(call.staged.data) + staged_at(call, m, first + k);
    const int64_t width = n - k < 16 ? n - k : 16;
    for (int64_t i = 0; i < width; ++i) {
      if constexpr (sizeof(X) == 2) {
        lane[i] += from_bf16(x[i]);
      } else {
        lane[i] += x[i];
      }
    }
  }
  for (int half = 8; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
  }
  return lane[0];
}

// Bf16Operand: what bf16 activations are multiplied as: float, or uint16_t holding their bits.
template <class Bf16Operand>
void stage(const Call& call, int64_t m0, int64_t m1) {
  constexpr bool kBf16 = sizeof(Bf16Operand) == 2;
  const bool bf16_operand = kBf16 && call.x_type == Type::kBFloat16;
  for (int64_t m = m0; m < m1; ++m) {
    if (call.staged.data != call.x) {
      if (bf16_operand) {
        stage_row<CopyBf16>(call, m);
      } else if (call.x_type == Type::kFloat) {
        stage_row<CopyFloat>(call, m);
      } else if (call.x_type == Type::kHalf) {
        stage_row<WidenHalf>(call, m);
      } else {
        stage_row<WidenBf16>(call, m);
      }
    }
    for (int64_t g = 0; call.sums != nullptr && g < call.G; ++g) {
      const int64_t first = g * call.group, n = (call.K < first + call.group ? call.K : first + call.group) - first;
      call.sums[m * call.G + g] = bf16_operand ? sum_of<uint16_t>(call, m, first, n) : sum_of<float>(call, m, first, n);
    }
  }
}

// --- y ---

// bias of `count` rows from row n0 on; 0 where there is none and past N. Asked first, as it is for every tile: the loop
// is not one that vectors do.
inline void load_bias(const Call& call, int64_t n0, int count, float* bias) {
  if (call.bias_type == Type::kNone) {
    std::memset(bias, 0, static_cast<size_t>(count) * 4);
    return;
  }
  for (int i = 0; i < count; ++i) bias[i] = n0 + i < call.N ? load(call.bias_type, call.bias, n0 + i) : 0.0f;
}

inline bool finite(float f) { return (as_bits(f) & 0x7fffffff) < 0x7f800000; }

// Rows n0 ... n0 + count - 1 of y whose sum is not finite, once more: weight by weight, in double. A product with the
// code is 1 / scale times larger than one with the weight and overflows before it (x = 1e36), and where zero points are
// floating an infinity is split into two of opposite signs. Where x has infinities, nothing else decides.
inline __attribute__((noinline)) void sum_again(const Call& call, int64_t m, int64_t n0, int64_t count,
                                                const float* bias, float* y) {
  const auto x_at = [&](int64_t k) {
    return load(call.x_type, call.x, m * call.x_row_stride + column_of(call, k) * call.x_column_stride);
  };
  bool infinite = false;
  for (int64_t k = 0; k < call.K; ++k) {
    const float x = x_at(k);
    if (x != x) return;  // a NaN, as is all of y
    infinite |= !finite(x);
  }
  for (int64_t i = 0; i < count; ++i) {
    if (finite(y[i])) continue;
    const int64_t tile = (n0 + i) / kTileRows;
    const int row = static_cast<int>((n0 + i) % kTileRows);
    double sum = bias[i];
    for (int64_t k = 0; k < call.K; ++k) {
      const float x = x_at(k);
      if (infinite && finite(x)) continue;
      const int code = code_at(call, tile, row, k);
      const int64_t g = k / call.group;
      const float scale = scale_of(call, tile, g, row), zero = zero_of(call, tile, g, row);
      sum += static_cast<double>(x) * weight_of(call, code, scale, zero);
    }
    y[i] = static_cast<float>(sum);
  }
}

// y[m][n0 ...] = sum + bias, rounded once. `count` is a multiple of 8; rows past N are not stored.
inline void store_row(const Call& call, int64_t m, int64_t n0, int count, const float* sum, const float* bias) {
  constexpr int kMost = kMostTiles * kTileRows;
  const int64_t valid = call.N - n0 < count ? call.N - n0 : count;
  float y[kMost];
  for (int i = 0; i < count; ++i) y[i] = sum[i] + bias[i];
  if (valid <= 0) return;
  uint32_t largest = 0;  // of |y|, as bits: compared eight at a time
  for (int i = 0; i < count; ++i) {
    const uint32_t magnitude = as_bits(y[i]) & 0x7fffffff;
    largest = magnitude > largest ? magnitude : largest;
  }
  if (largest >= 0x7f800000 && !call.int8_activations) sum_again(call, m, n0, valid, bias, y);
  const Type y_type = call.y_type == Type::kNone ? call.x_type : call.y_type;
  if (y_type == Type::kFloat) {
    std::memcpy(static_cast<float*>(call.y) + m * call.N + n0, y, static_cast<size_t>(valid) * 4);
    return;
  }
  uint16_t rounded[kMost];
  if (y_type == Type::kBFloat16) {
    for (int i = 0; i < count; ++i) rounded[i] = to_bf16(y[i]);
  } else {
#if defined(__F16C__)
    for (int i = 0; i < count; i += 8) {
      const __m128i half = _mm256_cvtps_ph(_mm256_loadu_ps(y + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(rounded + i), half);
    }
#else
    for (int i = 0; i < count; ++i) rounded[i] = to_half(y[i]);
#endif
  }
  std::memcpy(static_cast<uint16_t*>(call.y) + m * call.N + n0, rounded, static_cast<size_t>(valid) * 2);
}

}  // namespace
}  // namespace qkernels::cpu
