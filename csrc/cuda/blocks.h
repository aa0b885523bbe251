// What a block of each kernel is made of: its rows and its shared memory, for the launchers that ask for it and for the
// model of heuristics.h. Plain functions of numbers.
#pragma once
#include "a8.h"
#include "card.h"
#include "problem.h"

namespace qkernels::cuda {

inline int divide_up(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }

// In all of these, `strip`: bytes of one strip (64 rows) in one step: codes, scales, zeros.

// --- decode ---

constexpr int kMaxDecodeTokens = 32;
constexpr int kPlanesDecodeTokens = 8;  // the one size for codes in planes, and for k-quants

inline int decode_stages(const Config& c, int width) {
  return c.stages > 0 ? c.stages : decode_stages(c.tokens, width);
}
inline int decode_warp_bytes(int tokens, int strip, int stages) {  // its ring, or its totals afterwards
  const int ring = stages * strip, totals = tokens * (kStripRows + 4) * 4;
  return ring > totals ? ring : totals;
}
inline int64_t decode_shared_bytes(const Config& c, int M, int strip, int width, int steps) {
  return int64_t{divide_up(steps, c.splits)} * M * 128 +
         c.warps_n * c.warps_k * decode_warp_bytes(c.tokens, strip, decode_stages(c, width));
}

// --- gemm_sm80 ---

constexpr int kCodedGemmTokens = 64;  // the one size for codes that are no integers
inline int gemm_strips(int tokens) { return tokens == 32 ? 4 : 2; }
inline int gemm_shared_bytes(const Config& c, int strip, int width) {
  return (width <= 4 ? 4 : 3) * static_cast<int>(round_up(gemm_strips(c.tokens) * strip, 128) + c.tokens * 128);
}

// --- gemm_sm90 ---

inline int wgmma_stage_bytes(int tokens, int strip) {
  return static_cast<int>(round_up(tokens * 128 + wgmma_strips(tokens) * strip, 1024));
}
// As many stages, with a barrier pair each, as fit beside what it takes to start at a multiple of 1024; 16 hold 64 KB
// of 4-bit codes. `most`: fewer than that, where it is not 0.
inline int wgmma_stages(int tokens, int strip, int most = 0) {
  const int room = kHopperShared / wgmma_blocks(tokens) - 1024, one = wgmma_stage_bytes(tokens, strip) + 16;
  const int fit = room > 1024 + 16 * one ? 16 : (room - 1024) / one;
  return most > 0 && most < fit ? most : fit;
}
constexpr int kLeastWgmmaStages = 4;
inline int wgmma_shared_bytes(int tokens, int strip, int stages) {
  const int ring = stages * (wgmma_stage_bytes(tokens, strip) + 16);
  const int exchange = wgmma_strips(tokens) * tokens * (kStripRows + 4) * 4;  // of the totals, over the ring
  return 1024 + (ring > exchange ? ring : exchange);
}

// --- gemm_a8 ---

constexpr int kStagesA8 = 4;
inline int gemm_a8_shared_bytes(int tokens, int strip) {
  return kStagesA8 * static_cast<int>(round_up(strips_per_block_a8(tokens) * strip, 128) + tokens * kStepColumns);
}

// --- gemm_a8_sm90: two strips, and rows of 64 bytes of x ---

inline int wgmma_a8_stage_bytes(int tokens, int strip) {
  return static_cast<int>(round_up(tokens * kStepColumns + 2 * strip, 1024));
}
inline int wgmma_a8_stages(int tokens, int strip, int most = 0) {
  const int fit = (kHopperShared - 2 * 1024) / (wgmma_a8_stage_bytes(tokens, strip) + 16);
  return most > 0 && most < fit ? most : fit < 16 ? fit : 16;
}
inline int wgmma_a8_shared_bytes(int tokens, int strip, int stages) {
  const int ring = stages * wgmma_a8_stage_bytes(tokens, strip);
  const int totals = 2 * tokens * (kStripRows + 4) * 4;  // over the ring, afterwards
  return 1024 + stages * 16 + (ring > totals ? ring : totals);
}

}  // namespace qkernels::cuda
