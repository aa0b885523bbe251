// Which way a product with int8 activations is run: as heuristics.h does it, by a model of predicted times. **Nothing
// here has been measured**: docs/kernel-log.md.
#pragma once
#include "a8.h"
#include "heuristics.h"

namespace qkernels::cuda {

inline int wgmma_a8_stage_bytes(int tokens, int strip) {
  return static_cast<int>(round_up(tokens * 64 + 2 * strip, 1024));
}
// Six stages, a barrier pair each, and what it takes to start at a multiple of 1024; or, over the stages, the totals of
// two strips afterwards.
inline int wgmma_a8_shared_bytes(int tokens, int strip) {
  const int ring = 6 * wgmma_a8_stage_bytes(tokens, strip), totals = 2 * tokens * (kStripRows + 4) * 4;
  return 1024 + 6 * 16 + (ring > totals ? ring : totals);
}

}  // namespace qkernels::cuda
