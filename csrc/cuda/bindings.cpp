// The ops of layouts mma_tile and mma_tile_a8 on torch's stable ABI: last checks, the choice, allocation, launches. No
// kernel state survives a call: workspaces come from torch's allocator, everything runs on the current stream, nothing
// waits.
//
//   QKERNELS_LOG=1             each choice of a kernel is printed once, to stderr
//   QKERNELS_ACCUMULATE=fp16   4-bit weights and fp16 activations may be summed in fp16, 64 columns at a time: faster
//   on
//                              GeForce cards, and only as exact as fp16 (both are read once)
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <mutex>
#include <optional>
#include <set>
#include <string>

#include "../arguments.h"
#include "a8.h"
#include "heuristics_a8.h"

namespace qkernels::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kSliceBytes = 64 << 20;  // of dequantized weight at a time: it stays in the L2 of large cards

Type type_of(const Tensor& t) { return qkernels::type_of<Type>(t); }

// --- torch's stream, without linking to libtorch_cuda
// ---------------------------------------------------------------------

// `import torch` has loaded libtorch_cuda where torch has CUDA; RTLD_NOLOAD never loads it on a CPU-only one. (The
// stable ABI's own Stream has a native handle only from torch 2.13 on.)
using CurrentStream = AOTITorchError (*)(int32_t, void**);
CurrentStream find_current_stream() {
  void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  return library == nullptr ? nullptr
                            : reinterpret_cast<CurrentStream>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
}

void* current_stream(int32_t device) {
  static const CurrentStream find = find_current_stream();
  STD_TORCH_CHECK(find != nullptr, "this torch has no CUDA, or hides its streams (aoti_torch_get_current_cuda_stream)");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(find(device, &stream));
  return stream;
}

void check(int error, const char* what) {
  STD_TORCH_CHECK(error == 0, what, " could not be launched: ", error_text(error));
}

// --- settings
// -----------------------------------------------------------------------------------------------------------

bool logs() {
  static const char* value = std::getenv("QKERNELS_LOG");
  return value != nullptr && std::strcmp(value, "0") != 0;
}
bool half_accumulate() {
  static const char* value = std::getenv("QKERNELS_ACCUMULATE");
  STD_TORCH_CHECK(value == nullptr || std::strcmp(value, "fp16") == 0 || std::strcmp(value, "fp32") == 0,
                  "QKERNELS_ACCUMULATE must be fp32 or fp16, got ", value);
  return value != nullptr && std::strcmp(value, "fp16") == 0;
}

void log_once(const Problem& p, const Config& c) {
  static std::mutex mutex;
  static std::set<std::string> seen;
  const std::string line = describe(p) + ": " + describe(c);
  const std::lock_guard<std::mutex> lock(mutex);
  if (seen.insert(line).second) std::fprintf(stderr, "qkernels: %s\n", line.c_str());
}

// --- arguments
// ------------------------------------------------------------------------------------------------------------

void check_buffer(const char* name, const Tensor& t, int32_t device) {
  STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == device, name, " must be on cuda:", device,
                  " like x or qweight; move one of them");
  STD_TORCH_CHECK(t.is_contiguous() && reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0, name,
                  " must be contiguous and start at a multiple of 16 bytes");
}

