// y = x W^T for many tokens, on Hopper's wgmma: sm_90a alone.
//
// A block computes one strip (64 rows) for up to 32 tokens, two for more: one warpgroup a strip, whose four warps hold
// a strip's four tiles of mma_tile as the A operand, in registers; x is B, in shared memory. A last warpgroup keeps a
// ring of steps of 64 columns on their way: a thread for x by TMA tiles (swizzled, zeros past M and K) and one for each
// strip's codes, and its scales and zeros with the first step of their group, by bulk copies. Each announces its own
// bytes. mbarriers `full` and `empty` of each stage are all that joins producers and consumers.
//
//   rows x tokens   stage, 4 bit, g128   stages   registers of a lane: totals + sums of the group + fragments
//   64 x 16         2 KB + 2.1 KB        16       8 + 8 + 16
//   64 x 32         4 KB + 2.1 KB        15       16 + 16 + 16
//   128 x 64        8 KB + 4.3 KB        16       32 + 32 + 16
//   128 x 128       16 KB + 4.3 KB       10       64 + 64 + 16
//   128 x 256       32 KB + 4.3 KB       6        128 + 0 + 16
//
// Two ways to apply scales (kScaled). Where two accumulators fit and groups have 64 columns or more: sums over a group
// stay in the tensor core's accumulators, and scale and total meet in fp32 once a group (multiply.cuh has the numbers).
// Predicted, at 128 tokens and g128: 8 wgmma of 64 cycles a group and warpgroup, against 64 FMA and 2 x 36 instructions
// of conversion a lane; the sibling warpgroup covers the drain at a group's end. With 256 tokens, with groups of 16 and
// 32, with floating zeros, and where codes are in planes or no integers, fragments are scaled (scaled_fragments.cuh):
// each weight is rounded once to the type of the activations, as dequantize + mm does, and nothing drains before the
// end of K.
//
// Stacked experts are the same instances: a table says which rows of x and which expert's strips are a block's, and the
// fp32 sums go to memory. Where one product has gate and up, a block of two strips takes one of each and stores what
// the activation makes of them.
#pragma once
#include "activate.cuh"
#include "copy.cuh"
#include "output.cuh"
#include "scaled_fragments.cuh"
#include "sum_again.cuh"
#include "tensor_map.h"

// Only nvcc for sm_90a has these instructions; elsewhere the kernel is a trap that heuristics.h never chooses.
#if defined(QKERNELS_HOST) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define QK_WGMMA 1
#endif

namespace qkernels::cuda {

constexpr int kSwizzleBytes = 1024;  // a swizzled tile is aligned to the period of its swizzle

// A family of weights and activations that one kernel instance handles. kScaled: fragments are, of integers of 2 to 6
// bits and tables (kWidth 4, kNarrow) or of 8 bits of any kind; else sums of a group are, of integers of kWidth bits.
template <class Activation, int kWidth_, bool kScaled_>
struct WgmmaFormat {
  using T = Activation;
  static constexpr int kWidth = kWidth_;
  static constexpr bool kScaled = kScaled_, kNarrow = kScaled && kWidth == 4;
  static constexpr int kStepBytes = kNarrow ? 0 : step_bytes(kWidth);  // 0: as the weight says
};

struct WgmmaArguments {
  TensorMap x;
  Weight weight;
  GroupFormat format;
  Activations plain_x;  // what `x` maps
  Output out;
  bool coded;       // codes are no integers
  int strip_bytes;  // of a stage: codes, scales, zeros of one strip
  int stage_bytes;
  int stages;
  bool clusters;  // the parts of K are a cluster, which adds them
  // Of stacked experts: a table; how many blocks share one's rows; what becomes of gate and up. From one strip of a
  // block to the next.
  RowBlocks rows;
  int along_n, apart;
  GateUp gate_up;
};

// Where a block is: its rows of x and y, an expert, and which of its strips is the first.
struct WgmmaPlace {
  int row, end, expert, strip;

