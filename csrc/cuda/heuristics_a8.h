// Which way a product with int8 activations is run: as heuristics.h has it, by a model of predicted times.
#pragma once
#include "a8.h"
#include "heuristics.h"

namespace qkernels::cuda {

// Bytes of a stage of gemm_a8_sm90: two strips, and rows of 64 bytes of x. `strip`: bytes of a strip's codes and scales
// in a step.
inline int wgmma_a8_stage_bytes(int tokens, int strip) {
  return static_cast<int>(round_up(tokens * kStepColumns + 2 * strip, 1024));
}
// As many stages, with a barrier pair each, as fit beside what it takes to start at a multiple of 1024.
inline int wgmma_a8_stages(int tokens, int strip) {
  const int fit = (kHopperShared - 2 * 1024) / (wgmma_a8_stage_bytes(tokens, strip) + 16);
  return fit < 16 ? fit : 16;
}
inline int wgmma_a8_shared_bytes(int tokens, int strip) {
  const int stages = wgmma_a8_stages(tokens, strip), ring = stages * wgmma_a8_stage_bytes(tokens, strip);
  const int totals = 2 * tokens * (kStripRows + 4) * 4;  // over the ring, afterwards
  return 1024 + stages * 16 + (ring > totals ? ring : totals);
}

// A whole card's rates.
struct CardA8 {
  double mma_macs, wgmma_macs;  // multiplications a ns
  double shared_bytes;          // bytes of shared memory a ns: 128 a clock and multiprocessor
  double clock;                 // cycles a ns, of issue slots
};

// mma.sync reaches 62 % of wgmma on Hopper in fp16; that int8 does the same is a guess.
inline CardA8 card_a8(int sm) {
  if (sm >= 120) return {419e3, 0, 52e3, 2.4};
  if (sm >= 90) return {480e3, kHasWgmma && sm == 90 ? 780e3 : 0, 31e3, 1.83};
  if (sm == 89) return {330e3, 0, 41e3, 2.5};
  if (sm == 86) return {142e3, 0, 18e3, 1.7};
  return {312e3, 0, 19e3, 1.41};
}

// x is read twice, the second time from L2, and written once.
inline double quantize_ns(int M, int steps, const Card& card) {
  return card.launch_ns + 3.0 * M * steps * kStepColumns / (kReachedBandwidth * card.bytes_per_ns);
}

// The model's time for quantization, product and the sums of splits; 1e30 where the card cannot run it.
inline double predicted_a8_ns(const Weight& w, int M, const Device& device, const ConfigA8& c) {
  const Card card = cuda::card(device.sm);
  const CardA8 int8 = card_a8(device.sm);
  const bool wgmma = c.path == Path::kGemmSm90;
  if (wgmma && (int8.wgmma_macs == 0 || (c.tokens == 256 && w.groups > 1))) return 1e30;
  const int sms = device.multiprocessors, strips = wgmma ? 2 : strips_per_block_a8(c.tokens);
  const double steps = divide_up(w.steps > 0 ? w.steps : 1, c.splits);
  const int64_t blocks = int64_t{divide_up(M, c.tokens)} * divide_up(w.strips, strips) * c.splits;
  const int warps = wgmma ? 8 : c.tokens == 128 ? 8 : 4, resident = 8 / warps;  // by registers
  const double busiest = divide_up(blocks, sms), waves = divide_up(blocks, int64_t{sms} * resident);

  // Of the busiest multiprocessor, which has its share of the card's rates. mma.sync: each warp reads 64 rows and 32
  // tokens from shared memory; wgmma: each strip's warpgroup reads all tokens, and its own codes. Both copy them there.
  const double codes = strips * step_bytes(w.width), x = c.tokens * double{kStepColumns};
  const double read = wgmma ? strips * x + codes : warps * (step_bytes(w.width) + 32.0 * kStepColumns);
  const double macs = strips * double{kStripRows} * c.tokens * kStepColumns;
  const double folds = w.groups_per_step > 1 ? w.groups_per_step : 1.0 / w.steps_per_group;  // of a sum, in a step
  const double instructions = 3 * folds * strips * kStripRows * c.tokens;                    // shift, convert, FMA
  const double of_step[] = {
      macs / (kReachedMatrixRate * (wgmma ? int8.wgmma_macs : int8.mma_macs) / sms),
      (read + codes + x) / (int8.shared_bytes / sms),
      (codes + x) / (card.l2_bytes_per_ns / sms),
      instructions / (128 * int8.clock),  // four schedulers of 32 lanes
  };
  double slowest = 0;
  for (const double ns : of_step) slowest = ns > slowest ? ns : slowest;
  const double product = busiest * steps * slowest;
  const double memory = 1.0 * step_bytes(w.width) * w.strips * w.steps / (kReachedBandwidth * card.bytes_per_ns);
  double ns = quantize_ns(M, w.steps, card) + (product > memory ? product : memory) + waves * kBlockStart_ns;
  if (c.splits > 1) ns += card.launch_ns + 8.0 * c.splits * M * w.strips * kStripRows / card.l2_bytes_per_ns;
  return ns;
}

// The way with the least predicted time, of equals the one that reads x least. Tiles of more than 32 tokens are smaller
// than 2 M. Parts of K have at least eight steps (512 columns): below that a block's pipeline is mostly start and end.
inline ConfigA8 choose_a8(const Weight& w, int M, const Device& device) {
  ConfigA8 best{Path::kGemm, 32, 1};
  double least = 1e30;
  for (const Path path : {Path::kGemm, Path::kGemmSm90}) {
    const int smallest = path == Path::kGemm ? 32 : 64;
    for (int tokens = 4 * smallest; tokens >= smallest; tokens /= 2) {
      if (tokens > 32 && tokens >= 2 * M) continue;
      for (int splits = 1; splits == 1 || splits * 8 <= w.steps; splits = next_splits(splits)) {
        const ConfigA8 c{path, tokens, splits};
        const double ns = predicted_a8_ns(w, M, device, c);
        if (ns < least) best = c, least = ns;
      }
    }
  }
  return best;
}

}  // namespace qkernels::cuda
