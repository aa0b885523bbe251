// Activations to int8, one scale per token: scale = max |x| / 127 in fp32, q = x / scale rounded to nearest, ties to
// even. `wide`: as compressed-tensors has it, scale = max |x| / 127.5 and x / scale rounded to the type of x, q from
// -128 to 127. One block a token reads it twice, the second time from L2.
//
// Within each 16 columns q is stored as a lane of the int8 tensor core instruction meets it beside a lane's codes
// (gemm_a8.cuh): position 4 c + j holds column 2 c + {0, 8, 1, 9}[j].
//
// A token of zeros has scale 0 and codes 0. One with NaN or infinity in it has that scale and codes 0, so its y is NaN.
#pragma once
#include <cmath>

#include "copy.cuh"

namespace qkernels::cuda {

constexpr int kQuantizeThreads = 256;

QK_DEVICE Words4 load_tokens8(const Activations& a, bool aligned, int m, int k) {
  if (!aligned) return gather8(a, m, k);
  if (k >= a.K) return {};
  return load_global16(a.x + m * a.row_stride + k);
}

QK_DEVICE uint32_t half_of(const Words4& v, int i) { return v.word[i / 2] >> (i % 2 * 16) & 0xffffu; }

QK_DEVICE float rounded_to(bool half, float f) {
  const auto low = static_cast<uint16_t>(half ? pack_f16x2(f, 0.0f) : pack_bf16x2(f, 0.0f));
  return half ? f16_to_float(low) : bf16_to_float(low);
}

__global__ void __launch_bounds__(kQuantizeThreads)
    quantize_tokens(const Activations a, bool aligned, bool half, bool wide, int steps, int8_t* to, float* scales) {
  QK_SHARED(shared);
  const int m = blockIdx.x, thread = threadIdx.x, columns = steps * kStepColumns;
  // Bits of magnitudes order as the values do, and NaN comes above infinity: nothing is lost in the maximum.
  uint32_t most = 0;
  for (int k = thread * 8; k < columns; k += kQuantizeThreads * 8) {
    const Words4 v = load_tokens8(a, aligned, m, k);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const uint32_t bits = half_of(v, i) & 0x7fffu;
      most = bits > most ? bits : most;
    }
  }
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) {
    const uint32_t other = shuffle_xor(most, mask);
    most = other > most ? other : most;
  }
  const uint32_t warps = shared_address(shared);
  if (thread % 32 == 0) store_shared4(warps + thread / 32 * 4, most);
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kQuantizeThreads / 32; ++i) {
    const uint32_t other = load_shared4(warps + i * 4);
    most = other > most ? other : most;
  }
  const uint16_t bits = static_cast<uint16_t>(most);
  const float largest = half ? f16_to_float(bits) : bf16_to_float(bits);
  const float scale = wide ? rounded_to(half, largest / 127.5f) : largest / 127.0f;
  if (thread == 0) store_global4(scales + m, float_to_bits(scale));
  const bool finite = most < (half ? 0x7c00u : 0x7f80u) && scale > 0.0f;  // a wide scale may underflow

  for (int k = thread * 16; k < columns; k += kQuantizeThreads * 16) {
    const Words4 low = load_tokens8(a, aligned, m, k), high = load_tokens8(a, aligned, m, k + 8);
    Words4 q = {};
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const uint16_t value = static_cast<uint16_t>(half_of(i < 8 ? low : high, i % 8));
      // The smallest scale, 2^-133 / 127, still has nine bits: 127.1 is the most that comes out before rounding.
      const float v = half ? f16_to_float(value) : bf16_to_float(value);
      float level = v / scale;
      if (wide) {
        level = rounded_to(half, level);
        level = level < -128.0f ? -128.0f : level > 127.0f ? 127.0f : level;
      }
      const int code = finite ? static_cast<int>(rintf(level)) : 0;
      const int j = i / 8 + i % 2 * 2;  // column 2 c + 8 right + odd is byte right + 2 odd of word c
      q.word[i % 8 / 2] |= (static_cast<uint32_t>(code) & 0xffu) << (8 * j);
    }
    store_global16(to + static_cast<int64_t>(m) * columns + k, q);
  }
}

}  // namespace qkernels::cuda
