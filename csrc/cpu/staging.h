// How x is copied for the kernels. For files that are compiled for no instruction set in particular.
#pragma once
#include <cstdint>

#include "kernels.h"

namespace qkernels::cpu {
namespace {

Type operand_type(const Problem& p, const Kernels& kernels) {
  return p.x_type == Type::kBFloat16 ? kernels.bf16_operand : Type::kFloat;
}

// Columns of a block of the copy. A run must not cross blocks: they are kRun wide where groups start at multiples of
// kRun or divide it, else as wide as a group.
int64_t block_width(const Problem& p) {
  return p.G == 1 || p.group % kRun == 0 || kRun % p.group == 0 ? kRun : p.group;
}

bool wants_sums(const Problem& p) { return has_rest(p) && !p.int8_activations; }

// Bytes from one row of int8 activations to the next: whole cache lines, and not the multiple of 4096 at which rows
// would share L1 sets.
int64_t int8_row_bytes(const Problem& p) { return (p.K_pad / 64 + 1) * 64 + (p.K_pad / 64 % 2 == 1 ? 64 : 0); }

int64_t staged_bytes(const Call& call, const Kernels& kernels, bool copies) {
  if (call.int8_activations) return call.M * int8_row_bytes(call);
  if (!copies) return 0;
  const int64_t blocks = (call.K_pad + block_width(call) - 1) / block_width(call);
  return blocks * call.M * block_width(call) * (operand_type(call, kernels) == Type::kFloat ? 4 : 2);
}

// The same with what goes with it: sums and scales of rows.
int64_t staging_bytes(const Call& call, const Kernels& kernels, bool copies) {
  return staged_bytes(call, kernels, copies) + (wants_sums(call) || call.int8_activations ? call.M * call.G * 4 : 0) +
         (call.int8_activations ? call.M * 8 : 0);
}

// Says where they are, in `staging_bytes` of memory.
void lay_staging(Call& call, const Kernels& kernels, bool copies, void* memory) {
  call.scale_bytes = kTileRows * size_of(call.scale_type);
  call.zero_bytes = kTileRows * (call.zero_type == Type::kNone ? 1 : size_of(call.zero_type));  // or small factors
  void* behind = static_cast<char*>(memory) + staged_bytes(call, kernels, copies);
  if (call.int8_activations) {
    call.staged = {memory, call.K_pad + 1, 0, int8_row_bytes(call)};
    call.x_sums = static_cast<int32_t*>(behind);
    call.x_scales = reinterpret_cast<float*>(call.x_sums + call.M * call.G);
    call.x_zeros = call.x_scales + call.M;
  } else if (copies) {
    call.staged = {memory, block_width(call), call.M * block_width(call), block_width(call)};
  } else {
    call.staged = {call.x, call.K_pad + 1, 0, call.x_row_stride};
  }
  call.sums = wants_sums(call) ? static_cast<float*>(behind) : nullptr;
}

}  // namespace
}  // namespace qkernels::cpu
