// y = x W^T for many tokens, on mma.sync: sm_80 and everything later.
//
// A block computes kWarpsN strips (64 rows each) for kWarpsM * 32 tokens; each warp 64 x 32, so that one conversion of
// a weight fragment (9 instructions in 4 bit) feeds 4 mma, which take the tensor cores of an A100 8 cycles each:
// conversion hides behind them. 64 x 32 is what two fp32 accumulators of a group's sum and of the total leave room for:
// 160 to 200 registers, two blocks of four warps a multiprocessor or one of eight.
//
//   tokens  strips  warps  shared memory a stage, 4 bit, groups of 64 and more in 16-bit scales
//   32      4       4      8.5 KB + 4 KB
//   64      2       4      4.3 KB + 8 KB
//   128     2       8      4.3 KB + 16 KB
//
// The pipeline: kStages - 1 steps of 64 columns are on their way, one barrier a step. The barrier stands before the
// last of a step's four tiles, when all that the step reads is in registers: its slot is filled again, and the next
// step's x and first codes are loaded, while the last tile is multiplied. Codes and groups lie in shared memory as
// decode has them; x in 128-byte rows with swizzled chunks (multiply.cuh). x must be aligned here; what is not
// (act-order, odd K, strides) is copied first (side_kernels.cuh).
#pragma once
#include "copy.cuh"
#include "multiply_planes.cuh"
#include "output.cuh"
#include "sum_again.cuh"

