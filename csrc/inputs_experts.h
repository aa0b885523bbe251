// The arguments of ops on stacked experts as torch hands them over, and how the bindings of the CPU and of CUDA see
// them. Their order: qkernels/ops/grouped.py.
#pragma once
#include <torch/csrc/stable/ops.h>

#include "inputs.h"

namespace qkernels {

// `op` as torch calls grouped_gemm_<layout>.
template <Tensor (*op)(const Tensor& x, const Tensor& rows, const Tensor& offsets, const Inputs&, ScalarType dtype)>
Tensor grouped_op(const Tensor& x, const Tensor& rows, const Tensor& offsets, const Tensor& qweight,
                  const Tensor& scales, const OptionalTensor& zeros, const OptionalTensor& k_order,
                  const OptionalTensor& outer_scales, const OptionalTensor& outer_zeros, const OptionalTensor& bias,
                  int64_t out_features, int64_t bits, int64_t group_size, bool zeros_are_offsets, int64_t codebook,
                  int64_t factors, ScalarType dtype) {
  return op(x, rows, offsets,
            {nullptr, qweight, scales, zeros, k_order, outer_scales, outer_zeros, bias, out_features, bits, group_size,
             zeros_are_offsets, codebook, factors},
            dtype);
}

// `op` as torch calls experts_<layout>.
template <Tensor (*op)(const Tensor& x, const Tensor& ids, const Tensor& weights, const Inputs& up, const Inputs& down,
                       int64_t activation, double alpha, double limit)>
Tensor experts_op(const Tensor& x, const Tensor& ids, const Tensor& weights, const Tensor& up_qweight,
                  const Tensor& up_scales, const OptionalTensor& up_zeros, const OptionalTensor& up_k_order,
                  const OptionalTensor& up_outer_scales, const OptionalTensor& up_outer_zeros,
                  const OptionalTensor& up_bias, int64_t up_out_features, int64_t up_bits, int64_t up_group_size,
                  bool up_zeros_are_offsets, int64_t up_codebook, int64_t up_factors, const Tensor& down_qweight,
                  const Tensor& down_scales, const OptionalTensor& down_zeros, const OptionalTensor& down_k_order,
                  const OptionalTensor& down_outer_scales, const OptionalTensor& down_outer_zeros,
                  const OptionalTensor& down_bias, int64_t down_out_features, int64_t down_bits,
                  int64_t down_group_size, bool down_zeros_are_offsets, int64_t down_codebook, int64_t down_factors,
                  int64_t activation, double alpha, double limit) {
  return op(
      x, ids, weights,
      {nullptr, up_qweight, up_scales, up_zeros, up_k_order, up_outer_scales, up_outer_zeros, up_bias, up_out_features,
       up_bits, up_group_size, up_zeros_are_offsets, up_codebook, up_factors},
      {nullptr, down_qweight, down_scales, down_zeros, down_k_order, down_outer_scales, down_outer_zeros, down_bias,
       down_out_features, down_bits, down_group_size, down_zeros_are_offsets, down_codebook, down_factors},
      activation, alpha, limit);
}

// The buffer of the first expert: what the checks of one weight are asked about.
inline Buffer of_expert(const Tensor& t, int64_t experts, const char* name) {
  Buffer b = buffer_of(t);
  refuse(b.dims >= 2 && b.sizes[0] == experts ? ""
                                              : text(name, " must be of ", experts, " experts, got ", described(b)));
  const auto sizes = t.sizes();
  b.dims -= 1;
  for (int i = 0; i < b.dims && i < 3; ++i) b.sizes[i] = sizes[i + 1];
  return b;
}

// One expert's weight as plain values, which checks.h asks about. Points into itself, so it stays where it is. `x`:
// rows of it, with the columns that the weight is to have.
struct PlainStack {
  std::optional<Buffer> zeros, k_order, outer_scales, outer_zeros, bias;
  int64_t experts;
  Arguments arguments;

  PlainStack(const Buffer& x, const Inputs& in) : experts(in.qweight.dim() > 0 ? in.qweight.size(0) : 0) {
    const auto given = [&](const OptionalTensor& t, std::optional<Buffer>& to, const char* name) -> const Buffer* {
      return t.has_value() ? &to.emplace(of_expert(*t, experts, name)) : nullptr;
    };
    arguments = {x,
                 of_expert(in.qweight, experts, "qweight"),
                 of_expert(in.scales, experts, "scales"),
                 given(in.zeros, zeros, "zeros"),
                 in.k_order.has_value() ? &k_order.emplace(buffer_of(*in.k_order)) : nullptr,
                 given(in.outer_scales, outer_scales, "outer_scales"),
                 given(in.outer_zeros, outer_zeros, "outer_zeros"),
                 given(in.bias, bias, "bias"),
                 in.out_features,
                 in.bits,
                 in.group_size,
                 in.zeros_are_offsets,
                 in.codebook,
                 in.factors,
                 in.act};
  }
  PlainStack(const PlainStack&) = delete;
};

// The same with another bias.
inline Inputs with_bias(const Inputs& in, const OptionalTensor& bias) {
  return {in.x,           in.qweight, in.scales,       in.zeros, in.k_order,    in.outer_scales,
          in.outer_zeros, bias,       in.out_features, in.bits,  in.group_size, in.zeros_are_offsets,
          in.codebook,    in.factors, in.act};
}

// Contiguous.
inline OptionalTensor dense(const OptionalTensor& t) {
  return t.has_value() && !t->is_contiguous() ? OptionalTensor(torch::stable::contiguous(*t)) : t;
}

}  // namespace qkernels
