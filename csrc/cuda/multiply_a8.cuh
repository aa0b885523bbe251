// What the two products with int8 activations share: their arguments, and how codes become int8.
//
// The bytes of mma_tile were made for m16n8k16. Of 16 columns, lane 4 r + c has the codes of columns 2 c, 2 c + 1, 2 c
// + 8 and 2 c + 9 of rows r and r + 8, where m16n8k32 (and wgmma m64nNk32, whose A is four of its fragments, one a
// warp) wants four columns in a row, 4 c ... 4 c + 3, of its first and its second 16. A sum does not care for the order
// of its columns, so x is permuted instead (quantize_a8.cuh), and two steps of 16 columns make one instruction.
//
// A code becomes an integer of 8 bits by being moved to the top of its byte and having its sign bit flipped:
//   (code << (8 - bits)) ^ 0x80 = (code - 2^(bits - 1)) << (8 - bits),
// which for four codes is a shift and a lop3; the sums are shifted back, exactly. No byte is subtracted from another.
//
// Numbers: int32 sums are exact within a group (at most 131072 columns: 131072 * 128 * 127 < 2^31). They are converted
// to fp32, rounded there beyond 2^24, and one FMA multiplies each by its scale and adds it to the total. Per split, the
// total is multiplied by the token's scale, rounded; bias is added, rounded; and then comes the type of y.
#pragma once
#include "a8.h"
#include "copy.cuh"
#include "output.cuh"

namespace qkernels::cuda {

struct GemmA8Arguments {
  Weight weight;
  GroupFormat format;
  const int8_t* x;  // [M, steps * 64], as quantize_tokens leaves it
  const float* x_scales;
  Output out;
  Type stored;      // of y; kNone: the sums of each part of K are left, for add_parts or finish_a8
  int shift;        // 8 - bits
  int strip_bytes;  // of a stage: codes and scales of one strip
};

// A lane's codes of 32 columns. Four a register, row r in a[0] and a[2], row r + 8 in a[1] and a[3]; a[2] and a[3] are
// the second 16 columns.
template <int kWidth>
QK_DEVICE void unpack_a8(const uint32_t (&first)[kWidth / 4], const uint32_t (&second)[kWidth / 4], int shift,
                         uint32_t (&a)[4]) {
  constexpr int kSign = 0x6a;  // (a & b) ^ c
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint32_t (&q)[kWidth / 4] = half == 0 ? first : second;
    if constexpr (kWidth == 4) {  // at most four bits in a nibble: shift is 4 or more
      a[2 * half] = lop3<kSign>(q[0] << shift, 0xf0f0f0f0u, 0x80808080u);
      a[2 * half + 1] = lop3<kSign>(q[0] << (shift - 4), 0xf0f0f0f0u, 0x80808080u);
    } else {
      a[2 * half] = (permute_bytes(q[0], q[1], 0x6240) << shift) ^ 0x80808080u;
      a[2 * half + 1] = (permute_bytes(q[0], q[1], 0x7351) << shift) ^ 0x80808080u;
    }
  }
}

// Two columns of y for token m, or of part `split` of its sums, from totals that lack the token's scale.
QK_DEVICE void store_a8(const GemmA8Arguments& p, const Columns& columns, int split, int m, float low, float high,
                        float x_scale) {
  low = multiply_rounded(low, x_scale), high = multiply_rounded(high, x_scale);
  if (p.stored == Type::kNone) {
    store_partial(p.out, split, m, columns.n, low, high);
  } else if (p.stored == Type::kHalf) {
    store_y<Half>(p.out, columns, m, low, high);
  } else {
    store_y<BFloat16>(p.out, columns, m, low, high);
  }
}

}  // namespace qkernels::cuda
