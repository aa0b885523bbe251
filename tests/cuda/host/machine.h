// The parts of a multiprocessor that a kernel can tell from each other: threads (a fiber each), warps and their
// exchange of registers, the barriers of a block, its shared memory.
//
// Not here: rounding inside tensor cores, time, bank conflicts (tests/cuda/ptx counts those). Clusters: their barrier,
// and reads of each other's shared memory.
#pragma once
#include <cstdint>
#include <cstdio>
#include <functional>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "fiber.h"

namespace qkernels::host {

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
  Dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  size_t count() const { return size_t{x} * y * z; }
};

// What the kernel did wrong. Thrown on the fiber that did it, rethrown by the launch.
struct KernelError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// A requested cp.async: it happens when its group is waited for, as late as the manual allows.
struct Copy {
  unsigned char* to;
  const void* from;
  int bytes;
  bool valid;
};

struct Thread;

// A wgmma that has been issued: it happens when its group is waited for, and reads its registers only then.
struct Wgmma {
  void* d;
  int count;  // of registers of d, 32 bits each
  const uint32_t* a;
  uint64_t b;
  bool accumulate;
  void (*multiply)(Thread* lanes, size_t which);  // of a warp
};

struct Thread {
  enum class Wait : uint8_t { kNothing, kBarrier, kMbarrier, kWarp, kCluster, kDone };
  Wait wait = Wait::kNothing;
  int barrier = 0;
  unsigned index = 0;
  Dim3 id;
  std::vector<Copy> copies;
  std::vector<size_t> groups;  // where in `copies` each committed group ends
  std::vector<Wgmma> wgmmas;
  std::vector<size_t> wgmma_groups;                     // where in `wgmmas` each committed group ends
  std::map<void*, std::vector<uint32_t>> accumulators;  // of those under way; the kernel's registers are poison
  bool wgmma_fenced = false;
  void* stack_pointer = nullptr;
  const char* stack_bottom = nullptr;
  void* tsan_fiber = nullptr;
  void* asan_fake = nullptr;
};

constexpr unsigned kLanes = 32;

// Registers that one lane hands to a warp instruction, and receives from it.
struct alignas(64) LaneRegisters {
  uint32_t in[12];
  uint32_t out[8];
};

// TSan's clocks are kept apart for even and odd phases: a thread that is a barrier ahead must not hand what it has
// written since to those that only now leave the barrier before.
struct Phase {
  unsigned number = 0;
  char clock[2];
  void* current() { return &clock[number & 1]; }
};

struct Warp {
  unsigned arrived = 0, alive = 0;
  const char* instruction = nullptr;
  LaneRegisters lane[kLanes];
  Phase phase;
};

struct Barrier {
  unsigned arrived = 0, expected = 0;
  unsigned arrived_of_warp[kLanes] = {};
  Phase phase;
};

constexpr int kBarriers = 16;

// An mbarrier. Its copies land when somebody waits for the phase.
struct TransactionBarrier {
  unsigned count = 0, left = 0;
  int64_t bytes = 0;  // announced and not yet there
  bool fenced = false;
  std::vector<Copy> copies;  // of 16 bytes each, `bytes` of them from memory and the rest zeros
  Phase phase;
};

struct Block;

// Blocks that run at the same time and reach each other's shared memory.
struct Cluster {
  std::vector<Block*> blocks;  // by rank
  Phase phase;
};

struct Block {
  Cluster* cluster = nullptr;
  Dim3 id, size, grid;
  unsigned char* shared = nullptr;
  size_t shared_bytes = 0;
  unsigned alive = 0;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  Barrier barriers[kBarriers];
  std::map<uint32_t, TransactionBarrier> mbarriers;
  const std::function<void()>* body = nullptr;
  std::string error;
  // The scheduler's own stack.
  void* stack_pointer = nullptr;
  void* tsan_fiber = nullptr;
  void* asan_fake = nullptr;
  const void* stack_bottom = nullptr;
  size_t stack_bytes = 0;
  char* end_clock = nullptr;  // released by every thread of the launch at its end
};

inline Block* block = nullptr;
inline Thread* thread = nullptr;

inline Warp& warp_of(const Thread& t) { return block->warps[t.index / kLanes]; }
inline LaneRegisters& registers() { return warp_of(*thread).lane[thread->index % kLanes]; }

[[noreturn]] inline void fail(const std::string& what) {
  throw KernelError(what + " (block " + std::to_string(block->id.x) + "," + std::to_string(block->id.y) + "," +
                    std::to_string(block->id.z) + ", thread " + std::to_string(thread->index) + ")");
}

