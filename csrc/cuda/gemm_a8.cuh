// y = x W^T with int8 activations, on the integer tensor cores (mma.m16n8k32.s8): any M, sm_80 and everything later.
// multiply_a8.cuh has the operands and the numbers.
//
// Blocks, tiles and pipeline are those of gemm_sm80.cuh; a token's step is 64 bytes, in four chunks of 16 columns.
#pragma once
#include "blocks.h"
#include "multiply_a8.cuh"

namespace qkernels::cuda {

constexpr int kWarpTokensA8 = 32;
constexpr int kTokenTilesA8 = kWarpTokensA8 / 8;

// Two tokens share 128 bytes, all banks: the eight rows that an ldmatrix reads at a time meet each bank once.
QK_DEVICE uint32_t swizzled_a8(int token, int chunk) {
  return token * kStepColumns + ((chunk ^ (token >> 1 & 3)) << 4);
}

using SumsA8 = int32_t[kTilesPerStrip][kTokenTilesA8][4];

// totals += scale * sums, sums = 0. `index`: of row r of the lane among the step's scales.
QK_DEVICE void add_group(Totals<kTokenTilesA8>& totals, SumsA8& sums, const GroupFormat& f, uint32_t scales, int index,
                         int shift) {
  float scale[2 * kTilesPerStrip];
  load_eight(f.scale_type, scales, index, scale);
#pragma unroll
  for (int tile = 0; tile < kTilesPerStrip; ++tile) {
#pragma unroll
    for (int i = 0; i < kTokenTilesA8; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float sum = static_cast<float>(sums[tile][i][j] >> shift);
        totals[tile][i][j] = fmaf(sum, scale[2 * tile + j / 2], totals[tile][i][j]);
        sums[tile][i][j] = 0;
      }
    }
  }
}

