// The compiled ops on torch's stable ABI: last checks, allocation, and the call. Schemas are defined in
// qkernels/ops/schema.py, which makes the same checks with friendlier words; nothing here needs Python.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <array>
#include <optional>

#include "arguments.h"
#include "cpu/kernels.h"

namespace qkernels {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Contiguous, on the CPU. torch::stable::new_empty goes by the dispatcher and an op's name: 0.4 us more, of the 2.3
// that a call takes beside its product.
Tensor empty(int32_t dtype, std::array<int64_t, 2> shape) {
  const std::array<int64_t, 2> strides{std::max<int64_t>(shape[1], 1), 1};
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(2, shape.data(), strides.data(), dtype, aoti_torch_device_type_cpu(),
                                                  /*device_index=*/0, &handle));
  return Tensor(handle);
}

void parallel_for(int64_t n, void* context, cpu::Body body) {
  if (n == 1) return body(context, 0, 1);
  torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) { body(context, begin, end); });
}

// Both layouts have the same buffers; kInt8: cpu_tile_a8.
template <bool kInt8>
Tensor gemm_cpu_tile(const Tensor& x, const Tensor& qweight, const Tensor& scales, const std::optional<Tensor>& zeros,
                     const std::optional<Tensor>& k_order, const std::optional<Tensor>& bias, int64_t out_features,
                     int64_t bits, int64_t group_size, bool zeros_are_offsets) {
  const cpu::Choice choice = cpu::current();
  STD_TORCH_CHECK(choice.kernels != nullptr, choice.error);
  const cpu::Kernels& kernels = kInt8 ? cpu::int8_kernels(*choice.kernels) : *choice.kernels;
  STD_TORCH_CHECK(x.dim() == 2 && is_floating(type_of(x)), "x must be float32, bfloat16 or float16 [M, K]");
  STD_TORCH_CHECK(2 <= bits && bits <= 8 && group_size >= 1 && out_features >= 0,
                  "bits must be 2 to 8, group_size positive and out_features not negative, got bits=", bits,
                  ", group_size=", group_size, ", out_features=", out_features);
  cpu::Call p{cpu::make_problem(x.size(0), out_features, x.size(1), static_cast<int>(bits), group_size)};
  const int64_t tiles = cpu::tiles_of(p);
  STD_TORCH_CHECK(p.G == 1 || group_size % 8 == 0, "group_size must be a multiple of 8, got ", group_size);
  STD_TORCH_CHECK(
      type_of(qweight) == Type::kUInt8 && has_shape(qweight, {tiles, p.tile_bytes}) && qweight.is_contiguous(),
      "qweight must be contiguous uint8 [", tiles, ", ", p.tile_bytes, "] for N=", p.N, ", K=", p.K, ", bits=", bits);
  STD_TORCH_CHECK(
      is_floating(type_of(scales)) && has_shape(scales, {tiles, p.G, cpu::kTileRows}) && scales.is_contiguous(),
      "scales must be contiguous floating [", tiles, ", ", p.G, ", 32]");
  p.x = x.const_data_ptr(), p.x_type = type_of(x);
  p.x_row_stride = x.stride(0), p.x_column_stride = x.stride(1);
  p.qweight = static_cast<const uint8_t*>(qweight.const_data_ptr());
  p.scales = scales.const_data_ptr(), p.scale_type = type_of(scales);
  p.int8_activations = kInt8;
  p.zeros_are_offsets = zeros_are_offsets;
  if (zeros.has_value()) {
    const Type type = type_of(*zeros);
    STD_TORCH_CHECK((is_floating(type) || (type == Type::kUInt8 && !zeros_are_offsets)) &&
                        has_shape(*zeros, {tiles, p.G, cpu::kTileRows}) && zeros->is_contiguous(),
                    "zeros must be contiguous ", zeros_are_offsets ? "floating" : "uint8 or floating", " [", tiles,
                    ", ", p.G, ", 32] like scales");
    p.zeros = zeros->const_data_ptr(), p.zero_type = type;
  } else {
    STD_TORCH_CHECK(!zeros_are_offsets, "zeros must be given where zeros_are_offsets is true");
  }
  // What fits an int32 sum: see layouts/cpu_tile_a8.py
  const int64_t longest_group = int64_t{1} << (p.zero_type == Type::kUInt8 ? 16 : 17);
  STD_TORCH_CHECK(!kInt8 || std::min(p.K, group_size) <= longest_group, "groups must be at most ", longest_group,
                  " long with int8 activations, got ", group_size, " of K=", p.K);
  if (k_order.has_value()) {
    STD_TORCH_CHECK(k_order->scalar_type() == ScalarType::Int && has_shape(*k_order, {p.K}) && k_order->is_contiguous(),
                    "k_order must be contiguous int32 [K] = [", p.K, "]");
    p.k_order = static_cast<const int32_t*>(k_order->const_data_ptr());
  }
  std::optional<Tensor> dense_bias;  // holds the copy if there is one
  if (bias.has_value()) {
    STD_TORCH_CHECK(is_floating(type_of(*bias)) && has_shape(*bias, {p.N}), "bias must be floating [N] = [", p.N, "]");
    dense_bias = bias->is_contiguous() ? *bias : torch::stable::contiguous(*bias);  // the call alone costs 1 us
    p.bias = dense_bias->const_data_ptr(), p.bias_type = type_of(*bias);
  }
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  Tensor y = empty(dtype, {p.M, p.N});
  p.y = y.mutable_data_ptr();
  // From torch's allocator, which caches; gone when this call returns.
  std::optional<Tensor> workspace;
  if (const int64_t bytes = cpu::workspace_bytes(p, kernels)) {
    workspace = empty(aoti_torch_dtype_uint8(), {1, bytes});
  }
  cpu::gemm(p, kernels, workspace.has_value() ? workspace->mutable_data_ptr() : nullptr,
            torch::stable::get_num_threads(), parallel_for);
  return y;
}

