// How a kernel is launched: on the GPU through the CUDA runtime, in the host build (-DQKERNELS_HOST) on the emulator of
// tests/cuda/host. The launchers are written against this one function, so both run the same code up to here.
#pragma once
#include <cstddef>

#ifdef QKERNELS_HOST
#include "launch_host.h"
#else
#include <cuda_runtime.h>

namespace qkernels::cuda {

// A block gets this much dynamic shared memory without asking.
constexpr size_t kDefaultShared = 48 * 1024;

template <class... Parameters, class... Arguments>
cudaError_t launch_blocks(bool clusters, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                          cudaStream_t stream, Arguments... arguments) {
  if (shared_bytes > kDefaultShared) {
    // Per device and per kernel, and cheap (about 1 us): remembering it would be state that several devices share.
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {1, 1, grid.z};
  if (clusters) config.attrs = &attribute, config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

// Returns the error of the launch itself; errors of the kernel appear at the caller's next synchronisation.
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                   Arguments... arguments) {
  return launch_blocks(false, kernel, grid, block, shared_bytes, stream, arguments...);
}

// The blocks with the same x and y, 8 at most, are a cluster: they run at the same time and read each other's shared
// memory. From sm_90 on.
template <class... Parameters, class... Arguments>
cudaError_t launch_clusters(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                            cudaStream_t stream, Arguments... arguments) {
  return launch_blocks(true, kernel, grid, block, shared_bytes, stream, arguments...);
}

}  // namespace qkernels::cuda
#endif
