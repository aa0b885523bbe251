// What all instruction sets share: staging of x, the split into units of work, and their distribution over threads.
#include <algorithm>
#include <cstring>
#include <vector>

#include "apart.h"
#include "kernels.h"
#include "shares.h"
#include "staging.h"

// Of the OpenMP that torch's pool is made with, and null where it is made with another: cores that this process may run
// on. Not sched_getaffinity of the calling thread, which OMP_PROC_BIND ties to one core.
extern "C" __attribute__((weak)) int omp_get_num_procs();

namespace qkernels::cpu {
namespace {

// x is read in place where there are few rows and they already are what a kernel wants.
bool copies_x(const Call& call, const Kernels& kernels) {
  return call.int8_activations || call.M > kFewTokens || call.k_order != nullptr || call.K != call.K_pad ||
         call.x_column_stride != 1 || call.x_type != operand_type(call, kernels);
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
// work: a few us while each has a core, but 40 (4 threads) to 70 (8) where there are two cores (Zen 5, 2026-11-24).
bool runs_alone(const Problem& p, const Kernels& kernels, int64_t threads) {
  const bool little = (p.M + 1) * p.N * p.K * (p.bits > 4 ? 2 : 1) <= kernels.little_work;
  return threads == 1 || (little && crowded(threads));
}

struct Work {
  const Call& call;
  const Kernels& kernels;
  int64_t tiles_per_unit, tile_units, rows_per_block, units;
  std::vector<Share> shares;

  Work(const Call& c, const Kernels& k, int64_t threads) : call(c), kernels(k) {
    // A unit is a few tiles with all rows, or one tile with a block of rows. Tiles are taken together only while every
    // thread has four units: one thread's last unit then is a small part of the whole.
    tiles_per_unit = tiles_together(call.M);
    while (tiles_per_unit > 1 && tiles_of(call) < 4 * threads * tiles_per_unit) tiles_per_unit /= 2;
    tile_units = (tiles_of(call) + tiles_per_unit - 1) / tiles_per_unit;
    rows_per_block = rows_of_a_block(call.M);
    units = tile_units * ((call.M + rows_per_block - 1) / rows_per_block);
    shares = shares_of(units, threads);
  }
};

void stage_rows(void* context, int64_t m0, int64_t m1) {
  const Work& work = *static_cast<Work*>(context);
  work.kernels.stage(work.call, m0, m1);
}

// Blocks of rows are outermost, so that a block of x stays in L2 while the weights stream past it.
void multiply_units(void* context, int64_t begin, int64_t end) {
  Work& work = *static_cast<Work*>(context);
  const Call& call = work.call;
  work_through(work.shares, begin, end, [&](int64_t unit) {
    const int64_t tile = unit % work.tile_units * work.tiles_per_unit;
    const int64_t m0 = unit / work.tile_units * work.rows_per_block;
    const int tiles = static_cast<int>(std::min(work.tiles_per_unit, tiles_of(call) - tile));
    work.kernels.multiply(call, tile, tiles, m0, std::min(call.M, m0 + work.rows_per_block));
  });
}

// What the kernels write; `call` gets its staging.
void multiply_all(Call& call, const Kernels& kernels, void* workspace, int64_t threads, ParallelFor parallel_for) {
  const bool copies = copies_x(call, kernels), sums = wants_sums(call);
  lay_staging(call, kernels, copies, workspace);

  const bool alone = runs_alone(call, kernels, threads);
  if (alone) threads = 1;
  Work work(call, kernels, threads);
  if (copies || sums) {
    // One core copies 64 K elements in 6 to 8 us and gathers them in 40 to 80, where the product of 16 rows with one
    // 4096 x 4096 weight takes 700. Waking the others twice costs about as much, and far more where they are busy.
    if (alone || call.M == 1 || call.M * call.K <= 65536) {
      kernels.stage(call, 0, call.M);
    } else {
      parallel_for(call.M, &work, stage_rows);
    }
  }
  parallel_for(static_cast<int64_t>(work.shares.size()), &work, multiply_units);
}

// A product with something to be added (apart.h), in pieces for threads.
struct Finishing {
  Call call, inner;
  std::vector<int64_t> stored;  // marked columns
  std::vector<float> x;         // of those that are added together
  Columns columns;
  bool last;

  static constexpr int64_t kColumns = 512, kTiles = 8;  // of a piece

  static void mark(void* context, int64_t begin, int64_t end) {
    const Finishing& f = *static_cast<Finishing*>(context);
    mark_columns(f.call, const_cast<uint8_t*>(f.inner.marked), begin * kColumns, std::min(f.call.K, end * kColumns));
  }
  static void run(void* context, int64_t begin, int64_t end) {
    const Finishing& f = *static_cast<Finishing*>(context);
    finish(f.call, f.inner, f.columns, f.last, begin * kTiles, std::min(tiles_of(f.call), end * kTiles));
  }

  void find_marked() {
    const uint8_t* marked = inner.marked;
    const auto next = [&](int64_t k) -> int64_t {
      const void* found = std::memchr(marked + k, 1, static_cast<size_t>(call.K - k));
      return found == nullptr ? call.K : static_cast<const uint8_t*>(found) - marked;
    };
    if (call.k_order == nullptr) {
      for (int64_t k = next(0); k < call.K; k = next(k + 1)) stored.push_back(k);
    } else if (next(0) < call.K) {
      for (int64_t k = 0; k < call.K; ++k) {
        if (marked[column_of(call, k)] != 0) stored.push_back(k);
      }
    }
  }

  // The next columns from `first` on, with x in them; returns how many.
  int64_t take(int64_t first) {
    const int64_t left = static_cast<int64_t>(stored.size()) - first;
    columns = {stored.data() + first, static_cast<int>(std::min<int64_t>(left, Columns::kTogether)), nullptr};
    last = columns.count == left;
    if (columns.count > 0) x.resize(static_cast<size_t>(call.M * Columns::kTogether));
    for (int i = 0; i < columns.count; ++i) {
      const int64_t column = column_of(call, columns.at[i]) * call.x_column_stride;
      for (int64_t m = 0; m < call.M; ++m) {
        x[static_cast<size_t>(m * Columns::kTogether + i)] = load(call.x_type, call.x, m * call.x_row_stride + column);
      }
    }
    columns.x = x.data();
    return columns.count;
  }
};

}  // namespace

int64_t workspace_bytes(const Call& call, const Kernels& kernels) {
  Call inner = call;
  inner.M = rows_of_sums(call);
  return apart_bytes(call) + staging_bytes(inner, kernels, copies_x(call, kernels));
}

void gemm(Call call, const Kernels& kernels, void* workspace, int64_t threads, ParallelFor parallel_for) {
  if (call.M == 0 || call.N == 0) return;
  if (!has_apart(call)) return multiply_all(call, kernels, workspace, threads, parallel_for);

  // Pieces go to threads where they are worth waking them: see gemm's own in multiply_all.
  const auto in_pieces = [&](int64_t pieces, int64_t work, void* context, Body body) {
    if (threads == 1 || work <= 65536) return body(context, 0, pieces);
    parallel_for(pieces, context, body);
  };
  Finishing f{call, without_apart(call, workspace), {}, {}, {}, false};
  void* behind = static_cast<char*>(workspace) + apart_bytes(call);
  if (call.rounding == Rounding::kOutliers) {
    in_pieces((call.K + f.kColumns - 1) / f.kColumns, call.M * call.K / 8, &f, Finishing::mark);  // eight at a time
    f.find_marked();
    if (f.stored.empty()) {  // then the sums are all
      call.marked = f.inner.marked;
      return multiply_all(call, kernels, behind, threads, parallel_for);
    }
  }
  multiply_all(f.inner, kernels, behind, threads, parallel_for);
  for (int64_t first = 0; !f.last;) {
    first += f.take(first);
    // A weight takes as long as about four products with it.
    const int64_t work = (call.M + 4) * call.N * (f.columns.count + 1);
    in_pieces((tiles_of(call) + f.kTiles - 1) / f.kTiles, work, &f, Finishing::run);
  }
}

}  // namespace qkernels::cpu
