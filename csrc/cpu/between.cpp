// The loops of between.h, split over threads.
#include "between.h"

namespace qkernels::cpu {
namespace {

// Values that one core works through in about the time that it takes to wake another.
constexpr int64_t kOfOneThread = 32768;

const BetweenLoops& loops_of(const Kernels& kernels) {
#if defined(__x86_64__)
  if (&kernels == &kAvx2) return kBetweenAvx2;
  if (&kernels != &kScalar) return kBetweenAvx512;
#endif
  return kBetweenScalar;
}

// `pieces` of so many values each, in runs that are worth a thread.
template <class Part>
void split(const Part& part, void (*loop)(const Part&, int64_t, int64_t), int64_t pieces, int64_t values,
           ParallelFor parallel_for) {
  if (pieces * values <= kOfOneThread) return loop(part, 0, pieces);
  struct Context {
    const Part& part;
    void (*loop)(const Part&, int64_t, int64_t);
  } context{part, loop};
  parallel_for(pieces, &context, [](void* p, int64_t begin, int64_t end) {
    const Context& c = *static_cast<Context*>(p);
    c.loop(c.part, begin, end);
  });
}

}  // namespace

void norm(const Norm& n, const Kernels& kernels, ParallelFor parallel_for) {
  split(n, loops_of(kernels).norm, n.rows, n.n, parallel_for);
}

void gate(const Gate& g, const Kernels& kernels, ParallelFor parallel_for) {
  split(g, loops_of(kernels).gate, g.n / kLaneWidth, kLaneWidth, parallel_for);
}

void rotate(const Rotation& r, const Kernels& kernels, ParallelFor parallel_for) {
  split(r, loops_of(kernels).rotate, r.B * r.H, r.T * r.D, parallel_for);
}

void attend(const Attention& a, const Kernels& kernels, ParallelFor parallel_for) {
  split(a, loops_of(kernels).attend, a.B * a.G, a.H / a.G * a.P * a.D / 4, parallel_for);
}

}  // namespace qkernels::cpu