  QK_DEVICE int first_strip(const Weight& w) const { return expert * w.strips; }
};

// Asked for again behind the loop over K, so that it holds no registers in there. Of experts, blocks with the same rows
// lie side by side: x comes from memory once and is in L2 for the others, as are an expert's strips for its next rows.
template <int kTokens>
QK_DEVICE WgmmaPlace place_of(const WgmmaArguments& p) {
  constexpr int kStrips = wgmma_strips(kTokens);
  const int block = blockIdx.x;
  if (!p.rows.given()) return {block * kTokens, p.out.M, 0, static_cast<int>(blockIdx.y) * kStrips};
  const int along_m = block / p.along_n, along_n = block - along_m * p.along_n;
  const RowBlock rows = row_block(p.rows, along_m);
  return {rows.x_row, rows.x_row + rows.count, rows.expert, p.apart == 1 ? along_n * kStrips : along_n};
}

// The stages of a block, a ring; `parity` is that of the phase that the current slot's `full` barrier is in.
struct Ring {
  uint32_t slots, barriers;
  int stage_bytes, stages;
  int slot = 0;
  uint32_t parity = 0;

  QK_DEVICE uint32_t stage() const { return slots + slot * stage_bytes; }
  QK_DEVICE uint32_t full() const { return barriers + slot * 16; }
  QK_DEVICE uint32_t empty() const { return full() + 8; }
  QK_DEVICE void advance() {
    if (++slot == stages) slot = 0, parity ^= 1;
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

// By one thread: tiles of x from `column` on, `bytes` each. Where experts have rows, matrix i of x is the kTokens rows
// in front of row i: a block whose rows end there begins so far down in it that it reads its own, and zeros for the
// others.
QK_DEVICE void produce_x(const TensorMap& x, Ring ring, int column, int columns, int row, int matrix, int bytes,
                         int steps) {
  for (; steps > 0; --steps, column += columns) {
    mbarrier_wait(ring.empty(), ring.parity ^ 1);
    mbarrier_arrive_expect(ring.full(), bytes);
    copy_tile(ring.stage(), &x, column, row, matrix, ring.full());
    ring.advance();
  }
}

// By one thread: the codes of a strip, counted from the expert's `first`, to `place` of each stage, and behind them the
// scales and zeros of a group in the first of its steps here, or (kInLast) in the last; and outer factors in every
// step. kStepBytes 0: as many as the weight has.
template <int kStepBytes, bool kInLast>
QK_DEVICE void produce_strip(const Weight& w, const GroupFormat& f, Ring ring, int place, int first, int wanted,
                             int begin, int end) {
  const int strip = first + (wanted < w.strips ? wanted : w.strips - 1);  // past N: any, whose rows are not stored
  GroupWalk walk = GroupWalk::at(w, begin);
  const int code_bytes = kStepBytes == 0 ? f.code_bytes : kStepBytes;
  const uint8_t* codes = w.codes + (static_cast<int64_t>(strip) * w.steps + begin) * code_bytes;
  const int64_t value = (static_cast<int64_t>(strip) * w.groups + walk.group) * kStripRows;
  const uint8_t *scales = w.scales + value * f.scale_size, *zeros = w.zeros + value * f.zero_size;
  const int group_bytes = f.scale_bytes + f.zero_bytes;
  const bool has_outer = kStepBytes == 0 && f.outer_bytes != 0;
  const int outer_bytes = has_outer ? f.outer_bytes + f.outer_zero_bytes : 0;
  bool opens = true;  // the step is the first of its group here
  for (int step = begin; step < end; ++step) {
    const bool brings_group = kInLast ? walk.left == 1 || step + 1 == end : opens;
    mbarrier_wait(ring.empty(), ring.parity ^ 1);  // its codes have been read
    const uint32_t full = ring.full(), to = ring.stage() + place;
    mbarrier_arrive_expect(full, code_bytes + (brings_group ? group_bytes : 0) + outer_bytes);
    copy_bulk(to, codes, code_bytes, full);
    codes += code_bytes;
    if (brings_group) {
      copy_bulk(to + code_bytes, scales, f.scale_bytes, full);
      if (f.zero_bytes != 0) copy_bulk(to + code_bytes + f.scale_bytes, zeros, f.zero_bytes, full);
      scales += f.scale_bytes, zeros += f.zero_bytes;
    }
    if (has_outer) {
      const int64_t outer = static_cast<int64_t>(strip) * w.outers + step / kStepsOfOuter;
      const uint32_t behind = to + code_bytes + group_bytes;
      copy_bulk(behind, w.outer + outer * f.outer_bytes, f.outer_bytes, full);
      if (f.outer_zero_bytes != 0) {
        copy_bulk(behind + f.outer_bytes, w.outer_zeros + outer * f.outer_zero_bytes, f.outer_zero_bytes, full);
      }
    }
    opens = walk.left == 1;
    walk.advance(w);
    ring.advance();
  }
}

template <int kCount>
QK_DEVICE void add_scaled(float (&totals)[kCount], const float (&sums)[kCount], float scale, float scale8) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) totals[i] = fmaf(sums[i], i % 4 < 2 ? scale : scale8, totals[i]);
}

// What a warp of a consumer warpgroup keeps from step to step. Fragment s of a step is converted while the wgmma of the
// two before it are in flight, into the registers of the one that the wait has just seen finished.
template <class F, int kTokens>
struct Consumer {
  using T = typename F::T;
  const WgmmaArguments& p;
  Ring ring;  // at the step that is multiplied next
  int end, lane;
  // From a stage's start: the lane's codes (kNarrow: and those in the second plane), and the strip's scales; and of its
  // first row among the scales of a group.
  uint32_t to_codes, to_high, to_scales, first_row;
  uint64_t first_x;     // descriptor of the first stage's x
  int length;           // of the group that begins next, in steps
  int fresh_in = 0;     // steps until then: the step that begins it brings its scales and zeros
  uint32_t before = 0;  // `empty` of the step before, whose last wgmma may be in flight; or 0
  uint32_t scales = 0;  // of the step that is being converted: where they are, its codes, and the group
  std::conditional_t<F::kNarrow, NarrowCodes, LaneCodes<F::kWidth>> q{};
  [[maybe_unused]] OuterPairs outer{};
  RowGroup group{};
  Zeros zeros{};
  uint32_t a[kStepsOf16][4]{};

