// An op's arguments as torch hands them over, and how the bindings of the CPU and of CUDA see them. The positional
// order of the ops is written here and in qkernels/layouts/__init__.py (BUFFERS, NUMBERS); one more number or buffer
// of all ops is one more here, and in the Arguments of checks.h.
#pragma once
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <string>

#include "checks.h"

namespace qkernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

struct Inputs {
  const Tensor* x;  // null: dequantize
  const Tensor &qweight, &scales;
  const OptionalTensor &zeros, &k_order, &outer_scales, &outer_zeros, &bias;
  int64_t out_features, bits, group_size;
  bool zeros_are_offsets;
  int64_t codebook, factors;
  int64_t act = 0;
  const OptionalTensor* x_static = nullptr;  // null: the layout has no such buffer
};

// `op` as torch calls gemm_<layout> and gemv_<layout>.
template <Tensor (*op)(const Inputs&)>
Tensor product_op(const Tensor& x, const Tensor& qweight, const Tensor& scales, const OptionalTensor& zeros,
                  const OptionalTensor& k_order, const OptionalTensor& outer_scales, const OptionalTensor& outer_zeros,
                  const OptionalTensor& bias, int64_t out_features, int64_t bits, int64_t group_size,
                  bool zeros_are_offsets, int64_t codebook, int64_t factors) {
  return op({&x, qweight, scales, zeros, k_order, outer_scales, outer_zeros, bias, out_features, bits, group_size,
             zeros_are_offsets, codebook, factors});
}

// The same of layouts for int8 activations, which have a buffer and a number more.
template <Tensor (*op)(const Inputs&)>
Tensor product_op_a8(const Tensor& x, const Tensor& qweight, const Tensor& scales, const OptionalTensor& zeros,
                     const OptionalTensor& k_order, const OptionalTensor& outer_scales,
                     const OptionalTensor& outer_zeros, const OptionalTensor& x_static, const OptionalTensor& bias,
                     int64_t out_features, int64_t bits, int64_t group_size, bool zeros_are_offsets, int64_t codebook,
                     int64_t factors, int64_t act) {
  return op({&x, qweight, scales, zeros, k_order, outer_scales, outer_zeros, bias, out_features, bits, group_size,
             zeros_are_offsets, codebook, factors, act, &x_static});
}

// `op` as torch calls dequantize_<layout>.
template <Tensor (*op)(const Inputs&, int64_t in_features, ScalarType dtype)>
Tensor dequantize_op(const Tensor& qweight, const Tensor& scales, const OptionalTensor& zeros,
                     const OptionalTensor& k_order, const OptionalTensor& outer_scales,
                     const OptionalTensor& outer_zeros, int64_t out_features, int64_t in_features, int64_t bits,
                     int64_t group_size, bool zeros_are_offsets, int64_t codebook, int64_t factors, ScalarType dtype) {
  const OptionalTensor no_bias;
  return op({nullptr, qweight, scales, zeros, k_order, outer_scales, outer_zeros, no_bias, out_features, bits,
             group_size, zeros_are_offsets, codebook, factors},
            in_features, dtype);
}

template <Tensor (*op)(const Inputs&, int64_t in_features, ScalarType dtype)>
Tensor dequantize_op_a8(const Tensor& qweight, const Tensor& scales, const OptionalTensor& zeros,
                        const OptionalTensor& k_order, const OptionalTensor& outer_scales,
                        const OptionalTensor& outer_zeros, const OptionalTensor& x_static, int64_t out_features,
                        int64_t in_features, int64_t bits, int64_t group_size, bool zeros_are_offsets, int64_t codebook,
                        int64_t factors, int64_t act, ScalarType dtype) {
  const OptionalTensor no_bias;
  return op({nullptr, qweight, scales, zeros, k_order, outer_scales, outer_zeros, no_bias, out_features, bits,
             group_size, zeros_are_offsets, codebook, factors, act, &x_static},
            in_features, dtype);
}

// --- the same as plain values, which checks.h asks about ---

struct NamedType {
  Type type;
  const char* name;
};

inline NamedType type_of(ScalarType type) {
  switch (type) {
    case ScalarType::Byte:
      return {Type::kUInt8, "uint8"};
    case ScalarType::Float:
      return {Type::kFloat, "float32"};
    case ScalarType::Half:
      return {Type::kHalf, "float16"};
    case ScalarType::BFloat16:
      return {Type::kBFloat16, "bfloat16"};
    case ScalarType::Double:
      return {Type::kNone, "float64"};
    case ScalarType::Char:
      return {Type::kInt8, "int8"};
    case ScalarType::Float8_e8m0fnu:
      return {Type::kE8M0, "float8_e8m0fnu"};
    case ScalarType::Float8_e4m3fn:
      return {Type::kE4M3, "float8_e4m3fn"};
    case ScalarType::Short:
      return {Type::kNone, "int16"};
    case ScalarType::Int:
      return {Type::kNone, "int32"};
    case ScalarType::Long:
      return {Type::kNone, "int64"};
    case ScalarType::Bool:
      return {Type::kNone, "bool"};
    default:
      return {Type::kNone, torch::headeronly::toString(type)};
  }
}

inline Buffer buffer_of(const Tensor& t) {
  // Not t.scalar_type(), which knows no Float8_e8m0fnu in torch 2.13 and throws; the shim's numbers are the enum's.
  int32_t number;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &number));
  const auto dtype = static_cast<ScalarType>(number);
  const auto [type, name] = type_of(dtype);
  const auto sizes = t.sizes();
  Buffer b{t.const_data_ptr(),
           type,
           dtype == ScalarType::Int,
           name,
           static_cast<int>(sizes.size()),
           {},
           t.is_contiguous(),
           t.is_cuda() ? t.get_device_index() : -1};
  for (int i = 0; i < b.dims && i < 3; ++i) b.sizes[i] = sizes[i];
  return b;
}

// Points into itself, so it stays where it is.
struct Plain {
  std::optional<Buffer> zeros, k_order, outer_scales, outer_zeros, bias, x_static;
  Arguments arguments{};

  explicit Plain(const Inputs& in) {
    const auto given = [](const OptionalTensor& t, std::optional<Buffer>& to) -> const Buffer* {
      if (!t.has_value()) return nullptr;
      return &to.emplace(buffer_of(*t));
    };
    arguments = {in.x == nullptr ? Buffer{} : buffer_of(*in.x),
                 buffer_of(in.qweight),
                 buffer_of(in.scales),
                 given(in.zeros, zeros),
                 given(in.k_order, k_order),
                 given(in.outer_scales, outer_scales),
                 given(in.outer_zeros, outer_zeros),
                 given(in.bias, bias),
                 in.out_features,
                 in.bits,
                 in.group_size,
                 in.zeros_are_offsets,
                 in.codebook,
                 in.factors,
                 in.act,
                 in.x_static == nullptr ? nullptr : given(*in.x_static, x_static)};
  }
  Plain(const Plain&) = delete;
};

inline void refuse(const std::string& wrong) { STD_TORCH_CHECK(wrong.empty(), wrong); }

}  // namespace qkernels
