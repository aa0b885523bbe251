// The ops of layouts cpu_tile_a16 and cpu_tile_a8 on torch's stable ABI: last checks, allocation, and the call. Schemas
// are defined in qkernels/ops/schema.py, which makes the same checks before; nothing here needs Python.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>

#include "../inputs.h"
#include "checks.h"
#include "kernels.h"

namespace qkernels::cpu {
namespace {

// Contiguous, on the CPU. torch::stable::new_empty goes by the dispatcher and an op's name: 0.4 us more, of the 2.3
// that a call takes beside its product.
Tensor empty(int32_t dtype, std::array<int64_t, 2> shape) {
  const std::array<int64_t, 2> strides{std::max<int64_t>(shape[1], 1), 1};
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(2, shape.data(), strides.data(), dtype, aoti_torch_device_type_cpu(),
                                                  /*device_index=*/0, &handle));
  return Tensor(handle);
}

void parallel_for(int64_t n, void* context, Body body) {
  if (n == 1) return body(context, 0, 1);
  torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) { body(context, begin, end); });
}

const void* data_of(const Buffer* b) { return b == nullptr ? nullptr : b->data; }

// Both layouts have the same buffers; kInt8: cpu_tile_a8.
template <bool kInt8>
Tensor product(const Inputs& in, const Arguments& a) {
  const Choice choice = current();
  STD_TORCH_CHECK(choice.kernels != nullptr, choice.error);
  const Kernels& kernels = kInt8 ? int8_kernels(*choice.kernels) : *choice.kernels;
  refuse(wrong_product(a, kInt8));
  Call call{problem_of(a, kInt8)};
  call.x = a.x.data;
  call.x_row_stride = in.x->stride(0), call.x_column_stride = in.x->stride(1);
  call.qweight = static_cast<const uint8_t*>(a.qweight.data);
  call.scales = a.scales.data, call.zeros = data_of(a.zeros);
  call.outer_scales = data_of(a.outer_scales), call.outer_zeros = data_of(a.outer_zeros);
  call.k_order = static_cast<const int32_t*>(data_of(a.k_order));
  OptionalTensor dense_bias;  // holds the copy if there is one
  if (a.bias != nullptr) {
    dense_bias = a.bias->contiguous ? *in.bias : torch::stable::contiguous(*in.bias);  // the call alone costs 1 us
    call.bias = dense_bias->const_data_ptr();
  }
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(in.x->get(), &dtype));
  Tensor y = empty(dtype, {call.M, call.N});
  call.y = y.mutable_data_ptr();
  // From torch's allocator, which caches; gone when this call returns.
  OptionalTensor workspace;
  if (const int64_t bytes = workspace_bytes(call, kernels)) {
    workspace = empty(aoti_torch_dtype_uint8(), {1, bytes});
  }
  gemm(call, kernels, workspace.has_value() ? workspace->mutable_data_ptr() : nullptr, torch::stable::get_num_threads(),
       parallel_for);
  return y;
}

template <bool kInt8>
Tensor gemm_cpu_tile(const Inputs& in) {
  return product<kInt8>(in, Plain(in).arguments);
}

template <bool kInt8>
Tensor gemv_cpu_tile(const Inputs& in) {
  const Plain plain(in);
  refuse(wrong_decode(plain.arguments.x, kInt8));
  return product<kInt8>(in, plain.arguments);
}

}  // namespace
}  // namespace qkernels::cpu

STABLE_TORCH_LIBRARY_IMPL(qkernels, CPU, m) {
  using namespace qkernels;
  m.impl("gemm_cpu_tile_a16", TORCH_BOX(&product_op<cpu::gemm_cpu_tile<false>>));
  m.impl("gemv_cpu_tile_a16", TORCH_BOX(&product_op<cpu::gemv_cpu_tile<false>>));
  m.impl("gemm_cpu_tile_a8", TORCH_BOX(&product_op<cpu::gemm_cpu_tile<true>>));
  m.impl("gemv_cpu_tile_a8", TORCH_BOX(&product_op<cpu::gemv_cpu_tile<true>>));
}
