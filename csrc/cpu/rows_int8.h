// Rows of x quantized to int8: plain loops that the compiler vectorizes for the file that includes this.
#pragma once
#include <cstdint>

#include "kernels.h"
#include "rows.h"

namespace qkernels::cpu {
namespace {

struct FromFloat {
  using From = float;
  static float value(From v) { return v; }
};
struct FromHalf {
  using From = uint16_t;
  static float value(From v) { return from_half(v); }
};
struct FromBf16 {
  using From = uint16_t;
  static float value(From v) { return from_bf16(v); }
};

// One row: scale = max |x| / 127 and codes = round(x / max |x| * 127), ties to even. Divided first: 127 / max |x| would
// overflow below 2^-121. A row of zeros has codes and scale 0; one with a NaN or an infinity has codes 0 and scale NaN.
template <class C>
void quantize_row(const Call& call, int64_t m) {
  const typename C::From* __restrict x = static_cast<const typename C::From*>(call.x) + m * call.x_row_stride;
  int8_t* __restrict codes = static_cast<int8_t*>(const_cast<void*>(call.staged.data)) + m * call.staged.row_stride;
  const int64_t K = call.K, stride = call.x_column_stride;
  uint32_t most = 0;  // magnitudes in the order of their bits, where infinities and NaNs come last
  for (int64_t k = 0; k < K; ++k) {
    const uint32_t magnitude = as_bits(C::value(stride == 1 ? x[k] : x[k * stride])) & 0x7fffffff;
    most = most < magnitude ? magnitude : most;
  }
  const bool finite = most < 0x7f800000;
  const float largest = as_float(most);
  call.x_scales[m] = finite ? largest / 127.0f : as_float(0x7fc00000);
  if (!finite || most == 0) {
    std::memset(codes, 0, static_cast<size_t>(call.K_pad));
  } else if (call.k_order != nullptr) {
    for (int64_t k = 0; k < K; ++k) {
      int64_t column = call.k_order[k];  // comes from a file: a wrong entry must not become a wild read
      column = column < 0 ? 0 : column >= K ? K - 1 : column;
      codes[k] = static_cast<int8_t>(__builtin_rintf(C::value(x[column * stride]) / largest * 127.0f));
    }
  } else if (stride == 1) {
    for (int64_t k = 0; k < K; ++k) codes[k] = static_cast<int8_t>(__builtin_rintf(C::value(x[k]) / largest * 127.0f));
  } else {
    for (int64_t k = 0; k < K; ++k) {
      codes[k] = static_cast<int8_t>(__builtin_rintf(C::value(x[k * stride]) / largest * 127.0f));
    }
  }
  for (int64_t k = K; k < call.K_pad; ++k) codes[k] = 0;
  for (int64_t g = 0; g < call.G; ++g) {
    const int64_t first = g * call.group, end = K < first + call.group ? K : first + call.group;
    int32_t sum = 0;
    for (int64_t k = first; k < end; ++k) sum += codes[k];
    call.x_sums[g * call.M + m] = sum;
  }
}

void stage_int8(const Call& call, int64_t m0, int64_t m1) {
  for (int64_t m = m0; m < m1; ++m) {
    if (call.x_type == Type::kFloat) {
      quantize_row<FromFloat>(call, m);
    } else if (call.x_type == Type::kHalf) {
      quantize_row<FromHalf>(call, m);
    } else {
      quantize_row<FromBf16>(call, m);
    }
  }
}

}  // namespace
}  // namespace qkernels::cpu
