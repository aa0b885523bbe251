// The launchers of problem.h: a fused product with what may come before (a copy of x) and after it (sums of splits),
// and the side kernels.
#include "a8.h"
#include "blocks.h"
#include "launchers.h"
#include "side_kernels.cuh"
#include "tensor_map.h"

namespace qkernels::cuda {
namespace {

// Enough blocks for every multiprocessor of any card; the kernels loop.
int side_blocks(int64_t threads) {
  const int64_t blocks = (threads + kSideThreads - 1) / kSideThreads;
  return static_cast<int>(blocks < 2048 ? blocks : 2048);
}

int64_t partial_bytes(const Call& call, const Config& config) {
  return config.splits > 1 && !adds_in_cluster(config) ? int64_t{4} * config.splits * call.out.M * call.out.N_pad : 0;
}

}  // namespace

int64_t staged_bytes(const Call& call, const Config& config) {
  if (config.path == Path::kDecode) return 0;
  if (config.path == Path::kGemmSm90 ? tma_reads(call.x) : is_aligned(call.x)) return 0;
  return int64_t{2} * call.x.M * call.weight.steps * kStepColumns;
}

int64_t workspace_bytes(const Call& call, const Config& config) {
  if (has_int8_activations(config.path)) return workspace_a8(call, config).bytes;
  return staged_bytes(call, config) + partial_bytes(call, config);
}

int stage_x(const Activations& x, int steps, uint16_t* to, void* stream) {
  const int64_t chunks = int64_t{8} * x.M * steps;
  if (chunks == 0) return cudaSuccess;
  return launch(stage, dim3(side_blocks(chunks)), dim3(kSideThreads), 0, static_cast<cudaStream_t>(stream), x, steps,
                to);
}

int multiply(const Call& original, const Config& config, void* workspace, void* stream) {
  if (has_int8_activations(config.path)) {
    return is_coded(coding_of(original.weight)) ? cudaErrorInvalidValue
                                                : multiply_a8(original, config, workspace, stream);
  }
  Call call = original;
  uint8_t* free = static_cast<uint8_t*>(workspace);
  if (const int64_t bytes = staged_bytes(call, config)) {
    uint16_t* copy = reinterpret_cast<uint16_t*>(free);
    if (const int error = stage_x(call.x, call.weight.steps, copy, stream)) return error;
    const int columns = call.weight.steps * kStepColumns;
    call.x = {copy, call.x.M, columns, columns, 1, nullptr};
    free += bytes;
  }
  call.out.partial = reinterpret_cast<float*>(free);

  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  const bool half = call.type == Type::kHalf;
  cudaError_t error = cudaErrorInvalidValue;
  if (config.path == Path::kDecode) {
    error = half ? launch_decode_f16(call, config, s) : launch_decode_bf16(call, config, s);
  } else if (config.path == Path::kGemmSm90) {
    error = launch_gemm_sm90(call, config, s);
  } else if (config.path == Path::kGemm) {
    error = half ? launch_gemm_f16(call, config, s) : launch_gemm_bf16(call, config, s);
  }
  if (error != cudaSuccess || config.splits == 1 || adds_in_cluster(config)) return error;
  return add_parts(call.out, config.splits, call.type, stream);
}

int add_parts(const Output& out, int splits, Type type, void* stream) {
  const dim3 grid(side_blocks(int64_t{out.M} * out.N_pad / 2)), block(kSideThreads);
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  return type == Type::kHalf ? launch(reduce<Half>, grid, block, 0, s, out, splits)
                             : launch(reduce<BFloat16>, grid, block, 0, s, out, splits);
}

int dequantize(const Weight& weight, int first, int count, int columns, const int32_t* k_order, Type type, void* to,
               void* stream) {
  constexpr int kMostStrips = 65535 / kTilesPerStrip;  // of a grid
  const int steps = divide_up(columns, kStepColumns);
  for (int done = 0; done < count && steps > 0; done += kMostStrips) {
    DequantizeArguments p{};
    const int strips = count - done < kMostStrips ? count - done : kMostStrips;
    const int row = (first + done) * kStripRows;
    p.weight = weight, p.first_strip = first + done;
    p.rows = weight.N - row < strips * kStripRows ? weight.N - row : strips * kStripRows;
    p.columns = columns, p.k_order = k_order, p.type = type;
    p.to = static_cast<uint8_t*>(to) + int64_t{done} * kStripRows * columns * size_of(type);
    const dim3 grid(divide_up(steps, kSideThreads / 32), strips * kTilesPerStrip), block(kSideThreads);
    const cudaStream_t s = static_cast<cudaStream_t>(stream);
    const bool coded = weight.codebook != Codebook::kIntegers;
    const auto kernel = has_planes(weight)  ? dequantize_planes
                        : weight.width == 4 ? (coded ? dequantize_tiles<4, true> : dequantize_tiles<4, false>)
                                            : (coded ? dequantize_tiles<8, true> : dequantize_tiles<8, false>);
    const cudaError_t error = launch(kernel, grid, block, 0, s, p);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

int current_device(Device* device) {
  int major = 0, minor = 0;
  cudaError_t error = cudaGetDevice(&device->index);
  auto ask = [&](int* to, cudaDeviceAttr what) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(to, what, device->index);
  };
  ask(&major, cudaDevAttrComputeCapabilityMajor), ask(&minor, cudaDevAttrComputeCapabilityMinor);
  ask(&device->multiprocessors, cudaDevAttrMultiProcessorCount);
  ask(&device->most_shared, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  device->sm = 10 * major + minor;
  return error;
}

const char* error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace qkernels::cuda
