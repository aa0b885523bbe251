#include "launch_decode.cuh"

namespace qkernels::cuda {

cudaError_t launch_decode_f16(const Call& call, const Config& config, cudaStream_t stream) {
  return launch_decode<Half>(call, config, stream);
}

}  // namespace qkernels::cuda
