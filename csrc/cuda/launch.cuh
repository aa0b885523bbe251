// How a kernel is launched: through the CUDA runtime, or in the host build (-DQKERNELS_HOST) through its twin in
// tests/cuda/host, which runs it on the emulator and refuses what a card would.
#pragma once
#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>

#ifdef QKERNELS_HOST
#include "runtime_host.h"
#else
#include <cuda_runtime.h>
#endif

namespace qkernels::cuda {

// A block gets this much dynamic shared memory without asking.
constexpr size_t kDefaultShared = 48 * 1024;

// Lets a kernel's blocks on the current device have as much dynamic shared memory as the card gives a block: the first
// time, for good. The limit belongs to the function and not to a launch or a thread, so a limit of each launch's own
// would be lowered by a smaller launch while a larger one of another thread, or of the same capture, is on its way. It
// is a constant of the card, and a second thread waits until it is set.
inline cudaError_t allow_shared(const void* kernel) {
  static std::mutex mutex;
  static std::map<const void*, uint64_t> allowed;  // a bit a device; those past 64 are asked every time
  int device = 0, most = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
  const std::lock_guard<std::mutex> lock(mutex);
  uint64_t& done = allowed[kernel];
  if ((done & bit) != 0) return cudaSuccess;
  error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error == cudaSuccess) error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
  if (error == cudaSuccess) done |= bit;
  return error;
}

// Clusters of `size` blocks along z.
inline cudaLaunchAttribute cluster_of(unsigned size) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {1, 1, size};
  return attribute;
}

template <class... Parameters, class... Arguments>
cudaError_t launch_blocks(bool clusters, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                          cudaStream_t stream, Arguments... arguments) {
  if (shared_bytes > kDefaultShared) {
    const cudaError_t error = allow_shared(reinterpret_cast<const void*>(kernel));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchAttribute attribute = cluster_of(grid.z);
  const cudaLaunchConfig_t config = {grid, block, shared_bytes, stream, &attribute, clusters ? 1u : 0u};
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
