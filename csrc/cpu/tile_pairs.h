// Two rows of x times two rows of the weight, four columns an instruction, where there is an even number of rows of x
// and V has kPairs (tile_sums.h):
//   pair, part    interleave the sums of rows r and r + 1 of x, and take them apart
//   to_rows       makes of the operands of two steps those of the lower and of the upper half of a vector's rows
//   inputs        the operand of two rows of x
//   multiply_add_rows  a product, added to sums that are interleaved; with the bits of one row of x alone
#pragma once
#include <cstdint>

#define QK_INLINE inline __attribute__((always_inline))

namespace qkernels::cpu {
namespace {

// An octet of columns in pairs (V::kPairs): rows of x as `accumulate` has them.
template <class V, class U, int kSteps, int kVectors, int kTokens, int kPointers>
QK_INLINE void add_pairs(const U& unpacker, const typename U::Zero* zero, const typename U::Raw (&raw)[kVectors],
                         const typename V::X* (&rows)[kPointers], int64_t x_stride,
                         typename V::Sum (&acc)[kTokens][kVectors]) {
#pragma GCC unroll 4
  for (int s = 0; s < kSteps; s += 2) {
    typename V::Weight low[kVectors], high[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      low[v] = unpacker.value(raw[v], s, zero[v]), high[v] = unpacker.value(raw[v], s + 1, zero[v]);
      V::to_rows(low[v], high[v]);
    }
#pragma GCC unroll 8
    for (int r = 0; r < kTokens; r += 2) {
      const typename V::X* row = rows[r / 4] + (r % 4) * x_stride + s * V::kStep;
      const typename V::Input input = V::inputs(row, row + x_stride);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        acc[r][v] = V::multiply_add_rows(acc[r][v], low[v], input);
        acc[r + 1][v] = V::multiply_add_rows(acc[r + 1][v], high[v], input);
      }
    }
  }
}

}  // namespace
}  // namespace qkernels::cpu
