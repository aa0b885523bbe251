// Rows of x quantized to int8: plain loops that the compiler vectorizes for the file that includes this.
#pragma once
#include <cstdint>

#include "kernels.h"
#include "rows.h"

namespace qkernels::cpu {
namespace {

constexpr uint32_t kInfinity = 0x7f800000;  // magnitudes in the order of their bits, where NaNs come after it
inline uint32_t magnitude_of(float f) { return as_bits(f) & 0x7fffffff; }

// The nearest of fp16's values as if its exponents had no end; of no NaN. from_half(to_half(f)) is the same up to
// 65504, and has branches that keep the compiler from doing sixteen at once: 3.6 ns a value where this takes 0.2.
inline float in_steps_of_half(float f) {
  const uint32_t magnitude = magnitude_of(f);
  const uint32_t normal = (magnitude + 0xfff + ((magnitude >> 13) & 1)) & ~uint32_t{0x1fff};
  const uint32_t small = as_bits(as_float(magnitude) + 0.5f - 0.5f);  // below 2^-14: to multiples of 2^-24
  return as_float((magnitude < 0x38800000 ? small : normal) | (as_bits(f) & 0x80000000));
}

// The types of x; `rounded`: a float to its nearest value, `in_half`: one of its values in steps of fp16.
struct FromFloat {
  using From = float;
  static float value(From v) { return v; }
  static float rounded(float f) { return f; }
  static float in_half(float f) { return in_steps_of_half(f); }
};
struct FromHalf {
  using From = uint16_t;
  static float value(From v) { return from_half(v); }
  static float rounded(float f) { return from_half(to_half(f)); }
  static float in_half(float f) { return f; }
};
struct FromBf16 {
  using From = uint16_t;
  static float value(From v) { return from_bf16(v); }
  static float rounded(float f) { return from_bf16(to_bf16(f)); }
  static float in_half(float f) { return in_steps_of_half(f); }
};

// A row of x, and where its codes go.
template <class C>
struct Row {
  const Call& call;
  int64_t m;
  const typename C::From* __restrict x;
  int8_t* __restrict codes;
  int64_t K, stride;

  Row(const Call& c, int64_t row)
      : call(c),
        m(row),
        x(static_cast<const typename C::From*>(c.x) + row * c.x_row_stride),
        codes(static_cast<int8_t*>(const_cast<void*>(c.staged.data)) + row * c.staged.row_stride),
        K(c.K),
        stride(c.x_column_stride) {}

  float at(int64_t column) const { return C::value(stride == 1 ? x[column] : x[column * stride]); }

