// W8A8 and W4A8: products of mma_tile's symmetric weights with activations that are quantized to int8, one scale per
// token. The workspace of a call, and the launchers.
#pragma once
#include "problem.h"

namespace qkernels::cuda {

// One group's int32 sums must hold columns * 128 * 127 (multiply_a8.cuh); where x goes down to -128, one column less.
constexpr int64_t kMostGroupColumnsA8 = 131072;

QK_CONSTEXPR int strips_per_block_a8(int tokens) { return tokens == 32 ? 4 : 2; }

// int8 tokens [M, steps * 64] in the order that fragments want, fp32 scales [M], partial sums.
struct WorkspaceA8 {
  int64_t scales, partial, bytes;  // offsets of the second and third, and the whole
};
inline WorkspaceA8 workspace_a8(const Call& call, const Config& config) {
  const int64_t M = call.out.M;
  WorkspaceA8 at{};
  at.scales = M * call.weight.steps * kStepColumns;
  at.partial = at.scales + round_up(4 * M, 16);
  at.bytes = at.partial + (config.splits > 1 ? int64_t{4} * config.splits * M * call.out.N_pad : 0);
  return at;
}

// x -> int8 `to` [M, steps * 64] and `scales` [M] (quantize_a8.cuh). `rounding`: kFull or kWide.
int quantize_a8(const Activations& x, Type type, Rounding rounding, int steps, int8_t* to, float* scales, void* stream);
// y = x W^T + bias. `workspace`: workspace_a8(...).bytes, 16-byte aligned. M, N > 0; zero points must be absent, groups
// must not be of 16 columns.
int multiply_a8(const Call& call, const Config& config, void* workspace, void* stream);

// Partial sums [splits][M][N_pad] -> y, in the order of the splits.
int add_parts(const Output& out, int splits, Type type, void* stream);

}  // namespace qkernels::cuda
