// Decode: y = x W^T for up to 32 tokens. Every byte of the weight is used once, so the kernel is a stream: its floor is
// bytes / bandwidth, and what it must do is to keep enough of them on the way.
//
// A block is 4, 8 or 16 warps, warps_n * warps_k. Each warp owns one strip of 64 rows and a contiguous range of its
// columns, and runs alone: it asks for its own bytes (cp.async, each lane 16 bytes of each base tile) stages - 1 steps
// ahead into its own ring in shared memory, and waits for nobody. 16 warps * 3 steps * 2 KB = 96 KB under way per
// block in 4 bit, where an H200 wants 64 KB a multiprocessor (36 KB are 4.8 TB/s * 1 us / 132; latency grows under
// load) and an RTX card 10 KB.
//
// x is staged once per block, only its valid rows, and serves warps_n strips: 8 strips at M = 8 read 6 % as many bytes
// of x as of codes. It is gathered here, so act-order costs no launch. It is asked for after the first weights, which
// come from further away. Scales and zeros ride in the same ring.
//
// A step's instructions compete with its bytes (multiply_biased.cuh): addresses are pointers that run along, one for a
// lane's codes and one for its part of scales and zeros, and the warp's own registers remember where x is.
//
// Sums meet in a fixed order: first the warps_k warps of a strip, in shared memory, then the blocks of a split of K,
// through the workspace and a second launch (side_kernels.cuh). No atomics, nothing left behind.
#pragma once
#include "copy.cuh"
#include "multiply_planes.cuh"
#include "output.cuh"
#include "sum_again.cuh"

namespace qkernels::cuda {

struct DecodeArguments {
  Weight weight;
  GroupFormat format;
  Activations x;
  Output out;
  bool aligned;  // x: 16-byte copies
  int warps_n, warps_k;
  int steps_per_block;  // at most
  int stages;           // of a warp's ring, 2 ... kMostDecodeStages
  int stage_bytes;      // of one warp: codes, scales, zeros
  int warp_bytes;       // of one warp: its ring, or its totals afterwards
  RowBlocks rows;       // of stacked experts; x.M is then the most rows of a block
};

// Asks for the x tile of `count` steps: [step][token][64 columns], swizzled.
// `mine`: rows of x; in a block of an expert there may be fewer than the tile has.
QK_DEVICE void stage_tokens(const DecodeArguments& p, uint32_t to, int first_step, int count, const RowBlock& mine) {
  const int M = p.x.M, rows = blockDim.x / 8, chunk = threadIdx.x & 7;  // a row: 64 columns of a token
  int step = static_cast<int>(threadIdx.x >> 3) / M, token = static_cast<int>(threadIdx.x >> 3) - step * M;
  const int more_steps = rows / M, more_tokens = rows - more_steps * M;
  while (step < count) {
    const int k = (first_step + step) * kStepColumns + chunk * 8;
    const uint32_t place = to + step * M * kTokenBytes + swizzled(token, chunk);
    if (p.aligned) {
      const bool valid = k < p.x.K && token < mine.count;
      cp_async16_or_zero(place, p.x.x + (valid ? (mine.x_row + token) * p.x.row_stride + k : 0), valid);
    } else {
      store_shared16(place, gather8(p.x, mine.x_row + token, k));
    }
    step += more_steps, token += more_tokens;
    if (token >= M) token -= M, ++step;
  }
}

// Where 16 bytes of a step's scales and zeros are, and how far it is to those of the next group (of a step's groups):
// in a stage zeros follow the scales, in 16-byte chunks that count through. `value`: the step's first scale.
struct GroupChunk {
  const uint8_t* from;
  int stride;

  // kCoded: scales may be of 8 bits.
  template <bool kCoded>
  static QK_DEVICE GroupChunk at(const Weight& w, const GroupFormat& f, int64_t value, int chunk) {
    const int byte = chunk * 16;
    if (byte < f.scale_bytes)
      return {w.scales + value * (kCoded ? f.scale_size : value_size(f.scale_type)) + byte, f.scale_bytes};
    return {w.zeros + value * (kCoded ? 0 : value_size(f.zero_type)) + byte - f.scale_bytes, f.zero_bytes};
  }
};

// The same of short groups where there may be outer factors: 16 bytes of scales, zeros, outer factors of scales, of
// zeros, one behind the other in a stage, and how far it is to the next step's; to the next but three's, of outer
// factors.
struct FactorChunk {
  const uint8_t* from;
  int stride;
  bool outer;