  QK_DEVICE void load(int of) {
    const int index = of * kStripRows + static_cast<int>(first_row);
    if constexpr (F::kScaled) {
      group = load_any_group<F::kNarrow>(p.format, scales, index, outer);
    } else {
      group = load_group(p.format, scales, index);
    }
    if constexpr (F::kNarrow) {
      zeros = narrow_zeros<T>(group.zero, group.zero8);
    } else {
      zeros = Codes<T, F::kWidth>::zeros(group.zero, group.zero8);
    }
  }
  QK_DEVICE void open() {
    mbarrier_wait(ring.full(), ring.parity);
    scales = ring.stage() + to_scales;
    if constexpr (F::kNarrow) {
      q.load(p.weight.width, ring.stage() + to_codes, ring.stage() + to_high);
      if (p.format.outer_bytes != 0) outer.load(p.format, scales, static_cast<int>(first_row));
    } else {
      load_codes<F::kWidth>(q, ring.stage() + to_codes, 0, 0);
    }
    if (fresh_in == 0) {
      load(0);
      fresh_in = length, length = p.weight.steps_per_group;
    }
    --fresh_in;
  }
  QK_DEVICE void convert(int s) {
    if constexpr (F::kScaled) {
      const int groups = p.format.groups_per_step;  // 1, 2 or 4
      if (groups > 1 && s > 0 && s * groups % kStepsOf16 == 0) load(s * groups / kStepsOf16);
    }
    if constexpr (F::kNarrow) {
      unpack_narrow<T>(p.format, p.weight.width, p.coded, q, s, zeros, a[s]);
    } else if constexpr (F::kScaled) {
      unpack_wide<T>(p.format, p.coded, q[s], zeros, a[s]);
    } else {
      Codes<T, F::kWidth>::unpack(q[s], zeros, a[s]);
    }
    if constexpr (F::kScaled) scale_fragment<T>(a[s], group);
  }
  QK_DEVICE void release() {
    __syncwarp();  // all lanes have read the stage
    if (lane == 0 && before != 0) mbarrier_arrive(before);
  }
  QK_DEVICE void start() { open(), convert(0), convert(1); }

