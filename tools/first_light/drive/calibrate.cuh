// What the numbers of card.h are on this card, one JSON line each: {"mode": "calibrate", "what": ..., "value": ...}.
//
//   launch_ns              a kernel that waits for the one before it, in a graph
//   cluster_barrier_ns     one of the two barriers of a cluster of four
//   read_bytes_per_ns      memory that is read once; copy_bytes_per_ns: bytes read and written
//   l2_bytes_per_ns        a buffer of a quarter of the L2, read again and again
//   mma_macs_per_ns, mma8_macs_per_ns     mma.sync from registers, bf16 and int8
//   wgmma_macs_per_ns, wgmma8_macs_per_ns with `tokens`: A from registers, B from one place in shared memory
#pragma once
#include "gemm_sm90.cuh"
#include "setup.h"

namespace qkernels::drive {

// Samples in us a call, sorted: a graph of `calls` launches, queued behind a pause of 50 us.
template <class Launch>
std::vector<double> sampled(int rounds, int calls, const Launch& one) {
  cudaStream_t stream;
  cudaEvent_t begin, end;
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  OK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  OK(cudaEventCreate(&begin)), OK(cudaEventCreate(&end));
  OK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  for (int i = 0; i < calls; ++i) one(i, stream);
  OK(cudaStreamEndCapture(stream, &graph));
  OK(cudaGraphInstantiate(&exec, graph, 0));
  OK(cudaGraphLaunch(exec, stream));
  std::vector<double> us;
  for (int r = 0; r < rounds; ++r) {
    OK(launch(pause, dim3(1), dim3(1), 0, stream, int64_t{90000}));
    OK(cudaEventRecord(begin, stream)), OK(cudaGraphLaunch(exec, stream)), OK(cudaEventRecord(end, stream));
    OK(cudaEventSynchronize(end));
    float ms = 0;
    OK(cudaEventElapsedTime(&ms, begin, end));
    us.push_back(ms * 1e3 / calls);
  }
  OK(cudaGraphExecDestroy(exec)), OK(cudaGraphDestroy(graph)), OK(cudaStreamDestroy(stream));
  std::sort(us.begin(), us.end());
  return us;
}

__global__ void nothing() {}

// Reads 16 bytes a thread and step; writes them, or one word that depends on all of them and is never written.
__global__ void __launch_bounds__(kThreads)
    move(const uint8_t* from, uint8_t* to, int64_t bytes, int times, bool copy) {
  uint32_t seen = 0;
  for (int t = 0; t < times; ++t) {
    for (int64_t i = (blockIdx.x * int64_t{blockDim.x} + threadIdx.x) * 16; i < bytes;
         i += int64_t{gridDim.x} * blockDim.x * 16) {
      const Words4 v = load_global16(from + i);
      if (copy) store_global16(to + i, v);
      seen |= v.word[0] & v.word[1] & v.word[2] & v.word[3];
    }
  }
  if (seen == 0x12345678u && !copy) store_global4(to, seen);  // the bytes are zeros
}

__global__ void __launch_bounds__(128) mma_loop(int steps, bool int8, uint32_t* to) {
  float sums[8][4] = {};
  int32_t sums8[8][4] = {};
  const uint32_t a[4] = {threadIdx.x, 1, 2, 3}, b[2] = {4, 5};
  for (int s = 0; s < steps; ++s) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (int8) {
        mma_s8(sums8[i], a, b);
      } else {
        mma_bf16(sums[i], a, b);
      }
    }
  }
  float all = 0;
  for (int i = 0; i < 32; ++i) all += sums[i / 4][i % 4] + static_cast<float>(sums8[i / 4][i % 4]);
  if (all == 1.5f) store_global4(to, 1);
}

template <int kTokens, bool kInt8>
__global__ void __launch_bounds__(256, 1) wgmma_loop(int steps, uint32_t* to) {
#ifdef QK_WGMMA
  QK_SHARED(shared);
  const uint32_t tile = (shared_address(shared) + kSwizzleBytes - 1) / kSwizzleBytes * kSwizzleBytes;
  for (int i = threadIdx.x * 16; i < kTokens * 128; i += 256 * 16) store_shared16(tile + i, {});
  fence_async_proxy();
  __syncthreads();
  const uint32_t a[4] = {0, 0, 0, 0};
  std::conditional_t<kInt8, int32_t, float> sums[kTokens / 2];  // the first product opens them: zeros would be moves
  uint32_t all = 0;
  for (int s = 0; s < steps; ++s) {
    wgmma_fence();
    if constexpr (kInt8) {
      wgmma_s8(sums, a, wgmma_descriptor<kStepColumns>(tile), s > 0);
    } else {
      wgmma_bf16(sums, a, wgmma_descriptor<kTokenBytes>(tile), s > 0);
    }
    wgmma_commit();
    wgmma_wait<1>();
  }
  wgmma_wait<0>();
  wgmma_results(sums);
  for (int i = 0; i < kTokens / 2; ++i) {
    if constexpr (kInt8) {
      all |= static_cast<uint32_t>(sums[i]);
    } else {
      all |= float_to_bits(sums[i]);
    }
  }
  if (all != 0) store_global4(to, all);
#else
  (void)steps, (void)to;
#endif
}