template <bool kInt8>
Tensor gemv_cpu_tile(const Tensor& x, const Tensor& qweight, const Tensor& scales, const std::optional<Tensor>& zeros,
                     const std::optional<Tensor>& k_order, const std::optional<Tensor>& bias, int64_t out_features,
                     int64_t bits, int64_t group_size, bool zeros_are_offsets) {
  STD_TORCH_CHECK(x.dim() == 2 && x.size(0) <= cpu::kMaxDecodeTokens, kInt8 ? "gemv_cpu_tile_a8" : "gemv_cpu_tile_a16",
                  " takes M <= ", cpu::kMaxDecodeTokens, " rows of x; call gemm");
  return gemm_cpu_tile<kInt8>(x, qweight, scales, zeros, k_order, bias, out_features, bits, group_size,
                              zeros_are_offsets);
}

}  // namespace
}  // namespace qkernels

STABLE_TORCH_LIBRARY_IMPL(qkernels, CPU, m) {
  m.impl("gemm_cpu_tile_a16", TORCH_BOX(&qkernels::gemm_cpu_tile<false>));
  m.impl("gemv_cpu_tile_a16", TORCH_BOX(&qkernels::gemv_cpu_tile<false>));
  m.impl("gemm_cpu_tile_a8", TORCH_BOX(&qkernels::gemm_cpu_tile<true>));
  m.impl("gemv_cpu_tile_a8", TORCH_BOX(&qkernels::gemv_cpu_tile<true>));
}

// For qkernels/kernels/native.py, through ctypes.
#define QK_EXPORT extern "C" __attribute__((visibility("default")))

QK_EXPORT const char* qkernels_cpu_isa() {
  const qkernels::cpu::Kernels* kernels = qkernels::cpu::current().kernels;
  return kernels == nullptr ? nullptr : kernels->name;
}
QK_EXPORT const char* qkernels_cpu_isa_error() { return qkernels::cpu::current().error; }
QK_EXPORT const char* qkernels_cpu_isas() { return qkernels::cpu::available(); }
QK_EXPORT const char* qkernels_cpu_use_isa(const char* name) { return qkernels::cpu::choose(name); }
QK_EXPORT int qkernels_has_cuda() {
#if defined(QKERNELS_CUDA)
  return 1;
#else
  return 0;
#endif
}
