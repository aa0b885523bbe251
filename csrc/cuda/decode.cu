// The 24 instances of decode (type x width x short or longer groups x 8, 16, 32 tokens), and how they are launched.
#include "blocks.h"
#include "decode.cuh"
#include "launchers.h"

namespace qkernels::cuda {
namespace {

template <class F>
cudaError_t launch_tokens(const DecodeArguments& p, int tokens, dim3 grid, size_t shared, cudaStream_t stream) {
  const dim3 block(p.warps_n * p.warps_k * 32);
  switch (tokens) {
    case 8:
      return launch(decode<F, 1>, grid, block, shared, stream, p);
    case 16:
      return launch(decode<F, 2>, grid, block, shared, stream, p);
    case 32:
      return launch(decode<F, 4>, grid, block, shared, stream, p);
    default:
      return cudaErrorInvalidValue;
  }
}

template <class T>
cudaError_t launch_format(const DecodeArguments& p, int tokens, dim3 grid, size_t shared, cudaStream_t stream) {
  const bool short_groups = p.weight.groups_per_step > 1;
  if (p.weight.width == 4) {
    return short_groups ? launch_tokens<Format<T, 4, true>>(p, tokens, grid, shared, stream)
                        : launch_tokens<Format<T, 4, false>>(p, tokens, grid, shared, stream);
  }
  return short_groups ? launch_tokens<Format<T, 8, true>>(p, tokens, grid, shared, stream)
                      : launch_tokens<Format<T, 8, false>>(p, tokens, grid, shared, stream);
}

}  // namespace

cudaError_t launch_decode(const Call& call, const Config& config, cudaStream_t stream) {
  const int warps = config.warps_n * config.warps_k;
  if (warps < 1 || warps > most_decode_warps(config.tokens) || call.x.M > config.tokens || config.splits < 1) {
    return cudaErrorInvalidValue;
  }
  DecodeArguments p{};
  p.weight = call.weight, p.format = group_format(call.weight), p.x = call.x, p.out = call.out;
  p.aligned = is_aligned(call.x);
  p.warps_n = config.warps_n, p.warps_k = config.warps_k;
  p.steps_per_block = divide_up(call.weight.steps, config.splits);
  p.stage_bytes = stage_bytes(call.weight);
  p.warp_bytes = decode_warp_bytes(config.tokens, p.stage_bytes, call.weight.width);
  const size_t shared = decode_shared_bytes(config, call.x.M, p.stage_bytes, call.weight.width, call.weight.steps);
  const dim3 grid(divide_up(call.weight.strips, config.warps_n), config.splits);
  return call.type == Type::kHalf ? launch_format<Half>(p, config.tokens, grid, shared, stream)
                                  : launch_format<BFloat16>(p, config.tokens, grid, shared, stream);
}

}  // namespace qkernels::cuda