  static QK_DEVICE FactorChunk at(const Weight& w, const GroupFormat& f, int64_t strip, int step, int chunk) {
    const int64_t value = (strip * w.groups + step * w.groups_per_step) * kStripRows;
    int byte = chunk * 16;
    if (byte < f.scale_bytes) return {w.scales + value * f.scale_size + byte, f.scale_bytes, false};
    byte -= f.scale_bytes;
    if (byte < f.zero_bytes) return {w.zeros + value * f.zero_size + byte, f.zero_bytes, false};
    byte -= f.zero_bytes;
    const int64_t outer = strip * w.outers + step / kStepsOfOuter;
    if (byte < f.outer_bytes) return {w.outer + outer * f.outer_bytes + byte, f.outer_bytes, true};
    byte -= f.outer_bytes;
    return {w.outer_zeros + outer * f.outer_zero_bytes + byte, f.outer_zero_bytes, true};
  }
};

// cp_async_wait<stages - 2>: the number stands in the instruction. kUsual is tried first.
template <int kUsual>
QK_DEVICE void wait_for_slot(int stages) {
  if (stages == kUsual) {
    cp_async_wait<kUsual - 2>();
  } else if (stages <= 3) {
    stages == 2 ? cp_async_wait<0>() : cp_async_wait<1>();
  } else if (stages == 4) {
    cp_async_wait<2>();
  } else {
    stages == 5 ? cp_async_wait<3>() : cp_async_wait<kMostDecodeStages - 2>();
  }
}

template <class F, int kTokenTiles>
__global__ void __launch_bounds__(32 * most_decode_warps(8 * kTokenTiles), 1) decode(const DecodeArguments p) {
  QK_SHARED(shared);
  constexpr bool kCoded = is_coded(F::kCoding), kHasFactors = has_factors<F>();
  constexpr int kUsualStages = decode_stages(8 * kTokenTiles, F::kWidth);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int strip = blockIdx.x * p.warps_n + warp % p.warps_n, part = warp / p.warps_n;
  const bool owns = strip < p.weight.strips;
  RowBlock rows = {0, 0, 0, p.x.M};
  if (p.rows.given()) {
    rows = row_block(p.rows, blockIdx.z);
    if (rows.count <= 0) return;
  }
  // The block's columns, and the warp's share of them.
  const Share block = Share::of(p.weight.steps, gridDim.y, blockIdx.y);
  const Share mine = Share::of(block.end - block.begin, p.warps_k, part);
  const int begin = block.begin + mine.begin;
  const int steps = owns ? mine.end - mine.begin : 0;
  const uint32_t x = shared_address(shared);
  const uint32_t rings = x + p.steps_per_block * p.x.M * kTokenBytes;
  const uint32_t ring = rings + warp * p.warp_bytes;

  // What a lane copies of the codes is what it will use, so nothing but its own wait stands between; scales and zeros
  // are copied by some lanes for all, hence the barrier of the warp in the loop.
  const uint64_t policy = evict_first_policy();
  const int64_t first_strip = owns ? rows.expert * p.weight.strips + strip : 0;
  GroupWalk walk = GroupWalk::at(p.weight, begin);
  int chunks = (p.format.scale_bytes + p.format.zero_bytes) / 16;
  if constexpr (kHasFactors) chunks += (p.format.outer_bytes + p.format.outer_zero_bytes) / 16;
  const int code_bytes = F::kPlanes ? p.format.code_bytes : F::kStepBytes;
  const bool copies_groups = lane < chunks;
  const uint8_t* codes = p.weight.codes + (first_strip * p.weight.steps + begin) * code_bytes + lane * 16;
  [[maybe_unused]] GroupChunk groups;
  [[maybe_unused]] FactorChunk factors;
  [[maybe_unused]] int next_step = begin;
  if constexpr (kHasFactors) {
    factors = FactorChunk::at(p.weight, p.format, first_strip, begin, copies_groups ? lane : 0);
  } else {
    groups =
        GroupChunk::at<kCoded>(p.weight, p.format, (first_strip * p.weight.groups + walk.group) * kStripRows, lane);
  }
  // Asks for the next step. `to`, as all addresses of slots below: of the lane's first 16 bytes.
  auto copy_step = [&](uint32_t to) {
#pragma unroll
    for (int i = 0; i < F::kStepBytes; i += kTileBytes) {
      if (i < least_step_bytes<F>() || i < code_bytes) cp_async16_hint(to + i, codes + i, policy);
    }
    codes += code_bytes;
    if constexpr (kHasFactors) {
      if (copies_groups) cp_async16(to + code_bytes, factors.from);
#pragma unroll 1
      for (int more = 32; lane + more < chunks; more += 32) {
        cp_async16(to + code_bytes + more * 16,
                   FactorChunk::at(p.weight, p.format, first_strip, next_step, lane + more).from);
      }
      ++next_step;
      if (!factors.outer || next_step % kStepsOfOuter == 0) factors.from += factors.stride;
    } else {
      if (copies_groups) cp_async16(to + code_bytes, groups.from);
      if constexpr (F::kMostChunks > 32) {
        const int64_t value = (first_strip * p.weight.groups + walk.group) * kStripRows;
        for (int more = 32; lane + more < chunks; more += 32) {
          cp_async16(to + code_bytes + more * 16, GroupChunk::at<kCoded>(p.weight, p.format, value, lane + more).from);
        }
      }
      walk.advance(p.weight);
      if (walk.left == p.weight.steps_per_group) groups.from += groups.stride;  // another group has begun
    }
  };
  const uint32_t first_slot = ring + lane * 16, last_slot = first_slot + (p.stages - 1) * p.stage_bytes;
#pragma unroll 1
  for (int i = 0; i < p.stages - 1; ++i) {
    if (i < steps) copy_step(first_slot + i * p.stage_bytes);
    cp_async_commit();
  }
  stage_tokens(p, x, block.begin, block.end - block.begin, rows);
  cp_async_commit();
  cp_async_wait<0>();  // x, the youngest group
  __syncthreads();

  // ldmatrix wants eight rows where there may be fewer tokens: the last one stands in. Its products land in columns of
  // y^T that are not stored, and no two columns mix.
  uint32_t token_offset[kTokenTiles];
#pragma unroll
  for (int i = 0; i < kTokenTiles; ++i) {
    const int token = 8 * i + (lane & 7);
    token_offset[i] = swizzled(token < p.x.M ? token : p.x.M - 1, lane >> 3);
    keep(token_offset[i]);
  }
  uint32_t to_scales = code_bytes - lane * 16;
  keep(to_scales);

  Totals<kTokenTiles> totals = {};
  uint32_t slot = first_slot, free_slot = last_slot, step_x = x + mine.begin * p.x.M * kTokenBytes;
  for (int left = steps; left > 0; --left) {
    wait_for_slot<kUsualStages>(p.stages);
    __syncwarp();  // all lanes' copies of this slot are there, and all lanes are done with the slot before
    TokenFragments<kTokenTiles> tokens;
    load_tokens<kTokenTiles>(tokens, step_x, token_offset);
    if (left > p.stages - 1) copy_step(free_slot);
    cp_async_commit();
    if constexpr (F::kPlanes) {
      multiply_planes<F, kTokenTiles>(totals, p.format, slot, slot + to_scales, tokens, lane);
    } else if constexpr (F::kBiased) {
      multiply_biased<F, kTokenTiles>(totals, p.format, slot, slot + to_scales, tokens, lane);
    } else {
      CodesRing<F::kWidth> ring_of_codes;
      load_codes<F::kWidth>(ring_of_codes[0], slot, 0, 0);
      multiply_step<F, kTokenTiles>(totals, p.format, slot - lane * 16, ring_of_codes, tokens, lane);
    }
    free_slot = slot;
    slot = slot == last_slot ? first_slot : slot + p.stage_bytes;
    step_x += p.x.M * kTokenBytes;
  }
  cp_async_wait<0>();
  __syncwarp();  // lanes of the same warp may still read the ring that its totals now overwrite
#pragma unroll
  for (int i = 0; i < kTokenTiles; ++i) store_exchange<kTokenTiles>(totals, i, ring, 8 * i, lane);
  __syncthreads();

  // One warp adds up and stores the 64 rows of one token and strip, two rows a lane.
  const RowBlock to = p.rows.given() ? row_block(p.rows, blockIdx.z) : RowBlock{0, 0, 0, p.x.M};
  for (int j = warp; j < p.warps_n * to.count; j += p.warps_n * p.warps_k) {
    const int token = j / p.warps_n, column = j % p.warps_n;
    const uint32_t place = (token * kExchangeRow + 2 * lane) * 4;
    float low = 0.0f, high = 0.0f;
    for (int k = 0; k < p.warps_k; ++k) {
      const Words2 v = load_shared8(rings + (k * p.warps_n + column) * p.warp_bytes + place);
      low += bits_to_float(v.word[0]), high += bits_to_float(v.word[1]);
    }
    const int n = (blockIdx.x * p.warps_n + column) * kStripRows + 2 * lane;
    if (n < p.out.N_pad) {  // of all lanes or of none
      const int row = (to.expert * p.weight.strips + blockIdx.x * p.warps_n + column) * kStripRows + 2 * lane;
      if constexpr (is_coded(F::kCoding)) outer_factors_of(p.weight, row).apply(low, high);
      if (!all_finite(low, high)) {
        uint32_t seldom = row;
        keep(seldom);  // nothing of what is seldom needed is found beforehand: 32 bytes of it spilled
        sum_again<typename F::T, is_coded(F::kCoding), F::kPlanes>(p.weight, p.x, to.x_row + token, seldom, block, low,
                                                                   high);
      }
      if (gridDim.y == 1 && !p.rows.given()) {
        store_y<typename F::T>(p.out, columns_of(p.out, n), token, low, high);
      } else {
        store_partial(p.out, blockIdx.y, to.y_row + token, n, low, high);
      }
    }
  }
}

}  // namespace qkernels::cuda
