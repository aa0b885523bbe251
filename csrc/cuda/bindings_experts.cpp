// grouped_gemm_mma_tile and experts_mma_tile on torch's stable ABI. Schemas: qkernels/ops/grouped.py. As bindings.cpp:
// nothing of the device is read, and no state survives a call.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <limits>

#include "../inputs_experts.h"
#include "bindings.h"
#include "experts.h"
#include "settings.h"

namespace qkernels::cuda {
namespace {

using torch::stable::accelerator::DeviceGuard;

constexpr int64_t kMostPairs = std::numeric_limits<int32_t>::max() / 2;

// Of a stack whose arguments are right; kernels count the rows of all experts in 32 bits.
Stack stack_of(const PlainStack& plain, int64_t K) {
  const Arguments& a = plain.arguments;
  const Weight w = weight_of(a, K);
  const int64_t rows = plain.experts * w.strips * kStripRows;
  refuse(rows <= std::numeric_limits<int32_t>::max() && plain.experts <= 8192
             ? ""
             : text("stacked experts may have 2^31 - 1 rows in all and be 8192, got ", plain.experts, " of ", w.N));
  return {w, static_cast<int>(plain.experts),
          a.k_order == nullptr ? nullptr : static_cast<const int32_t*>(a.k_order->data),
          a.bias == nullptr ? nullptr : static_cast<const uint8_t*>(a.bias->data),
          a.bias == nullptr ? Type::kNone : a.bias->type};
}

void check_x(const Tensor& x) {
  const Buffer b = buffer_of(x);
  refuse(b.dims == 2 ? "" : text("x must be bfloat16 or float16 [T, K], got ", described(b)));
}

// An argument that says who goes where: on the device of x, contiguous.
Tensor placed(const Tensor& t, const char* name, int device, bool right, const char* wanted) {
  const Buffer b = buffer_of(t);
  refuse(right ? "" : text(name, " must be ", wanted, ", got ", described(b)));
  refuse(b.device == device
             ? ""
             : text(name, " must be on cuda:", device, " like x, got ", place_of(b), "; move one of them"));
  return b.contiguous ? t : torch::stable::contiguous(t);
}

bool is_integer(const Tensor& t, bool narrow_too) {
  const ScalarType type = t.scalar_type();
  return type == ScalarType::Long || (narrow_too && type == ScalarType::Int);
}

Activations activations_of(const Tensor& x) {
  return {static_cast<const uint16_t*>(x.const_data_ptr()),
          static_cast<int>(x.size(0)),
          static_cast<int>(x.size(1)),
          x.stride(0),
          x.stride(1),
          nullptr};
}

Problem problem_of(const Stack& stack, int64_t bits, Type type, const Device& device) {
  return problem_of(stack.weight, 1, static_cast<int>(bits), 16, type == Type::kHalf, true, device, {});
}

void log(const Problem& p, int64_t pairs, int experts, const BlockConfig& config) {
  if (!logs()) return;
  log_once(text(experts, " experts, ", pairs, " rows, ", describe(p), ": ", describe(config)));
}

// forced: the configuration, or null for the one that is chosen.
Tensor grouped_product(const Tensor& x, const Tensor& rows_in, const Tensor& offsets_in, const Inputs& in,
                       ScalarType dtype, const Config* forced) {
  check_x(x);
  const OptionalTensor bias = dense(in.bias);
  const PlainStack plain(buffer_of(x), with_bias(in, bias));
  refuse(wrong_product(plain.arguments));
  const int index = plain.arguments.qweight.device;
  const Stack stack = stack_of(plain, x.size(1));
  const Tensor rows = placed(rows_in, "rows", index, rows_in.dim() == 1 && is_integer(rows_in, false), "int64 [R]");
  const Tensor offsets =
      placed(offsets_in, "offsets", index,
             offsets_in.dim() == 1 && offsets_in.size(0) == stack.experts + 1 && is_integer(offsets_in, false),
             "int64 [E + 1]");
  const Type type = plain.arguments.x.type, y_type = type_of(dtype).type;
  refuse(y_type == type || y_type == Type::kFloat ? "" : "dtype must be that of x, or float32");
  const int64_t R = rows.size(0);
  refuse(R <= kMostPairs ? "" : text("there are too many rows: ", R, ", at most ", kMostPairs));
  const DeviceGuard guard(index);
  const Device device = checked_device();
  Tensor y = torch::stable::new_empty(x, {R, in.out_features}, dtype);
  if (R == 0 || in.out_features == 0) return y;
  if (x.size(0) == 0 || stack.experts == 0) return torch::stable::zero_(y);
  const Grouped call{stack,
                     activations_of(x),
                     type,
                     static_cast<const int64_t*>(rows.const_data_ptr()),
                     static_cast<const int64_t*>(offsets.const_data_ptr()),
                     static_cast<int>(R),
                     y.mutable_data_ptr(),
                     y_type};
  const Problem problem = problem_of(stack, in.bits, type, device);
  Config config;
  if (forced == nullptr) {
    const BlockConfig chosen = remembered_block(problem, problem, 0, R, stack.experts, false);
    log(problem, R, stack.experts, chosen);
    config = chosen.up;
  } else {
    config = *forced;
    refuse(uses_wgmma(config.path) && (!kHasWgmma || device.sm != 90)
               ? "this device has no wgmma, or this build has no sm_90a"
               : "");
  }
  OptionalTensor workspace;
  void* space = allocate(x, workspace_bytes(call, config), workspace);
  check(grouped_gemm(call, config, space, current_stream(index)), "grouped_gemm_mma_tile");
  return y;
}

Tensor grouped_gemm_mma_tile(const Tensor& x, const Tensor& rows, const Tensor& offsets, const Inputs& in,
                             ScalarType dtype) {
  return grouped_product(x, rows, offsets, in, dtype, nullptr);
}

// For tests, as multiply_as in bindings.cpp: a tile of gemm_sm80 or gemm_sm90.
Tensor grouped_gemm_as(const Tensor& x, const Tensor& rows, const Tensor& offsets, const Tensor& qweight,
                       const Tensor& scales, const OptionalTensor& zeros, const OptionalTensor& k_order,
                       const OptionalTensor& outer_scales, const OptionalTensor& outer_zeros,
                       const OptionalTensor& bias, int64_t out_features, int64_t bits, int64_t group_size,
                       bool zeros_are_offsets, int64_t codebook, int64_t factors, ScalarType dtype, int64_t path,
                       int64_t tokens) {
  const Config config{static_cast<Path>(path), static_cast<int>(tokens), 0, 0, 1, false};
  return grouped_product(x, rows, offsets,
                         {nullptr, qweight, scales, zeros, k_order, outer_scales, outer_zeros, bias, out_features, bits,
                          group_size, zeros_are_offsets, codebook, factors},
                         dtype, &config);
}

Tensor experts_mma_tile(const Tensor& x, const Tensor& ids_in, const Tensor& weights_in, const Inputs& up_in,
                        const Inputs& down_in, int64_t activation, double alpha, double limit) {
  check_x(x);
  refuse(activation >= 0 && activation < static_cast<int64_t>(Activation::kCount) ? "" : "there is no such activation");
  const auto kind = static_cast<Activation>(activation);
  const int64_t width = up_in.out_features / (is_gated(kind) ? 2 : 1);
  const OptionalTensor up_bias = dense(up_in.bias), down_bias = dense(down_in.bias);
  Buffer rows = buffer_of(x);
  const PlainStack up_plain(rows, with_bias(up_in, up_bias));
  refuse(wrong_product(up_plain.arguments));
  rows.sizes[1] = width;
  const PlainStack down_plain(rows, with_bias(down_in, down_bias));
  refuse(wrong_product(down_plain.arguments));
  const int index = up_plain.arguments.qweight.device;
  const Stack up = stack_of(up_plain, x.size(1)), down = stack_of(down_plain, width);
  refuse(up.experts == down.experts ? "" : text("up is of ", up.experts, " experts, down of ", down.experts));
  const int64_t T = x.size(0), k = ids_in.dim() == 2 ? ids_in.size(1) : 0;
  const Tensor ids = placed(ids_in, "ids", index, ids_in.dim() == 2 && ids_in.size(0) == T && is_integer(ids_in, true),
                            "int64 or int32 [T, k]");
  const Type weights_type = type_of(weights_in.scalar_type()).type;
  const Tensor weights = placed(weights_in, "weights", index, weights_in.numel() == T * k && is_floating(weights_type),
                                "floating [T, k] like ids");
  refuse(T * k <= kMostPairs
             ? ""
             : text("there are too many pairs of tokens and experts: ", T * k, ", at most ", kMostPairs));
  const DeviceGuard guard(index);
  const Device device = checked_device();
  Tensor y = torch::stable::new_empty(x, {T, down_in.out_features});
  if (T == 0 || down_in.out_features == 0) return y;
  if (k == 0 || up.experts == 0) return torch::stable::zero_(y);
  const Type type = up_plain.arguments.x.type;
  const Block call{up,
                   down,
                   activations_of(x),
                   type,
                   static_cast<const uint32_t*>(ids.const_data_ptr()),
                   ids.scalar_type() == ScalarType::Long ? 2 : 1,
                   static_cast<int>(k),
                   static_cast<const uint8_t*>(weights.const_data_ptr()),
                   weights_type,
                   kind,
                   static_cast<float>(alpha),
                   static_cast<float>(limit),
                   static_cast<uint16_t*>(y.mutable_data_ptr())};
  const Problem of_up = problem_of(up, up_in.bits, type, device),
                of_down = problem_of(down, down_in.bits, type, device);
  const BlockConfig config = remembered_block(of_up, of_down, static_cast<int>(T), T * k, up.experts,
                                              pairs_strips(kind, static_cast<int>(width)));
  log(of_up, T * k, up.experts, config);
  OptionalTensor workspace;
  void* space = allocate(x, workspace_bytes(call, config), workspace);
  check(experts(call, config, space, current_stream(index)), "experts_mma_tile");
  return y;
}

}  // namespace
}  // namespace qkernels::cuda

STABLE_TORCH_LIBRARY_IMPL(qkernels, CUDA, m) {
  using namespace qkernels;
  m.impl("grouped_gemm_mma_tile", TORCH_BOX(&grouped_op<cuda::grouped_gemm_mma_tile>));
  m.impl("experts_mma_tile", TORCH_BOX(&experts_op<cuda::experts_mma_tile>));
}
STABLE_TORCH_LIBRARY_IMPL(qkernels_forced, CUDA, m) {
  m.impl("grouped_gemm", TORCH_BOX(&qkernels::cuda::grouped_gemm_as));
}
