// grouped_gemm_cpu_tile_... and experts_cpu_tile_... on torch's stable ABI. Schemas: qkernels/ops/grouped.py.
#include <algorithm>
#include <vector>

#include "../inputs_experts.h"
#include "checks.h"
#include "experts.h"
#include "tensors.h"

namespace qkernels::cpu {
namespace {

int64_t stride_of(const OptionalTensor& t, int64_t experts) {
  return t.has_value() && experts > 0 ? t->numel() / experts * size_of(buffer_of(*t).type) : 0;
}

// Stacked experts, checked. Points into tensors that the caller holds; `bias` is the contiguous one.
Stack stack_of(const Tensor& x, int64_t K, const Inputs& in, bool int8) {
  Buffer rows = buffer_of(x);
  rows.sizes[1] = K;
  const PlainStack plain(rows, in);
  const Arguments& a = plain.arguments;
  const int64_t E = plain.experts;
  refuse(is_static(static_cast<Rounding>(in.act)) ? text("act must be 1 to 4 for stacked experts, got ", in.act) : "");
  refuse(wrong_product(a, int8));
  Call call = call_with(a, int8);
  call.bias = data_of(a.bias);
  const OptionalTensor qweight = in.qweight, scales = in.scales;
  return {call,
          {stride_of(qweight, E), stride_of(scales, E), stride_of(in.zeros, E), stride_of(in.outer_scales, E),
           stride_of(in.outer_zeros, E), stride_of(in.bias, E)},
          E};
}

void check_x(const Tensor& x) {
  const Buffer b = buffer_of(x);
  refuse(b.dims == 2 && is_floating(b.type)
             ? ""
             : text("x must be float32, bfloat16 or float16 [T, K], got ", described(b)));
}

std::vector<int64_t> integers_of(const Tensor& t, const char* name) {
  const Tensor whole = torch::stable::contiguous(t);
  const Buffer b = buffer_of(whole);
  const bool wide = dtype_of(whole) == aoti_torch_dtype_int64();
  refuse(wide || b.int32 ? "" : text(name, " must be int64, got ", described(b)));
  std::vector<int64_t> values(static_cast<size_t>(whole.numel()));
  for (size_t i = 0; i < values.size(); ++i) {
    values[i] = wide ? static_cast<const int64_t*>(b.data)[i] : static_cast<const int32_t*>(b.data)[i];
  }
  return values;
}

// `in`: of the stack, but for x.
Tensor grouped(const Tensor& x_in, const Tensor& rows_in, const Tensor& offsets_in, const Inputs& in, ScalarType dtype,
               bool int8) {
  const Kernels& kernels = kernels_now(int8);
  check_x(x_in);
  const Tensor x = x_in.is_contiguous() ? x_in : torch::stable::contiguous(x_in);
  const OptionalTensor bias = dense(in.bias);
  const Stack stack = stack_of(x, x.size(1), with_bias(in, bias), int8);
  std::vector<int64_t> rows = integers_of(rows_in, "rows"), offsets = integers_of(offsets_in, "offsets");
  const int64_t T = x.size(0), R = static_cast<int64_t>(rows.size());
  refuse(static_cast<int64_t>(offsets.size()) == stack.experts + 1 ? "" : "offsets must be [E + 1]");
  refuse(T > 0 || R == 0 ? "" : "rows of an x without rows");
  // Values come from outside: a wrong one must not become a wild read.
  for (int64_t& row : rows) row = std::clamp<int64_t>(row, 0, T - 1);
  int64_t last = 0;
  for (int64_t& offset : offsets) last = offset = std::clamp<int64_t>(offset, last, R);
  const Type x_type = buffer_of(x).type, y_type = type_of(dtype).type;
  refuse(y_type == x_type || y_type == Type::kFloat ? "" : "dtype must be that of x, or float32");
  Tensor y = empty(y_type == Type::kFloat ? aoti_torch_dtype_float32() : dtype_of(x), {R, in.out_features});
  const Grouped call{stack,          x.const_data_ptr(),   x_type, T, R, rows.data(),
                     offsets.data(), y.mutable_data_ptr(), y_type};
  Tensor workspace = empty(aoti_torch_dtype_uint8(), {1, workspace_bytes(call, kernels)});
  grouped_gemm(call, kernels, workspace.mutable_data_ptr(), torch::stable::get_num_threads(), parallel_for);
  return y;
}

void* allocate(void* context, int64_t bytes) {
  auto& held = *static_cast<std::vector<Tensor>*>(context);
  held.push_back(empty(aoti_torch_dtype_uint8(), {1, std::max<int64_t>(bytes, 1)}));
  return held.back().mutable_data_ptr();
}

Tensor block(const Tensor& x_in, const Tensor& ids_in, const Tensor& weights_in, const Inputs& up_in,
             const Inputs& down_in, int64_t activation, double alpha, double limit, bool int8) {
  const Kernels& kernels = kernels_now(int8);
  check_x(x_in);
  const Tensor x = x_in.is_contiguous() ? x_in : torch::stable::contiguous(x_in);
  refuse(activation >= 0 && activation < static_cast<int64_t>(Activation::kCount) ? "" : "there is no such activation");
  const auto kind = static_cast<Activation>(activation);
  const int64_t width = up_in.out_features / (is_gated(kind) ? 2 : 1);
  const OptionalTensor up_bias = dense(up_in.bias), down_bias = dense(down_in.bias);
  const Stack up = stack_of(x, x.size(1), with_bias(up_in, up_bias), int8);
  const Stack down = stack_of(x, width, with_bias(down_in, down_bias), int8);
  refuse(up.experts == down.experts ? "" : text("up is of ", up.experts, " experts, down of ", down.experts));
  const std::vector<int64_t> ids = integers_of(ids_in, "ids");
  const int64_t T = x.size(0), k = ids_in.dim() == 2 ? ids_in.size(1) : 0;
  refuse(ids_in.dim() == 2 && ids_in.size(0) == T && weights_in.numel() == T * k ? ""
                                                                                 : "ids and weights must be [T, k]");
  const Tensor weights_dense = torch::stable::contiguous(weights_in);
  const Buffer w = buffer_of(weights_dense);
  refuse(is_floating(w.type) ? "" : text("weights must be floating, got ", described(w)));
  std::vector<float> weights(ids.size());
  widen(w.type, w.data, static_cast<int64_t>(weights.size()), weights.data());
  Tensor y = empty(dtype_of(x), {T, down_in.out_features});
  std::vector<Tensor> held;
  const Block call{up,
                   down,
                   x.const_data_ptr(),
                   buffer_of(x).type,
                   T,
                   k,
                   ids.data(),
                   weights.data(),
                   kind,
                   static_cast<float>(alpha),
                   static_cast<float>(limit),
                   y.mutable_data_ptr()};
  experts(call, kernels, kernels_now(false), allocate, &held, torch::stable::get_num_threads(), parallel_for);
  return y;
}

Tensor grouped_a16(const Tensor& x, const Tensor& rows, const Tensor& offsets, const Inputs& in, ScalarType dtype) {
  return grouped(x, rows, offsets, in, dtype, false);
}

Tensor block_a16(const Tensor& x, const Tensor& ids, const Tensor& weights, const Inputs& up, const Inputs& down,
                 int64_t activation, double alpha, double limit) {
  return block(x, ids, weights, up, down, activation, alpha, limit, false);
}

// Ops of int8 activations as torch calls them: they are told a number more of a stack, and of static ones, which stacks
// have not (ops/grouped.py refuses them).

Tensor grouped_a8(const Tensor& x, const Tensor& rows, const Tensor& offsets, const Tensor& qweight,
                  const Tensor& scales, const OptionalTensor& zeros, const OptionalTensor& k_order,
                  const OptionalTensor& outer_scales, const OptionalTensor& outer_zeros,
                  const OptionalTensor& /*x_static*/, const OptionalTensor& bias, int64_t out_features, int64_t bits,
                  int64_t group_size, bool zeros_are_offsets, int64_t codebook, int64_t factors, int64_t act,
                  ScalarType dtype) {
  return grouped(x, rows, offsets,
                 {nullptr, qweight, scales, zeros, k_order, outer_scales, outer_zeros, bias, out_features, bits,
                  group_size, zeros_are_offsets, codebook, factors, act},
                 dtype, true);
}

Tensor block_a8(const Tensor& x, const Tensor& ids, const Tensor& weights, const Tensor& up_qweight,
                const Tensor& up_scales, const OptionalTensor& up_zeros, const OptionalTensor& up_k_order,
                const OptionalTensor& up_outer_scales, const OptionalTensor& up_outer_zeros,
                const OptionalTensor& /*up_x_static*/, const OptionalTensor& up_bias, int64_t up_out_features,
                int64_t up_bits, int64_t up_group_size, bool up_zeros_are_offsets, int64_t up_codebook,
                int64_t up_factors, int64_t up_act, const Tensor& down_qweight, const Tensor& down_scales,
                const OptionalTensor& down_zeros, const OptionalTensor& down_k_order,
                const OptionalTensor& down_outer_scales, const OptionalTensor& down_outer_zeros,
                const OptionalTensor& /*down_x_static*/, const OptionalTensor& down_bias, int64_t down_out_features,
                int64_t down_bits, int64_t down_group_size, bool down_zeros_are_offsets, int64_t down_codebook,
                int64_t down_factors, int64_t down_act, int64_t activation, double alpha, double limit) {
  return block(
      x, ids, weights,
      {nullptr, up_qweight, up_scales, up_zeros, up_k_order, up_outer_scales, up_outer_zeros, up_bias, up_out_features,
       up_bits, up_group_size, up_zeros_are_offsets, up_codebook, up_factors, up_act},
      {nullptr, down_qweight, down_scales, down_zeros, down_k_order, down_outer_scales, down_outer_zeros, down_bias,
       down_out_features, down_bits, down_group_size, down_zeros_are_offsets, down_codebook, down_factors, down_act},
      activation, alpha, limit, true);
}

}  // namespace
}  // namespace qkernels::cpu

STABLE_TORCH_LIBRARY_IMPL(qkernels, CPU, m) {
  using namespace qkernels;
  m.impl("grouped_gemm_cpu_tile_a16", TORCH_BOX(&grouped_op<cpu::grouped_a16>));
  m.impl("grouped_gemm_cpu_tile_a8", TORCH_BOX(&cpu::grouped_a8));
  m.impl("experts_cpu_tile_a16", TORCH_BOX(&experts_op<cpu::block_a16>));
  m.impl("experts_cpu_tile_a8", TORCH_BOX(&cpu::block_a8));
}
