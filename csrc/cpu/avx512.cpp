// AVX-512 F, BW, VL, DQ: 16 rows a vector, fp32 products. Serves fp32 and fp16 activations on every AVX-512 CPU, and
// bf16 ones on those without AVX512_BF16.
#include <cstdint>
#include <cstring>

#include "target.h"
QK_TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")

#include "avx512_vectors.h"
#include "experts_loops.h"
#include "kernels.h"

namespace qkernels::cpu {
namespace {

struct Avx512 : Avx512Sums {
  using X = float;
  using Weight = __m512;
  using Input = __m512;
  static constexpr int kStep = 1, kRunsTogether = 1;
  static constexpr int kDecodeVectors[kMaxDecodeTokens] = {8, 4, 4, 4, 2, 2, 2, 2};
  static constexpr bool kPairs = false;
  static QK_INLINE Input broadcast(const X* x) { return _mm512_set1_ps(*x); }
  static QK_INLINE Sum multiply_add(Sum sum, Weight w, Input x) { return _mm512_fmadd_ps(w, x, sum); }
  static QK_INLINE Weight load_weight(const uint8_t* p) { return _mm512_loadu_ps(p); }
  static QK_INLINE void store_weight(uint8_t* p, Weight w) { _mm512_storeu_ps(p, w); }
};

// A look-up by the low 4 bits of each lane needs no mask: vpermps ignores the others.
template <class Value>
QK_INLINE __m512 float_table(Value value) {
  alignas(64) float values[16];
  for (int i = 0; i < 16; ++i) values[i] = value(i);
  return _mm512_load_ps(values);
}
QK_INLINE __m512 nibble_value(__m512i lanes, int s, __m512 table) {
  return _mm512_permutexvar_ps(shifted(lanes, 16 * (s & 1) + 4 * (s >> 1)), table);
}

struct SymmetricNibbles : RawNibbles, NoZeros {
  __m512 table;
  struct Value {
    const Call& call;
    float operator()(int i) const { return plain_value(call, i); }
  };
  explicit SymmetricNibbles(const Call& call) : table(float_table(Value{call})) {}
  QK_INLINE __m512 value(Raw raw, int s, Zero) const { return nibble_value(raw, s, table); }
};

struct NibblesWithZeros : RawNibbles, FloatZeros {
  __m512 table;
  struct Value {
    float operator()(int i) const { return static_cast<float>(i); }
  };
  explicit NibblesWithZeros(const Call& call) : FloatZeros(call), table(float_table(Value{})) {}
  QK_INLINE __m512 value(Raw raw, int s, Zero zero) const { return _mm512_sub_ps(nibble_value(raw, s, table), zero); }
};

struct FloatBytes : RawBytes, ByteZeros {
  static constexpr bool kPanel = false;
  using ByteZeros::ByteZeros;
  QK_INLINE __m512 value(const Raw& raw, int s, const Zero& zero) const {
    return byte_value(raw.quad[s >> 2], 2 * (s & 1) + (s >> 1 & 1), zero);
  }
};

template <int kBits>
struct FloatPlanes : RawPlanes<kBits>, MantissaZeros {
  using MantissaZeros::MantissaZeros;
  QK_INLINE __m512 value(const typename RawPlanes<kBits>::Raw& raw, int s, Zero zero) const {
    return code_value<kBits>(RawPlanes<kBits>::code(raw, s >> 1, s & 1), zero);
  }
};

// An 8-bit float, as the bf16 that it is
struct Floats : RawBytes, NoZeros {
  static constexpr bool kPanel = true;
  WordTable table;
  explicit Floats(const Call& call) : table(call.codebook) {}
  QK_INLINE __m512 value(const Raw& raw, int s, Zero) const {
    const __m512i pair = table.look_up(shifted(raw.quad[s >> 2], 8 * (s >> 1 & 1)));
    const __m512i high = _mm512_and_si512(pair, _mm512_set1_epi32(static_cast<int>(0xffff0000u)));
    return _mm512_castsi512_ps((s & 1) != 0 ? high : _mm512_slli_epi32(pair, 16));
  }
};

}  // namespace

const Kernels kAvx512 = {"avx512",
                         Type::kFloat,
                         stage<float>,
                         multiply<Avx512, SymmetricNibbles, NibblesWithZeros, FloatBytes, SymmetricNibbles, Floats,
                                  FloatPlanes, FloatPlanes>,
                         kLittleWork,
                         activate,
                         weigh};

}  // namespace qkernels::cpu

QK_TARGET_END
