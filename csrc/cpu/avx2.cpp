// AVX2 with FMA and F16C: 8 rows a vector, fp32 products. A tile is four vectors.
#include <cstdint>
#include <cstring>

#include "target.h"
QK_TARGET_BEGIN("avx2,fma,f16c")

#include <immintrin.h>

#include "avx2_vectors.h"
#include "experts_loops.h"
#include "kernels.h"
#include "tile_gemm.h"

namespace qkernels::cpu {
namespace {

using Lanes = uint32_t __attribute__((vector_size(32)));  // so that `>> n` takes any n and still becomes an immediate

struct Avx2 : Avx2Sums {
  using X = float;
  using Weight = __m256;
  using Input = __m256;
  static constexpr int kStep = 1;
  static constexpr bool kPairs = false;
  // 16 registers: 6 rows x 2 vectors of sums, 2 of weights, 1 of x.
  static constexpr int kTokens = 6, kHalf = 2;
  static constexpr int kDecodeVectors[kMaxDecodeTokens] = {8, 4, 2, 2, 2, 2, 1, 1}, kRunsTogether = 1;

  static QK_INLINE Input broadcast(const X* x) { return _mm256_broadcast_ss(x); }
  static QK_INLINE Sum multiply_add(Sum sum, Weight w, Input x) { return _mm256_fmadd_ps(w, x, sum); }
  static QK_INLINE Weight load_weight(const uint8_t* p) { return _mm256_loadu_ps(reinterpret_cast<const float*>(p)); }
  static QK_INLINE void store_weight(uint8_t* p, Weight w) { _mm256_storeu_ps(reinterpret_cast<float*>(p), w); }
};

// code - zero for any scheme; the zero is mid_of where no integer zero points are given
struct Unpacker {
  static constexpr bool kPanel = true;  // 64 rows 25 % faster: each unpacked vector meets few rows in 16 registers
  using Zero = __m256;
  const Call& call;
  explicit Unpacker(const Call& c) : call(c) {}
  QK_INLINE Zero zero(int64_t at) const {
    return call.zero_type == Type::kUInt8 ? Avx2::widen(Type::kUInt8, call.zeros, at)
                                          : Avx2::set1(static_cast<float>(mid_of(call)));
  }
  static QK_INLINE __m256i lanes(const uint8_t* at) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)); }
  static QK_INLINE __m256 value_of(__m256i lanes, int shift, int mask, Zero zero) {
    const __m256i code = _mm256_and_si256((__m256i)((Lanes)lanes >> shift), _mm256_set1_epi32(mask));
    return _mm256_sub_ps(_mm256_cvtepi32_ps(code), zero);
  }
};

struct Nibbles : Unpacker, BlockOf<4> {
  using Unpacker::Unpacker;
  using Raw = __m256i;
  static QK_INLINE Raw load(const uint8_t* at, int) { return lanes(at); }
  QK_INLINE __m256 value(Raw raw, int s, Zero zero) const {
    return value_of(raw, 16 * (s & 1) + 4 * (s >> 1), 15, zero);
  }
};

struct Bytes : Unpacker, BlockOf<8> {
  using Unpacker::Unpacker;
  struct Raw {
    __m256i quad[2];
  };
  static QK_INLINE Raw load(const uint8_t* at, int) { return {{lanes(at), lanes(at + kLineBytes)}}; }
  QK_INLINE __m256 value(const Raw& raw, int s, Zero zero) const {
    return value_of(raw.quad[s >> 2], 16 * (s & 1) + 8 * (s >> 1 & 1), 255, zero);
  }
};

// Codes in planes: each octet's lines, and how far its fields are from where they belong (variable shifts, which AVX2
// has, and no rotation: the high plane goes there by two).
template <int kBits>
struct FromPlanes : Unpacker, BlockOf<kBits> {
  using Unpacker::Unpacker;
  using Block = BlockOf<kBits>;
  static constexpr Planes planes = Block::planes;
  struct Raw {
    __m256i low, high;
    int low_right, high_right;
  };
  static QK_INLINE Raw load(const uint8_t* at, int i) {
    const __m256i low = lanes(at + Block::low_line(i) * kLineBytes);
    const __m256i high = planes.high == 0 ? low : lanes(at + Block::high_line(i) * kLineBytes);
    return {low, high, 32 - Block::low_left(i), i * planes.high * 4};
  }
  static QK_INLINE __m256i field(__m256i lanes, int right, int width) {
    const __m256i moved = _mm256_srlv_epi32(lanes, _mm256_set1_epi32(right));
    return _mm256_and_si256(moved, _mm256_set1_epi32((1 << width) - 1));
  }
  QK_INLINE __m256 value(const Raw& raw, int s, Zero zero) const {
    const int word = 16 * (s & 1), p = s >> 1;
    __m256i code = field(raw.low, raw.low_right + word + planes.low * p, planes.low);
    if constexpr (planes.high != 0) {
      const __m256i high = field(raw.high, raw.high_right + word + planes.high * p, planes.high);
      code = _mm256_or_si256(code, _mm256_slli_epi32(high, planes.low));
    }
    return _mm256_sub_ps(_mm256_cvtepi32_ps(code), zero);
  }
};

