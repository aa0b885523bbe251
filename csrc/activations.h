// How x becomes int8: numbers of the ops, ACTIVATION_NUMBERS in qkernels/scheme.py. Free of torch and CUDA.
#pragma once

namespace qkernels {

// All but kNone have one scale a row of x; the static ones have the same for all rows, from a file.
enum class Rounding : int {
  kNone,        // x stays as it is
  kFull,        // max |x| / 127, in fp32
  kWide,        // max |x| / 127.5, scale and quotient rounded to the type of x, codes down to -128
  kZeroPoint,   // (max - min) / 255 and a zero point, likewise
  kOutliers,    // kFull of x in fp16, multiplied by 127 / max; columns with |x| >= 6 in any row are multiplied as they
                // are
  kStatic,      // kWide with a given scale
  kStaticZero,  // kZeroPoint with a given scale and zero point
  kCount
};

// Whether scale and zero point are given.
static constexpr bool is_static(Rounding r) { return r == Rounding::kStatic || r == Rounding::kStaticZero; }
// Whether codes stand for themselves less a zero point.
static constexpr bool has_zero_points(Rounding r) { return r == Rounding::kZeroPoint || r == Rounding::kStaticZero; }
// Whether a code of x may be -128, which has no negative in a byte.
static constexpr bool reaches_128(Rounding r) { return r == Rounding::kWide || has_zero_points(r) || is_static(r); }

// An outlier: of fp16, so that any type's values are rounded to it first. (5.998046875 is the least float that becomes
// 6: halfway from 5.99609375, and ties go to even.)
static constexpr float kOutlier = 6.0f, kBecomesOutlier = 5.998046875f;

}  // namespace qkernels
