#include "launch_gemm.cuh"

namespace qkernels::cuda {

cudaError_t launch_gemm_bf16(const Call& call, const Config& config, cudaStream_t stream) {
  return launch_gemm<BFloat16>(call, config, stream);
}

}  // namespace qkernels::cuda
