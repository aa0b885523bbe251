// What the bindings take from torch: memory, threads, a tensor's dtype.
#pragma once
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

inline int32_t dtype_of(const Tensor& t) {
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &dtype));
  return dtype;
}

void parallel_for(int64_t n, void* context, Body body) {
  if (n == 1) return body(context, 0, 1);
  torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) { body(context, begin, end); });
}

}  // namespace

// The kernels of the instruction set that is in use; raises where there are none.
inline const Kernels& kernels_now(bool int8) {
  const Choice choice = current();
  STD_TORCH_CHECK(choice.kernels != nullptr, choice.error);
  return int8 ? int8_kernels(*choice.kernels) : *choice.kernels;
}

}  // namespace qkernels::cpu