// Of 3 bits: an octet has its line, but for the last one, whose bits the lines had left over.
template <>
struct FromPlanes<3> : Unpacker, BlockOf<3> {
  using Unpacker::Unpacker;
  struct Raw {
    __m256i line[3];
    int octet;
  };
  static QK_INLINE Raw load(const uint8_t* at, int i) {
    if (i == 3) return {{lanes(at), lanes(at + kLineBytes), lanes(at + 2 * kLineBytes)}, i};
    const __m256i line = lanes(at + i * kLineBytes);
    return {{line, line, line}, i};
  }
  static QK_INLINE __m256i bit(__m256i lanes, int right, int mask) {
    return _mm256_and_si256((__m256i)((Lanes)lanes >> right), _mm256_set1_epi32(mask));
  }
  QK_INLINE __m256 value(const Raw& raw, int s, Zero zero) const {
    const int word = 16 * (s & 1), p = s >> 1;
    if (raw.octet < 3) return value_of(raw.line[0], word + 3 * p, 7, zero);
    if (p < 3) return value_of(raw.line[p], word + 12, 7, zero);
    const __m256i low = _mm256_or_si256(bit(raw.line[0], word + 15, 1), bit(raw.line[1], word + 14, 2));
    const __m256i code = _mm256_or_si256(low, bit(raw.line[2], word + 13, 4));
    return _mm256_sub_ps(_mm256_cvtepi32_ps(code), zero);
  }
};

// Of a codebook with 16 values: two look-ups of eight, by the low three bits, and the fourth chooses
struct Table : BlockOf<4> {
  static constexpr bool kPanel = true;
  struct Zero {};
  using Raw = __m256i;
  __m256 low, high;
  explicit Table(const Call& call) {
    alignas(32) float values[16];
    for (int i = 0; i < 16; ++i) values[i] = plain_value(call, i);
    low = _mm256_load_ps(values), high = _mm256_load_ps(values + 8);
  }
  QK_INLINE Zero zero(int64_t) const { return {}; }
  static QK_INLINE Raw load(const uint8_t* at, int) { return Unpacker::lanes(at); }
  QK_INLINE __m256 value(Raw raw, int s, Zero) const {
    const int shift = 16 * (s & 1) + 4 * (s >> 1);
    const __m256i code = (__m256i)((Lanes)raw >> shift);
    const __m256 fourth = _mm256_castsi256_ps((__m256i)((Lanes)raw << (28 - shift)));
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, code), _mm256_permutevar8x32_ps(high, code), fourth);
  }
};

// An 8-bit float of a quad
struct Floats : Bytes {
  struct Zero {};
  const int shift;
  const float unit;
  explicit Floats(const Call& c)
      : Bytes(c),
        shift(c.codebook == Codebook::kE4M3 ? 20 : 21),
        unit(c.codebook == Codebook::kE4M3 ? 0x1p120f : 0x1p112f) {}
  QK_INLINE Zero zero(int64_t) const { return {}; }
  QK_INLINE __m256 value(const Raw& raw, int s, Zero) const {
    return Avx2::small_floats((__m256i)((Lanes)raw.quad[s >> 2] >> (16 * (s & 1) + 8 * (s >> 1 & 1))), shift, unit);
  }
};

}  // namespace

const Kernels kAvx2 = {"avx2",
                       Type::kFloat,
                       stage<float>,
                       multiply<Avx2, Nibbles, Nibbles, Bytes, Table, Floats, FromPlanes, FromPlanes>,
                       kLittleWork / 4,
                       activate,
                       weigh};

}  // namespace qkernels::cpu

QK_TARGET_END
