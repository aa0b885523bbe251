// Runs the blocks of a launch, one after the other (those of a cluster in turns, from one barrier of the cluster to the
// next), their threads in an order that is chosen to be unkind.
//
// A barrier that is missing often does no harm in lockstep. What finds it is a schedule in which one warp is far ahead,
// and TSan, for which the schedule does not matter.
#pragma once
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <utility>

#include "machine.h"

namespace qkernels::host {

enum class Schedule { kAscending, kDescending, kRandom, kWarpAhead };

struct Settings {
  Schedule schedule = Schedule::kAscending;
  uint64_t seed = 1;
};
inline Settings settings;

// Not yet written shared memory. As fp16 -22.2, as bf16 -4.3e8: wrong results, without the NaN that may hide in a mask.
constexpr int kPoison = 0xcd;

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15u + 1) {}
  unsigned below(unsigned n) {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return static_cast<unsigned>(state_ >> 33) % n;
  }

 private:
  uint64_t state_;
};

QK_UNSEEN inline void fiber_entry() {
  asan_arrive(nullptr, &block->stack_bottom, &block->stack_bytes);
  try {
    (*block->body)();
  } catch (const std::exception& e) {
    if (block->error.empty()) block->error = e.what();
  }
  tsan_release(block->end_clock);
  thread->wait = Thread::Wait::kDone;
  leave();
  std::abort();  // a finished fiber was resumed
}

QK_UNSEEN inline void prepare_threads(const Stacks& stacks) {
  Block& b = *block;
  b.alive = static_cast<unsigned>(b.size.count());
  b.threads.assign(b.alive, {});
  b.warps.assign((b.alive + kLanes - 1) / kLanes, {});
  for (unsigned i = 0; i < b.alive; ++i) {
    Thread& t = b.threads[i];
    t.index = i;
    t.id = Dim3(i % b.size.x, i / b.size.x % b.size.y, i / b.size.x / b.size.y);
    t.stack_bottom = stacks.bottom(i);
    t.stack_pointer = fresh_stack(stacks.bottom(i), &fiber_entry);
    t.tsan_fiber = tsan_create();
    ++b.warps[i / kLanes].alive;
  }
}

// Resumes a thread until it waits or ends; returns whether it ended.
QK_UNSEEN inline bool step(Thread& t) {
  Block& b = *block;
  thread = &t;
  tsan_switch(t.tsan_fiber);
  asan_leave(&b.asan_fake, t.stack_bottom, kStackBytes);
  qk_switch_stack(&b.stack_pointer, t.stack_pointer);
  asan_arrive(b.asan_fake, nullptr, nullptr);
  if (!b.error.empty()) throw KernelError(b.error);
  if (t.wait != Thread::Wait::kDone) return false;
  --b.alive;
  Warp& w = warp_of(t);
  --w.alive;
  if (w.arrived != 0 && w.arrived == w.alive) fail(std::string("lane exited while its warp waits in ") + w.instruction);
  Barrier& all = b.barriers[0];
  if (all.arrived != 0 && all.arrived == b.alive) open_barrier(0);  // threads that have exited count as arrived
  return true;
}

QK_UNSEEN inline std::string where_threads_wait() {
  unsigned in_barrier = 0, in_mbarrier = 0, in_warp = 0, in_cluster = 0;
  const char* instruction = "";
  for (const Thread& t : block->threads) {
    in_barrier += t.wait == Thread::Wait::kBarrier;
    in_mbarrier += t.wait == Thread::Wait::kMbarrier;
    in_warp += t.wait == Thread::Wait::kWarp;
    in_cluster += t.wait == Thread::Wait::kCluster;
    if (t.wait == Thread::Wait::kWarp) instruction = warp_of(t).instruction;
  }
  return std::to_string(in_barrier) + " threads wait in a barrier, " +
         (in_mbarrier != 0 ? std::to_string(in_mbarrier) + " in an mbarrier, " : "") +
         (in_cluster != 0 ? std::to_string(in_cluster) + " in the cluster's barrier, " : "") + std::to_string(in_warp) +
         " in a warp instruction " + instruction;
}

inline bool runnable(const Thread& t) { return t.wait == Thread::Wait::kNothing; }

// Every thread that can run runs once, in the order given; returns how many did.
QK_UNSEEN inline unsigned step_each(const std::vector<unsigned>& order, unsigned& left) {
  unsigned ran = 0;
  for (const unsigned i : order) {
    Thread& t = block->threads[i];
    if (!runnable(t)) continue;
    ++ran;
    left -= step(t);
  }
  return ran;
}

// One warp, chosen at random among those that can, runs until it has to wait for another.
QK_UNSEEN inline unsigned step_one_warp(Random& random, unsigned& left) {
  const auto count = static_cast<unsigned>(block->warps.size());
  const unsigned chosen = random.below(count);
  for (unsigned i = 0; i < count; ++i) {
    const unsigned first = (chosen + i) % count * kLanes;
    const unsigned end = std::min<unsigned>(first + kLanes, static_cast<unsigned>(block->threads.size()));
    std::vector<unsigned> lanes(end - first);
    std::iota(lanes.begin(), lanes.end(), first);
    unsigned ran = 0;
    while (const unsigned now = step_each(lanes, left)) ran += now;
    if (ran != 0) return ran;
  }
  return 0;
}

// How far a block is.
struct Run {
  Random random{0};
  unsigned left = 0;  // threads that have not ended
  std::vector<unsigned> order;
};

