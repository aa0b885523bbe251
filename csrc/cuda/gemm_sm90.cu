// The 32 instances of gemm_wgmma (type x width x eight of tile and kind of scaling), and how they are launched. Tiles
// of 16 tokens do not scale fragments: they are predicted to gain 3 % at most, on weights of 64 rows.
#include <limits>
#include <mutex>

#include "blocks.h"
#include "card.h"
#include "gemm_sm90.cuh"
#include "launchers.h"

namespace qkernels::cuda {
namespace {

template <class F, int kTokens>
cudaError_t launch_tile(const WgmmaArguments& p, const Config& c, cudaStream_t stream) {
  const dim3 grid =
      p.rows.given() ? dim3(p.rows.blocks * p.along_n) : dim3(divide_up(p.out.M, kTokens), p.along_n, c.splits);
  const dim3 block(wgmma_threads(kTokens));
  const int shared = wgmma_shared_bytes(kTokens, p.strip_bytes, p.stages);
  return p.clusters ? launch_clusters(gemm_wgmma<F, kTokens>, grid, block, shared, stream, p)
                    : launch(gemm_wgmma<F, kTokens>, grid, block, shared, stream, p);
}

template <class F>
cudaError_t launch_tokens(const WgmmaArguments& p, const Config& c, cudaStream_t stream) {
  switch (c.tokens) {
    case 16:
      if constexpr (!F::kScaled) return launch_tile<F, 16>(p, c, stream);
      break;
    case 32:
      return launch_tile<F, 32>(p, c, stream);
    case 64:
      return launch_tile<F, 64>(p, c, stream);
    case 128:
      return launch_tile<F, 128>(p, c, stream);
    case 256:
      if constexpr (F::kScaled) return launch_tile<F, 256>(p, c, stream);
      break;
  }
  return cudaErrorInvalidValue;
}

template <class T, int kWidth>
cudaError_t launch_width(const WgmmaArguments& p, const Config& c, cudaStream_t stream) {
  return c.tokens == 256 || sums_cannot_be_scaled(p.weight) || is_coded(coding_of(p.weight))
             ? launch_tokens<WgmmaFormat<T, kWidth, true>>(p, c, stream)
             : launch_tokens<WgmmaFormat<T, kWidth, false>>(p, c, stream);
}

// Clusters of `size` blocks of a kernel. All instances for as many tokens ask for the same shared memory within a KB,
// and for all registers of their share of a multiprocessor; so one stands for them.
template <int kTokens>
cudaError_t ask_clusters(int size, int* active) {
  constexpr auto kernel = gemm_wgmma<WgmmaFormat<BFloat16, 4, false>, kTokens>;
  const int strip = step_bytes(4) + 2 * kStripRows;
  const int shared = wgmma_shared_bytes(kTokens, strip, wgmma_stages(kTokens, strip));
  const cudaError_t error = allow_shared(reinterpret_cast<const void*>(kernel));
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attribute = cluster_of(size);
  const cudaLaunchConfig_t config = {
      dim3(1, 1, size), dim3(wgmma_threads(kTokens)), static_cast<size_t>(shared), nullptr, &attribute, 1};
  return cudaOccupancyMaxActiveClusters(active, kernel, &config);
}

}  // namespace

int clusters_of(const Device& device, Clusters* clusters) {
  constexpr int kDevices = 64;
  static std::mutex mutex;
  static Clusters known[kDevices] = {};
  static bool asked[kDevices] = {};
  *clusters = {};
  if (!kHasWgmma || device.sm != 90 || device.index >= kDevices) return cudaSuccess;
  const std::lock_guard<std::mutex> lock(mutex);
  if (!asked[device.index]) {
    for (const int size : {2, 3, 4, 8}) {
      if (const int error = ask_clusters<32>(size, &known[device.index].active[1][size])) return error;
      if (const int error = ask_clusters<64>(size, &known[device.index].active[0][size])) return error;
    }
    asked[device.index] = true;
  }
  *clusters = known[device.index];
  return cudaSuccess;
}

cudaError_t launch_gemm_sm90(const Call& call, const Config& c, cudaStream_t stream) {
  if (!tma_reads(call.x) || c.splits < 1) return cudaErrorInvalidValue;
  const bool experts = call.rows.given(), gate_up = call.gate_up.to != nullptr;
  const int strips = wgmma_strips(c.tokens);
  if (experts && (call.rows.table == nullptr || c.splits != 1)) return cudaErrorInvalidValue;
  if (gate_up && (!experts || strips != 2 || call.weight.N % (2 * kStripRows) != 0)) return cudaErrorInvalidValue;
  WgmmaArguments p{};
  p.rows = call.rows, p.gate_up = call.gate_up;
  p.apart = gate_up ? call.weight.strips / 2 : 1, p.along_n = divide_up(call.weight.strips, strips);
  if (int64_t{p.along_n} * p.rows.blocks > std::numeric_limits<int>::max()) return cudaErrorInvalidValue;
  p.weight = call.weight, p.format = group_format(call.weight, call.type), p.plain_x = call.x, p.out = call.out;
  p.coded = call.weight.codebook != Codebook::kIntegers, p.strip_bytes = stage_bytes(call.weight),
  p.stage_bytes = wgmma_stage_bytes(c.tokens, p.strip_bytes);
  p.stages = wgmma_stages(c.tokens, p.strip_bytes, c.stages), p.clusters = adds_in_cluster(c);
  if (p.stages < 2) return cudaErrorInvalidValue;
  if (call.x.K > 0) {
    const Activations& x = call.x;
    const cudaError_t error = experts ? encode_tensor_map(&p.x, x.x - c.tokens * x.row_stride, int64_t{x.M} + 1,
                                                          c.tokens, x.K, x.row_stride, c.tokens, kStepColumns)
                                      : encode_tensor_map(&p.x, x.x, 1, x.M, x.K, x.row_stride, c.tokens, kStepColumns);
    if (error != cudaSuccess) return error;
  }
  if (call.type == Type::kHalf) {
    return call.weight.width <= 6 ? launch_width<Half, 4>(p, c, stream) : launch_width<Half, 8>(p, c, stream);
  }
  return call.weight.width <= 6 ? launch_width<BFloat16, 4>(p, c, stream) : launch_width<BFloat16, 8>(p, c, stream);
}

}  // namespace qkernels::cuda