  // codes[k] = code(column of k, its value), zeros past K, and their sums over each group; or zeros alone.
  template <class Code>
  void fill(bool zeros, Code code) const {
    if (zeros) {
      std::memset(codes, 0, static_cast<size_t>(call.K_pad));
    } else if (call.k_order != nullptr) {
      for (int64_t k = 0; k < K; ++k) {
        int64_t column = call.k_order[k];  // comes from a file: a wrong entry must not become a wild read
        column = column < 0 ? 0 : column >= K ? K - 1 : column;
        codes[k] = code(column, C::value(x[column * stride]));
      }
    } else if (stride == 1) {
      for (int64_t k = 0; k < K; ++k) codes[k] = code(k, C::value(x[k]));
    } else {
      for (int64_t k = 0; k < K; ++k) codes[k] = code(k, C::value(x[k * stride]));
    }
    for (int64_t k = K; k < call.K_pad; ++k) codes[k] = 0;
    for (int64_t g = 0; g < call.G; ++g) {
      const int64_t first = g * call.group, end = K < first + call.group ? K : first + call.group;
      int32_t sum = 0;
      for (int64_t k = first; k < end; ++k) sum += codes[k];
      call.x_sums[g * call.M + m] = sum;
    }
  }
};

inline float scale_or_nan(bool finite, float scale) { return finite ? scale : as_float(0x7fc00000); }

// to nearest, ties to even, -128 to 127
inline int8_t clamped(float f) {
  f = f < -128.0f ? -128.0f : f > 127.0f ? 127.0f : f;
  return static_cast<int8_t>(__builtin_rintf(f));
}

// scale = max |x| / 127 and codes = round(x / max |x| * 127), ties to even. Divided first: 127 / max |x| would overflow
// below 2^-121. A row of zeros has codes and scale 0; one with a NaN or an infinity has codes 0 and scale NaN.
template <class C>
void quantize_full(const Row<C>& row) {
  uint32_t most = 0;
  for (int64_t k = 0; k < row.K; ++k) {
    const uint32_t magnitude = magnitude_of(row.at(k));
    most = most < magnitude ? magnitude : most;
  }
  const bool finite = most < kInfinity;
  const float largest = as_float(most);
  row.call.x_scales[row.m] = scale_or_nan(finite, largest / 127.0f);
  row.fill(!finite || most == 0,
           [=](int64_t, float v) { return static_cast<int8_t>(__builtin_rintf(v / largest * 127.0f)); });
}

// As compressed-tensors computes (calculate_qparams, fake_quantize): every step is rounded to the type of x. A scale
// that underflows becomes its eps there, under which all codes are 0, too.
template <class C>
void quantize_wide(const Row<C>& row) {
  uint32_t most = 0;
  for (int64_t k = 0; k < row.K; ++k) {
    const uint32_t magnitude = magnitude_of(row.at(k));
    most = most < magnitude ? magnitude : most;
  }
  const bool finite = most < kInfinity;
  const float scale = C::rounded(as_float(most) / 127.5f);
  row.call.x_scales[row.m] = scale_or_nan(finite, scale);
  row.fill(!finite || scale == 0.0f, [=](int64_t, float v) { return clamped(C::rounded(v / scale)); });
}

// Likewise, over the range that min, max and 0 span.
template <class C>
void quantize_zero_point(const Row<C>& row) {
  float low = 0.0f, high = 0.0f;
  uint32_t most = 0;
  for (int64_t k = 0; k < row.K; ++k) {
    const float v = row.at(k);
    low = v < low ? v : low, high = v > high ? v : high;
    most = most < magnitude_of(v) ? magnitude_of(v) : most;
  }
  const float scale = C::rounded(C::rounded(high - low) / 255.0f);
  const bool finite = most < kInfinity && magnitude_of(scale) < kInfinity;
  const bool zeros = !finite || scale == 0.0f;
  const float zero = zeros ? 0.0f : clamped(C::rounded(-128.0f - C::rounded(low / scale)));
  row.call.x_scales[row.m] = scale_or_nan(finite, scale);
  row.call.x_zeros[row.m] = zero * scale;
  row.fill(zeros, [=](int64_t, float v) { return clamped(C::rounded(C::rounded(v / scale) + zero)); });
}

// As bitsandbytes computes (int8_vectorwise_quant): x in fp16, the maximum of the entries below 6, one product with 127
// over it, which PyTorch takes as 127 times the reciprocal. A column that is marked has codes 0: see apart.h.
template <class C>
void quantize_outliers(const Row<C>& row) {
  uint32_t most = 0, all = 0;
  for (int64_t k = 0; k < row.K; ++k) {
    const float v = row.at(k);
    const uint32_t magnitude = magnitude_of(C::in_half(v)), usual = magnitude < as_bits(kOutlier) ? magnitude : 0;
    all = all < magnitude_of(v) ? magnitude_of(v) : all;
    most = most < usual ? usual : most;
  }
  const bool nan = all > kInfinity;
  const float largest = as_float(most), factor = 1.0f / largest * 127.0f;
  row.call.x_scales[row.m] = scale_or_nan(!nan, largest / 127.0f);
  const uint8_t* marked = row.call.marked;
  row.fill(nan || most == 0, [=](int64_t column, float v) {
    const float code = C::in_half(v) * factor;  // before the question: so that the loop has no branch
    return static_cast<int8_t>(__builtin_rintf(marked[column] != 0 ? 0.0f : code));
  });
}

// As compressed-tensors computes with scale and zero point from a file: quotient and sum rounded to the type of x,
// which the scale is rounded to as well. Infinities are the largest codes, as there; a row with a NaN is NaN.
template <class C>
void quantize_static(const Row<C>& row) {
  uint32_t most = 0;
  for (int64_t k = 0; k < row.K; ++k) {
    const uint32_t magnitude = magnitude_of(row.at(k));
    most = most < magnitude ? magnitude : most;
  }
  const float scale = C::rounded(row.call.x_scale);
  const bool usable = most <= kInfinity && scale != 0.0f && magnitude_of(scale) < kInfinity;
  const bool zeros = has_zero_points(row.call.rounding) && magnitude_of(row.call.x_zero) < kInfinity;
  const float zero = zeros ? clamped(row.call.x_zero) : 0.0f;
  row.call.x_scales[row.m] = scale_or_nan(most <= kInfinity, scale);
  row.call.x_zeros[row.m] = usable ? zero * scale : 0.0f;
  row.fill(!usable, [=](int64_t, float v) { return clamped(C::rounded(C::rounded(v / scale) + zero)); });
}

// The row past the last of x that zero points ask for (apart.h): ones.
void fill_ones(const Call& call, int64_t m) {
  const Row<FromFloat> row(call, m);
  for (int64_t k = 0; k < call.K_pad; ++k) row.codes[k] = k < call.K;
  for (int64_t g = 0; g < call.G; ++g) {
    const int64_t first = g * call.group;
    call.x_sums[g * call.M + m] = static_cast<int32_t>(call.K - first < call.group ? call.K - first : call.group);
  }
  call.x_scales[m] = 1.0f, call.x_zeros[m] = 0.0f;
}

template <class C>
void quantize_row(const Call& call, int64_t m) {
  const Row<C> row(call, m);
  switch (call.rounding) {
    case Rounding::kWide:
      return quantize_wide(row);
    case Rounding::kZeroPoint:
      return m == call.M - 1 ? fill_ones(call, m) : quantize_zero_point(row);
    case Rounding::kOutliers:
      return quantize_outliers(row);
    case Rounding::kStatic:
      return quantize_static(row);
    case Rounding::kStaticZero:
      return m == call.M - 1 ? fill_ones(call, m) : quantize_static(row);
    default:
      return quantize_full(row);
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