__global__ void __launch_bounds__(128) barriers(int count) {
#ifdef QK_WGMMA
  for (int i = 0; i < count; ++i) cluster_barrier();
#else
  (void)count;
#endif
}

inline void found(const char* what, double value, int tokens = 0) {
  std::printf("{\"mode\": \"calibrate\", \"what\": \"%s\", \"tokens\": %d, \"value\": %.4g}\n", what, tokens, value);
  std::fflush(stdout);
}

template <int kTokens, bool kInt8>
void measure_wgmma(int rounds, int steps, int sms, uint32_t* to) {
  const auto us = sampled(rounds, 4, [&](int, cudaStream_t stream) {
    OK(launch(wgmma_loop<kTokens, kInt8>, dim3(sms), dim3(256), 2 * kSwizzleBytes + kTokens * 128, stream, steps, to));
  });
  const double macs = 2.0 * sms * steps * 64 * kTokens * (kInt8 ? 32 : 16);  // two warpgroups a block
  found(kInt8 ? "wgmma8_macs_per_ns" : "wgmma_macs_per_ns", macs / (us[us.size() / 2] * 1e3), kTokens);
}

// --mb: of the buffers that are read and copied; --steps: of the loops of products; --rounds.
inline int calibrate(const Options& o) {
  Device device{};
  int l2 = 0;
  OK(current_device(&device)), OK(cudaDeviceGetAttribute(&l2, cudaDevAttrL2CacheSize, device.index));
  const int rounds = o.number("rounds", 9), steps = o.number("steps", 4096),
            sms = o.number("blocks", device.multiprocessors);
  const int64_t bytes = int64_t{o.number("kb", 1 << 20)} << 10;
  uint8_t *from = device_memory(bytes), *to = device_memory(bytes);
  OK(cudaMemset(from, 0, bytes));
  auto median = [&](int calls, const auto& one) {
    const auto us = sampled(rounds, calls, one);
    return us[us.size() / 2] * 1e3;
  };

  found("launch_ns", median(200, [&](int, cudaStream_t stream) { OK(launch(nothing, dim3(1), dim3(32), 0, stream)); }));
  auto moved = [&](int64_t size, int times, bool copy) {
    return median(2, [&](int, cudaStream_t stream) {
      OK(launch(move, dim3(4 * sms), dim3(kThreads), 0, stream, static_cast<const uint8_t*>(from), to, size, times,
                copy));
    });
  };
  found("read_bytes_per_ns", bytes / moved(bytes, 1, false));
  found("copy_bytes_per_ns", 2.0 * bytes / moved(bytes, 1, true));
  const int64_t small = std::min<int64_t>(bytes, l2 / 4 / 16 * 16);
  found("l2_bytes_per_ns", 16.0 * small / moved(small, 16, false));
  for (const bool int8 : {false, true}) {
    const double ns = median(4, [&](int, cudaStream_t stream) {
      OK(launch(mma_loop, dim3(4 * sms), dim3(128), 0, stream, steps, int8, reinterpret_cast<uint32_t*>(to)));
    });
    found(int8 ? "mma8_macs_per_ns" : "mma_macs_per_ns", 4.0 * sms * 4 * steps * 8 * 16 * 8 * (int8 ? 32 : 16) / ns);
  }
  if (device.sm != 90 || !kHasWgmma) return 0;
  const int count = 64;
  const double many = median(
      4, [&](int, cudaStream_t stream) { OK(launch_clusters(barriers, dim3(1, 1, 4), dim3(128), 0, stream, count)); });
  const double none = median(
      4, [&](int, cudaStream_t stream) { OK(launch_clusters(barriers, dim3(1, 1, 4), dim3(128), 0, stream, 0)); });
  found("cluster_barrier_ns", (many - none) / count);
  uint32_t* word = reinterpret_cast<uint32_t*>(to);
  measure_wgmma<16, false>(rounds, steps, sms, word), measure_wgmma<64, false>(rounds, steps, sms, word);
  measure_wgmma<128, false>(rounds, steps, sms, word), measure_wgmma<256, false>(rounds, steps, sms, word);
  measure_wgmma<64, true>(rounds, steps, sms, word), measure_wgmma<256, true>(rounds, steps, sms, word);
  return 0;
}

}  // namespace qkernels::drive
