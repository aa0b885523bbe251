// What launch.cuh does with the CUDA runtime, on its twin: one kernel launched with two sizes of shared memory by two
// threads, in a capture, and on two devices.
#include <atomic>
#include <thread>

#include "call.h"
#include "launch.cuh"
#include "memory_host.h"

namespace {

using namespace qkernels;

void kernel(int*) {}
constexpr size_t kLarge = 200 * 1024, kSmall = 60 * 1024;

cudaError_t launch_with(size_t shared, cudaStream_t stream) {
  return cuda::launch(kernel, dim3(1), dim3(32), shared, stream, static_cast<int*>(nullptr));
}

// Launches into a capture of its own, so that nothing runs: the number that were refused.
int refused(int launches, bool large_first) {
  cudaStream_t stream;
  cudaGraph_t graph;
  int wrong = 0;
  wrong += cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking) != cudaSuccess;
  wrong += cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal) != cudaSuccess;
  for (int i = 0; i < launches; ++i) {
    wrong += launch_with((i % 2 == 0) == large_first ? kLarge : kSmall, stream) != cudaSuccess;
  }
  wrong += cudaStreamEndCapture(stream, &graph) != cudaSuccess;
  cudaGraphDestroy(graph), cudaStreamDestroy(stream);
  return wrong;
}

// `threads`: launches refused of two threads; `graph`: the error of a graph of a large launch and then a small one;
// `after`: how often a limit was set, by device; `limits`: the least limit that was set on each.
int run(const host::Call& call) {
  int32_t* threads = call.pointer<int32_t>("threads");
  std::atomic<int> wrong{0};
  auto work = [&](bool large_first) { wrong += refused(static_cast<int>(call.integer("launches")), large_first); };
  std::thread one(work, true), two(work, false);
  one.join(), two.join();
  *threads = wrong;

  cudaStream_t stream;
  cudaGraph_t graph;
  cudaGraphExec_t exec = nullptr;
  cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
  cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal);
  int error = launch_with(kLarge, stream);
  if (error == cudaSuccess) error = launch_with(kSmall, stream);
  cudaStreamEndCapture(stream, &graph);
  if (error == cudaSuccess) error = cudaGraphInstantiate(&exec, graph, 0);
  if (error == cudaSuccess) error = cudaGraphLaunch(exec, stream);
  *call.pointer<int32_t>("graph") = error;

  cudaSetDevice(1);
  *call.pointer<int32_t>("other_device") = launch_with(kLarge, nullptr);
  cudaSetDevice(0);
  for (const auto& [function, device, bytes] : host::allowed.asked) {
    int32_t& limit = call.pointer<int32_t>("limits")[device];
    ++call.pointer<int32_t>("asked")[device];
    limit = limit == 0 || static_cast<int32_t>(bytes) < limit ? static_cast<int32_t>(bytes) : limit;
  }
  return 0;
}

const host::Registered kShared("shared_memory", run);

}  // namespace
