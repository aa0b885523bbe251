// The 12 instances of gemm_a8 (width x groups of 32 or longer x tokens), the quantization of x, and how they are
// launched.
#include "a8.h"
#include "blocks.h"
#include "gemm_a8.cuh"
#include "launch_a8.cuh"
#include "quantize_a8.cuh"

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

}  // namespace

int quantize_a8(const Activations& x, Type type, Rounding rounding, int steps, int8_t* to, float* scales,
                void* stream) {
  if (rounding != Rounding::kFull && rounding != Rounding::kWide) return cudaErrorInvalidValue;
  return launch(quantize_tokens, dim3(x.M), dim3(kQuantizeThreads), kQuantizeThreads / 32 * 4,
                static_cast<cudaStream_t>(stream), x, is_aligned(x), type == Type::kHalf, rounding == Rounding::kWide,
                steps, to, scales);
}

int multiply_a8(const Call& call, const Config& config, void* workspace, void* stream) {
  const Weight& w = call.weight;
  if (!has_int8_activations(config.path) || w.zero_type != Type::kNone || w.groups_per_step > 2 || config.splits < 1 ||
      int64_t{w.steps_per_group} * kStepColumns > kMostGroupColumnsA8 - (reaches_128(call.rounding) ? 1 : 0)) {
    return cudaErrorInvalidValue;
  }
  const WorkspaceA8 at = workspace_a8(call, config);
  uint8_t* base = static_cast<uint8_t*>(workspace);
  int8_t* x = reinterpret_cast<int8_t*>(base);
  float* x_scales = reinterpret_cast<float*>(base + at.scales);
  if (const int error = quantize_a8(call.x, call.type, call.rounding, w.steps, x, x_scales, stream)) return error;

  GemmA8Arguments p{};
  p.weight = w, p.format = group_format(w, call.type), p.x = x, p.x_scales = x_scales, p.out = call.out;
  p.out.partial = reinterpret_cast<float*>(base + at.partial);
  p.half = call.type == Type::kHalf;
  for (p.shift = 7; w.mid >> (7 - p.shift) > 1;) --p.shift;  // mid is 2^(bits - 1)
  p.strip_bytes = stage_bytes(w);
  const bool groups32 = w.groups_per_step == 2;
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  const cudaError_t error =
      config.path == Path::kGemmA8Sm90 ? launch_gemm_a8_sm90(p, config, s)
      : w.width == 4 ? groups32 ? launch_tokens<4, true>(p, config, s) : launch_tokens<4, false>(p, config, s)
      : groups32     ? launch_tokens<8, true>(p, config, s)
                     : launch_tokens<8, false>(p, config, s);
  if (error != cudaSuccess || config.splits == 1) return error;
  return add_parts(p.out, config.splits, call.type, stream);
}

}  // namespace qkernels::cuda