// The buffers of one weight. Their values are not looked at: kernels clamp what they index with.
Weight checked_weight(const Tensor& qweight, const Tensor& scales, const OptionalTensor& zeros, int64_t N, int64_t K,
                      int64_t bits, int64_t group_size, bool zeros_are_offsets) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max() - kStepColumns;
  STD_TORCH_CHECK(2 <= bits && bits <= 8 && group_size >= 1 && 0 <= N && N <= kMost && 0 <= K && K <= kMost,
                  "bits must be 2 to 8, group_size positive, N and K 0 to ", kMost, ", got bits=", bits,
                  ", group_size=", group_size, ", N=", N, ", K=", K);
  STD_TORCH_CHECK(K <= group_size || group_size == 16 || group_size == 32 || group_size % kStepColumns == 0,
                  "group_size must be 16, 32 or a multiple of 64, got ", group_size);
  Weight w = make_weight(N, K, static_cast<int>(bits), group_size);
  const int64_t strip_bytes = int64_t{w.steps} * step_bytes(w.width);
  STD_TORCH_CHECK(type_of(qweight) == Type::kUInt8 && has_shape(qweight, {w.strips, strip_bytes}),
                  "qweight must be uint8 [", w.strips, ", ", strip_bytes, "] for N=", N, ", K=", K, ", bits=", bits);
  const int32_t device = qweight.get_device_index();
  check_buffer("qweight", qweight, device);
  STD_TORCH_CHECK(is_floating(type_of(scales)) && has_shape(scales, {w.strips, w.groups, kStripRows}),
                  "scales must be floating [", w.strips, ", ", w.groups, ", 64]");
  check_buffer("scales", scales, device);
  w.codes = static_cast<const uint8_t*>(qweight.const_data_ptr());
  w.scales = static_cast<const uint8_t*>(scales.const_data_ptr()), w.scale_type = type_of(scales);
  w.zeros_are_offsets = zeros_are_offsets;
  STD_TORCH_CHECK(zeros.has_value() || !zeros_are_offsets, "zeros must be given where zeros_are_offsets is true");
  if (zeros.has_value()) {
    const Type type = type_of(*zeros);
    STD_TORCH_CHECK((is_floating(type) || (type == Type::kUInt8 && !zeros_are_offsets)) &&
                        has_shape(*zeros, {w.strips, w.groups, kStripRows}),
                    "zeros must be ", zeros_are_offsets ? "floating" : "uint8 or floating", " [", w.strips, ", ",
                    w.groups, ", 64] like scales");
    check_buffer("zeros", *zeros, device);
    w.zeros = static_cast<const uint8_t*>(zeros->const_data_ptr()), w.zero_type = type;
  }
  return w;
}

const int32_t* checked_order(const OptionalTensor& k_order, int64_t K, int32_t device) {
  if (!k_order.has_value()) return nullptr;
  STD_TORCH_CHECK(k_order->scalar_type() == ScalarType::Int && has_shape(*k_order, {K}),
                  "k_order must be int32 [K] = [", K, "]");
  check_buffer("k_order", *k_order, device);
  return static_cast<const int32_t*>(k_order->const_data_ptr());
}

Device checked_device() {
  Device device{};
  check(current_device(&device), "cudaDeviceGetAttribute");
  STD_TORCH_CHECK(device.sm >= 80,
                  "these kernels need compute capability 8.0 (A100, RTX 30) or later, this device has ", device.sm / 10,
                  ".", device.sm % 10);
  return device;
}

// --- dequantize + mm
// ------------------------------------------------------------------------------------------------------

