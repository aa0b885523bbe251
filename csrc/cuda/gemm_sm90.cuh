// y = x W^T for many tokens, on Hopper's wgmma: sm_90a alone.
//
// A block computes two strips (64 rows each) for kTokens tokens: one warpgroup a strip, whose four warps hold a strip's
// four tiles of mma_tile as the A operand, in registers; x is B, in shared memory. A third warpgroup is the producer:
// one of its threads keeps kWgmmaStages steps of 64 columns on their way, x by TMA tiles (swizzled, zeros past M and
// K), codes, scales and zeros by bulk copies. mbarriers `full` and `empty` of each stage are all that joins the two.
//
//   tokens  shared memory a stage, 4 bit, g128   registers of a lane: totals + sums of the group + fragments
//   64      8 KB + 4.3 KB                        32 + 32 + 16
//   128     16 KB + 4.3 KB                       64 + 64 + 16
//
// A fragment is converted while two wgmma are in flight (consume, below), so within a group the tensor cores do not
// drain. Sums over a group stay in the tensor core's accumulators; scale and total meet in fp32 once a group
// (multiply.cuh has the numbers). Predicted, at 128 tokens and g128: 8 wgmma of 64 cycles a group and warpgroup,
// against 64 FMA and 2 x 36 instructions of conversion a lane; the sibling warpgroup covers the drain at a group's end.
// Unmeasured.
//
// Short groups and floating zeros (kShortGroups) take a plain path: 16 columns, wait, scale; and a product with a
// matrix of ones for the sums of x.
#pragma once
#include "copy.cuh"
#include "output.cuh"
#include "tensor_map.h"

// Only nvcc for sm_90a has these instructions; elsewhere the kernel is a trap that heuristics.h never chooses.
#if defined(QKERNELS_HOST) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define QK_WGMMA 1
#endif

namespace qkernels::cuda {

constexpr int kWgmmaStrips = 2, kWgmmaStages = 6;
constexpr int kWgmmaConsumers = kWgmmaStrips * 128, kWgmmaThreads = kWgmmaConsumers + 128;
constexpr int kSwizzleBytes = 1024;  // a swizzled tile is aligned to the period of its swizzle

struct WgmmaArguments {
  TensorMap x;
  Weight weight;
  GroupFormat format;
  Output out;
  int strip_bytes;  // of a stage: codes, scales, zeros of one strip
  int stage_bytes;
};

// The stages of a block, a ring; `parity` is that of the phase that the current slot's `full` barrier is in.
struct Ring {
  uint32_t slots, barriers;
  int stage_bytes;
  int slot = 0;
  uint32_t parity = 0;

  QK_DEVICE uint32_t stage() const { return slots + slot * stage_bytes; }
  QK_DEVICE uint32_t full() const { return barriers + slot * 16; }
  QK_DEVICE uint32_t empty() const { return full() + 8; }
  QK_DEVICE void advance() {
    if (++slot == kWgmmaStages) slot = 0, parity ^= 1;
  }
};

#ifdef QK_WGMMA
template <class T, int kCount>
QK_DEVICE void wgmma(float (&d)[kCount], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  if constexpr (T::kType == Type::kHalf) {
    wgmma_f16(d, a, b, accumulate);
  } else {
    wgmma_bf16(d, a, b, accumulate);
  }
}

// By one thread.
template <class F, int kTokens>
QK_DEVICE void produce(const WgmmaArguments& p, Ring ring, int begin, int end) {
  const Weight& w = p.weight;
  const GroupFormat& f = p.format;
  GroupWalk walk = GroupWalk::at(w, begin);
  for (int step = begin; step < end; ++step) {
    mbarrier_wait(ring.empty(), ring.parity ^ 1);
    const uint32_t full = ring.full();
    mbarrier_arrive_expect(full, kTokens * kTokenBytes + kWgmmaStrips * p.strip_bytes);
    copy_tile(ring.stage(), &p.x, step * kStepColumns, blockIdx.x * kTokens, full);
#pragma unroll
    for (int s = 0; s < kWgmmaStrips; ++s) {
      const int wanted = blockIdx.y * kWgmmaStrips + s;
      const int strip = wanted < w.strips ? wanted : w.strips - 1;  // past N: any strip, whose rows are not stored
      const uint32_t to = ring.stage() + kTokens * kTokenBytes + s * p.strip_bytes;
      const int64_t place = static_cast<int64_t>(strip) * w.steps + step;
      copy_bulk(to, w.codes + place * F::kStepBytes, F::kStepBytes, full);
      const int64_t first = (static_cast<int64_t>(strip) * w.groups + walk.group) * kStripRows;
      copy_bulk(to + F::kStepBytes, w.scales + first * size_of(f.scale_type), f.scale_bytes, full);
      if (f.zero_bytes != 0) {
        copy_bulk(to + F::kStepBytes + f.scale_bytes, w.zeros + first * size_of(f.zero_type), f.zero_bytes, full);
      }
    }
    walk.advance(w);
    ring.advance();
  }
}

// A lane's codes for 16 columns of its warp's tile, to the fragment.
template <class F>
QK_DEVICE void load_fragment(uint32_t codes, int tile, int s, int lane, const Zeros& z, uint32_t (&a)[4]) {
  constexpr int kWords = F::kWidth / 4;
  const int word = s * kWords;
  const uint32_t place = codes + (word / 4 * kTilesPerStrip + tile) * kTileBytes + lane * 16 + word % 4 * 4;
  uint32_t q[kWords];
  if constexpr (kWords == 1) {
    q[0] = load_shared4(place);
  } else {
    const Words2 v = load_shared8(place);
    q[0] = v.word[0], q[1] = v.word[1];
  }
  Codes<typename F::T, F::kWidth>::unpack(q, z, a);
}

template <int kCount>
QK_DEVICE void add_scaled(float (&totals)[kCount], const float (&sums)[kCount], float scale, float scale8) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) totals[i] = fmaf(sums[i], i % 4 < 2 ? scale : scale8, totals[i]);
}

