// What is known of the cards: data, and beside each number where it comes from and of when that is. heuristics.h is the
// model that reads it; tools/first_light fits the numbers that are guesses to a sweep, and says which sweep it was.
//
// Sources: "sheet": the maker's data sheet or programming guide, as of 2026-11. "sass": counted on 2026-11-30 in the
// SASS of nvcc 13.0 for sm_90a, along the executed path (docs/kernel-log.md). "guess": of 2026-11, by nobody's
// measurement.
#pragma once
#include "problem.h"

namespace qkernels::cuda {

struct Number {
  double value;
  const char* source;
  constexpr operator double() const { return value; }
};

// Rates are the whole card's, with `multiprocessors` of them.
struct Card {
  Number multiprocessors;
  Number bytes_per_ns;  // memory bandwidth
  Number l2_bytes_per_ns;
  Number macs_per_ns, macs8_per_ns;              // multiplications of mma.sync: 16 bit summed in fp32, and int8
  Number wgmma_macs_per_ns, wgmma8_macs_per_ns;  // 0: the card has none
  Number cublas_macs_per_ns;
  Number clock_ghz;
  Number shared_bytes;  // of a multiprocessor, for all of its blocks; a block may have 1 KB less
  Number latency_ns;    // of memory under load
  Number launch_ns;     // of one more kernel, that waits for the one before, in a graph
  Number decode_start_ns, gemm_start_ns, wgmma_start_ns;  // a block's pipeline fills, its sums meet: once per wave
  Number cluster_barriers_ns, cluster_bytes_per_ns;       // bytes: of a multiprocessor
  // Shares that are reached. Two warps on a scheduler convert and multiply in turns; one alone waits for itself.
  Number reached_bandwidth, reached_cublas, reached_matrix, reached_by_few_warps, reached_issue;
  // Instructions of a decode warp for 64 x 64 symmetric weights of 4 bit in long groups, up to 8 tokens (heuristics.h
  // has the others); clocks that a producing thread of a Hopper kernel takes for a step of its strip and a group's
  // scales.
  Number decode_slots, producer_clocks;
};

constexpr int kCardNumbers = sizeof(Card) / sizeof(Number);
// In the order of the fields.
constexpr const char* kCardNames[] = {"multiprocessors",     "bytes_per_ns",         "l2_bytes_per_ns",
                                      "macs_per_ns",         "macs8_per_ns",         "wgmma_macs_per_ns",
                                      "wgmma8_macs_per_ns",  "cublas_macs_per_ns",   "clock_ghz",
                                      "shared_bytes",        "latency_ns",           "launch_ns",
                                      "decode_start_ns",     "gemm_start_ns",        "wgmma_start_ns",
                                      "cluster_barriers_ns", "cluster_bytes_per_ns", "reached_bandwidth",
                                      "reached_cublas",      "reached_matrix",       "reached_by_few_warps",
                                      "reached_issue",       "decode_slots",         "producer_clocks"};
static_assert(sizeof(kCardNames) / sizeof(kCardNames[0]) == kCardNumbers, "a name for each number of a card");

// Whether gemm_sm90.cu was compiled for sm_90a (setup.py); elsewhere its kernels are traps.
#if defined(QKERNELS_SM90A) || defined(QKERNELS_HOST)
constexpr bool kHasWgmma = true;
#else
constexpr bool kHasWgmma = false;
#endif

constexpr int kHopperShared = 228 * 1024;

namespace cards {

constexpr const char *kSheet = "sheet", *kSass = "sass", *kGuess = "guess";
constexpr const char* kClusters = "guess (decision 0006)";
constexpr const char* kMeasured = "an H200, 2026-11: torch.mm, bf16, 769 to 798 TFLOP/s";

// What no card has been asked for yet. 90 % of the bandwidth; 80 % of a matrix rate.
constexpr Card make(Number multiprocessors, Number bytes, Number l2, Number macs, Number macs8, Number cublas,
                    Number clock, Number shared) {
  return {multiprocessors, bytes,        l2,          macs,           macs8,          {0, kSheet},    {0, kSheet},
          cublas,          clock,        shared,      {1000, kGuess}, {2000, kGuess}, {1500, kGuess}, {1500, kGuess},
          {1500, kGuess},  {0, kSheet},  {1, kSheet}, {0.9, kGuess},  {0.9, kGuess},  {0.8, kGuess},  {0.5, kGuess},
          {0.8, kGuess},   {218, kSass}, {0, kSheet}};
}

constexpr Card kA100 = make({108, kSheet}, {2039, kSheet}, {4500, kGuess}, {125e3, "sheet: 156e3, guess: 80 %"},
                            {312e3, kSheet}, {125e3, kGuess}, {1.41, kSheet}, {164 * 1024, kSheet});
constexpr Card kRtx3090 = make({82, kSheet}, {936, kSheet}, {3000, kGuess}, {35e3, kSheet}, {142e3, kSheet},
                               {35e3, kGuess}, {1.7, kSheet}, {100 * 1024, kSheet});
constexpr Card kRtx4090 = make({128, kSheet}, {1008, kSheet}, {5000, kGuess}, {82e3, kSheet}, {330e3, kSheet},
                               {82e3, kGuess}, {2.5, kSheet}, {100 * 1024, kSheet});
constexpr Card kRtx5090 = make({170, kSheet}, {1790, kSheet}, {6000, kGuess}, {105e3, kSheet}, {419e3, kSheet},
                               {105e3, kGuess}, {2.4, kSheet}, {100 * 1024, kSheet});

// mma.sync is taken to reach 62 % of wgmma, in 16 and in 8 bit; the latency, to be such that 64 KB on their way draw a
// multiprocessor's share of the bandwidth; the clock is what is left under load of 1.98 at most. A launch that waits
// for the one before is an edge of a graph, about 1000 ns, and the second kernel's own start.
constexpr Card h200() {
  Card c = make({132, kSheet}, {4800, kSheet}, {7000, kGuess}, {240e3, kGuess}, {480e3, kGuess}, {390e3, kMeasured},
                {1.755, kSheet}, {kHopperShared, kSheet});
  c.wgmma_macs_per_ns = {390e3, "sheet: 495e3; guess of what power allows"};
  c.wgmma8_macs_per_ns = {780e3, "sheet: 990e3; guess of what power allows"};
  c.latency_ns = {65536 * 132 / 4800.0, kGuess};
  c.launch_ns = {2500, kGuess};
  c.decode_start_ns = {1000, kGuess}, c.wgmma_start_ns = {2000, kGuess};
  c.cluster_barriers_ns = {1000, kClusters}, c.cluster_bytes_per_ns = {25, kClusters};
  c.reached_cublas = {0.95, kMeasured};
  c.producer_clocks = {150, "sass: 116 of stalls; guess: the rest for waits"};
  return c;
}
constexpr Card kH200 = h200();

}  // namespace cards

// The card of a compute capability. Those of 10.x (B200) have no numbers of their own: an H200's, whose wgmma they
// lack.
inline Card card_of(int sm) {
  if (sm >= 120) return cards::kRtx5090;
  if (sm >= 90) {
    Card c = cards::kH200;
    if (!kHasWgmma || sm != 90) c.wgmma_macs_per_ns.value = c.wgmma8_macs_per_ns.value = 0;
    return c;
  }
  return sm == 89 ? cards::kRtx4090 : sm == 86 ? cards::kRtx3090 : cards::kA100;
}

}  // namespace qkernels::cuda
