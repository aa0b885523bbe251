// Sums that are not finite, once more: weight by weight, as a float layer has them.
//
// A product with a code is 1 / scale times larger than one with its weight, and overflows before it (x = 1e36). Where
// zeros are floating, and in decode up to 16 tokens (multiply_biased.cuh), an infinity meets one of the other sign. So
// a warp that finds such a sum among the 64 rows of a token adds them anew from memory: of the weight the columns where
// x is infinite, for nothing else decides then; or all of them, where x is merely large. A NaN in x leaves NaN
// everywhere, and costs one pass over x. The loops over K know nothing of this.
#pragma once
#include "copy.cuh"
#include "weights.cuh"

namespace qkernels::cuda {

QK_DEVICE bool is_finite(float v) { return (float_to_bits(v) & 0x7fffffffu) < 0x7f800000u; }

constexpr uint32_t kNaN = 0x7fc00000;

// By whole warps.
QK_DEVICE bool all_finite(float low, float high) { return !any_lane(!is_finite(low) || !is_finite(high)); }

// x of row m at stored column k.
template <class T>
QK_DEVICE float x_at(const Activations& a, int m, int k) {
  const int column = a.k_order == nullptr ? k : clamped(static_cast<int>(load_global4(a.k_order + k)), a.K);
  return T::low(load_global2(a.x + m * a.row_stride + column * a.column_stride));
}

// Row m of x times rows n and n + 1 of the weight over `steps`, to those of `low` and `high` that are not finite. By
// whole warps; n is even, and the lanes' own.
template <class T, bool kCoded = false, bool kPlanes = false>
QK_DEVICE void sum_again(const Weight& w, const Activations& x, int m, int n, Share steps, float& low, float& high) {
  const int begin = steps.begin * kStepColumns;
  const int end = steps.end * kStepColumns < x.K ? steps.end * kStepColumns : x.K;
  bool has_nan = false, has_infinity = false;
  for (int k = begin + static_cast<int>(threadIdx.x & 31); k < end; k += 32) {
    const float v = x_at<T>(x, m, k);
    has_nan |= v != v, has_infinity |= !is_finite(v);
  }
  if (any_lane(has_nan)) return;
  has_infinity = any_lane(has_infinity);
  float sum = 0.0f, next = 0.0f;
#pragma unroll 1
  for (int k = begin; k < end; ++k) {
    const float v = x_at<T>(x, m, k);
    if (has_infinity && is_finite(v)) continue;
    if constexpr (kPlanes) {
      sum = fmaf(v, planes_weight_at(w, n, k), sum), next = fmaf(v, planes_weight_at(w, n + 1, k), next);
    } else {
      sum = fmaf(v, weight_at<kCoded>(w, n, k), sum), next = fmaf(v, weight_at<kCoded>(w, n + 1, k), next);
    }
  }
  if (!is_finite(low)) low = sum;
  if (!is_finite(high)) high = next;
}

}  // namespace qkernels::cuda
