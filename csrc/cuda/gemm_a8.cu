// The 12 instances of gemm_a8 (width x groups of 32 or longer x tokens), the quantization of x, what is added to the
// sums of codes, and how they are launched.
#include "a8.h"
#include "apart_a8.cuh"
#include "blocks.h"
#include "gemm_a8.cuh"
#include "launch_a8.cuh"

namespace qkernels::cuda {
namespace {

template <int kWidth, bool kGroups32, int kWarpsN, int kWarpsM>
cudaError_t launch_tile(const GemmA8Arguments& p, int splits, cudaStream_t stream) {
  const dim3 grid(divide_up(p.out.M, kWarpsM * kWarpTokensA8), divide_up(p.weight.strips, kWarpsN), splits);
  const int shared = gemm_a8_shared_bytes(kWarpsM * kWarpTokensA8, p.strip_bytes);
  return launch(gemm_a8<kWidth, kGroups32, kWarpsN, kWarpsM>, grid, dim3(kWarpsN * kWarpsM * 32), shared, stream, p);
}

template <int kWidth, bool kGroups32>
cudaError_t launch_tokens(const GemmA8Arguments& p, const Config& c, cudaStream_t stream) {
  switch (c.tokens) {
    case 32:
      return launch_tile<kWidth, kGroups32, 4, 1>(p, c.splits, stream);
    case 64:
      return launch_tile<kWidth, kGroups32, 2, 2>(p, c.splits, stream);
    case 128:
      return launch_tile<kWidth, kGroups32, 2, 4>(p, c.splits, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

// Marks of all columns, and the list of those that are marked.
cudaError_t launch_marks(const Call& call, uint16_t* marks, int32_t* list, cudaStream_t stream) {
  const int columns = call.weight.steps * kStepColumns, words = columns / 16, blocks = marked_blocks(call.x.M);
  if (columns > 0) {
    const MarkColumns p{call.x,  is_aligned(call.x),    call.type == Type::kHalf,
                        columns, marked_rows(call.x.M), marks + words};
    const dim3 grid(divide_up(words, kMarkThreads), blocks);
    const cudaError_t error = launch(mark_columns, grid, dim3(kMarkThreads), 0, stream, p);
    if (error != cudaSuccess) return error;
  }
  return launch(list_marked, dim3(1), dim3(kQuantizeThreads), kQuantizeThreads / 32 * 4, stream, marks + words, words,
                blocks, marks, list);
}

cudaError_t launch_finish(const Call& call, const FinishA8& p, cudaStream_t stream) {
  const dim3 grid(divide_up(p.out.M, kFinishTokens), p.weight.strips), block(kFinishThreads);
  return call.type == Type::kHalf ? launch(finish_a8<Half>, grid, block, finish_shared_bytes(), stream, p)
                                  : launch(finish_a8<BFloat16>, grid, block, finish_shared_bytes(), stream, p);
}

}  // namespace

int quantize_a8(const Call& call, const WorkspaceA8& at, uint8_t* workspace, void* stream) {
  const Activations& x = call.x;
  const bool aligned = is_aligned(x), half = call.type == Type::kHalf;
  const int steps = call.weight.steps;
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  int8_t* to = reinterpret_cast<int8_t*>(workspace);
  float* scales = reinterpret_cast<float*>(workspace + at.scales);
  if (call.rounding == Rounding::kFull || call.rounding == Rounding::kWide) {
    return launch(quantize_tokens, dim3(x.M), dim3(kQuantizeThreads), kQuantizeThreads / 32 * 4, s, x, aligned, half,
                  call.rounding == Rounding::kWide, steps, to, scales);
  }
  const bool outliers = call.rounding == Rounding::kOutliers;
  if ((!outliers && !has_zero_points(call.rounding) && !is_static(call.rounding)) ||
      is_static(call.rounding) != (call.x_static != nullptr)) {
    return cudaErrorInvalidValue;
  }
  uint16_t* marks = outliers ? reinterpret_cast<uint16_t*>(workspace + at.marks) : nullptr;
  if (outliers) {
    if (const int error = launch_marks(call, marks, reinterpret_cast<int32_t*>(workspace + at.list), s)) return error;
  }
  const QuantizeAs p{x,     aligned,      half,   call.rounding,
                     steps, to,           scales, reinterpret_cast<float*>(workspace + at.zeros),
                     marks, call.x_static};
  return launch(quantize_as, dim3(rows_a8(call)), dim3(kQuantizeThreads), kQuantizeThreads / 32 * 12, s, p);
}

int multiply_a8(const Call& call, const Config& config, void* workspace, void* stream) {
  const Weight& w = call.weight;
  if (!has_int8_activations(config.path) || w.zero_type != Type::kNone || w.groups_per_step > 2 || config.splits < 1 ||
      int64_t{w.steps_per_group} * kStepColumns > kMostGroupColumnsA8 - (reaches_128(call.rounding) ? 1 : 0)) {
    return cudaErrorInvalidValue;
  }
  const WorkspaceA8 at = workspace_a8(call, config);
  uint8_t* base = static_cast<uint8_t*>(workspace);
  if (const int error = quantize_a8(call, at, base, stream)) return error;

  const bool apart = has_apart(call.rounding);
  GemmA8Arguments p{};
  p.weight = w, p.format = group_format(w, call.type), p.out = call.out;
  p.x = reinterpret_cast<const int8_t*>(base), p.x_scales = reinterpret_cast<const float*>(base + at.scales);
  p.out.partial = reinterpret_cast<float*>(base + at.partial), p.out.M = rows_a8(call);
  p.stored = apart || config.splits > 1 ? Type::kNone : call.type;
  if (apart) p.out.bias_type = Type::kNone;                  // finish_a8 adds it
  for (p.shift = 7; w.mid >> (7 - p.shift) > 1;) --p.shift;  // mid is 2^(bits - 1)
  p.strip_bytes = stage_bytes(w);
  const bool groups32 = w.groups_per_step == 2;
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  const cudaError_t error =
      config.path == Path::kGemmA8Sm90 ? launch_gemm_a8_sm90(p, config, s)
      : w.width == 4 ? groups32 ? launch_tokens<4, true>(p, config, s) : launch_tokens<4, false>(p, config, s)
      : groups32     ? launch_tokens<8, true>(p, config, s)
                     : launch_tokens<8, false>(p, config, s);
  if (error != cudaSuccess || (config.splits == 1 && !apart)) return error;
  if (!apart) return add_parts(p.out, config.splits, call.type, stream);
  FinishA8 f{w, call.x, call.out, config.splits, p.out.M, nullptr, nullptr};
  f.out.partial = p.out.partial;
  if (has_zero_points(call.rounding)) f.zeros = reinterpret_cast<const float*>(base + at.zeros);
  if (call.rounding == Rounding::kOutliers) f.list = reinterpret_cast<const int32_t*>(base + at.list);
  return launch_finish(call, f, s);
}

}  // namespace qkernels::cuda
