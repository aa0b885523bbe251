// The ops of layouts cpu_tile_a16 and cpu_tile_a8 on torch's stable ABI: last checks, allocation, and the call. Schemas
// are defined in qkernels/ops/schema.py, which makes the same checks before; nothing here needs Python.
#include "../inputs.h"
#include "checks.h"
#include "kernels.h"
#include "tensors.h"

namespace qkernels::cpu {
namespace {

// Both layouts have the same buffers; kInt8: cpu_tile_a8.
template <bool kInt8>
Tensor product(const Inputs& in, const Arguments& a) {
  const Kernels& kernels = kernels_now(kInt8);
  refuse(wrong_product(a, kInt8));
  Call call = call_with(a, kInt8);
  call.x = a.x.data;
  call.x_row_stride = in.x->stride(0), call.x_column_stride = in.x->stride(1);
  OptionalTensor dense_bias;  // holds the copy if there is one
  if (a.bias != nullptr) {
    dense_bias = a.bias->contiguous ? *in.bias : torch::stable::contiguous(*in.bias);  // the call alone costs 1 us
    call.bias = dense_bias->const_data_ptr();
  }
  Tensor y = empty(dtype_of(*in.x), {call.M, call.N});
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
  m.impl("gemm_cpu_tile_a8", TORCH_BOX(&product_op_a8<cpu::gemm_cpu_tile<true>>));
  m.impl("gemv_cpu_tile_a8", TORCH_BOX(&product_op_a8<cpu::gemv_cpu_tile<true>>));
}
