// The ops rows_cpu_tile_a16 and rows_cpu_tile_a8: rows of a packed weight by number, as an embedding wants them.
// Schemas are in qkernels/ops/rows.py.
#include "../inputs.h"
#include "checks.h"
#include "kernels.h"
#include "rows.h"
#include "tensors.h"

namespace qkernels::cpu {
namespace {

struct Rows {
  Call call;  // of the weight; y and its type
  const int64_t* ids;
};

void store_values(const Call& call, int64_t at, const float* values, int64_t n) {
  if (call.y_type == Type::kFloat) {
    std::memcpy(static_cast<float*>(call.y) + at, values, static_cast<size_t>(n) * 4);
    return;
  }
  uint16_t* to = static_cast<uint16_t*>(call.y) + at;
  const bool half = call.y_type == Type::kHalf;
  for (int64_t i = 0; i < n; ++i) to[i] = half ? to_half(values[i]) : to_bf16(values[i]);
}

// A group at a time; the number of bits is known to the compiler, which divides by the columns of a block. Values are
// those of `QuantTensor.dequantize`, products rounded one by one.
template <int kBits, bool kInt8>
void rows_of_bits(const Rows& rows, int64_t begin, int64_t end) {
  Call call = rows.call;
  call.bits = kBits;
  std::vector<float> values(static_cast<size_t>(call.K));
  for (int64_t i = begin; i < end; ++i) {
    const int64_t tile = rows.ids[i] / kTileRows;
    const int row = static_cast<int>(rows.ids[i] % kTileRows);
    for (int64_t g = 0; g < call.G; ++g) {
      const float scale = scale_of(call, tile, g, row), zero = zero_of(call, tile, g, row);
      for (int64_t k = g * call.group; k < std::min(call.K, (g + 1) * call.group); ++k) {
        const int code = kInt8 ? int8_code_at(call, tile, row, k) : code_at(call, tile, row, k);
        values[static_cast<size_t>(column_of(call, k))] = weight_of(call, code, scale, zero);
      }
    }
    store_values(call, i * call.K, values.data(), call.K);
  }
}

template <bool kInt8>
void find_rows(void* context, int64_t begin, int64_t end) {
  const Rows& rows = *static_cast<Rows*>(context);
  switch (rows.call.bits) {
    case 2:
      return rows_of_bits<2, kInt8>(rows, begin, end);
    case 3:
      return rows_of_bits<3, kInt8>(rows, begin, end);
    case 4:
      return rows_of_bits<4, kInt8>(rows, begin, end);
    case 5:
      return rows_of_bits<5, kInt8>(rows, begin, end);
    case 6:
      return rows_of_bits<6, kInt8>(rows, begin, end);
    case 7:
      return rows_of_bits<7, kInt8>(rows, begin, end);
    default:
      return rows_of_bits<8, kInt8>(rows, begin, end);
  }
}

template <bool kInt8>
Tensor rows_of(const Tensor& ids, const Inputs& in, int64_t in_features, ScalarType dtype) {
  Plain plain(in);
  Arguments& a = plain.arguments;
  STD_TORCH_CHECK(ids.sizes().size() == 1 && ids.is_contiguous() && dtype_of(ids) == aoti_torch_dtype_int64(),
                  "ids must be contiguous int64 [n]");
  const Type y_type = type_of(dtype).type;
  STD_TORCH_CHECK(is_floating(y_type), "dtype must be float32, bfloat16 or float16");
  const int64_t n = ids.size(0);
  a.x = Buffer{nullptr, Type::kFloat, false, "float32", 2, {n, in_features}, true, -1};  // checks ask its shape
  refuse(wrong_product(a, kInt8));
  Rows rows{call_with(a, kInt8), static_cast<const int64_t*>(ids.const_data_ptr())};
  for (int64_t i = 0; i < n; ++i) {
    STD_TORCH_CHECK(rows.ids[i] >= 0 && rows.ids[i] < rows.call.N, "ids must be 0 ... ", rows.call.N - 1, ", got ",
                    rows.ids[i]);
  }
  Tensor y = empty(static_cast<int32_t>(dtype), {n, in_features});
  rows.call.y = y.mutable_data_ptr(), rows.call.y_type = y_type;
  if (n * in_features <= 8192) {  // about what one core does while it wakes another
    find_rows<kInt8>(&rows, 0, n);
  } else {
    parallel_for(n, &rows, find_rows<kInt8>);
  }
  return y;
}

Tensor rows_a16(const Tensor& ids, const Tensor& qweight, const Tensor& scales, const OptionalTensor& zeros,
                const OptionalTensor& k_order, const OptionalTensor& outer_scales, const OptionalTensor& outer_zeros,
                int64_t out_features, int64_t in_features, int64_t bits, int64_t group_size, bool zeros_are_offsets,
                int64_t codebook, int64_t factors, ScalarType dtype) {
  const OptionalTensor no_bias;
  return rows_of<false>(ids,
                        {nullptr, qweight, scales, zeros, k_order, outer_scales, outer_zeros, no_bias, out_features,
                         bits, group_size, zeros_are_offsets, codebook, factors},
                        in_features, dtype);
}

Tensor rows_a8(const Tensor& ids, const Tensor& qweight, const Tensor& scales, const OptionalTensor& zeros,
               const OptionalTensor& k_order, const OptionalTensor& outer_scales, const OptionalTensor& outer_zeros,
               const OptionalTensor& x_static, int64_t out_features, int64_t in_features, int64_t bits,
               int64_t group_size, bool zeros_are_offsets, int64_t codebook, int64_t factors, int64_t act,
               ScalarType dtype) {
  const OptionalTensor no_bias;
  return rows_of<true>(ids,
                       {nullptr, qweight, scales, zeros, k_order, outer_scales, outer_zeros, no_bias, out_features,
                        bits, group_size, zeros_are_offsets, codebook, factors, act, &x_static},
                       in_features, dtype);
}

}  // namespace
}  // namespace qkernels::cpu

STABLE_TORCH_LIBRARY_IMPL(qkernels, CPU, m) {
  m.impl("rows_cpu_tile_a16", TORCH_BOX(&qkernels::cpu::rows_a16));
  m.impl("rows_cpu_tile_a8", TORCH_BOX(&qkernels::cpu::rows_a8));
}
