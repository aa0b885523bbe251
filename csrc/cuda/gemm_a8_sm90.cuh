// y = x W^T with int8 activations on Hopper's wgmma (m64nNk32.s32.s8.s8): sm_90a alone. multiply_a8.cuh has the
// operands and the numbers, gemm_sm90.cuh the ring of stages and the division into warpgroups: two strips a block, one
// a consumer warpgroup, weights in registers, and a producer that keeps a ring of steps of 64 columns on their way by
// TMA.
//
//   tokens  groups         stage, W8A8  W4A8       registers of a lane: totals + sums + fragments
//   64      32 and longer  12 KB x 16   8 KB x 16  32 + 32 + 8
//   128     32 and longer  16 KB x 12   12 x 16    64 + 64 + 8
//   256     one in K       24 KB x 8    20 x 10    128 + 8: int32 all the way, scaled once
//
// A token's step is a row of 64 bytes, swizzled within 64, so that steps and groups are those of the other kernels; a
// core matrix's eight rows of 16 bytes meet every bank once, as they do in rows of 128. Scales come with the last step
// of their group only: with one group in K they would be an eighth of what W4A8 reads.
//
// One wgmma is always in flight while the fragment of the next is unpacked, into the registers of the one that the wait
// has just seen finished; and a group begins and ends with none in flight, since where sums in flight meet sums at rest
// in one branch ptxas puts waits of its own. Predicted at 256 tokens: a wgmma is 128 cycles of the tensor cores (4096
// multiplications a cycle), 256 of both warpgroups, for which a lane unpacks 8 (W4A8) or 12 instructions.
#pragma once
#include "gemm_sm90.cuh"
#include "multiply_a8.cuh"

namespace qkernels::cuda {

constexpr int kTokenBytesA8 = kStepColumns, kStripsA8 = 2, kConsumersA8 = kStripsA8 * 128;

struct WgmmaA8Arguments {
  TensorMap x;  // as 16-bit values: [M, steps * 32], tiles of 32
  GemmA8Arguments gemm;
  int stage_bytes, stages;
};

#ifdef QK_WGMMA
// totals += scale * sums, once these are shifted back.
template <int kCount>
QK_DEVICE void add_sums(float (&totals)[kCount], int32_t (&sums)[kCount], float scale, float scale8, int shift) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    totals[i] = fmaf(static_cast<float>(sums[i] >> shift), i % 4 < 2 ? scale : scale8, totals[i]);
  }
}

// kOneGroup: the weight has one scale a row.
template <int kWidth, bool kGroups32, bool kOneGroup, int kTokens>
QK_DEVICE void consume_a8(const GemmA8Arguments& p, Ring ring, int begin, int end, int strip, int tile, int lane,
                          float (&totals)[kTokens / 2]) {
  if (begin >= end) return;
  int32_t sums[kTokens / 2];
  LaneCodes<kWidth> q;  // of the step that is being unpacked
  uint32_t a[2][4];     // 32 columns each
  auto codes = [&] { return ring.stage() + kTokens * kTokenBytesA8 + strip * p.strip_bytes; };
  auto open = [&] {
    mbarrier_wait(ring.full(), ring.parity);
    load_codes<kWidth>(q, codes(), tile, lane);
  };
  auto unpack = [&](int s) { unpack_a8<kWidth>(q[2 * s], q[2 * s + 1], p.shift, a[s]); };
  auto multiply = [&](int s, uint64_t x, bool accumulate) {
    wgmma_fence();
    wgmma_s8(sums, a[s], x + 2 * s, accumulate);  // 32 bytes of k a time
    wgmma_commit();
  };
  auto load_scales = [&](uint32_t scales, int group, float& scale, float& scale8) {
    load_pair(p.format.scale_type, scales, group * kStripRows + 8 * (lane >> 2) + 2 * tile, scale, scale8);
  };
  uint32_t before = 0;  // barrier of the step before, whose last wgmma may be in flight; or 0
  auto release = [&] {
    __syncwarp();  // all lanes have read the stage
    if (lane == 0 && before != 0) mbarrier_arrive(before);
  };

  open();
  unpack(0);
  GroupWalk walk = GroupWalk::at(p.weight, begin);
  for (int step = begin; step < end;) {
    const int last = kOneGroup || step + walk.left > end ? end : step + walk.left;
    uint32_t scales = 0;
    float scale, scale8;
    for (bool accumulate = false; step < last; ++step, accumulate = true) {
      const uint64_t x = wgmma_descriptor<kTokenBytesA8>(ring.stage());
      const uint32_t empty = ring.empty();
      scales = codes() + step_bytes(kWidth);
      multiply(0, x, accumulate);
      if constexpr (kGroups32) {
        unpack(1);
        load_scales(scales, 0, scale, scale8);
        wgmma_wait<0>();
        wgmma_results(sums);
        add_sums(totals, sums, scale, scale8, p.shift);
      } else {
        wgmma_wait<1>();  // the step before: its stage is free, and its second fragment is
        release();
        unpack(1);
      }
      multiply(1, x, !kGroups32);
      if constexpr (!kGroups32) wgmma_wait<1>();  // the first fragment is free
      ring.advance();
      if (step + 1 < end) {
        open();
        unpack(0);
      }
      before = empty;
      // A short group ends with its step (steps_per_group is 1). Said here, because a second round would unpack into
      // the fragment that the second wgmma of this step still reads, and would add its sums to another group's.
      if constexpr (kGroups32) {
        ++step;
        break;
      }
    }
    walk.left = p.weight.steps_per_group;
    load_scales(scales, kGroups32 ? 1 : 0, scale, scale8);
    wgmma_wait<0>();
    wgmma_results(sums);
    release();
    before = 0;
    add_sums(totals, sums, scale, scale8, p.shift);
    if constexpr (kOneGroup) break;
  }
}
#endif

