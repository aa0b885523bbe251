// The ops of layouts mma_tile and mma_tile_a8 on torch's stable ABI: last checks, the choice, allocation, launches. No
// state survives a call: workspaces come from torch's allocator, everything runs on the current stream, nothing waits.
//
//   QKERNELS_LOG=1             each choice of a kernel is printed once, to stderr
//   QKERNELS_ACCUMULATE=fp16   4-bit weights and fp16 activations may be summed in fp16, 64 columns at a time: faster
//                              on GeForce cards, and only as exact as fp16
// Both are read once.
#include "bindings.h"

#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <array>
#include <cstdlib>

#include "heuristics.h"
#include "settings.h"

namespace qkernels::cuda {
namespace {

constexpr int64_t kSliceBytes = 64 << 20;  // of dequantized weight at a time: it stays in the L2 of large cards

// --- torch's stream, without linking to libtorch_cuda ---

// `import torch` has loaded libtorch_cuda where torch has CUDA; RTLD_NOLOAD never loads it on a CPU-only one. (The
// stable ABI's own Stream has a native handle only from torch 2.13 on.)
using CurrentStream = AOTITorchError (*)(int32_t, void**);
CurrentStream find_current_stream() {
  void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  return library == nullptr ? nullptr
                            : reinterpret_cast<CurrentStream>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
}

}  // namespace

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

// --- settings ---

bool logs() {
  static const bool on = is_on(std::getenv("QKERNELS_LOG"));
  return on;
}

namespace {

bool half_accumulate() {
  static const char* value = std::getenv("QKERNELS_ACCUMULATE");
  static const int half = accumulates_half(value);
  STD_TORCH_CHECK(half >= 0, "QKERNELS_ACCUMULATE must be fp32 or fp16, got ", value);
  return half == 1;
}

// --- arguments ---

const uint8_t* bytes(const Buffer* b) { return b == nullptr ? nullptr : static_cast<const uint8_t*>(b->data); }

}  // namespace

Weight weight_of(const Arguments& a, int64_t K) {
  Weight w = make_weight(a.out_features, K, static_cast<int>(a.bits), a.group_size, a.act == 0);
  w.codes = bytes(&a.qweight), w.scales = bytes(&a.scales), w.zeros = bytes(a.zeros);
  w.scale_type = a.scales.type, w.zero_type = a.zeros == nullptr ? Type::kNone : a.zeros->type;
  w.zeros_are_offsets = a.zeros_are_offsets;
  set_codebook(w, static_cast<Codebook>(a.codebook));
  w.outer = bytes(a.outer_scales), w.outer_type = a.outer_scales == nullptr ? Type::kNone : a.outer_scales->type;
  w.outer_zeros = bytes(a.outer_zeros),
  w.outer_zero_type = a.outer_zeros == nullptr ? Type::kNone : a.outer_zeros->type;
  set_factors(w, static_cast<Factors>(a.factors));
  return w;
}

Device checked_device() {
  Device device{};
  check(current_device(&device), "cudaDeviceGetAttribute");
  refuse(wrong_device(device));
  return device;
}

Clusters checked_clusters(const Device& device) {
  Clusters clusters{};
  check(clusters_of(device, &clusters), "cudaOccupancyMaxActiveClusters");
  return clusters;
}

void* allocate(const Tensor& like, int64_t bytes, OptionalTensor& to) {
  if (bytes == 0) return nullptr;
  to = torch::stable::new_empty(like, {bytes}, ScalarType::Byte);
  return to->mutable_data_ptr();
}

namespace {

Problem problem_of(const Call& call, const Device& device, int64_t bits, int act_bits) {
  return problem_of(call.weight, rows_a8(call), static_cast<int>(bits), act_bits, call.type == Type::kHalf,
                    is_aligned(call.x), device, checked_clusters(device));
}

// --- dequantize + mm ---

// aten::linear.out rather than linear or matmul: autocast leaves it alone, and a bias is added before the one rounding.
void linear_out(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& out) {
  using torch::stable::detail::from;
  std::array<StableIValue, 4> stack{from(x), from(weight), from(bias), from(out)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // the reference that the call returns
}

void dequantize_and_multiply(const Call& call, const Tensor& x, const OptionalTensor& bias, Tensor& y, void* stream) {
  const Weight& w = call.weight;
  // Where x is not plain, it goes through its order into padded rows; the weight then comes padded, and in its order.
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

// --- the ops ---

// What a product is launched with.
struct Prepared {
  Call call;
  const Tensor& x;
  const OptionalTensor& bias;  // contiguous
  Tensor& y;
  Device device;
  void* stream;
};

// Checks, switches to the device, allocates y, and lets `launch` fill it unless it has no values.
template <class Launch>
Tensor product(const Inputs& in, const Arguments& a, Launch launch) {
  const Tensor& x = *in.x;
  const int32_t device_index = a.qweight.device;
  const Weight w = weight_of(a, a.x.sizes[1]);
  Call call{};
  call.weight = w, call.type = a.x.type, call.rounding = static_cast<Rounding>(a.act);
  if (a.x_static != nullptr) call.x_static = static_cast<const float*>(a.x_static->data);
  call.x = {static_cast<const uint16_t*>(a.x.data),
            static_cast<int>(a.x.sizes[0]),
            w.K,
            x.stride(0),
            x.stride(1),
            a.k_order == nullptr ? nullptr : static_cast<const int32_t*>(a.k_order->data)};
  call.out = {nullptr, nullptr, Type::kNone, call.x.M, w.N, w.strips * kStripRows, nullptr};
  OptionalTensor bias;
  if (in.bias.has_value()) {
    bias = torch::stable::contiguous(*in.bias);
    call.out.bias = static_cast<const uint8_t*>(bias->const_data_ptr()), call.out.bias_type = a.bias->type;
  }
  const torch::stable::accelerator::DeviceGuard guard(device_index);
  const Device device = checked_device();
  Tensor y = torch::stable::new_empty(x, {x.size(0), in.out_features});
  if (call.x.M == 0 || w.N == 0) return y;
  call.out.y = static_cast<uint16_t*>(y.mutable_data_ptr());
  launch(Prepared{call, x, bias, y, device, current_stream(device_index)});
  return y;
}

// The launches of a configuration, with the workspace that it asks for.
void run(const Prepared& p, const Config& config) {
  if (config.path == Path::kDequantize) return dequantize_and_multiply(p.call, p.x, p.bias, p.y, p.stream);
  OptionalTensor workspace;
  void* space = allocate(p.x, workspace_bytes(p.call, config), workspace);
  check(multiply(p.call, config, space, p.stream), describe(config).c_str());
}

void run_chosen(const Prepared& p, const Problem& problem, bool decode_only) {
  const Config config = remembered_choice(problem, half_accumulate(), decode_only);
  if (logs()) log_once(describe(problem) + ": " + describe(config));
  run(p, config);
}

Tensor product_a16(const Inputs& in, bool decode_only) {
  const Plain plain(in);
  if (decode_only) refuse(wrong_decode(plain.arguments.x));
  refuse(wrong_product(plain.arguments));
  return product(in, plain.arguments,
                 [&](const Prepared& p) { run_chosen(p, problem_of(p.call, p.device, in.bits, 16), decode_only); });
}

Tensor gemm_mma_tile(const Inputs& in) { return product_a16(in, false); }

Tensor gemv_mma_tile(const Inputs& in) { return product_a16(in, true); }

Tensor gemm_mma_tile_a8(const Inputs& in) {
  const Plain plain(in);
  refuse(wrong_product(plain.arguments));
  refuse(wrong_a8(plain.arguments));
  return product(in, plain.arguments,
                 [&](const Prepared& p) { run_chosen(p, problem_of(p.call, p.device, in.bits, 8), false); });
}

// For tests, which want every kernel executed and not those alone that are chosen: the configuration is given, and one
// that does not exist is an error. The instances of sm_90a are traps in the code of every other card.
Tensor multiply_as(const Tensor& x, const Tensor& qweight, const Tensor& scales, const OptionalTensor& zeros,
                   const OptionalTensor& k_order, const OptionalTensor& outer_scales, const OptionalTensor& outer_zeros,
                   const OptionalTensor& x_static, const OptionalTensor& bias, int64_t out_features, int64_t bits,
                   int64_t group_size, bool zeros_are_offsets, int64_t codebook, int64_t factors, int64_t act,
                   int64_t path, int64_t tokens, int64_t warps_n, int64_t warps_k, int64_t splits, bool half_accumulate,
                   int64_t stages) {
  const Inputs in{&x,          qweight, scales,       zeros,    k_order,    outer_scales,
                  outer_zeros, bias,    out_features, bits,     group_size, zeros_are_offsets,
                  codebook,    factors, act,          &x_static};
  const Plain plain(in);
  refuse(wrong_product(plain.arguments));
  auto number = [](int64_t v) { return static_cast<int>(v); };
  const Config config{static_cast<Path>(path), number(tokens),  number(warps_n), number(warps_k),
                      number(splits),          half_accumulate, number(stages)};
  if (has_int8_activations(config.path)) refuse(wrong_a8(plain.arguments));
  return product(in, plain.arguments, [&](const Prepared& p) {
    const bool wgmma = uses_wgmma(config.path);
    refuse(wgmma && (!kHasWgmma || p.device.sm != 90) ? "this device has no wgmma, or this build has no sm_90a" : "");
    run(p, config);
  });
}

Tensor dequantize_mma_tile(const Inputs& in, int64_t in_features, ScalarType dtype) {
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16,
                  "dtype must be float32, bfloat16 or float16, got ", type_of(dtype).name);
  const Plain plain(in);
  const Arguments& a = plain.arguments;
  refuse(wrong_weight(a, in_features));
  refuse(wrong_order(a, in_features));
  const torch::stable::accelerator::DeviceGuard guard(a.qweight.device);
  checked_device();
  const Weight w = weight_of(a, in_features);
  Tensor to = torch::stable::new_empty(in.qweight, {in.out_features, in_features}, dtype);
  if (w.N == 0 || w.K == 0) return to;
  const int32_t* order = a.k_order == nullptr ? nullptr : static_cast<const int32_t*>(a.k_order->data);
  void* stream = current_stream(a.qweight.device);
  check(dequantize(w, 0, w.strips, w.K, order, type_of(dtype).type, to.mutable_data_ptr(), stream), "dequantize");
  return to;
}

}  // namespace
}  // namespace qkernels::cuda

STABLE_TORCH_LIBRARY_IMPL(qkernels, CUDA, m) {
  using namespace qkernels;
  m.impl("gemm_mma_tile", TORCH_BOX(&product_op<cuda::gemm_mma_tile>));
  m.impl("gemv_mma_tile", TORCH_BOX(&product_op<cuda::gemv_mma_tile>));
  m.impl("dequantize_mma_tile", TORCH_BOX(&dequantize_op<cuda::dequantize_mma_tile>));
  m.impl("gemm_mma_tile_a8", TORCH_BOX(&product_op_a8<cuda::gemm_mma_tile_a8>));
  m.impl("dequantize_mma_tile_a8", TORCH_BOX(&dequantize_op_a8<cuda::dequantize_mma_tile>));  // the same bytes
}

// A namespace of its own: nothing in qkernels calls it (tests/gpu/test_cuda.py).
STABLE_TORCH_LIBRARY(qkernels_forced, m) {
  m.def(
      "multiply(Tensor x, Tensor qweight, Tensor scales, Tensor? zeros, Tensor? k_order, Tensor? outer_scales, "
      "Tensor? outer_zeros, Tensor? x_static, Tensor? bias, int out_features, int bits, int group_size, bool "
      "zeros_are_offsets, "
      "int codebook, int factors, int act, int path, int tokens, int warps_n, int warps_k, int splits, bool "
      "half_accumulate, "
      "int stages) -> Tensor");
  m.def(
      "grouped_gemm(Tensor x, Tensor rows, Tensor offsets, Tensor qweight, Tensor scales, Tensor? zeros, Tensor? "
      "k_order, Tensor? outer_scales, Tensor? outer_zeros, Tensor? bias, int out_features, int bits, int group_size, "
      "bool zeros_are_offsets, int codebook, int factors, ScalarType dtype, int path, int tokens) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(qkernels_forced, CUDA, m) { m.impl("multiply", TORCH_BOX(&qkernels::cuda::multiply_as)); }
