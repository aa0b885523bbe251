// The twin of csrc/cuda/launch.cuh: a launch runs at once on the emulator, or is written down for the PTX interpreter.
#pragma once
#include <dlfcn.h>

#include <string>
#include <tuple>
#include <vector>

#include "ptx.cuh"
#include "scheduler.h"

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };

namespace qkernels::host {

// One launch: what a GPU would be told. `kernel` is the mangled name, which is the name of the entry in nvcc's PTX too.
struct Launch {
  std::string kernel;
  Dim3 grid, size;
  size_t shared_bytes = 0;
  std::vector<std::string> parameters;  // their bytes
};

// When set, launches are appended here and not run.
inline std::vector<Launch>* recording = nullptr;

inline std::string symbol_of(const void* function) {
  Dl_info info;
  return dladdr(function, &info) != 0 && info.dli_sname != nullptr ? info.dli_sname : "";
}

template <class T>
inline std::string bytes_of(const T& v) {
  return std::string(reinterpret_cast<const char*>(&v), sizeof(T));
}

// What every GPU from sm_80 on allows.
constexpr size_t kMostThreads = 1024;

}  // namespace qkernels::host

namespace qkernels::cuda {

constexpr unsigned kMostOfCluster = 8;  // what every card with clusters has

template <class... Parameters, class... Arguments>
cudaError_t launch_blocks(bool clusters, void (*kernel)(Parameters...), dim3 grid, dim3 size, size_t shared_bytes,
                          Arguments... arguments) {
  if (grid.count() == 0 || size.count() == 0 || size.count() > host::kMostThreads || grid.y > 65535 || grid.z > 65535) {
    return cudaErrorInvalidConfiguration;
  }
  const std::tuple<Parameters...> values(arguments...);
  if (host::recording != nullptr) {
    host::Launch record{host::symbol_of(reinterpret_cast<const void*>(kernel)), grid, size, shared_bytes, {}};
    std::apply([&](const auto&... v) { (record.parameters.push_back(host::bytes_of(v)), ...); }, values);
    host::recording->push_back(record);
    return cudaSuccess;
  }
  host::run_grid(grid, size, shared_bytes, [&] { std::apply(kernel, values); }, clusters);
  return cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 size, size_t shared_bytes, cudaStream_t,
                   Arguments... arguments) {
  return launch_blocks(false, kernel, grid, size, shared_bytes, arguments...);
}

template <class... Parameters, class... Arguments>
cudaError_t launch_clusters(void (*kernel)(Parameters...), dim3 grid, dim3 size, size_t shared_bytes, cudaStream_t,
                            Arguments... arguments) {
  if (grid.z > kMostOfCluster) return cudaErrorInvalidConfiguration;
  return launch_blocks(true, kernel, grid, size, shared_bytes, arguments...);
}

}  // namespace qkernels::cuda