// Fiber to scheduler.
QK_UNSEEN inline void leave() {
  Thread* self = thread;
  const bool ends = self->wait == Thread::Wait::kDone;
  tsan_switch(block->tsan_fiber);
  asan_leave(ends ? nullptr : &self->asan_fake, block->stack_bottom, block->stack_bytes);
  qk_switch_stack(&self->stack_pointer, block->stack_pointer);
  asan_arrive(self->asan_fake, &block->stack_bottom, &block->stack_bytes);
}

// ---- barriers ----

QK_UNSEEN inline void open_barrier(int id) {
  Barrier& b = block->barriers[id];
  for (size_t w = 0; w < block->warps.size(); ++w) {
    // bar.sync is for whole warps; on the GPU a divergent one is undefined.
    if (b.arrived_of_warp[w] != 0 && b.arrived_of_warp[w] < block->warps[w].alive) {
      throw KernelError("divergent barrier " + std::to_string(id) + ": " + std::to_string(b.arrived_of_warp[w]) +
                        " of " + std::to_string(block->warps[w].alive) + " lanes of warp " + std::to_string(w));
    }
    b.arrived_of_warp[w] = 0;
  }
  for (Thread& t : block->threads) {
    if (t.wait == Thread::Wait::kBarrier && t.barrier == id) t.wait = Thread::Wait::kNothing;
  }
  b.arrived = 0;
  ++b.phase.number;
}

// Returns the clock to acquire once the barrier opens.
QK_UNSEEN inline void* arrive(int id, unsigned expected, bool waits) {
  Barrier& b = block->barriers[id];
  void* const clock = b.phase.current();
  if (b.arrived != 0 && id != 0 && b.expected != expected) fail("threads disagree on the size of a named barrier");
  b.expected = expected;
  ++b.arrived_of_warp[thread->index / kLanes];
  tsan_release(clock);
  if (++b.arrived == expected) {
    open_barrier(id);
  } else if (waits) {
    thread->wait = Thread::Wait::kBarrier;
    thread->barrier = id;
    leave();
  }
  return clock;
}

inline void barrier_sync(int id, unsigned expected) { tsan_acquire(arrive(id, expected, true)); }
inline void block_sync() { barrier_sync(0, block->alive); }

// Of all threads of the cluster that have not exited. The scheduler opens it once they are all here.
QK_UNSEEN inline void cluster_sync() {
  if (block->cluster->blocks.size() < 2) fail("barrier.cluster in a launch without clusters");
  void* const clock = block->cluster->phase.current();
  tsan_release(clock);
  thread->wait = Thread::Wait::kCluster;
  leave();
  tsan_acquire(clock);
}

// ---- warp instructions ----

// Every lane has put its operands into its registers; the lane that arrives last does the work of the whole warp. That
// orders no memory between the lanes, on the GPU as here: only warp_sync does.
QK_UNSEEN inline void warp_instruction(const char* name, void (*work)(Warp&), bool needs_all = true) {
  Warp& w = warp_of(*thread);
  if (needs_all && w.alive != kLanes) fail(std::string(name) + " in a warp of which lanes have exited");
  if (w.arrived != 0 && w.instruction != name) {
    fail(std::string("divergent warp: ") + name + " while other lanes wait in " + w.instruction);
  }
  w.instruction = name;
  if (++w.arrived < w.alive) {
    thread->wait = Thread::Wait::kWarp;
    leave();
    return;
  }
  work(w);
  w.arrived = 0;
  ++w.phase.number;
  const size_t first = thread->index / kLanes * kLanes;
  for (size_t i = first; i < first + kLanes && i < block->threads.size(); ++i) {
    Thread& t = block->threads[i];
    if (t.wait == Thread::Wait::kWarp) t.wait = Thread::Wait::kNothing;
  }
}

inline void warp_sync() {
  void* const clock = warp_of(*thread).phase.current();
  tsan_release(clock);
  warp_instruction("__syncwarp", [](Warp&) {}, false);
  tsan_acquire(clock);
}

template <int kCount>
QK_UNSEEN inline void give(int at, const uint32_t (&v)[kCount]) {
  for (int i = 0; i < kCount; ++i) registers().in[at + i] = v[i];
}
template <int kCount>
QK_UNSEEN inline void take(uint32_t (&v)[kCount]) {
  for (int i = 0; i < kCount; ++i) v[i] = registers().out[i];
}

}  // namespace qkernels::host
