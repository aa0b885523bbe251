// The ops `round_columns` and `clipped_grids` on torch's stable ABI: last checks, allocation, and the call. Their
// schemas are in qkernels/quantizers/native.py, which makes the same checks before.
#include "rounding.h"
#include "tensors.h"

namespace qkernels::cpu {
namespace {

bool is_matrix(const Buffer& b, int64_t rows, int64_t columns) {
  return b.type == Type::kFloat && has_shape(b, {rows, columns});
}

std::string wrong_columns(const Buffer& columns, const Buffer& factor, const Buffer& scales, const Buffer* zeros,
                          const Buffer& groups, int64_t bits) {
  const int64_t n = columns.sizes[0], N = columns.sizes[1];
  if (bits < 1 || bits > 8) return text("bits must be 1 to 8, got ", bits);
  if (columns.dims != 2 || columns.type != Type::kFloat || n > kMostColumns) {
    return text("columns must be float32 [up to ", kMostColumns, ", N], got ", described(columns));
  }
  if (!is_matrix(factor, n, n)) return text("factor must be float32 [", n, ", ", n, "], got ", described(factor));
  if (scales.dims != 2 || !is_matrix(scales, scales.sizes[0], N)) {
    return text("scales must be float32 [groups, ", N, "], got ", described(scales));
  }
  if (zeros != nullptr && !is_matrix(*zeros, scales.sizes[0], N)) {
    return text("zeros must be like scales, got ", described(*zeros));
  }
  if (!has_shape(groups, {n})) return text("groups must be int64 [", n, "], got ", described(groups));
  const auto* group = static_cast<const int64_t*>(groups.data);
  for (int64_t i = 0; i < n; ++i) {
    if (group[i] < 0 || group[i] >= scales.sizes[0]) {
      return text("groups must be 0 to ", scales.sizes[0] - 1, ", got ", group[i], " for column ", i);
    }
  }
  return "";
}

// Codes uint8, values and errors float32, each [n, N].
std::tuple<Tensor, Tensor, Tensor> columns_rounded(const Tensor& columns_in, const Tensor& factor_in,
                                                   const Tensor& scales_in, const OptionalTensor& zeros_in,
                                                   const Tensor& groups_in, int64_t bits) {
  const Kernels& kernels = kernels_now(false);
  const Tensor columns = torch::stable::contiguous(columns_in), factor = torch::stable::contiguous(factor_in);
  const Tensor scales = torch::stable::contiguous(scales_in), groups = torch::stable::contiguous(groups_in);
  OptionalTensor zeros;
  if (zeros_in.has_value()) zeros = torch::stable::contiguous(*zeros_in);
  const Buffer c = buffer_of(columns), f = buffer_of(factor), s = buffer_of(scales), g = buffer_of(groups);
  const std::optional<Buffer> z = zeros.has_value() ? std::optional<Buffer>(buffer_of(*zeros)) : std::nullopt;
  refuse(dtype_of(groups) == aoti_torch_dtype_int64() ? "" : "groups must be int64");
  refuse(wrong_columns(c, f, s, z.has_value() ? &*z : nullptr, g, bits));
  const int64_t n = c.sizes[0], N = c.sizes[1];
  Tensor codes = empty(aoti_torch_dtype_uint8(), {n, N});
  Tensor values = empty(aoti_torch_dtype_float32(), {n, N}), errors = empty(aoti_torch_dtype_float32(), {n, N});
  round_columns({static_cast<const float*>(c.data), static_cast<const float*>(f.data),
                 static_cast<const float*>(s.data), z.has_value() ? static_cast<const float*>(z->data) : nullptr,
                 static_cast<const int64_t*>(g.data), n, N, static_cast<float>(1 << (bits - 1)),
                 static_cast<float>((1 << bits) - 1), static_cast<uint8_t*>(codes.mutable_data_ptr()),
                 static_cast<float*>(values.mutable_data_ptr()), static_cast<float*>(errors.mutable_data_ptr())},
                kernels, torch::stable::get_num_threads(), parallel_for);
  return {codes, values, errors};
}

std::string wrong_groups(const Buffer& groups, const Buffer* importance, int64_t bits, const Buffer& shares) {
  if (bits < 1 || bits > 8) return text("bits must be 1 to 8, got ", bits);
  if (groups.dims != 2 || groups.type != Type::kFloat || groups.sizes[1] < 1 || groups.sizes[1] > kMostMembers) {
    return text("groups must be float32 [groups, 1 to ", kMostMembers, "], got ", described(groups));
  }
  if (importance != nullptr && (importance->dims != 2 || importance->sizes[0] < 1 ||
                                !is_matrix(*importance, importance->sizes[0], groups.sizes[1]))) {
    return text("importance must be float32 [1 or more, ", groups.sizes[1], "], got ", described(*importance));
  }
  if (shares.dims != 1 || shares.type != Type::kFloat) {
    return text("shares must be float32 [trials], got ", described(shares));
  }
  return "";
}

// Scales and zeros float32 [1, groups] (zeros [0, groups] where they are not wanted), and int64 [1, 1]: a group whose
// scale its type cannot hold, among the sixteen that begin there; the number of groups where there is none.
std::tuple<Tensor, Tensor, Tensor> grids_fitted(const Tensor& groups_in, const OptionalTensor& importance_in,
                                                const Tensor& shares_in, int64_t bits, bool zeros_too,
                                                int64_t scale_type) {
  const Kernels& kernels = kernels_now(false);
  const Tensor groups = torch::stable::contiguous(groups_in), shares = torch::stable::contiguous(shares_in);
  OptionalTensor importance;
  if (importance_in.has_value()) importance = torch::stable::contiguous(*importance_in);
  const Buffer g = buffer_of(groups), s = buffer_of(shares);
  const std::optional<Buffer> i = importance.has_value() ? std::optional<Buffer>(buffer_of(*importance)) : std::nullopt;
  constexpr Type types[] = {Type::kFloat, Type::kHalf, Type::kBFloat16};
  refuse(scale_type < 0 || scale_type > 2 ? text("scale_type must be 0 to 2, got ", scale_type) : "");
  refuse(wrong_groups(g, i.has_value() ? &*i : nullptr, bits, s));
  const int64_t rows = g.sizes[0];
  Tensor scales = empty(aoti_torch_dtype_float32(), {1, rows});
  Tensor zeros = empty(aoti_torch_dtype_float32(), {zeros_too ? 1 : 0, rows});
  Tensor wrong = empty(aoti_torch_dtype_int64(), {1, 1});
  std::atomic<int64_t> not_finite{rows};
  fit_grids(
      {static_cast<const float*>(g.data), i.has_value() ? static_cast<const float*>(i->data) : nullptr, rows,
       g.sizes[1], i.has_value() ? i->sizes[0] : 1, zeros_too, static_cast<float>((1 << bits) - 1), types[scale_type],
       static_cast<const float*>(s.data), s.sizes[0], static_cast<float*>(scales.mutable_data_ptr()),
       zeros_too ? static_cast<float*>(zeros.mutable_data_ptr()) : nullptr, &not_finite},
      kernels, torch::stable::get_num_threads(), parallel_for);
  static_cast<int64_t*>(wrong.mutable_data_ptr())[0] = not_finite;
  return {scales, zeros, wrong};
}

}  // namespace
}  // namespace qkernels::cpu

STABLE_TORCH_LIBRARY_IMPL(qkernels, CPU, m) {
  m.impl("round_columns", TORCH_BOX(&qkernels::cpu::columns_rounded));
  m.impl("clipped_grids", TORCH_BOX(&qkernels::cpu::grids_fitted));
}
