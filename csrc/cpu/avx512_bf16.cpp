// AVX-512 with AVX512_BF16: bf16 activations are multiplied as they are, two columns an instruction; code - zero is
// exact in bf16 (at most 255 in magnitude), so that nothing is rounded before the fp32 sum; so are the values of all
// codebooks but NF4 and FP4, which are rounded to bf16 once. fp32 and fp16 activations keep fp32 products.
//
// vdpbf16ps reads subnormal bf16 values (below 2^-126) as 0 and flushes such sums to 0, whatever MXCSR says.
#include <cstdint>
#include <cstring>

#include "target.h"
QK_TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c")

#include "avx512_vectors.h"
#include "kernels.h"

namespace qkernels::cpu {
namespace {

struct Avx512Bf16 : Avx512Sums {
  using X = uint16_t;
  using Weight = __m512i;  // per row a pair of bf16, the lower column in the low word
  using Input = __m512i;
  // One tile at a time, for one stream of memory is read faster than two or four: Zen 4, one core, a row of x,
  // w4a16_g128 31 GB/s where four tiles are read at 24, Q4_K 29 where two are at 23.
  static constexpr int kStep = 2, kRunsTogether = 2;
  static constexpr int kDecodeVectors[kMaxDecodeTokens] = {2, 2, 2, 2, 2, 2, 2, 2};
  static constexpr bool kPairs = false;
  static QK_INLINE Input broadcast(const X* x) {
    int pair;
    std::memcpy(&pair, x, 4);
    return _mm512_set1_epi32(pair);
  }
  static QK_INLINE Sum multiply_add(Sum sum, Weight w, Input x) {
    return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)x);
  }
  static QK_INLINE Weight load_weight(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static QK_INLINE void store_weight(uint8_t* p, Weight w) { _mm512_storeu_si512(p, w); }
};

// vpermw looks up 32 bf16 values by the low 5 bits of each word.
template <class Value>
QK_INLINE __m512i bf16_table(Value value) {
  alignas(64) uint16_t values[32];
  for (int i = 0; i < 32; ++i) values[i] = to_bf16(static_cast<float>(value(i)));
  return _mm512_load_si512(values);
}

// The fifth bit of an index belongs to the neighbouring code: entries 16 ... 31 repeat the first 16, and no mask is
// needed.
struct SymmetricPairs : RawNibbles, NoZeros {
  __m512i table;
  struct Value {
    const Call& call;
    float operator()(int i) const { return plain_value(call, i & 15); }
  };
  explicit SymmetricPairs(const Call& call) : table(bf16_table(Value{call})) {}
  QK_INLINE __m512i value(Raw raw, int s, Zero) const { return _mm512_permutexvar_epi16(shifted(raw, 4 * s), table); }
};

// Integer zero points of codes of up to 4 bits: code + 16 - zero is 1 ... 31, an index, whose entry is code - zero.
struct SmallZeros {
  using Zero = __m512i;
  const Call& call;
  __m512i table;
  struct Value {
    int operator()(int i) const { return i - 16; }
  };
  explicit SmallZeros(const Call& c) : call(c), table(bf16_table(Value{})) {}
  QK_INLINE Zero zero(int64_t at) const {
    const auto* bytes = reinterpret_cast<const __m128i*>(static_cast<const uint8_t*>(call.zeros) + at);
    const __m512i zeros = _mm512_cvtepu8_epi32(_mm_loadu_si128(bytes));
    const __m512i both = _mm512_or_si512(zeros, _mm512_slli_epi32(zeros, 16));
    return _mm512_sub_epi16(_mm512_set1_epi16(16), both);
  }
  // Of codes in the low `bits` of each word
  QK_INLINE __m512i less_zero(__m512i words, int bits, Zero zero) const {
    const __m512i code = _mm512_and_si512(words, _mm512_set1_epi16(static_cast<int16_t>((1 << bits) - 1)));
    return _mm512_permutexvar_epi16(_mm512_add_epi16(code, zero), table);
  }
};

struct PairsWithZeros : RawNibbles, SmallZeros {
  using SmallZeros::SmallZeros;
  QK_INLINE __m512i value(Raw raw, int s, Zero zero) const { return less_zero(shifted(raw, 4 * s), 4, zero); }
};

// Of two fp32 whose low halves are 0, the high halves: the pair
QK_INLINE __m512i pair_of(__m512 low, __m512 high) {
  const __m512i lower = _mm512_castps_si512(low);
  return _mm512_mask_alignr_epi8(_mm512_castps_si512(high), 0x3333333333333333, lower, lower, 2);
}

// An integer of at most 255 fills the top half of an fp32.
struct BytePairs : RawBytes, ByteZeros {
  static constexpr bool kPanel = false;  // 64 rows 1 % slower, 16 rows 13 % faster
  using ByteZeros::ByteZeros;
  QK_INLINE __m512i value(const Raw& raw, int s, const Zero& zero) const {
    const __m512i quad = raw.quad[s >> 1];
    return pair_of(byte_value(quad, s & 1, zero), byte_value(quad, 2 + (s & 1), zero));
  }
};

// Up to 5 bits are an index of vpermw, 6 bits one of vpermi2w; what is above them is left over, so tables repeat.
template <int kBits>
struct SymmetricPlanes : RawPlanes<kBits>, NoZeros {
  __m512i table[2];
  struct Value {
    const Call& call;
    int first;
    float operator()(int i) const { return plain_value(call, (first + i) & ((1 << kBits) - 1)); }
  };
  explicit SymmetricPlanes(const Call& call) : table{bf16_table(Value{call, 0}), bf16_table(Value{call, 32})} {}
  QK_INLINE __m512i value(const typename RawPlanes<kBits>::Raw& raw, int s, Zero) const {
    const __m512i code = RawPlanes<kBits>::code(raw, s, 0);
    if constexpr (kBits > 5) return _mm512_permutex2var_epi16(table[0], code, table[1]);
    return _mm512_permutexvar_epi16(code, table[0]);
  }
};

// Two fp32 whose top halves are the pair, as in BytePairs
template <int kBits>
struct PlanesWithZeros : RawPlanes<kBits>, MantissaZeros {
  using MantissaZeros::MantissaZeros;
  QK_INLINE __m512i value(const typename RawPlanes<kBits>::Raw& raw, int s, Zero zero) const {
    const __m512i code = RawPlanes<kBits>::code(raw, s, 0);
    return pair_of(code_value<kBits>(code, zero), code_value<kBits>(shifted(code, 16), zero));
  }
};

template <>
struct PlanesWithZeros<2> : RawPlanes<2>, SmallZeros {
  using SmallZeros::SmallZeros;
  QK_INLINE __m512i value(const Raw& raw, int s, Zero zero) const { return less_zero(code(raw, s, 0), 2, zero); }
};

template <>
struct PlanesWithZeros<3> : RawPlanes<3>, SmallZeros {
  using SmallZeros::SmallZeros;
  QK_INLINE __m512i value(const Raw& raw, int s, Zero zero) const { return less_zero(code(raw, s, 0), 3, zero); }
};

// An 8-bit float: bytes 0 and 2 of a lane are the pair 0, bytes 1 and 3 the pair 1.
struct FloatPairs : RawBytes, NoZeros {
  static constexpr bool kPanel = true;
  WordTable table;
  explicit FloatPairs(const Call& call) : table(call.codebook) {}
  QK_INLINE __m512i value(const Raw& raw, int s, Zero) const {
    return table.look_up(shifted(raw.quad[s >> 1], 8 * (s & 1)));
  }
};

void multiply_by_type(const Call& call, int64_t tile, int tiles, int64_t m0, int64_t m1) {
  if (call.x_type != Type::kBFloat16) return kAvx512.multiply(call, tile, tiles, m0, m1);
  multiply<Avx512Bf16, SymmetricPairs, PairsWithZeros, BytePairs, SymmetricPairs, FloatPairs, SymmetricPlanes,
           PlanesWithZeros>(call, tile, tiles, m0, m1);
}

void activate(const Between& between, int64_t m0, int64_t m1) { kAvx512.activate(between, m0, m1); }
void weigh(const Weighing& weighing, int64_t t0, int64_t t1) { kAvx512.weigh(weighing, t0, t1); }

}  // namespace

const Kernels kAvx512Bf16 = {"avx512_bf16", Type::kBFloat16, stage<uint16_t>, multiply_by_type, kLittleWork, activate,
                             weigh};

}  // namespace qkernels::cpu

QK_TARGET_END