// Groups of 64 columns and more, integer zeros. Fragment s of a step is converted when two more are behind it: while
// the wgmma of the two before it are in flight, and into the registers of the one that the wait has just seen finished.
// The loop over the steps of a group touches no sums but through wgmma, and the loop over the groups begins and ends
// with none in flight: where sums in flight met sums at rest in one branch, ptxas put a wait of its own (C7517).
template <class F, int kTokens>
QK_DEVICE void consume(const WgmmaArguments& p, Ring ring, int begin, int end, int strip, int tile, int lane,
                       float (&totals)[kTokens / 2]) {
  using T = typename F::T;
  if (begin >= end) return;
  GroupWalk walk = GroupWalk::at(p.weight, begin);
  float sums[kTokens / 2];
  uint32_t a[kStepsOf16][4];
  LaneCodes<F::kWidth> q;  // of the step that is being converted
  RowGroup group;
  Zeros zeros;
  auto open = [&](const Ring& at) {
    mbarrier_wait(at.full(), at.parity);
    const uint32_t codes = at.stage() + kTokens * kTokenBytes + strip * p.strip_bytes;
    load_codes<F::kWidth>(q, codes, tile, lane);
    group = load_group(p.format, codes + F::kStepBytes, 8 * (lane >> 2) + 2 * tile);
    zeros = Codes<T, F::kWidth>::zeros(group.zero, group.zero8);
  };
  auto convert = [&](int s) { Codes<T, F::kWidth>::unpack(q[s], zeros, a[s]); };

  open(ring);
  convert(0), convert(1);
  uint32_t before = 0;  // barrier of the step before, whose last wgmma may be in flight; or 0
  auto release = [&] {
    __syncwarp();  // all lanes have read the stage
    if (lane == 0 && before != 0) mbarrier_arrive(before);
  };
  for (int step = begin; step < end;) {
    const int last = step + walk.left < end ? step + walk.left : end;
    const float scale = group.scale, scale8 = group.scale8;
    bool opens = true;
    for (; step < last; ++step) {
      const uint64_t x = wgmma_descriptor<kTokenBytes>(ring.stage());
      const uint32_t empty = ring.empty();
      ring.advance();
#pragma unroll
      for (int s = 0; s < kStepsOf16; ++s) {
        wgmma_fence();
        wgmma<T>(sums, a[s], x + 2 * s, !opens || s > 0);  // 32 bytes of k a time
        wgmma_commit();
        wgmma_wait<2>();  // the one before the last: its fragment is free
        if (s == 1) release();
        if (s < 2) {
          convert(s + 2);
        } else if (step + 1 < end) {
          if (s == 2) open(ring);
          convert(s - 2);
        }
      }
      opens = false;
      before = empty;
    }
    walk.left = p.weight.steps_per_group;
    wgmma_wait<0>();
    wgmma_results(sums);
    add_scaled(totals, sums, scale, scale8);
  }
}

