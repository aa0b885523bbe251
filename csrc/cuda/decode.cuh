// Decode: y = x W^T for up to 32 tokens. Every byte of the weight is used once, so the kernel is a stream: its floor is
// bytes / bandwidth, and what it must do is to keep enough of them on the way.
//
// A block is 4, 8 or 16 warps, warps_n * warps_k. Each warp owns one strip of 64 rows and a contiguous range of its
// columns, and runs alone: it asks for its own bytes (cp.async, each lane 16 bytes of each base tile) kStages - 1 steps
// ahead into its own ring in shared memory, and waits for nobody. 16 warps * 3 steps * 2 KB = 96 KB under way per
// block in 4 bit, where an H200 wants 64 KB a multiprocessor (36 KB are 4.8 TB/s * 1 us / 132; latency grows under
// load) and an RTX card 10 KB.
//
// x is staged once per block, only its valid rows, and serves warps_n strips: 8 strips at M = 8 read 6 % as many bytes
// of x as of codes. It is gathered here, so act-order costs no launch. Scales and zeros ride in the same ring.
//
// Sums meet in a fixed order: first the warps_k warps of a strip, in shared memory, then the blocks of a split of K,
// through the workspace and a second launch (side_kernels.cuh). No atomics, nothing left behind.
#pragma once
#include "copy.cuh"
#include "output.cuh"

namespace qkernels::cuda {

struct DecodeArguments {
  Weight weight;
  GroupFormat format;
  Activations x;
  Output out;
  bool aligned;  // x: 16-byte copies
  int warps_n, warps_k;
  int steps_per_block;  // at most
  int stage_bytes;      // of one warp: codes, scales, zeros
  int warp_bytes;       // of one warp: its ring, or its totals afterwards
};

// Asks for the x tile of `count` steps: [step][token][64 columns], swizzled.
QK_DEVICE void stage_tokens(const DecodeArguments& p, uint32_t to, int first_step, int count) {
  const int M = p.x.M;
  for (int i = threadIdx.x; i < count * M * 8; i += blockDim.x) {
    const int row = i >> 3, chunk = i & 7;
    const int step = row / M, token = row - step * M;
    const int k = (first_step + step) * kStepColumns + chunk * 8;
    const uint32_t place = to + step * M * kTokenBytes + swizzled(token, chunk);
    if (p.aligned) {
      const bool valid = k < p.x.K;
      cp_async16_or_zero(place, p.x.x + token * p.x.row_stride + (valid ? k : 0), valid);
    } else {
      store_shared16(place, gather8(p.x, token, k));
    }
  }
}

template <class F, int kTokenTiles>
__global__ void __launch_bounds__(32 * most_decode_warps(8 * kTokenTiles)) decode(const DecodeArguments p) {
  QK_SHARED(shared);
  constexpr int kStages = decode_stages(8 * kTokenTiles, F::kWidth);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int strip = blockIdx.x * p.warps_n + warp % p.warps_n, part = warp / p.warps_n;
  const bool owns = strip < p.weight.strips;
  // The block's columns, and the warp's share of them.
  const Share block = Share::of(p.weight.steps, gridDim.y, blockIdx.y);
  const Share mine = Share::of(block.end - block.begin, p.warps_k, part);
  const int first = block.begin, count = block.end - first, begin = first + mine.begin, end = first + mine.end;
  const uint32_t x = shared_address(shared);
  const uint32_t rings = x + p.steps_per_block * p.x.M * kTokenBytes;
  const uint32_t ring = rings + warp * p.warp_bytes;

  stage_tokens(p, x, first, count);
  cp_async_commit();

  // What a lane copies of the codes is what it will use, so nothing but its own wait stands between; scales and zeros
  // are copied by some lanes for all, hence the barrier of the warp in the loop.
  const uint64_t policy = evict_first_policy();
  const uint8_t* strip_codes = p.weight.codes + static_cast<int64_t>(owns ? strip : 0) * p.weight.steps * F::kStepBytes;
  GroupWalk walk = GroupWalk::at(p.weight, begin);
  auto copy_step = [&](int step, int slot) {
    const uint32_t to = ring + slot * p.stage_bytes;
    const uint8_t* from = strip_codes + static_cast<int64_t>(step) * F::kStepBytes;
#pragma unroll
    for (int i = 0; i < F::kStepBytes; i += kTileBytes) {
      cp_async16_hint(to + i + lane * 16, from + i + lane * 16, policy);
    }
    copy_groups(p.weight, p.format, strip, walk.group, to + F::kStepBytes, lane, 32, true);
    walk.advance(p.weight);
  };
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) {
    if (owns && begin + i < end) copy_step(begin + i, i);
    cp_async_commit();
  }
  cp_async_wait<kStages - 1>();  // x, the oldest group
  __syncthreads();

  // ldmatrix wants eight rows where there may be fewer tokens: the last one stands in. Its products land in columns of
  // y^T that are not stored, and no two columns mix.
  uint32_t token_offset[kTokenTiles];
#pragma unroll
  for (int i = 0; i < kTokenTiles; ++i) {
    const int token = 8 * i + (lane & 7);
    token_offset[i] = swizzled(token < p.x.M ? token : p.x.M - 1, lane >> 3);
  }

  Totals<kTokenTiles> totals = {};
  if (owns) {
    int slot = 0;
    for (int step = begin; step < end; ++step) {
      cp_async_wait<kStages - 2>();
      __syncwarp();  // all lanes' copies of this slot are there, and all lanes are done with the slot before
      TokenFragments<kTokenTiles> tokens;
      load_tokens<kTokenTiles>(tokens, x + (step - first) * p.x.M * kTokenBytes, token_offset);
      const int ahead = step + kStages - 1;
      if (ahead < end) copy_step(ahead, slot == 0 ? kStages - 1 : slot - 1);
      cp_async_commit();
      CodesRing<F::kWidth> codes;
      load_codes<F::kWidth>(codes[0], ring + slot * p.stage_bytes, 0, lane);
      multiply_step<F, kTokenTiles>(totals, p.format, ring + slot * p.stage_bytes, codes, tokens, lane);
      slot = slot == kStages - 1 ? 0 : slot + 1;
    }
  }
  cp_async_wait<0>();
  __syncwarp();  // lanes of the same warp may still read the ring that its totals now overwrite
#pragma unroll
  for (int i = 0; i < kTokenTiles; ++i) store_exchange<kTokenTiles>(totals, i, ring, 8 * i, lane);
  __syncthreads();

  // One warp adds up and stores the 64 rows of one token and strip, two rows a lane.
  for (int j = warp; j < p.warps_n * p.x.M; j += p.warps_n * p.warps_k) {
    const int token = j / p.warps_n, column = j % p.warps_n;
    const uint32_t place = (token * kExchangeRow + 2 * lane) * 4;
    float low = 0.0f, high = 0.0f;
    for (int k = 0; k < p.warps_k; ++k) {
      const Words2 v = load_shared8(rings + (k * p.warps_n + column) * p.warp_bytes + place);
      low += bits_to_float(v.word[0]), high += bits_to_float(v.word[1]);
    }
    const int n = (blockIdx.x * p.warps_n + column) * kStripRows + 2 * lane;
    if (n < p.out.N_pad) {
      store_part<typename F::T>(p.out, blockIdx.y, gridDim.y, token, n, low, high);
    }
  }
}

}  // namespace qkernels::cuda
