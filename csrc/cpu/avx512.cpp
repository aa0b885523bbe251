// AVX-512 F, BW, VL, DQ: 16 rows a vector, fp32 products. Serves fp32 and fp16 activations on every AVX-512 CPU, and
// bf16 ones on those without AVX512_BF16.
#include <cstdint>
#include <cstring>

#include "target.h"
QK_TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")

#include "avx512_vectors.h"
#include "kernels.h"

namespace qkernels::cpu {
namespace {

struct Avx512 : Avx512Sums {
  using X = float;
  using Weight = __m512;
  using Input = __m512;
  static constexpr int kStep = 1;
  static QK_INLINE Input broadcast(const X* x) { return _mm512_set1_ps(*x); }
  static QK_INLINE Sum multiply_add(Sum sum, Weight w, Input x) { return _mm512_fmadd_ps(w, x, sum); }
  static QK_INLINE Weight load_weight(const uint8_t* p) { return _mm512_loadu_ps(p); }
  static QK_INLINE void store_weight(uint8_t* p, Weight w) { _mm512_storeu_ps(p, w); }
};

// A look-up by the low 4 bits of each lane needs no mask: vpermps ignores the others.
QK_INLINE __m512 table_of(int zero) {
  alignas(64) float values[16];
  for (int i = 0; i < 16; ++i) values[i] = static_cast<float>(i - zero);
  return _mm512_load_ps(values);
}
QK_INLINE __m512 nibble_value(__m512i lanes, int s, __m512 table) {
  return _mm512_permutexvar_ps(shifted(lanes, 16 * (s & 1) + 4 * (s >> 1)), table);
}

struct SymmetricNibbles : RawNibbles {
  struct Zero {};
  __m512 table;
  explicit SymmetricNibbles(const Call& call) : table(table_of(1 << (call.bits - 1))) {}
  QK_INLINE Zero zero(int64_t) const { return {}; }
  QK_INLINE __m512 value(Raw raw, int s, Zero) const { return nibble_value(raw, s, table); }
};

struct NibblesWithZeros : RawNibbles, FloatZeros {
  __m512 table;
  explicit NibblesWithZeros(const Call& call) : FloatZeros(call), table(table_of(0)) {}
  QK_INLINE __m512 value(Raw raw, int s, Zero zero) const { return _mm512_sub_ps(nibble_value(raw, s, table), zero); }
};

struct FloatBytes : RawBytes, FloatZeros {
  static constexpr bool kPanel = false;
  using FloatZeros::FloatZeros;
  QK_INLINE __m512 value(const Raw& raw, int s, Zero zero) const {
    return byte_value(raw.quad[s >> 2], 16 * (s & 1) + 8 * (s >> 1 & 1), zero);
  }
};

}  // namespace

const Kernels kAvx512 = {"avx512", Type::kFloat, stage<float>,
                         multiply<Avx512, SymmetricNibbles, NibblesWithZeros, FloatBytes>, kLittleWork};

}  // namespace qkernels::cpu

QK_TARGET_END