  // d += the weights of these 64 columns times x; or =, if it `opens`.
  QK_DEVICE void multiply(float (&d)[kTokens / 2], int step, bool opens) {
    // Addresses of shared memory in units of 16 do not carry out of their 14 bits of the descriptor's lower word.
    const uint64_t x = (first_x & ~uint64_t{0xffffffff}) |
                       (static_cast<uint32_t>(first_x) + ring.slot * (static_cast<uint32_t>(p.stage_bytes) / 16));
    const uint32_t empty = ring.empty();
    ring.advance();
#pragma unroll
    for (int s = 0; s < kStepsOf16; ++s) {
      wgmma_fence();
      wgmma<T>(d, a[s], x + 2 * s, !opens || s > 0);  // 32 bytes of k a time
      wgmma_commit();
      wgmma_wait<2>();  // the one before the last: its fragment is free
      if (s == 1) release();
      if (s < 2) {
        convert(s + 2);
      } else if (step + 1 < end) {
        if (s == 2) open();
        convert(s - 2);
      }
    }
    before = empty;
  }
};

// The loop over the steps of a group touches no sums but through wgmma, and the loop over groups begins and ends with
// none in flight: where sums in flight met sums at rest in one branch, ptxas put in a wait of its own (C7517).
template <class F, int kTokens>
QK_DEVICE void consume(Consumer<F, kTokens> consumer, int begin, int end, float (&totals)[kTokens / 2]) {
  if (begin >= end) return;
  consumer.start();
  if constexpr (F::kScaled) {
    for (int step = begin; step < end; ++step) consumer.multiply(totals, step, false);
    wgmma_wait<0>();
    wgmma_results(totals);
  } else {
    int left = GroupWalk::at(consumer.p.weight, begin).left;
    float sums[kTokens / 2];
    for (int step = begin; step < end;) {
      const int last = step + left < end ? step + left : end;
      const float scale = consumer.group.scale, scale8 = consumer.group.scale8;
      bool opens = true;
      for (; step < last; ++step) consumer.multiply(sums, step, opens), opens = false;
      left = consumer.p.weight.steps_per_group;
      wgmma_wait<0>();
      wgmma_results(sums);
      add_scaled(totals, sums, scale, scale8);
    }
  }
}

// Of stacked experts: the activation of the sums of a block's two strips, gate's rows and up's, which lie at `exchange`
// and `behind` bytes on; by eight warps. `mend` takes a row, a column of y, a part of K and two sums.
template <class T, class Mend>
QK_DEVICE void store_gate_up(const WgmmaArguments& p, const WgmmaPlace& here, int gate, int up, uint32_t exchange,
                             int behind, int warp, int lane, const Mend& mend) {
  Output out = p.out;
  if (out.bias_type != Type::kNone) out.bias += static_cast<int64_t>(here.expert) * out.N * size_of(out.bias_type);
  const Columns gates = columns_of(out, gate), ups = columns_of(out, up);
  const GateUp& made = p.gate_up;
  const Share steps{0, p.weight.steps};
#pragma unroll 1
  for (int m = here.row + warp; m < here.end; m += 8) {
    const uint32_t at = exchange + ((m - here.row) * kExchangeRow + 2 * lane) * 4;
    const Words2 g = load_shared8(at), u = load_shared8(at + behind);
    float low = bits_to_float(g.word[0]), high = bits_to_float(g.word[1]);
    float up_low = bits_to_float(u.word[0]), up_high = bits_to_float(u.word[1]);
#pragma unroll 1
    for (int part = 0; part < 2; ++part) {  // one copy of what mends, for which both pairs change their places twice
      mend(m, part == 0 ? gate : up, steps, low, high);
      const float first = low, second = high;
      low = up_low, high = up_high, up_low = first, up_high = second;
    }
    low = gated(made.activation, made.alpha, made.limit, low + gates.low_bias, up_low + ups.low_bias);
    high = gated(made.activation, made.alpha, made.limit, high + gates.high_bias, up_high + ups.high_bias);
    store_global4(made.to + static_cast<int64_t>(m) * (out.N / 2) + gate, T::pack(low, high));
  }
}
#endif

template <class F, int kTokens>
__global__ void __launch_bounds__(wgmma_threads(kTokens), wgmma_blocks(kTokens))
    gemm_wgmma(const __grid_constant__ WgmmaArguments p) {
#ifdef QK_WGMMA
  QK_SHARED(shared);
  constexpr int kStrips = wgmma_strips(kTokens), kConsumers = kStrips * 128;
  const int warpgroup = threadIdx.x / 128, warp = threadIdx.x / 32, tile = warp % 4, lane = threadIdx.x % 32;
  const int split = blockIdx.z;
  const Share share = Share::of(p.weight.steps, gridDim.z, split);
  uint32_t last = share.end;
  keep(last);  // or it is computed again in every step
  const int begin = share.begin, end = static_cast<int>(last);
  const uint32_t slots = (shared_address(shared) + kSwizzleBytes - 1) / kSwizzleBytes * kSwizzleBytes;
  const Ring ring{slots, slots + p.stages * p.stage_bytes, p.stage_bytes, p.stages};
  const WgmmaPlace here = place_of<kTokens>(p);
  if (p.rows.given() && here.row >= here.end) return;  // a slot that is left over

  if (threadIdx.x == 0) {
    for (Ring r = ring; r.parity == 0; r.advance()) {
      mbarrier_init(r.full(), 1 + kStrips);  // x, and each strip
      mbarrier_init(r.empty(), kConsumers / 32);
    }
    fence_async_proxy();
  }
  __syncthreads();

  if (warpgroup == kStrips) {
    give_registers<24>();
    const int role = warp - kConsumers / 32;  // 0: x, and then the strips
    if (role <= kStrips && elect_one()) {
      if (role == 0) {
        const bool dense = !p.rows.given();
        produce_x(p.x, ring, begin * kStepColumns, kStepColumns, dense ? here.row : kTokens - (here.end - here.row),
                  dense ? 0 : here.end, kTokens * kTokenBytes, end - begin);
      }
#pragma unroll
      for (int s = 0; s < kStrips; ++s) {
        if (role == 1 + s) {
          produce_strip<F::kStepBytes, false>(p.weight, p.format, ring, kTokens * kTokenBytes + s * p.strip_bytes,
                                              here.first_strip(p.weight), here.strip + s * p.apart, begin, end);
        }
      }
    }
    return;
  }
  take_registers<kStrips == 1 ? 208 : 240>();
  float totals[kTokens / 2] = {};
  const uint32_t strip_place = kTokens * kTokenBytes + warpgroup * p.strip_bytes;
  const int low = F::kNarrow ? low_plane(p.weight.width) : 4;
  uint32_t to_codes = strip_place + plane_offset(low, tile, lane), to_high = 0;
  uint32_t to_scales = strip_place + (F::kNarrow ? p.format.code_bytes : F::kStepBytes);
  if (F::kNarrow) to_high = strip_place + low * kTileBytes + plane_offset(high_plane(p.weight.width), tile, lane);
  uint32_t first_row = 8 * (lane >> 2) + 2 * tile;
  keep(to_codes), keep(to_high), keep(to_scales), keep(first_row);
  consume<F, kTokens>({p, ring, end, lane, to_codes, to_high, to_scales, first_row,
                       wgmma_descriptor<kTokenBytes>(slots), GroupWalk::at(p.weight, begin).left},
                      begin, end, totals);

  // Totals are turned around over the stages, once nobody reads those: [token][64 rows] of each warpgroup.
  named_barrier_sync(1, kConsumers);  // the warpgroups are done with the stages
  const uint32_t exchange = slots + warpgroup * exchange_bytes(kTokens);
#pragma unroll
  for (int i = 0; i < kTokens / 2; ++i) {
    const int token = i / 4 * 8 + lane % 4 * 2 + i % 2, row = tile * kTileRows + lane / 4 + i % 4 / 2 * 8;
    store_shared4(exchange + (token * kExchangeRow + row) * 4, float_to_bits(totals[i]));
  }
  const WgmmaPlace mine = place_of<kTokens>(p);
  const int expert_row = mine.first_strip(p.weight) * kStripRows;
  const int n = (mine.strip + warpgroup * p.apart) * kStripRows + 2 * lane;
  auto place = [&](int token) { return exchange + (token * kExchangeRow + 2 * lane) * 4; };
  // Scaled fragments are weights, and their sums those of a float layer, but where rows have factors of their own.
  const bool row_factors = F::kScaled && p.weight.outer != nullptr && p.weight.outers == 0;
  auto mend = [&](int m, int column, Share steps, float& low, float& high) {
    if (F::kScaled && !row_factors) return;
    if constexpr (F::kScaled) outer_factors_of(p.weight, expert_row + column).apply(low, high);
    if (!all_finite(low, high)) {
      sum_again<typename F::T, F::kScaled>(p.weight, p.plain_x, m, expert_row + column, steps, low, high);
    }
  };
  if constexpr (kStrips == 2) {
    if (p.gate_up.to != nullptr) {
      named_barrier_sync(1, kConsumers);  // gate's rows and up's are there
      const int gate = mine.strip * kStripRows + 2 * lane, up = gate + p.apart * kStripRows;
      store_gate_up<typename F::T>(p, mine, gate, up, slots, exchange_bytes(kTokens), warp, lane, mend);
      return;
    }
  }
  const Columns columns = columns_of(p.out, n);
  if (p.clusters) {
    const int splits = gridDim.z, used = F::kScaled && !row_factors ? p.out.N : p.out.N_pad;
    cluster_barrier();  // all blocks' totals are there
    for (int token = split + splits * tile; token < kTokens; token += splits * 4) {
      const int m = blockIdx.x * kTokens + token;
      // What is read is used: it has come when this block says so below. And `mend` is for whole warps.
      if (m >= p.out.M || n >= used) continue;
      float low = 0, high = 0;
      for (int part = 0; part < splits; ++part) {  // in their order
        const Words2 v = load_cluster8(place(token), part);
        low += bits_to_float(v.word[0]), high += bits_to_float(v.word[1]);
      }
      mend(m, n, {0, p.weight.steps}, low, high);
      store_y<typename F::T>(p.out, columns, m, low, high);
    }
    cluster_barrier_relaxed();  // nobody reads this block's totals any more
    return;
  }
  named_barrier_sync(2 + warpgroup, 128);             // the four warps' rows are there
  const int splits = p.rows.given() ? 2 : gridDim.z;  // of more than one come sums
  for (int token = tile; token < kTokens; token += 4) {
    const int m = mine.row + token;
    const Words2 v = load_shared8(place(token));
    if (m < mine.end && n < p.out.N_pad) {
      float low = bits_to_float(v.word[0]), high = bits_to_float(v.word[1]);
      mend(m, n, share, low, high);
      store_part<typename F::T>(p.out, columns, split, splits, m, low, high);
    }
  }
#else
  asm volatile("trap;");
#endif
}

}  // namespace qkernels::cuda