// aten::linear.out rather than linear or matmul: autocast leaves it alone, and a bias is added before the one rounding.
void linear_out(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& out) {
  using torch::stable::detail::from;
  std::array<StableIValue, 4> stack{from(x), from(weight), from(bias), from(out)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // the reference that the call returns
}

void dequantize_and_multiply(const Call& call, const Tensor& x, const OptionalTensor& bias, Tensor& y, void* stream) {
  const Weight& w = call.weight;
  // x through its order into padded rows, where it is not plain: then the weight comes padded, too, and stays in its
  // order.
  const bool copies = !is_aligned(call.x);
  const int columns = copies ? w.steps * kStepColumns : w.K;
  Tensor plain_x = x;
  if (copies) {
    plain_x = torch::stable::new_empty(x, {call.x.M, columns});
    check(stage_x(call.x, w.steps, static_cast<uint16_t*>(plain_x.mutable_data_ptr()), stream), "the copy of x");
  }
  OptionalTensor plain_bias;
  if (bias.has_value()) plain_bias = torch::stable::to(*bias, x.scalar_type());
  const int64_t fits = kSliceBytes / (int64_t{2} * columns * kStripRows);
  const int count = static_cast<int>(fits < 1 ? 1 : fits < w.strips ? fits : w.strips);
  Tensor slice = torch::stable::new_empty(x, {int64_t{count} * kStripRows, columns});
  for (int first = 0; first < w.strips; first += count) {
    const int strips = w.strips - first < count ? w.strips - first : count;
    const int64_t row = int64_t{first} * kStripRows, left = w.N - row;
    const int64_t rows = left < strips * kStripRows ? left : strips * kStripRows;
    check(dequantize(w, first, strips, columns, nullptr, call.type, slice.mutable_data_ptr(), stream), "dequantize");
    OptionalTensor part_of_bias;
    if (plain_bias.has_value()) part_of_bias = torch::stable::narrow(*plain_bias, 0, row, rows);
    linear_out(plain_x, torch::stable::narrow(slice, 0, 0, rows), part_of_bias, torch::stable::narrow(y, 1, row, rows));
  }
}

// --- the ops
// --------------------------------------------------------------------------------------------------------------

// A call with everything but y, which is allocated on the right device only afterwards. `dense_bias` holds the copy of
// a bias that is not contiguous.
Call checked_call(const Tensor& x, const Tensor& qweight, const Tensor& scales, const OptionalTensor& zeros,
                  const OptionalTensor& k_order, const OptionalTensor& bias, int64_t out_features, int64_t bits,
                  int64_t group_size, bool zeros_are_offsets, OptionalTensor& dense_bias) {
  STD_TORCH_CHECK(x.dim() == 2 && (type_of(x) == Type::kHalf || type_of(x) == Type::kBFloat16),
                  "x must be bfloat16 or float16 [M, K]: the CUDA kernels take no float32");
  STD_TORCH_CHECK(x.size(0) <= std::numeric_limits<int32_t>::max() / 2, "x has too many rows: ", x.size(0));
  STD_TORCH_CHECK(qweight.is_cuda(), "qweight must be on a CUDA device, like x; move it there");
  const int32_t device_index = qweight.get_device_index();
  STD_TORCH_CHECK(x.is_cuda() && x.get_device_index() == device_index, "x must be on cuda:", device_index,
                  " like qweight; move one of them");
  Call call{};
  call.weight = checked_weight(qweight, scales, zeros, out_features, x.size(1), bits, group_size, zeros_are_offsets);
  const Weight& w = call.weight;
  call.type = type_of(x);
  call.x = {
      static_cast<const uint16_t*>(x.const_data_ptr()), static_cast<int>(x.size(0)), w.K, x.stride(0), x.stride(1),
      checked_order(k_order, w.K, device_index)};
  call.out = {nullptr, nullptr, Type::kNone, call.x.M, w.N, w.strips * kStripRows, nullptr};
  if (bias.has_value()) {
    STD_TORCH_CHECK(is_floating(type_of(*bias)) && has_shape(*bias, {out_features}), "bias must be floating [N] = [",
                    out_features, "]");
    STD_TORCH_CHECK(bias->is_cuda() && bias->get_device_index() == device_index, "bias must be on cuda:", device_index);
    dense_bias = torch::stable::contiguous(*bias);
    call.out.bias = static_cast<const uint8_t*>(dense_bias->const_data_ptr()), call.out.bias_type = type_of(*bias);
  }
  return call;
}

Tensor run(const Tensor& x, const Tensor& qweight, const Tensor& scales, const OptionalTensor& zeros,
           const OptionalTensor& k_order, const OptionalTensor& bias, int64_t out_features, int64_t bits,
           int64_t group_size, bool zeros_are_offsets, bool decode_only) {
  OptionalTensor dense_bias;
  Call call = checked_call(x, qweight, scales, zeros, k_order, bias, out_features, bits, group_size, zeros_are_offsets,
                           dense_bias);
  const Weight& w = call.weight;
  const int32_t device_index = qweight.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device_index);
  const Device device = checked_device();
  Tensor y = torch::stable::new_empty(x, {x.size(0), out_features});
  if (call.x.M == 0 || w.N == 0) return y;
  call.out.y = static_cast<uint16_t*>(y.mutable_data_ptr());

  const GroupBytes groups = group_bytes(w);
  const Problem problem{call.x.M,
                        w.N,
                        w.K,
                        static_cast<int>(bits),
                        groups.scales + groups.zeros,
                        call.type == Type::kHalf,
                        is_aligned(call.x),
                        device.sm,
                        device.multiprocessors,
                        w.groups_per_step > 1,
                        is_floating(w.zero_type)};
  const Config config = choose(problem, half_accumulate(), decode_only);
  if (logs()) log_once(problem, config);
  void* stream = current_stream(device_index);
  if (config.path == Path::kDequantize) {
    dequantize_and_multiply(call, x, dense_bias, y, stream);
    return y;
  }
  OptionalTensor workspace;
  if (const int64_t bytes = workspace_bytes(call, config)) {
    workspace = torch::stable::new_empty(x, {bytes}, ScalarType::Byte);
  }
  check(multiply(call, config, workspace.has_value() ? workspace->mutable_data_ptr() : nullptr, stream),
        describe(config).c_str());
  return y;
}

Tensor gemm_mma_tile(const Tensor& x, const Tensor& qweight, const Tensor& scales, const OptionalTensor& zeros,
                     const OptionalTensor& k_order, const OptionalTensor& bias, int64_t out_features, int64_t bits,
                     int64_t group_size, bool zeros_are_offsets) {
  return run(x, qweight, scales, zeros, k_order, bias, out_features, bits, group_size, zeros_are_offsets, false);
}

