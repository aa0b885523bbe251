// One warp that calls every wrapper of ptx.cuh whose result is a function of registers and shared memory, so that the
// host twins can be compared, bit for bit, with the instructions in the PTX that nvcc makes of the same file.
//
//   in [rounds][kWrapperInputs][32], out [rounds][kWrapperOutputs][32]: words of lanes; a block is a round
//
// Inputs 0 to 2 are any bits without infinities and NaN in either half, 3 to 8 pairs of small integers in fp16 (8: bf16
// is made of them here), so that the sums of mma are exact.
#pragma once
#include "launch.cuh"
#include "ptx.cuh"

namespace qkernels::cuda {

constexpr int kWrapperInputs = 9, kWrapperOutputs = 48;
constexpr int kWrapperSharedBytes = 32 * 16 + 32 * 16;

QK_DEVICE uint32_t as_bf16x2(uint32_t f16x2) {
  return pack_bf16x2(f16_to_float(static_cast<uint16_t>(f16x2)), f16_to_float(static_cast<uint16_t>(f16x2 >> 16)));
}

__global__ void __launch_bounds__(32) wrappers_kernel(const uint32_t* in, uint32_t* out) {
  QK_SHARED(memory);
  const uint32_t shared = shared_address(memory);
  const int lane = threadIdx.x;
  in += blockIdx.x * kWrapperInputs * 32 + lane;
  out += blockIdx.x * kWrapperOutputs * 32 + lane;
  int written = 0;
  const auto put = [&](uint32_t v) { store_global4(out + 32 * written++, v); };
  const uint32_t a = load_global4(in), b = load_global4(in + 32), c = load_global4(in + 64);

  put(lop3<0xea>(a, b, c));
  put(lop3<0x96>(a, b, c));
  put(lop3<0x1b>(a, b, c));
  put(permute_bytes(a, b, 0x3715));
  put(permute_bytes(a, b, 0x8c9f));
  put(add_f16x2(a, b));
  put(sub_f16x2(a, b));
  put(mul_f16x2(a, b));
  put(fma_f16x2(a, b, c));
  put(fma_bf16x2(a, b, c));
  put(sub_bf16x2(a, b));
  put(mul_bf16x2(a, b));
  const float x = bits_to_float(a), y = bits_to_float(b);
  put(pack_f16x2(f16_to_float(static_cast<uint16_t>(a)), x));
  put(pack_f16x2(y, bf16_to_float(static_cast<uint16_t>(b >> 16))));
  put(pack_bf16x2(x, y));
  put(float_to_bits(f16_to_float(static_cast<uint16_t>(c))));
  put(shuffle_xor(a, 5));
  put(shuffle(b, lane / 4 * 4));
  put(float_to_bits(shuffle_xor(x, 16)));
  put(shift_right_by_multiplying<12>(a));
  put(any_lane(static_cast<int>(a) > 0x7c000000));  // in some rounds

  // Four matrices of random bits; the second half of the memory arrives by cp.async.
  store_shared16(shared + 16 * lane, Words4{{a, b, c, a ^ b}});
  cp_async4_or_zero(shared + 512 + 16 * lane, in, lane % 3 != 0);
  cp_async4_or_zero(shared + 516 + 16 * lane, in + 32, true);
  cp_async4_or_zero(shared + 520 + 16 * lane, in + 64, true);
  cp_async4_or_zero(shared + 524 + 16 * lane, in + 96, true);
  cp_async_commit();
  cp_async_wait<0>();
  __syncwarp();
  uint32_t one[1], two[2], four[4];
  load_matrix_x1(one, shared + 16 * (lane ^ 3));
  load_matrix_x2(two, shared + 16 * (lane ^ 6));
  put(one[0]);
  put(two[0]);
  put(two[1]);
  load_matrix_x4(four, shared + 512 + 16 * lane);
  for (int i = 0; i < 4; ++i) put(four[i]);
  load_matrix_x4_transposed(four, shared + 16 * (31 - lane));
  for (int i = 0; i < 4; ++i) put(four[i]);
  put(load_shared8(shared + 8 * lane).word[1]);
  put(load_shared2(shared + 2 * lane));

  uint32_t fa[4], fb[2], ba[4], bb[2];
  for (int i = 0; i < 4; ++i) fa[i] = load_global4(in + 32 * (3 + i)), ba[i] = as_bf16x2(fa[i]);
  for (int i = 0; i < 2; ++i) fb[i] = load_global4(in + 32 * (7 + i)), bb[i] = as_bf16x2(fb[i]);
  float f[4] = {1, 2, static_cast<float>(lane), -3}, g[4] = {0, -1, 2, static_cast<float>(lane)};
  mma_f16(f, fa, fb);
  mma_bf16(g, ba, bb);
  uint32_t h[2] = {0x3c003c00, 0x40004000};  // 1 and 2
  mma_f16_accumulate_f16(h, fa, fb);
  int32_t s[4] = {lane, 0, -lane, 7};
  const uint32_t sa[4] = {a, b, c, a + b}, sb[2] = {a - b, b + c};
  mma_s8(s, sa, sb);
  for (int i = 0; i < 4; ++i) put(float_to_bits(f[i]));
  for (int i = 0; i < 4; ++i) put(float_to_bits(g[i]));
  for (int i = 0; i < 2; ++i) put(h[i]);
  for (int i = 0; i < 4; ++i) put(static_cast<uint32_t>(s[i]));
}

inline cudaError_t launch_wrappers(const uint32_t* in, uint32_t* out, int rounds, cudaStream_t stream) {
  return launch(&wrappers_kernel, dim3(rounds), dim3(32), kWrapperSharedBytes, stream, in, out);
}

}  // namespace qkernels::cuda