QK_UNSEEN inline Run start_block(const Stacks& stacks, uint64_t number) {
  prepare_threads(stacks);
  Run run{Random(settings.seed + 1000003 * number), block->alive, std::vector<unsigned>(block->alive)};
  std::iota(run.order.begin(), run.order.end(), 0u);
  if (settings.schedule == Schedule::kDescending) std::reverse(run.order.begin(), run.order.end());
  return run;
}

QK_UNSEEN inline bool waits_for_cluster() {
  return std::all_of(block->threads.begin(), block->threads.end(),
                     [](const Thread& t) { return t.wait == Thread::Wait::kCluster || t.wait == Thread::Wait::kDone; });
}

// To its end, or until all threads that are left wait for the other blocks of the cluster.
QK_UNSEEN inline void advance_block(Run& run) {
  std::vector<unsigned>& order = run.order;
  while (run.left != 0) {
    if (settings.schedule == Schedule::kRandom) {
      for (auto i = static_cast<unsigned>(order.size()); i > 1; --i) {
        std::swap(order[i - 1], order[run.random.below(i)]);
      }
    }
    const bool ahead = settings.schedule == Schedule::kWarpAhead;
    if ((ahead ? step_one_warp(run.random, run.left) : step_each(order, run.left)) != 0) continue;
    if (waits_for_cluster()) return;
    throw KernelError("deadlock: " + where_threads_wait());
  }
}

struct FreeMemory {
  void operator()(void* p) const { std::free(p); }
};
using Shared = std::unique_ptr<unsigned char, FreeMemory>;

// Exactly as large as asked for, so that ASan sees the first byte behind it.
inline Shared poisoned_shared(size_t bytes) {
  void* p = nullptr;
  if (posix_memalign(&p, 128, bytes == 0 ? 1 : bytes) != 0) throw std::bad_alloc();
  std::memset(p, kPoison, bytes);
  return Shared(static_cast<unsigned char*>(p));
}

QK_UNSEEN inline void set_block(Block* b) {
  block = b;
  thread = nullptr;
}

// A thread of TSan's that has ended lends its identity to the next, and then the two cannot race. So all threads of a
// launch exist until its end, of which TSan can keep about 8000.
constexpr size_t kMostTsanThreads = 7000;

// A block and the memory that is its own.
struct Place {
  Stacks stacks;
  Block block;
  Shared shared;
  explicit Place(unsigned threads) : stacks(threads) {}
  ~Place() {
    for (Thread& t : block.threads) tsan_destroy(t.tsan_fiber);
  }
};

QK_UNSEEN inline void run_cluster(Cluster& cluster, const std::vector<std::unique_ptr<Place>>& places,
                                  uint64_t number) {
  const size_t first = places.size() - cluster.blocks.size();
  struct Leave {
    ~Leave() { set_block(nullptr); }
  } leave_at_end;
  std::vector<Run> runs;
  for (Block* b : cluster.blocks) {
    set_block(b);
    runs.push_back(start_block(places[first + runs.size()]->stacks, number));
  }
  for (unsigned left = 1; left != 0; ++cluster.phase.number) {
    left = 0;
    for (size_t i = 0; i < runs.size(); ++i) {
      set_block(cluster.blocks[i]);
      advance_block(runs[i]);
      left += runs[i].left;
    }
    for (Block* b : cluster.blocks) {
      for (Thread& t : b->threads) {
        if (t.wait == Thread::Wait::kCluster) t.wait = Thread::Wait::kNothing;
      }
    }
  }
}

// Blocks of one launch are not ordered among each other, and TSan is not told otherwise: two blocks that touch the same
// global memory race. For that no block may reuse memory of another; without TSan one cluster's places serve all. The
// blocks with the same x and y are a cluster, or each is one of its own.
inline void run_grid(Dim3 grid, Dim3 size, size_t shared_bytes, const std::function<void()>& body,
                     bool clusters = false) {
  if (kThreadSanitizer && grid.count() * size.count() > kMostTsanThreads) {
    throw std::invalid_argument("too many threads for TSan: " + std::to_string(grid.count() * size.count()));
  }
  char end_clock;
  std::vector<std::unique_ptr<Place>> places;
  std::vector<std::unique_ptr<Cluster>> clusters_made;  // all kept, for the same reason
  const size_t each = clusters ? grid.z : 1, count = grid.count() / each;
  for (size_t c = 0; c < count; ++c) {
    if (kThreadSanitizer || places.empty()) {
      for (size_t rank = 0; rank < each; ++rank) {
        places.push_back(std::make_unique<Place>(static_cast<unsigned>(size.count())));
      }
    }
    clusters_made.push_back(std::make_unique<Cluster>());
    Cluster& cluster = *clusters_made.back();
    for (size_t rank = 0; rank < each; ++rank) {
      const size_t i = c + rank * count;
      Place& place = *places[places.size() - each + rank];
      place.shared = poisoned_shared(shared_bytes);
      Block& b = place.block = Block();
      b.cluster = &cluster;
      cluster.blocks.push_back(&b);
      b.id = Dim3(static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
                  static_cast<unsigned>(i / grid.x / grid.y));
      b.size = size;
      b.grid = grid;
      b.shared = place.shared.get();
      b.shared_bytes = shared_bytes;
      b.body = &body;
      b.tsan_fiber = tsan_current();
      b.end_clock = &end_clock;
    }
    run_cluster(cluster, places, c);
  }
  tsan_acquire(&end_clock);
}

}  // namespace qkernels::host
