#include "sample.cuh"
#include "wrappers.cuh"

// Uses outside of templates, so that nvcc emits the kernels.
extern "C" int qk_launch_sample(const qkernels::cuda::SampleProblem* p, void* stream) {
  return qkernels::cuda::launch_sample(*p, static_cast<cudaStream_t>(stream));
}
extern "C" int qk_launch_wrappers(const uint32_t* in, uint32_t* out, int rounds, void* stream) {
  return qkernels::cuda::launch_wrappers(in, out, rounds, static_cast<cudaStream_t>(stream));
}
