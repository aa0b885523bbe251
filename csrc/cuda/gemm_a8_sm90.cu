// The 10 instances of gemm_a8_wgmma (width x groups of 32 or longer x 64, 128 tokens; width x 256 tokens), and how they
// are launched.
#include "blocks.h"
#include "gemm_a8_sm90.cuh"
#include "launch_a8.cuh"

namespace qkernels::cuda {
namespace {

template <int kWidth, bool kGroups32, int kTokens>
cudaError_t launch_tile(const WgmmaA8Arguments& p, int splits, cudaStream_t stream) {
  const dim3 grid(divide_up(p.gemm.out.M, kTokens), divide_up(p.gemm.weight.strips, kStripsA8), splits);
  return launch(gemm_a8_wgmma<kWidth, kGroups32, kTokens>, grid, dim3(kConsumersA8 + 128),
                wgmma_a8_shared_bytes(kTokens, p.gemm.strip_bytes, p.stages), stream, p);
}

template <int kWidth>
cudaError_t launch_width(const WgmmaA8Arguments& p, const Config& c, cudaStream_t stream) {
  const bool groups32 = p.gemm.weight.groups_per_step == 2;
  switch (c.tokens) {
    case 64:
      return groups32 ? launch_tile<kWidth, true, 64>(p, c.splits, stream)
                      : launch_tile<kWidth, false, 64>(p, c.splits, stream);
    case 128:
      return groups32 ? launch_tile<kWidth, true, 128>(p, c.splits, stream)
                      : launch_tile<kWidth, false, 128>(p, c.splits, stream);
    case 256:
      return p.gemm.weight.groups == 1 ? launch_tile<kWidth, false, 256>(p, c.splits, stream) : cudaErrorInvalidValue;
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace

cudaError_t launch_gemm_a8_sm90(const GemmA8Arguments& gemm, const Config& c, cudaStream_t stream) {
  WgmmaA8Arguments p{};
  p.gemm = gemm, p.stage_bytes = wgmma_a8_stage_bytes(c.tokens, gemm.strip_bytes);
  p.stages = wgmma_a8_stages(c.tokens, gemm.strip_bytes, c.stages);
  if (p.stages < 2) return cudaErrorInvalidValue;
  if (const int words = gemm.weight.steps * kStepColumns / 2) {
    const uint16_t* x = reinterpret_cast<const uint16_t*>(gemm.x);
    const cudaError_t error = encode_tensor_map(&p.x, x, 1, gemm.out.M, words, words, c.tokens, kStepColumns / 2);
    if (error != cudaSuccess) return error;
  }
  return gemm.weight.width == 4 ? launch_width<4>(p, c, stream) : launch_width<8>(p, c, stream);
}

}  // namespace qkernels::cuda
