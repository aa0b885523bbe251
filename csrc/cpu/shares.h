// How work is split into units, and these over threads. For files that are compiled for no instruction set in
// particular.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

#include "kernels.h"

namespace qkernels::cpu {
namespace {

// Rows of x that meet a tile together. Blocks have equal sizes, a multiple of 8 rows where there are several: 65 rows
// are 40 + 25, not 64 + 1.
inline int64_t rows_of_a_block(int64_t M) {
  const int64_t blocks = (M + kBlockTokens - 1) / kBlockTokens;
  return blocks <= 1 ? M : ((M + blocks - 1) / blocks + 7) / 8 * 8;
}

// Units that one worker begins with, one after another in memory.
struct alignas(64) Share {
  std::atomic<int64_t> next{0};
  int64_t end = 0;
};

std::vector<Share> shares_of(int64_t units, int64_t threads) {
  std::vector<Share> shares(std::min(threads, units));
  const int64_t n = static_cast<int64_t>(shares.size());
  for (int64_t i = 0; i < n; ++i) shares[i].next = units * i / n, shares[i].end = units * (i + 1) / n;
  return shares;
}

// The workers begin ... end - 1. Each has a share of its own, for a core reads 88 GB/s in one stream (both cores of a
// Zen 5), 79 where the other takes every second piece of 256 KB, and 68 with pieces of 64 KB. Then it takes from the
// shares of others: cores may be busy with something else, or differ in speed.
template <class Run>
void work_through(std::vector<Share>& shares, int64_t begin, int64_t end, const Run& run) {
  if (begin >= end) return;
  const int64_t n = static_cast<int64_t>(shares.size());
  for (int64_t i = begin; i < begin + n; ++i) {
    Share& share = shares[i % n];
    for (int64_t unit; (unit = share.next.fetch_add(1, std::memory_order_relaxed)) < share.end;) run(unit);
  }
}

}  // namespace
}  // namespace qkernels::cpu
