// The searches of GGUF blocks, split over threads.
#include "gguf.h"

#include <cstring>

#include "shares.h"

namespace qkernels::cpu {
namespace {

// Sixteen blocks are searched together; a share of work is a few of those.
constexpr int64_t kUnit = 64;

struct Work {
  const GgufCall& call;
  const GgufSearches& searches;
  int64_t blocks;
  std::vector<Share> shares;
};

const GgufSearches& searches_of(const Kernels& kernels) {
#if defined(__x86_64__)
  if (&kernels == &kAvx2) return kGgufAvx2;
  if (&kernels != &kScalar) return kGgufAvx512;
#endif
  return kGgufScalar;
}

}  // namespace

void gguf_blocks(const GgufCall& call, const Kernels& kernels, int64_t threads, ParallelFor parallel_for) {
  const int64_t blocks = call.rows * (call.columns / shape_of(call.type).elements);
  if (blocks == 0) return;
  Work work{call, searches_of(kernels), blocks, {}};
  if (call.row_variance != nullptr) {
    parallel_for(call.rows, &work, [](void* context, int64_t begin, int64_t end) {
      const Work& w = *static_cast<Work*>(context);
      w.searches.row_variances(w.call, begin, end);
    });
  }
  work.shares = shares_of((blocks + kUnit - 1) / kUnit, threads);
  parallel_for(static_cast<int64_t>(work.shares.size()), &work, [](void* context, int64_t begin, int64_t end) {
    Work& w = *static_cast<Work*>(context);
    work_through(w.shares, begin, end, [&](int64_t unit) {
      w.searches.search(w.call, unit * kUnit, std::min(w.blocks, (unit + 1) * kUnit));
    });
  });
}

}  // namespace qkernels::cpu
