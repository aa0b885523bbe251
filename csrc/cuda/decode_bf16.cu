#include "launch_decode.cuh"

namespace qkernels::cuda {

cudaError_t launch_decode_bf16(const Call& call, const Config& config, cudaStream_t stream) {
  return launch_decode<BFloat16>(call, config, stream);
}

}  // namespace qkernels::cuda
