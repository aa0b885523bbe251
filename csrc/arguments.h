// What the bindings of the CPU and of the CUDA ops ask of their tensors.
#pragma once
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <initializer_list>

#include "types.h"

namespace qkernels {

// The kernels know no torch header, and so a type of their own.
inline Type type_of(const torch::stable::Tensor& t) {
  using torch::headeronly::ScalarType;
  switch (t.scalar_type()) {
    case ScalarType::Byte:
      return Type::kUInt8;
    case ScalarType::Float:
      return Type::kFloat;
    case ScalarType::Half:
      return Type::kHalf;
    case ScalarType::BFloat16:
      return Type::kBFloat16;
    default:
      return Type::kNone;
  }
}

inline bool has_shape(const torch::stable::Tensor& t, std::initializer_list<int64_t> shape) {
  if (t.dim() != static_cast<int64_t>(shape.size())) return false;
  int64_t dim = 0;
  for (const int64_t size : shape) {
    if (t.size(dim++) != size) return false;
  }
  return true;
}

}  // namespace qkernels
