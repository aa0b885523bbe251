// The op `gguf_blocks` on torch's stable ABI: last checks, allocation, and the call. Its schema is in
// qkernels/formats/gguf/quantizing.py, which makes the same checks before.
#include "gguf.h"
#include "tensors.h"

namespace qkernels::cpu {
namespace {

constexpr GgufType kTypes[] = {GgufType::kQ4_0,  GgufType::kQ4_1,  GgufType::kQ5_0, GgufType::kQ5_1, GgufType::kQ8_0,
                               GgufType::kQ2K,   GgufType::kQ3K,   GgufType::kQ4K,  GgufType::kQ5K,  GgufType::kQ6K,
                               GgufType::kIq4Nl, GgufType::kIq4Xs, GgufType::kMxfp4};

std::string wrong_blocks(const Buffer& weight, const Buffer* importance, int64_t type) {
  if (std::none_of(std::begin(kTypes), std::end(kTypes), [&](GgufType t) { return static_cast<int64_t>(t) == type; })) {
    return text("there is no search for the GGUF type ", type);
  }
  const int64_t elements = shape_of(static_cast<GgufType>(type)).elements;
  if (weight.dims != 2 || !is_floating(weight.type) || weight.sizes[1] % elements != 0) {
    return text("weight must be float32, bfloat16 or float16 [N, a multiple of ", elements, "], got ",
                described(weight));
  }
  if (importance != nullptr && (importance->type != Type::kFloat || !has_shape(*importance, {weight.sizes[1]}))) {
    return text("importance must be float32 [", weight.sizes[1], "], got ", described(*importance));
  }
  return "";
}

// The blocks, uint8 [N, bytes of a row], and int64 [1, 2]: the first row that holds inf or NaN, and the first whose
// scale float16 cannot hold; N where there is none.
std::tuple<Tensor, Tensor> blocks_of(const Tensor& weight_in, const OptionalTensor& importance_in, int64_t type,
                                     bool best) {
  const Kernels& kernels = kernels_now(false);
  const Tensor weight = torch::stable::contiguous(weight_in);
  OptionalTensor importance;
  if (importance_in.has_value()) importance = torch::stable::contiguous(*importance_in);
  const Buffer w = buffer_of(weight);
  const std::optional<Buffer> i = importance.has_value() ? std::optional<Buffer>(buffer_of(*importance)) : std::nullopt;
  refuse(wrong_blocks(w, i.has_value() ? &*i : nullptr, type));
  const auto kind = static_cast<GgufType>(type);
  const GgufShape shape = shape_of(kind);
  const int64_t rows = w.sizes[0], columns = w.sizes[1];
  Tensor out = empty(aoti_torch_dtype_uint8(), {rows, columns / shape.elements * shape.bytes});
  Tensor wrong = empty(aoti_torch_dtype_int64(), {1, 2});
  std::vector<float> variance(i.has_value() && shape.row_variance ? rows : 0);
  std::atomic<int64_t> not_finite{rows}, too_large{rows};
  gguf_blocks({kind, best, w.data, w.type, rows, columns, i.has_value() ? static_cast<const float*>(i->data) : nullptr,
               variance.empty() ? nullptr : variance.data(), static_cast<uint8_t*>(out.mutable_data_ptr()), &not_finite,
               &too_large},
              kernels, torch::stable::get_num_threads(), parallel_for);
  auto* found = static_cast<int64_t*>(wrong.mutable_data_ptr());
  found[0] = not_finite, found[1] = too_large;
  return {out, wrong};
}

}  // namespace
}  // namespace qkernels::cpu

STABLE_TORCH_LIBRARY_IMPL(qkernels, CPU, m) { m.impl("gguf_blocks", TORCH_BOX(&qkernels::cpu::blocks_of)); }
