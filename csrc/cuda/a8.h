// W8A8 and W4A8: products of mma_tile's symmetric weights with activations that are quantized to int8, one scale per
// token. The workspace of a call, and the launchers.
#pragma once
#include "problem.h"

namespace qkernels::cuda {

// One group's int32 sums must hold columns * 128 * 127 (multiply_a8.cuh); where x goes down to -128, one column less.
constexpr int64_t kMostGroupColumnsA8 = 131072;

QK_CONSTEXPR int strips_per_block_a8(int tokens) { return tokens == 32 ? 4 : 2; }

// Whether something is added to the sums of codes before y is rounded (apart_a8.cuh).
inline bool has_apart(Rounding r) { return has_zero_points(r) || r == Rounding::kOutliers; }
// Rows of the product of codes: those of x and, where they have zero points, one of ones.
inline int rows_a8(const Call& call) { return call.x.M + (has_zero_points(call.rounding) ? 1 : 0); }

// Outliers: the rows of x that one block looks at, and how many such blocks there are, 64 at most.
inline int marked_rows(int M) { return (M + 63) / 64; }
inline int marked_blocks(int M) { return M == 0 ? 0 : (M + marked_rows(M) - 1) / marked_rows(M); }

// int8 tokens [rows, steps * 64] in the order that fragments want; fp32 [rows] scales and, where quantize_as makes
// them, zero points times scales; of outliers, marks [1 + blocks][steps * 4] of 16 columns each, the first of them for
// all rows, and the list of marked columns; partial sums.
struct WorkspaceA8 {
  int64_t scales, zeros, marks, list, partial, bytes;  // offsets of all but the first, and the whole
};
inline WorkspaceA8 workspace_a8(const Call& call, const Config& config) {
  const int64_t rows = rows_a8(call), columns = int64_t{call.weight.steps} * kStepColumns;
  const bool outliers = call.rounding == Rounding::kOutliers, apart = has_apart(call.rounding);
  WorkspaceA8 at{};
  at.scales = rows * columns;
  at.zeros = at.scales + round_up(4 * rows, 16);
  at.marks = at.zeros + (apart || is_static(call.rounding) ? round_up(4 * rows, 16) : 0);
  at.list = at.marks + (outliers ? round_up((1 + marked_blocks(call.x.M)) * columns / 8, 16) : 0);
  at.partial = at.list + (outliers ? round_up(4 * (1 + columns), 16) : 0);
  at.bytes = at.partial + (apart || config.splits > 1 ? int64_t{4} * config.splits * rows * call.out.N_pad : 0);
  return at;
}

// x -> int8 [rows, steps * 64], `scales` and whatever else workspace_a8 has room for (quantize_a8.cuh, apart_a8.cuh).
int quantize_a8(const Call& call, const WorkspaceA8& at, uint8_t* workspace, void* stream);
// y = x W^T + bias. `workspace`: workspace_a8(...).bytes, 16-byte aligned. M, N > 0; zero points must be absent, groups
// must not be of 16 columns.
int multiply_a8(const Call& call, const Config& config, void* workspace, void* stream);

// Partial sums [splits][M][N_pad] -> y, in the order of the splits.
int add_parts(const Output& out, int splits, Type type, void* stream);

}  // namespace qkernels::cuda
