// The small kernels that drive needs beside those of the library: random bytes, the exact product in fp64, a pause.
#pragma once
#include "copy.cuh"
#include "launch.cuh"

namespace qkernels::drive {

using namespace qkernels::cuda;

constexpr int kThreads = 256;

QK_DEVICE uint32_t hashed(uint32_t i, uint32_t seed) {
  uint32_t h = i * 2654435761u ^ seed;
  h ^= h >> 15, h *= 2246822519u, h ^= h >> 13, h *= 3266489917u, h ^= h >> 16;
  return h;
}

// Bytes h & mask; or 16-bit numbers (bf16, fp16) that are uniform in [low, high).
struct Fill {
  uint8_t* to;
  int64_t count;
  uint32_t seed;
  Type type;
  uint32_t mask;
  float low, high;
};

__global__ void __launch_bounds__(kThreads) fill(const Fill f) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < f.count; i += int64_t{gridDim.x} * blockDim.x) {
    const uint32_t h = hashed(static_cast<uint32_t>(i), f.seed);
    if (f.type == Type::kUInt8) {
      f.to[i] = static_cast<uint8_t>(h & f.mask);
    } else {
      const float v = f.low + (f.high - f.low) * static_cast<float>(h >> 8) * (1.0f / 16777216);
      const uint32_t pair = f.type == Type::kHalf ? pack_f16x2(v, 0.0f) : pack_bf16x2(v, 0.0f);
      reinterpret_cast<uint16_t*>(f.to)[i] = static_cast<uint16_t>(pair);
    }
  }
}

// x as the kernels see it: itself, or rounded to int8 as ../../../csrc/activations.h says, from the definitions there
// and not by the kernels of quantize_a8.cuh. One thread a row, of finite numbers.
struct Seen {
  const uint16_t* x;
  float* to;
  int rows, K;
  bool half;
  Rounding rounding;
  float scale, zero;  // static ones
};

QK_DEVICE float value_of(const Seen& s, int row, int k) {
  const uint16_t bits = s.x[int64_t{row} * s.K + k];
  return s.half ? f16_to_float(bits) : bf16_to_float(bits);
}

QK_DEVICE float in_type(bool half, float f) {
  return half ? f16_to_float(static_cast<uint16_t>(pack_f16x2(f, 0.0f)))
              : bf16_to_float(static_cast<uint16_t>(pack_bf16x2(f, 0.0f)));
}

QK_DEVICE float cut(float f) { return rintf(f < -128.0f ? -128.0f : f > 127.0f ? 127.0f : f); }

QK_DEVICE bool is_marked(const Seen& s, int k) {
  for (int row = 0; row < s.rows; ++row) {
    const float v = in_type(true, value_of(s, row, k));
    if (v >= kOutlier || -v >= kOutlier) return true;
  }
  return false;
}

__global__ void __launch_bounds__(kThreads) see(const Seen s) {
  const int row = blockIdx.x * blockDim.x + threadIdx.x;
  if (row >= s.rows) return;
  const bool outliers = s.rounding == Rounding::kOutliers;
  float low = 0, high = 0, most = 0;  // most: of what is no outlier
  for (int k = 0; k < s.K; ++k) {
    const float v = value_of(s, row, k), seen = outliers ? in_type(true, v) : v, magnitude = seen < 0 ? -seen : seen;
    low = v < low ? v : low, high = v > high ? v : high;
    if (magnitude > most && !(outliers && magnitude >= kOutlier)) most = magnitude;
  }
  const bool zero_points = s.rounding == Rounding::kZeroPoint;
  float scale = most / 127.0f, zero = 0;
  if (s.rounding == Rounding::kWide) scale = in_type(s.half, most / 127.5f);
  if (zero_points) scale = in_type(s.half, in_type(s.half, high - low) / 255.0f);
  if (zero_points) zero = cut(in_type(s.half, -128.0f - in_type(s.half, low / scale)));
  if (s.rounding == Rounding::kStatic || s.rounding == Rounding::kStaticZero) {
    scale = in_type(s.half, s.scale), zero = s.rounding == Rounding::kStaticZero ? s.zero : 0;
  }
  for (int k = 0; k < s.K; ++k) {
    const float v = value_of(s, row, k);
    float seen = v;
    if (s.rounding == Rounding::kFull || (outliers && !is_marked(s, k))) {
      seen = scale > 0 ? rintf((outliers ? in_type(true, v) : v) / scale) * scale : 0;
    } else if (s.rounding != Rounding::kNone && !outliers) {
      seen = (cut(in_type(s.half, in_type(s.half, v / scale) + zero)) - zero) * scale;
    }
    s.to[int64_t{row} * s.K + k] = seen;
  }
}

// Which rows of y are checked: both ends.
QK_CONSTEXPR int checked_row(int i, int rows, int M) { return i < rows / 2 ? i : M - rows + i; }

// y in fp64, with the sum of (x w)^2: its root is what roundings of the weights leave. One thread a value.
struct Reference {
  const float *x, *w;
  double *exact, *squares;
  int M, N, K, rows;
};

__global__ void __launch_bounds__(kThreads) reference(const Reference r) {
  const int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
  if (i >= int64_t{r.rows} * r.N) return;
  const int n = static_cast<int>(i % r.N), m = checked_row(static_cast<int>(i / r.N), r.rows, r.M);
  double sum = 0, squares = 0;
  for (int k = 0; k < r.K; ++k) {
    const double p = double(r.x[int64_t{m} * r.K + k]) * r.w[int64_t{n} * r.K + k];
    sum += p, squares += p * p;
  }
  r.exact[i] = sum, r.squares[i] = squares;
}

// Keeps the stream busy, so that what follows is queued before the card comes to it.
__global__ void pause(int64_t cycles) {
#ifndef QKERNELS_HOST
  for (const int64_t start = clock64(); clock64() - start < cycles;) {
  }
#else
  (void)cycles;
#endif
}

}  // namespace qkernels::drive