template <int kWidth, bool kGroups32, int kWarpsN, int kWarpsM>
__global__ void __launch_bounds__(kWarpsN * kWarpsM * 32, 8 / (kWarpsN * kWarpsM)) gemm_a8(const GemmA8Arguments p) {
  QK_SHARED(shared);
  constexpr int kThreads = kWarpsN * kWarpsM * 32, kTokens = kWarpsM * kWarpTokensA8;
  constexpr int kCodeBytes = step_bytes(kWidth), kWordsOf16 = kWidth / 4;
  const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5;
  const int warp_n = warp % kWarpsN, warp_m = warp / kWarpsN;
  const int m0 = blockIdx.x * kTokens, strip0 = blockIdx.y * kWarpsN, split = blockIdx.z;
  const auto [begin, end] = Share::of(p.weight.steps, gridDim.z, split);

  // A stage: [strip][codes, scales], then the x tile, whose rows of 128 bytes the swizzle counts on.
  const int x_place = (kWarpsN * p.strip_bytes + 127) / 128 * 128;
  const int stage_bytes = x_place + kTokens * kStepColumns;
  const uint32_t stages = shared_address(shared);

  GroupWalk copied = GroupWalk::at(p.weight, begin), used = copied;
  auto copy_step = [&](int step, int slot) {
    const uint32_t to = stages + slot * stage_bytes;
    copy_strips<kWarpsN, kCodeBytes>(p.weight, p.format, strip0, p.weight.strips, step, copied.group, to, p.strip_bytes,
                                     thread, kThreads);
    copied.advance(p.weight);
#pragma unroll
    for (int i = thread; i < kTokens * 4; i += kThreads) {
      const int token = i >> 2, chunk = i & 3;
      const bool valid = m0 + token < p.out.M;
      const int64_t row = valid ? m0 + token : 0;
      cp_async16_or_zero(to + x_place + swizzled_a8(token, chunk),
                         p.x + (row * p.weight.steps + step) * kStepColumns + chunk * 16, valid);
    }
  };

  // Lane l asks for row l % 8 of matrix l / 8: 16 columns of eight tokens.
  uint32_t token_offset[kTokenTilesA8];
#pragma unroll
  for (int i = 0; i < kTokenTilesA8; ++i) {
    token_offset[i] = swizzled_a8(warp_m * kWarpTokensA8 + 8 * i + (lane & 7), lane >> 3);
  }
  Totals<kTokenTilesA8> totals = {};
  SumsA8 sums = {};

#pragma unroll 1
  for (int i = 0; i < kStagesA8 - 1; ++i) {
    if (begin + i < end) copy_step(begin + i, i);
    cp_async_commit();
  }
  int slot = 0;
  for (int step = begin; step < end; ++step) {
    cp_async_wait<kStagesA8 - 2>();
    __syncthreads();  // everybody's copies of this slot are there, and everybody is done with the slot before
    const int ahead = step + kStagesA8 - 1;
    if (ahead < end) copy_step(ahead, slot == 0 ? kStagesA8 - 1 : slot - 1);
    cp_async_commit();
    const uint32_t codes = stages + slot * stage_bytes + warp_n * p.strip_bytes;
    const uint32_t x = stages + slot * stage_bytes + x_place;

    uint32_t b[kTokenTilesA8][2][2];
#pragma unroll
    for (int i = 0; i < kTokenTilesA8; ++i) {
      uint32_t m[4];
      load_matrix_x4(m, x + token_offset[i]);
#pragma unroll
      for (int j = 0; j < 4; ++j) b[i][j / 2][j % 2] = m[j];
    }
    // 32 columns are half of a lane's 16 bytes in 4 bit, all of them in 8 bit, a row of tiles further. Halves read one
    // by one would be 8 bytes at a stride of 16: every bank twice.
    Words4 nibbles[kTilesPerStrip];
#pragma unroll
    for (int tile = 0; kWidth == 4 && tile < kTilesPerStrip; ++tile) {
      nibbles[tile] = load_shared16(codes + tile * kTileBytes + lane * 16);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int tile = 0; tile < kTilesPerStrip; ++tile) {
        uint32_t q[2][kWordsOf16], a[4];
        if constexpr (kWidth == 4) {
          q[0][0] = nibbles[tile].word[2 * half], q[1][0] = nibbles[tile].word[2 * half + 1];
        } else {
          const Words4 v = load_shared16(codes + (half * kTilesPerStrip + tile) * kTileBytes + lane * 16);
#pragma unroll
          for (int j = 0; j < 4; ++j) q[j / 2][j % 2] = v.word[j];
        }
        unpack_a8<kWidth>(q[0], q[1], p.shift, a);
#pragma unroll
        for (int i = 0; i < kTokenTilesA8; ++i) mma_s8(sums[tile][i], a, b[i][half]);
      }
      if constexpr (kGroups32) {
        add_group(totals, sums, p.format, codes + kCodeBytes, half * kStripRows + 8 * (lane >> 2), p.shift);
      }
    }
    if constexpr (!kGroups32) {
      if (used.left == 1 || step + 1 == end) {
        add_group(totals, sums, p.format, codes + kCodeBytes, 8 * (lane >> 2), p.shift);
      }
      used.advance(p.weight);
    }
    slot = slot == kStagesA8 - 1 ? 0 : slot + 1;
  }
  cp_async_wait<0>();
  __syncthreads();  // the exchange lies over stages that other warps may still read

  const uint32_t exchange = stages + warp * exchange_bytes(8);
  const int n = (strip0 + warp_n) * kStripRows + 2 * lane;
  const Columns columns = columns_of(p.out, n);
  turn_around<kTokenTilesA8>(totals, exchange, p.out, m0 + warp_m * kWarpTokensA8, n, lane,
                             [&](int m, float low, float high) {
                               store_a8(p, columns, split, m, low, high, bits_to_float(load_global4(p.x_scales + m)));
                             });
}

}  // namespace qkernels::cuda