namespace qkernels::cuda {

constexpr int kWarpTokens = 32;
constexpr int kWarpTokenTiles = kWarpTokens / 8;

// 4 stages of 21 KB (128 tokens, 4 bit) or 3 of 25 KB (8 bit) stay below the 99 KB that RTX cards allow.
QK_CONSTEXPR int gemm_stages(int width) { return width <= 4 ? 4 : 3; }

struct GemmArguments {
  Weight weight;
  GroupFormat format;
  const uint16_t* x;  // 16-byte aligned rows
  int64_t x_stride;
  int x_columns;  // a multiple of 8
  Output out;
  int strip_bytes;  // of a stage: codes, scales, zeros of one strip
  RowBlocks rows;   // of stacked experts: a table
};

template <class F, int kWarpsN, int kWarpsM, bool kHalfAccumulate>
__global__ void __launch_bounds__(kWarpsN * kWarpsM * 32, 8 / (kWarpsN * kWarpsM)) gemm(const GemmArguments p) {
  QK_SHARED(shared);
  constexpr int kThreads = kWarpsN * kWarpsM * 32, kTokens = kWarpsM * kWarpTokens, kStages = gemm_stages(F::kWidth);
  const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5;
  const int warp_n = warp % kWarpsN, warp_m = warp / kWarpsN;
  // Neighbouring blocks share a strip and differ in tokens: the weight comes from DRAM once, x stays in L2.
  const int split = blockIdx.z;
  int m0 = blockIdx.x * kTokens, first_strip = 0;
  Output out = p.out;
  if (p.rows.given()) {  // rows m0 ... out.M - 1, and an expert's strips
    const RowBlock rows = row_block(p.rows, blockIdx.x);
    if (rows.count <= 0) return;
    m0 = rows.x_row, out.M = rows.x_row + rows.count, first_strip = rows.expert * p.weight.strips;
  }
  const int strip0 = first_strip + blockIdx.y * kWarpsN;
  const Share share = Share::of(p.weight.steps, gridDim.z, split);
  const int begin = share.begin, end = share.end;  // plain ints: C++17 captures no structured bindings

  // A stage: [strip][codes, scales, zeros], then the x tile, which is aligned to its rows of 128 bytes.
  const int x_place = (kWarpsN * p.strip_bytes + kTokenBytes - 1) / kTokenBytes * kTokenBytes;
  const int stage_bytes = x_place + kTokens * kTokenBytes;
  const uint32_t stages = shared_address(shared);

  GroupWalk walk = GroupWalk::at(p.weight, begin);
  auto copy_step = [&](int step, int slot) {
    const uint32_t to = stages + slot * stage_bytes;
    copy_strips<kWarpsN, F::kStepBytes, F::kPlanes>(p.weight, p.format, strip0, first_strip + p.weight.strips, step,
                                                    walk.group, to, p.strip_bytes, thread, kThreads);
    walk.advance(p.weight);
#pragma unroll
    for (int i = thread; i < kTokens * 8; i += kThreads) {
      const int token = i >> 3, chunk = i & 7, k = step * kStepColumns + chunk * 8;
      const bool valid = m0 + token < out.M && k < p.x_columns;
      cp_async16_or_zero(to + x_place + swizzled(token, chunk), p.x + (valid ? (m0 + token) * p.x_stride + k : 0),
                         valid);
    }
  };

  uint32_t token_offset[kWarpTokenTiles];
#pragma unroll
  for (int i = 0; i < kWarpTokenTiles; ++i) {
    token_offset[i] = swizzled(warp_m * kWarpTokens + 8 * i + (lane & 7), lane >> 3);
  }
  Totals<kWarpTokenTiles> totals = {};

#pragma unroll 1
  for (int i = 0; i < kStages; ++i) {
    if (begin + i < end) copy_step(begin + i, i);
    cp_async_commit();
  }
  // What the first tile of a step needs is in registers before the step begins.
  TokenFragments<kWarpTokenTiles> tokens, next_tokens;
  [[maybe_unused]] CodesRing<F::kPlanes ? 4 : F::kWidth> codes;
  auto load_first = [&](TokenFragments<kWarpTokenTiles>& to, uint32_t stage) {
    load_tokens<kWarpTokenTiles>(to, stage + x_place, token_offset);
    if constexpr (!F::kPlanes) load_codes<F::kWidth>(codes[0], stage + warp_n * p.strip_bytes, 0, lane);
  };
  cp_async_wait<kStages - 1>();
  __syncthreads();
  if (begin < end) load_first(tokens, stages);

  int slot = 0;
  for (int step = begin; step < end; ++step) {
    const int next_slot = slot == kStages - 1 ? 0 : slot + 1;
    auto prepare_next = [&] {
      cp_async_wait<kStages - 2>();
      __syncthreads();  // everybody's copies of the next slot are there, and everybody is done with this one
      if (step + 1 < end) load_first(next_tokens, stages + next_slot * stage_bytes);
      if (step + kStages < end) copy_step(step + kStages, slot);
      cp_async_commit();
    };
    const uint32_t strip_codes = stages + slot * stage_bytes + warp_n * p.strip_bytes;
    if constexpr (F::kPlanes) {
      multiply_planes<F, kWarpTokenTiles>(totals, p.format, strip_codes + lane * 16, strip_codes + p.format.code_bytes,
                                          tokens, lane, prepare_next);
    } else {
      multiply_step<F, kWarpTokenTiles, kHalfAccumulate>(totals, p.format, strip_codes, codes, tokens, lane,
                                                         prepare_next);
    }
#pragma unroll
    for (int i = 0; i < kWarpTokenTiles; ++i) {
#pragma unroll
      for (int s = 0; s < kStepsOf16; ++s) {
        tokens[i][s][0] = next_tokens[i][s][0], tokens[i][s][1] = next_tokens[i][s][1];
      }
    }
    slot = next_slot;
  }
  // The exchange lies over the stages: since the last barrier nobody reads them, and no copy into them is on its way.
  const uint32_t exchange = stages + warp * exchange_bytes(8);
  const int first_row = first_strip * kStripRows, n = (strip0 + warp_n) * kStripRows + 2 * lane - first_row;
  const int first = m0 + warp_m * kWarpTokens, splits = p.rows.given() ? 2 : gridDim.z;  // of more than one come sums
  const Columns columns = columns_of(out, n);
  OuterFactors outer;
  if constexpr (is_coded(F::kCoding)) {
    if (n < out.N_pad) outer = outer_factors_of(p.weight, first_row + n);
  }
  uint32_t again = 0;  // of this lane: a bit for each token with a sum that is not finite
  turn_around<kWarpTokenTiles>(totals, exchange, out, first, n, lane, [&](int m, float low, float high) {
    if constexpr (is_coded(F::kCoding)) outer.apply(low, high);
    if (!is_finite(low) || !is_finite(high)) again |= 1u << (m - first);
    store_part<typename F::T>(out, columns, split, splits, m, low, high);
  });
  // Votes are here and not beside the stores, which lanes past N leave out: nothing has to bring them together again
  // for each token.
  if (!any_lane(again != 0)) return;
#pragma unroll 1
  for (int token = 0; token < kWarpTokens; ++token) {
    if (!any_lane(again >> token & 1)) continue;
    float low = bits_to_float(kNaN), high = low;
    const int m = first + token;
    sum_again<typename F::T, is_coded(F::kCoding), F::kPlanes>(
        p.weight, {p.x, out.M, p.x_columns, p.x_stride, 1, nullptr}, m, first_row + n, share, low, high);
    store_part<typename F::T>(out, columns, split, splits, m, low, high);
  }
}

}  // namespace qkernels::cuda
