// What all instruction sets share: staging of x, the split into units of work, and their distribution over threads.
#include <algorithm>
#include <atomic>
#include <vector>

#include "kernels.h"

// Of the OpenMP that torch's pool is made with, and null where it is made with another: cores that this process may run
// on. Not sched_getaffinity of the calling thread, which OMP_PROC_BIND ties to one core.
extern "C" __attribute__((weak)) int omp_get_num_procs();

namespace qkernels::cpu {
namespace {

Type operand_type(const Problem& p, const Kernels& kernels) {
  return p.x_type == Type::kBFloat16 ? kernels.bf16_operand : Type::kFloat;
}

// x is read in place where there are few rows and they already are what a kernel wants.
bool copies_x(const Problem& p, const Kernels& kernels) {
  return p.int8_activations || p.M > kFewRows || p.k_order != nullptr || p.K != p.K_pad || p.x_column_stride != 1 ||
         p.x_type != operand_type(p, kernels);
}

// Columns of a block of the copy. A run must not cross blocks: they are kRun wide where groups start at multiples of
// kRun or divide it, else as wide as a group.
int64_t block_width(const Problem& p) {
  return p.G == 1 || p.group % kRun == 0 || kRun % p.group == 0 ? kRun : p.group;
}

bool wants_sums(const Problem& p) { return has_rest(p) && !p.int8_activations; }

// Bytes from one row of int8 activations to the next: whole cache lines, and not the multiple of 4096 at which rows
// would share L1 sets.
int64_t int8_row_bytes(const Problem& p) { return (p.K_pad / 64 + 1) * 64 + (p.K_pad / 64 % 2 == 1 ? 64 : 0); }

int64_t staged_bytes(const Problem& p, const Kernels& kernels) {
  if (p.int8_activations) return p.M * int8_row_bytes(p);
  if (!copies_x(p, kernels)) return 0;
  const int64_t blocks = (p.K_pad + block_width(p) - 1) / block_width(p);
  return blocks * p.M * block_width(p) * (operand_type(p, kernels) == Type::kFloat ? 4 : 2);
}

// Whether torch has more threads than this process has cores. The answer costs 0.4 us: asked again when their number
// changes, not when the affinity of a running process does.
bool crowded(int64_t threads) {
  static thread_local int64_t asked_for = 0;
  static thread_local bool answer = false;
  if (threads != asked_for && omp_get_num_procs != nullptr) {
    answer = threads > omp_get_num_procs();
    asked_for = threads;
  }
  return answer;
}

// Whether the calling thread does better alone. A parallel region wakes and joins every thread of the pool, whoever has
// work: a few us while each has a core, but 40 (4 threads) to 70 (8) where there are two cores (docs/cpu-decode.md).
bool runs_alone(const Problem& p, const Kernels& kernels, int64_t threads) {
  const bool little = (p.M + 1) * p.N * p.K * (p.bits > 4 ? 2 : 1) <= kernels.little_work;
  return threads == 1 || (little && crowded(threads));
}

// Units that one worker begins with, one after another in memory.
struct alignas(64) Share {
  std::atomic<int64_t> next{0};
  int64_t end = 0;
};

struct Work {
  const Problem& p;
  const Kernels& kernels;
  int64_t tiles_per_unit, tile_units, rows_per_block, units;
  std::vector<Share> shares;

