// What multiply.cu calls in the other .cu files. The kernels of one path are one translation unit, so that they compile
// side by side.
#pragma once
#include "launch.cuh"
#include "problem.h"

namespace qkernels::cuda {

// `call.out.partial` and, for all but decode, an aligned `call.x` are set; the sums of several splits are left in
// `partial`.
cudaError_t launch_decode_f16(const Call& call, const Config& config, cudaStream_t stream);
cudaError_t launch_decode_bf16(const Call& call, const Config& config, cudaStream_t stream);
cudaError_t launch_gemm_f16(const Call& call, const Config& config, cudaStream_t stream);
cudaError_t launch_gemm_bf16(const Call& call, const Config& config, cudaStream_t stream);
cudaError_t launch_gemm_sm90(const Call& call, const Config& config, cudaStream_t stream);

}  // namespace qkernels::cuda