Tensor gemv_mma_tile(const Tensor& x, const Tensor& qweight, const Tensor& scales, const OptionalTensor& zeros,
                     const OptionalTensor& k_order, const OptionalTensor& bias, int64_t out_features, int64_t bits,
                     int64_t group_size, bool zeros_are_offsets) {
  STD_TORCH_CHECK(x.dim() == 2 && x.size(0) <= kMaxDecodeTokens, "gemv_mma_tile takes M <= ", kMaxDecodeTokens,
                  " rows of x; call gemm_mma_tile");
  return run(x, qweight, scales, zeros, k_order, bias, out_features, bits, group_size, zeros_are_offsets, true);
}

Tensor gemm_mma_tile_a8(const Tensor& x, const Tensor& qweight, const Tensor& scales, const OptionalTensor& zeros,
                        const OptionalTensor& k_order, const OptionalTensor& bias, int64_t out_features, int64_t bits,
                        int64_t group_size, bool zeros_are_offsets) {
  STD_TORCH_CHECK(!zeros.has_value(), "gemm_mma_tile_a8 takes symmetric weights: zeros must be None");
  OptionalTensor dense_bias;
  Call call = checked_call(x, qweight, scales, zeros, k_order, bias, out_features, bits, group_size, zeros_are_offsets,
                           dense_bias);
  const Weight& w = call.weight;
  STD_TORCH_CHECK(w.groups_per_step <= 2 && int64_t{w.steps_per_group} * kStepColumns <= kMostGroupColumnsA8,
                  "gemm_mma_tile_a8 takes groups of 32 to ", kMostGroupColumnsA8,
                  " columns, got group_size=", group_size, ", K=", w.K);
  const int32_t device_index = qweight.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device_index);
  const Device device = checked_device();
  Tensor y = torch::stable::new_empty(x, {x.size(0), out_features});
  if (call.x.M == 0 || w.N == 0) return y;
  call.out.y = static_cast<uint16_t*>(y.mutable_data_ptr());
  const ConfigA8 config = choose_a8(w, call.x.M, device);
  Tensor workspace = torch::stable::new_empty(x, {workspace_a8(call, config).bytes}, ScalarType::Byte);
  check(multiply_a8(call, config, workspace.mutable_data_ptr(), current_stream(device_index)), "gemm_mma_tile_a8");
  return y;
}

Tensor dequantize_mma_tile(const Tensor& qweight, const Tensor& scales, const OptionalTensor& zeros,
                           const OptionalTensor& k_order, int64_t out_features, int64_t in_features, int64_t bits,
                           int64_t group_size, bool zeros_are_offsets, ScalarType dtype) {
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16,
                  "dtype must be float32, bfloat16 or float16");
  STD_TORCH_CHECK(qweight.is_cuda(), "qweight must be on a CUDA device; move it there");
  STD_TORCH_CHECK(qweight.dim() == 2, "qweight must be 2-D: stacked experts are not taken here");
  const Weight w =
      checked_weight(qweight, scales, zeros, out_features, in_features, bits, group_size, zeros_are_offsets);
  const int32_t* order = checked_order(k_order, in_features, qweight.get_device_index());
  const torch::stable::accelerator::DeviceGuard guard(qweight.get_device_index());
  checked_device();
  Tensor to = torch::stable::new_empty(qweight, {out_features, in_features}, dtype);
  if (w.N == 0 || w.K == 0) return to;
  void* stream = current_stream(qweight.get_device_index());
  check(dequantize(w, 0, w.strips, w.K, order, type_of(to), to.mutable_data_ptr(), stream), "dequantize");
  return to;
}

}  // namespace
}  // namespace qkernels::cuda

STABLE_TORCH_LIBRARY_IMPL(qkernels, CUDA, m) {
  m.impl("gemm_mma_tile", TORCH_BOX(&qkernels::cuda::gemm_mma_tile));
  m.impl("gemv_mma_tile", TORCH_BOX(&qkernels::cuda::gemv_mma_tile));
  m.impl("dequantize_mma_tile", TORCH_BOX(&qkernels::cuda::dequantize_mma_tile));
  m.impl("gemm_mma_tile_a8", TORCH_BOX(&qkernels::cuda::gemm_mma_tile_a8));
  m.impl("dequantize_mma_tile_a8", TORCH_BOX(&qkernels::cuda::dequantize_mma_tile));  // the same bytes
}
