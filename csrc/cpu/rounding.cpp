// The loops of rounding.h, split over threads.
#include "rounding.h"

#include <algorithm>

#include "shares.h"

namespace qkernels::cpu {
namespace {

constexpr int64_t kUnit = 64;  // rows

const RoundingLoops& loops_of(const Kernels& kernels) {
#if defined(__x86_64__)
  if (&kernels == &kAvx2) return kRoundingAvx2;
  if (&kernels != &kScalar) return kRoundingAvx512;
#endif
  return kRoundingScalar;
}

template <class Call>
void split(const Call& call, void (*loop)(const Call&, int64_t, int64_t), int64_t rows, int64_t threads,
           ParallelFor parallel_for) {
  struct Work {
    const Call& call;
    void (*loop)(const Call&, int64_t, int64_t);
    int64_t rows;
    std::vector<Share> shares;
  };
  if (rows == 0) return;
  Work work{call, loop, rows, shares_of((rows + kUnit - 1) / kUnit, threads)};
  parallel_for(static_cast<int64_t>(work.shares.size()), &work, [](void* context, int64_t begin, int64_t end) {
    Work& w = *static_cast<Work*>(context);
    work_through(w.shares, begin, end,
                 [&](int64_t unit) { w.loop(w.call, unit * kUnit, std::min(w.rows, (unit + 1) * kUnit)); });
  });
}

}  // namespace

void round_columns(const ColumnsCall& call, const Kernels& kernels, int64_t threads, ParallelFor parallel_for) {
  split(call, loops_of(kernels).round_columns, call.n == 0 ? 0 : call.N, threads, parallel_for);
}

void fit_grids(const GridCall& call, const Kernels& kernels, int64_t threads, ParallelFor parallel_for) {
  split(call, loops_of(kernels).fit_grids, call.rows, threads, parallel_for);
}

}  // namespace qkernels::cpu