// Any group and any zero.
template <class F, int kTokens>
QK_DEVICE void consume_short(const WgmmaArguments& p, Ring ring, int begin, int end, int strip, int tile, int lane,
                             float (&totals)[kTokens / 2]) {
  using T = typename F::T;
  float sums[kTokens / 2];
  const uint32_t ones[4] = {T::kOnes, T::kOnes, T::kOnes, T::kOnes};
  auto multiply = [&](const uint32_t (&a)[4], uint64_t x, float scale, float scale8) {
    wgmma_fence();
    wgmma<T>(sums, a, x, false);
    wgmma_commit();
    wgmma_wait<0>();
    wgmma_results(sums);
    add_scaled(totals, sums, scale, scale8);
  };
  for (int step = begin; step < end; ++step) {
    mbarrier_wait(ring.full(), ring.parity);
    const uint32_t codes = ring.stage() + kTokens * kTokenBytes + strip * p.strip_bytes;
    const uint64_t x = wgmma_descriptor<kTokenBytes>(ring.stage());
#pragma unroll
    for (int s = 0; s < kStepsOf16; ++s) {
      const int group = s * p.format.groups_per_step / kStepsOf16;
      const RowGroup g = load_group(p.format, codes + F::kStepBytes, group * kStripRows + 8 * (lane >> 2) + 2 * tile);
      uint32_t a[4];
      load_fragment<F>(codes, tile, s, lane, Codes<T, F::kWidth>::zeros(g.zero, g.zero8), a);
      multiply(a, x + 2 * s, g.scale, g.scale8);
      if (has_rest(p.format)) multiply(ones, x + 2 * s, g.rest, g.rest8);
    }
    __syncwarp();  // all lanes have read the stage
    if (lane == 0) mbarrier_arrive(ring.empty());
    ring.advance();
  }
}
#endif

template <class F, int kTokens>
__global__ void __launch_bounds__(kWgmmaThreads, 1) gemm_wgmma(const __grid_constant__ WgmmaArguments p) {
#ifdef QK_WGMMA
  QK_SHARED(shared);
  const int warpgroup = threadIdx.x / 128, warp = threadIdx.x / 32, tile = warp % 4, lane = threadIdx.x % 32;
  const int split = blockIdx.z;
  const auto [begin, end] = Share::of(p.weight.steps, gridDim.z, split);
  const uint32_t slots = (shared_address(shared) + kSwizzleBytes - 1) / kSwizzleBytes * kSwizzleBytes;
  const Ring ring{slots, slots + kWgmmaStages * p.stage_bytes, p.stage_bytes};

  if (threadIdx.x == 0) {
    for (Ring r = ring; r.parity == 0; r.advance()) {
      mbarrier_init(r.full(), 1);
      mbarrier_init(r.empty(), kWgmmaConsumers / 32);
    }
    fence_async_proxy();
  }
  __syncthreads();

  if (warpgroup == kWgmmaStrips) {
    give_registers<24>();
    if (threadIdx.x == kWgmmaConsumers) produce<F, kTokens>(p, ring, begin, end);
    return;
  }
  take_registers<240>();
  float totals[kTokens / 2] = {};
  if constexpr (F::kShortGroups) {
    consume_short<F, kTokens>(p, ring, begin, end, warpgroup, tile, lane, totals);
  } else {
    consume<F, kTokens>(p, ring, begin, end, warpgroup, tile, lane, totals);
  }

  // Totals are turned around over the stages, once nobody reads those: [token][64 rows] of each warpgroup.
  named_barrier_sync(1, kWgmmaConsumers);  // both warpgroups are done with the stages
  const uint32_t exchange = slots + warpgroup * exchange_bytes(kTokens);
#pragma unroll
  for (int i = 0; i < kTokens / 2; ++i) {
    const int token = i / 4 * 8 + lane % 4 * 2 + i % 2, row = tile * kTileRows + lane / 4 + i % 4 / 2 * 8;
    store_shared4(exchange + (token * kExchangeRow + row) * 4, float_to_bits(totals[i]));
  }
  named_barrier_sync(2 + warpgroup, 128);  // the four warps' rows are there
  const int n = (blockIdx.y * kWgmmaStrips + warpgroup) * kStripRows + 2 * lane;
  for (int token = tile; token < kTokens; token += 4) {
    const int m = blockIdx.x * kTokens + token;
    const Words2 v = load_shared8(exchange + (token * kExchangeRow + 2 * lane) * 4);
    if (m < p.out.M && n < p.out.N_pad) {
      store_part<typename F::T>(p.out, split, gridDim.z, m, n, bits_to_float(v.word[0]), bits_to_float(v.word[1]));
    }
  }
#else
  asm volatile("trap;");
#endif
}

}  // namespace qkernels::cuda
