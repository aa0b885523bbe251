// What multiply_a8 calls in the other .cu file of int8 activations.
#pragma once
#include "launch.cuh"
#include "multiply_a8.cuh"

namespace qkernels::cuda {

cudaError_t launch_gemm_a8_sm90(const GemmA8Arguments& p, const Config& config, cudaStream_t stream);

}  // namespace qkernels::cuda