template <int kWidth, bool kGroups32, int kTokens>
__global__ void __launch_bounds__(kConsumersA8 + 128, 1) gemm_a8_wgmma(const __grid_constant__ WgmmaA8Arguments args) {
#ifdef QK_WGMMA
  QK_SHARED(shared);
  const GemmA8Arguments& p = args.gemm;
  const int warpgroup = threadIdx.x / 128, warp = threadIdx.x / 32, tile = warp % 4, lane = threadIdx.x % 32;
  const int split = blockIdx.z;
  const auto [begin, end] = Share::of(p.weight.steps, gridDim.z, split);
  const uint32_t barriers = shared_address(shared);
  const uint32_t slots = (barriers + args.stages * 16 + kSwizzleBytes - 1) / kSwizzleBytes * kSwizzleBytes;
  const Ring ring{slots, barriers, args.stage_bytes, args.stages};

  if (threadIdx.x == 0) {
    for (Ring r = ring; r.parity == 0; r.advance()) {
      mbarrier_init(r.full(), 1 + kStripsA8);  // x, and each strip
      mbarrier_init(r.empty(), kConsumersA8 / 32);
    }
    fence_async_proxy();
  }
  __syncthreads();

  if (warpgroup == kStripsA8) {
    give_registers<24>();
    const int role = warp - kConsumersA8 / 32;  // 0: x, and then the strips
    if (role <= kStripsA8 && elect_one()) {
      if (role == 0) {
        produce_x(args.x, ring, begin * (kStepColumns / 2), kStepColumns / 2, blockIdx.x * kTokens, 0,
                  kTokens * kTokenBytesA8, end - begin);
      }
#pragma unroll
      for (int s = 0; s < kStripsA8; ++s) {
        if (role == 1 + s) {
          produce_strip<step_bytes(kWidth), true>(p.weight, p.format, ring, kTokens * kTokenBytesA8 + s * p.strip_bytes,
                                                  0, blockIdx.y * kStripsA8 + s, begin, end);
        }
      }
    }
    return;
  }
  take_registers<240>();
  float totals[kTokens / 2] = {};
  consume_a8<kWidth, kGroups32, kTokens == 256, kTokens>(p, ring, begin, end, warpgroup, tile, lane, totals);

  // Totals are turned around over the stages, once nobody reads those: [token][64 rows] of each warpgroup.
  named_barrier_sync(1, kConsumersA8);  // both warpgroups are done with the stages
  const uint32_t exchange = slots + warpgroup * exchange_bytes(kTokens);
#pragma unroll
  for (int i = 0; i < kTokens / 2; ++i) {
    const int token = i / 4 * 8 + lane % 4 * 2 + i % 2, row = tile * kTileRows + lane / 4 + i % 4 / 2 * 8;
    store_shared4(exchange + (token * kExchangeRow + row) * 4, float_to_bits(totals[i]));
  }
  named_barrier_sync(2 + warpgroup, 128);  // the four warps' rows are there
  const int n = (blockIdx.y * kStripsA8 + warpgroup) * kStripRows + 2 * lane;
  const Columns columns = columns_of(p.out, n);
#pragma unroll 1
  for (int first = 0; first < kTokens; first += 128) {  // a warp's 32 tokens of these have their scales in its lanes
    const int mine = blockIdx.x * kTokens + first + 4 * lane + tile;
    const uint32_t x_scales = mine < p.out.M ? load_global4(p.x_scales + mine) : 0;
    for (int i = 0; i < 32; ++i) {
      const int token = first + 4 * i + tile, m = blockIdx.x * kTokens + token;
      const float x_scale = bits_to_float(shuffle(x_scales, i));
      if (token < kTokens && m < p.out.M && n < p.out.N_pad) {
        const Words2 v = load_shared8(exchange + (token * kExchangeRow + 2 * lane) * 4);
        store_a8(p, columns, split, m, bits_to_float(v.word[0]), bits_to_float(v.word[1]), x_scale);
      }
    }
  }
#else
  asm volatile("trap;");
#endif
}

}  // namespace qkernels::cuda