  Work(const Problem& problem, const Kernels& k, int64_t threads) : p(problem), kernels(k) {
    // A unit is a few tiles with all rows, or one tile with a block of rows. Tiles are taken together only while every
    // thread has four units: one thread's last unit then is a small part of the whole. Blocks have equal sizes, a
    // multiple of 8 rows where there are several: 65 rows are 40 + 25, not 64 + 1.
    const int64_t blocks = (p.M + kBlockRows - 1) / kBlockRows;
    tiles_per_unit = tiles_together(p.M);
    while (tiles_per_unit > 1 && tiles_of(p) < 4 * threads * tiles_per_unit) tiles_per_unit /= 2;
    tile_units = (tiles_of(p) + tiles_per_unit - 1) / tiles_per_unit;
    rows_per_block = blocks == 1 ? p.M : ((p.M + blocks - 1) / blocks + 7) / 8 * 8;
    units = tile_units * ((p.M + rows_per_block - 1) / rows_per_block);
    shares = std::vector<Share>(std::min(threads, units));
    const int64_t n = static_cast<int64_t>(shares.size());
    for (int64_t i = 0; i < n; ++i) {
      shares[i].next = units * i / n;
      shares[i].end = units * (i + 1) / n;
    }
  }
};

void stage_rows(void* context, int64_t m0, int64_t m1) {
  const Work& work = *static_cast<Work*>(context);
  work.kernels.stage(work.p, m0, m1);
}

// The workers begin ... end - 1. Each has a share of its own, for a core reads 88 GB/s in one stream (both cores of a
// Zen 5), 79 where the other takes every second piece of 256 KB, and 68 with pieces of 64 KB. Then it takes from the
// shares of others: cores may be busy with something else, or differ in speed. Blocks of rows are outermost, so that a
// block of x stays in L2 while the weights stream past it.
void multiply_units(void* context, int64_t begin, int64_t end) {
  Work& work = *static_cast<Work*>(context);
  const Problem& p = work.p;
  if (begin >= end) return;
  const int64_t shares = static_cast<int64_t>(work.shares.size());
  for (int64_t i = begin; i < begin + shares; ++i) {
    Share& share = work.shares[i % shares];
    for (int64_t unit; (unit = share.next.fetch_add(1, std::memory_order_relaxed)) < share.end;) {
      const int64_t tile = unit % work.tile_units * work.tiles_per_unit;
      const int64_t m0 = unit / work.tile_units * work.rows_per_block;
      const int tiles = static_cast<int>(std::min(work.tiles_per_unit, tiles_of(p) - tile));
      work.kernels.multiply(p, tile, tiles, m0, std::min(p.M, m0 + work.rows_per_block));
    }
  }
}

}  // namespace

int64_t workspace_bytes(const Problem& p, const Kernels& kernels) {
  return staged_bytes(p, kernels) + (wants_sums(p) || p.int8_activations ? p.M * p.G * 4 : 0) +
         (p.int8_activations ? p.M * 4 : 0);
}

void gemm(Problem p, const Kernels& kernels, void* workspace, int64_t threads, ParallelFor parallel_for) {
  if (p.M == 0 || p.N == 0) return;
  const bool copies = copies_x(p, kernels), sums = wants_sums(p);
  if (p.int8_activations) {
    p.staged = {workspace, p.K_pad + 1, 0, int8_row_bytes(p)};
    p.x_sums = reinterpret_cast<int32_t*>(static_cast<char*>(workspace) + staged_bytes(p, kernels));
    p.x_scales = reinterpret_cast<float*>(p.x_sums + p.M * p.G);
  } else if (copies) {
    p.staged = {workspace, block_width(p), p.M * block_width(p), block_width(p)};
  } else {
    p.staged = {p.x, p.K_pad + 1, 0, p.x_row_stride};
  }
  p.sums = sums ? reinterpret_cast<float*>(static_cast<char*>(workspace) + staged_bytes(p, kernels)) : nullptr;

  const bool alone = runs_alone(p, kernels, threads);
  if (alone) threads = 1;
  Work work(p, kernels, threads);
  if (copies || sums) {
    // One core copies 64 K elements in 6 to 8 us and gathers them in 40 to 80, where the product of 16 rows with one
    // 4096 x 4096 weight takes 700. Waking the others twice costs about as much, and far more where they are busy.
    if (alone || p.M == 1 || p.M * p.K <= 65536) {
      kernels.stage(p, 0, p.M);
    } else {
      parallel_for(p.M, &work, stage_rows);
    }
  }
  parallel_for(static_cast<int64_t>(work.shares.size()), &work, multiply_units);
}

}  // namespace qkernels::cpu
