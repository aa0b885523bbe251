// The twin of the CUDA runtime, as far as csrc/cuda and tools/first_light/drive use it: launches run at once on the
// emulator, or are written down for the PTX interpreter, or join the graph that their stream captures. It refuses what
// a card refuses: more shared memory than the function was allowed on this device, and grids and clusters that are too
// large.
//
// Two devices, both an H200.
#pragma once
#include <dlfcn.h>

#include <chrono>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "ptx.cuh"
#include "scheduler.h"

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevice = 101
};

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

// When set, told the name of each kernel before it runs.
inline std::function<void(const std::string&)> watching;

inline std::string symbol_of(const void* function) {
  Dl_info info;
  return dladdr(function, &info) != 0 && info.dli_sname != nullptr ? info.dli_sname : "";
}

template <class T>
inline std::string bytes_of(const T& v) {
  return std::string(reinterpret_cast<const char*>(&v), sizeof(T));
}

constexpr size_t kMostThreads = 1024;    // what every GPU from sm_80 on allows
constexpr unsigned kMostOfCluster = 8;   // what every card with clusters has
constexpr int kDevices = 2, kMostShared = 227 * 1024, kSharedOfAll = 228 * 1024, kWithoutAsking = 48 * 1024;
constexpr int kGroups[] = {16, 16, 16, 16, 16, 16, 18, 18};  // multiprocessors that a cluster finds room among

inline thread_local int device = 0;

// What each function is allowed on each device, and every time that this was set.
struct Allowed {
  std::mutex mutex;
  std::map<std::pair<const void*, int>, size_t> bytes;
  std::vector<std::tuple<const void*, int, size_t>> asked;

  size_t of(const void* function) {
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = bytes.find({function, device});
    return found == bytes.end() ? kWithoutAsking : found->second;
  }
};
inline Allowed allowed;

struct Node {
  const void* function;
  size_t shared_bytes;
  std::function<void()> run;
};
using Graph = std::vector<Node>;
struct Stream {
  Graph* captures = nullptr;
};
struct Event {
  std::chrono::steady_clock::time_point at;
};

inline int multiprocessors() {
  int sum = 0;
  for (const int group : kGroups) sum += group;
  return sum;
}

}  // namespace qkernels::host

using cudaStream_t = qkernels::host::Stream*;
using cudaGraph_t = qkernels::host::Graph*;
using cudaGraphExec_t = qkernels::host::Graph*;
using cudaEvent_t = qkernels::host::Event*;

// --- devices and functions ---

enum cudaDeviceAttr {
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrL2CacheSize
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess                    ? "no error"
         : error == cudaErrorInvalidValue         ? "invalid argument"
         : error == cudaErrorMemoryAllocation     ? "out of memory"
         : error == cudaErrorInvalidConfiguration ? "invalid configuration argument"
                                                  : "error";
}

inline cudaError_t cudaGetDevice(int* device) { return *device = qkernels::host::device, cudaSuccess; }
inline cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= qkernels::host::kDevices) return cudaErrorInvalidDevice;
  return qkernels::host::device = device, cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* to, cudaDeviceAttr what, int) {
  switch (what) {
    case cudaDevAttrComputeCapabilityMajor:
      return *to = 9, cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      return *to = 0, cudaSuccess;
    case cudaDevAttrMultiProcessorCount:
      return *to = qkernels::host::multiprocessors(), cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      return *to = qkernels::host::kMostShared, cudaSuccess;
    case cudaDevAttrL2CacheSize:
      return *to = 4096, cudaSuccess;  // small, so that a rehearsal rotates over few weights
  }
  return cudaErrorInvalidValue;
}
inline cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute, int value) {
  if (value < 0 || value > qkernels::host::kMostShared) return cudaErrorInvalidValue;
  qkernels::host::Allowed& allowed = qkernels::host::allowed;
  const std::lock_guard<std::mutex> lock(allowed.mutex);
  allowed.bytes[{function, qkernels::host::device}] = value;
  allowed.asked.emplace_back(function, qkernels::host::device, value);
  return cudaSuccess;
}

// --- launches ---

enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  qkernels::host::Dim3 grid, block;  // gridDim and blockDim are macros here
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments... arguments) {
  namespace host = qkernels::host;
  const host::Dim3 grid = config->grid, size = config->block;
  const size_t shared = config->dynamicSmemBytes;
  const bool clusters = config->numAttrs != 0;
  const void* function = reinterpret_cast<const void*>(kernel);
  if (grid.count() == 0 || size.count() == 0 || size.count() > host::kMostThreads || grid.y > 65535 || grid.z > 65535 ||
      (clusters && grid.z > host::kMostOfCluster)) {
    return cudaErrorInvalidConfiguration;
  }
  if (shared > host::allowed.of(function)) return cudaErrorInvalidValue;
  const std::tuple<Parameters...> values(arguments...);
  if (host::recording != nullptr) {
    host::Launch record{host::symbol_of(function), grid, size, shared, {}};
    std::apply([&](const auto&... v) { (record.parameters.push_back(host::bytes_of(v)), ...); }, values);
    host::recording->push_back(record);
    return cudaSuccess;
  }
  auto run = [=] {
    if (host::watching) host::watching(host::symbol_of(function));
    host::run_grid(grid, size, shared, [&] { std::apply(kernel, values); }, clusters);
  };
  if (config->stream != nullptr && config->stream->captures != nullptr) {
    config->stream->captures->push_back({function, shared, run});
  } else {
    run();
  }
  return cudaSuccess;
}

// One block fills a multiprocessor from half of its shared memory on.
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveClusters(int* active, Kernel, const cudaLaunchConfig_t* config) {
  const int blocks = qkernels::host::kSharedOfAll / (static_cast<int>(config->dynamicSmemBytes) + 1024);
  *active = 0;
  for (const int group : qkernels::host::kGroups) *active += group * blocks / config->attrs[0].val.clusterDim.z;
  return cudaSuccess;
}
