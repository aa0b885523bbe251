// NEON for int8 activations, 4 rows a vector: what its three instruction sets share. No speed was ever measured.
//
// The sums over a group are integers, and what follows is rounded product by product as the scalar code does it, so
// that y has that code's bits (but where an outer factor waits for a row's end: NVFP4). An FMA would save one
// instruction of about ten a token, vector and group of 32.
#pragma once
#include "neon_vectors.h"
#include "tile_int8.h"

namespace qkernels::cpu {
namespace {

struct NeonIntegers : NeonSums {
  using Integers = int32_t __attribute__((vector_size(16)));
  // 32 registers: 2 rows x 8 vectors of sums, codes and x; the fp32 totals of one row of x, and of two in part
  static constexpr int kTokens = 2, kDecodeTokens = 1;
  static constexpr int kDecodeVectors[kDecodeTokens] = {8};
  static constexpr bool kOneStream = false;

  static QK_INLINE Sum fma(Sum a, Sum b, Sum c) {
    Sum product = vmulq_f32(a, b);
    asm("" : "+w"(product));  // a compiler would make the two one
    return vaddq_f32(product, c);
  }
  static QK_INLINE Integers integers(int32_t i) { return (Integers)vdupq_n_s32(i); }
  static QK_INLINE Integers lanes_at(const uint8_t* at) { return (Integers)vld1q_u8(at); }
  static QK_INLINE Integers widen_bytes(const uint8_t* at) { return (Integers)lanes_of(at); }
  static QK_INLINE Integers quad(const int8_t* x) { return (Integers)four_bytes(x); }
  static QK_INLINE Sum to_sum(Integers i) { return vcvtq_f32_s32((int32x4_t)i); }
  static QK_INLINE Integers look_up(Integers table, Integers indices) {
    return (Integers)vqtbl1q_u8((uint8x16_t)table, (uint8x16_t)indices);
  }
};

// Bytes as signed ones: bytes - 128
QK_INLINE int8x16_t as_signed(NeonIntegers::Integers bytes) {
  return (int8x16_t)veorq_u8((uint8x16_t)bytes, vdupq_n_u8(128));
}

}  // namespace
}  // namespace qkernels::cpu
