// The twins of csrc/cuda/ptx_sm90.cuh. Asynchronous for real, as late as the manual allows: a copy lands when somebody
// waits for its mbarrier's phase, a wgmma reads its operands and writes its results when its group is waited for. Until
// then the destination is poison; in registers, a large number.
#pragma once
#include <cstring>

#include "ptx_host.h"

#ifdef __SANITIZE_THREAD__
extern "C" {
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#endif

namespace qkernels::host {

// While it lives, TSan overlooks the fiber: the emulator's own containers, whose functions QK_UNSEEN does not reach.
struct Unseen {
#ifdef __SANITIZE_THREAD__
  Unseen() { AnnotateIgnoreReadsBegin(__FILE__, __LINE__), AnnotateIgnoreWritesBegin(__FILE__, __LINE__); }
  ~Unseen() { AnnotateIgnoreWritesEnd(__FILE__, __LINE__), AnnotateIgnoreReadsEnd(__FILE__, __LINE__); }
#else
  Unseen() {}
#endif
};

// ---- mbarrier ----

QK_UNSEEN inline TransactionBarrier& mbarrier_at(uint32_t address) {
  const Unseen unseen;
  const auto found = block->mbarriers.find(address);
  if (found == block->mbarriers.end()) fail("no mbarrier at " + std::to_string(address));
  return found->second;
}

QK_UNSEEN inline void wake(uint32_t address) {
  const Unseen unseen;
  for (Thread& t : block->threads) {
    if (t.wait == Thread::Wait::kMbarrier && t.barrier == static_cast<int>(address)) t.wait = Thread::Wait::kNothing;
  }
}

QK_UNSEEN inline void settle(uint32_t address) {
  TransactionBarrier& b = mbarrier_at(address);
  if (b.left != 0 || b.bytes != 0) return;
  b.left = b.count;
  ++b.phase.number;
  wake(address);
}

QK_UNSEEN inline void mbarrier_arrive(uint32_t address, uint32_t bytes) {
  TransactionBarrier& b = mbarrier_at(address);
  if (b.left == 0) fail("more arrivals at an mbarrier than it counts");
  tsan_release(b.phase.current());
  b.bytes += bytes;
  --b.left;
  settle(address);
}

// Bytes one by one: TSan intercepts memcpy, and what lands is not the waiting thread's write. The write that races, if
// one does, is that of the poison, by the thread that asked.
QK_UNSEEN inline void land(uint32_t address) {
  const Unseen unseen;
  TransactionBarrier& b = mbarrier_at(address);
  for (const Copy& copy : b.copies) {
    for (int i = 0; i < 16; ++i) {
      copy.to[i] = i < copy.bytes ? static_cast<const volatile unsigned char*>(copy.from)[i] : 0;
    }
    b.bytes -= 16;
  }
  b.copies.clear();
  settle(address);
}

QK_UNSEEN inline void mbarrier_wait(uint32_t address, uint32_t parity) {
  TransactionBarrier& b = mbarrier_at(address);
  const auto on_the_way = [&] {
    const Unseen unseen;
    return !b.copies.empty();
  };
  while ((b.phase.number & 1) == parity) {
    if (on_the_way()) {
      land(address);
      continue;
    }
    thread->wait = Thread::Wait::kMbarrier;
    thread->barrier = static_cast<int>(address);
    leave();
  }
  tsan_acquire(&b.phase.clock[parity]);
}

// ---- copies ----

// Poisons 16 bytes and notes where they come from.
inline void request_chunk(uint32_t to, const void* from, int bytes, TransactionBarrier& b) {
  unsigned char* const destination = shared_memory(to, 16);
  for (int i = 0; i < 16; i += 4) store(destination + i, kPoisonWord);
  const Unseen unseen;
  b.copies.push_back({destination, from, bytes, true});
}

QK_UNSEEN inline TransactionBarrier& barrier_of_copy(uint32_t address) {
  TransactionBarrier& b = mbarrier_at(address);
  if (!b.fenced) fail("a copy through an mbarrier that no fence.proxy.async has shown to it");
  return b;
}

inline void requested(uint32_t address, TransactionBarrier& b) {
  tsan_release(b.phase.current());
  wake(address);
}

inline void copy_bulk(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
  if (to % 16 != 0 || reinterpret_cast<uintptr_t>(from) % 16 != 0 || bytes % 16 != 0 || bytes == 0) {
    fail("misaligned cp.async.bulk");
  }
  TransactionBarrier& b = barrier_of_copy(barrier);
  for (uint32_t i = 0; i < bytes; i += 16) request_chunk(to + i, static_cast<const char*>(from) + i, 16, b);
  requested(barrier, b);
}

struct TensorMap {
  const uint16_t* from = nullptr;
  int64_t matrices = 0;  // each begins a row behind the one before
  int rows = 0, columns = 0;
  int64_t stride = 0;
  int tile_rows = 0, tile_columns = 0;
};

// Rows of 128 bytes: bits 4 ... 6 of the address are XORed with bits 7 ... 9; of 64: bits 4, 5 with 7, 8; of 32: 4, 7.
inline uint32_t swizzled_address(uint32_t address, uint32_t row_bytes) {
  return address ^ (address >> 3 & (row_bytes / 16 - 1) << 4);
}

inline void copy_tile(uint32_t to, const TensorMap& map, int column, int row, int matrix, uint32_t barrier) {
  if (to % 128 != 0) fail("misaligned destination of cp.async.bulk.tensor");
  TransactionBarrier& b = barrier_of_copy(barrier);
  for (int r = 0; r < map.tile_rows; ++r) {
    for (int c = 0; c < map.tile_columns; c += 8) {
      const bool in_matrix = row + r >= 0 && row + r < map.rows && matrix >= 0 && matrix < map.matrices;
      const int left = in_matrix ? map.columns - (column + c) : 0;
      const int valid = left < 0 ? 0 : left > 8 ? 8 : left;
      const uint16_t* from = valid == 0 ? map.from : map.from + (int64_t{matrix} + row + r) * map.stride + column + c;
      const auto row_bytes = static_cast<uint32_t>(map.tile_columns) * 2;
      const auto place = to + static_cast<uint32_t>(r) * row_bytes + static_cast<uint32_t>(c) * 2;
      request_chunk(swizzled_address(place, row_bytes), from, valid * 2, b);
    }
  }
  requested(barrier, b);
}

// ---- wgmma: 32 bytes of k a time ----

// What a word of a or b holds, and what is added up. 8 bit: unsigned, it wraps, as without .satfinite.
template <class T>
struct Pairs {
  using Sum = float;
  static constexpr unsigned kCount = 2;
  static Sum get(uint32_t word, unsigned i) { return i == 0 ? low<T>(word) : high<T>(word); }
};
struct Bytes {
  using Sum = uint32_t;
  static constexpr unsigned kCount = 4;
  static Sum get(uint32_t word, unsigned i) { return static_cast<uint32_t>(static_cast<int8_t>(word >> (8 * i))); }
};
constexpr unsigned kWordsOfK = 8;

// Column n of b where the descriptor says: K-major, without swizzle or with one of 128, 64 or 32 bytes.
inline void read_b(uint64_t descriptor, uint32_t n, uint32_t (&words)[kWordsOfK]) {
  const auto field = [&](int at) { return static_cast<uint32_t>(descriptor >> at & 0x3fff) << 4; };
  const auto start = field(0), leading = field(16), stride = field(32);
  const auto mode = static_cast<uint32_t>(descriptor >> 62);  // 1: 128 bytes, 2: 64, 3: 32, 0: none
  const uint32_t row = mode == 0 ? 16 : 256u >> mode;         // of 16 bytes: nothing is swizzled
  for (uint32_t i = 0; i < kWordsOfK; ++i) {
    const uint32_t along = mode == 0 ? i / 4 * leading + i % 4 * 4 : i * 4;
    const uint32_t address = start + n / 8 * stride + n % 8 * row + along;
    words[i] = load<uint32_t>(shared_memory(swizzled_address(address, row), 4));
  }
}

// One wgmma, the rows of one warp. Only b is memory of the GPU. Row by row as the words lie: word i of a row is
// register i / 4 * 2 (row + 8: one more) of lane i % 4 of the row's four.
QK_UNSEEN inline void gather_a(const Thread* lanes, size_t which, uint32_t (&a)[16][kWordsOfK]) {
  const Unseen unseen;
  const Wgmma& first = lanes[0].wgmmas[which];
  for (unsigned l = 0; l < kLanes; ++l) {
    const Wgmma& w = lanes[l].wgmmas[which];
    if (w.b != first.b || w.accumulate != first.accumulate || w.count != first.count || w.multiply != first.multiply) {
      throw KernelError("lanes disagree on the operands of a wgmma");
    }
    for (unsigned r = 0; r < 4; ++r) a[l / 4 + r % 2 * 8][l % 4 + r / 2 * 4] = w.a[r];
  }
}

template <class T>
QK_UNSEEN void add_column(Thread* lanes, size_t which, unsigned n, const uint32_t (&a)[16][kWordsOfK],
                          const uint32_t (&b)[kWordsOfK]) {
  const Unseen unseen;
  for (unsigned row = 0; row < 16; ++row) {
    Thread& owner = lanes[row % 8 * 4 + n % 8 / 2];
    const Wgmma& w = owner.wgmmas[which];
    typename T::Sum sum = 0;
    for (unsigned k = 0; k < kWordsOfK * T::kCount; ++k) {
      sum += T::get(a[row][k / T::kCount], k % T::kCount) * T::get(b[k / T::kCount], k % T::kCount);
    }
    uint32_t& d = owner.accumulators[w.d][n / 8 * 4 + row / 8 * 2 + n % 2];
    d = w.accumulate ? std::bit_cast<uint32_t>(std::bit_cast<typename T::Sum>(d) + sum) : std::bit_cast<uint32_t>(sum);
  }
}

inline Wgmma wgmma_of(const Thread* lanes, size_t which) {
  const Unseen unseen;
  return lanes[0].wgmmas[which];
}

template <class T>
void multiply_warp(Thread* lanes, size_t which) {
  uint32_t a[16][kWordsOfK];
  gather_a(lanes, which, a);
  const Wgmma first = wgmma_of(lanes, which);
  for (unsigned n = 0; n < static_cast<unsigned>(first.count) * 2; ++n) {
    uint32_t b[kWordsOfK];
    read_b(first.b, n, b);
    add_column<T>(lanes, which, n, a, b);
  }
}

// d until its results are there: 16777215 as fp32, 1266679807 as int32. Not NaN, which sum_again.cuh would mend.
constexpr uint32_t kPoisonSum = 0x4b7fffff;

template <class T, class Register, int kCount>
QK_UNSEEN void issue_wgmma(Register (&d)[kCount], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  const Unseen unseen;
  Thread& t = *thread;
  if (!t.wgmma_fenced) fail("wgmma without wgmma.fence");
  if (t.accumulators.find(d) == t.accumulators.end()) {
    std::vector<uint32_t>& before = t.accumulators[d];
    for (Register& value : d) {
      before.push_back(std::bit_cast<uint32_t>(value));
      value = std::bit_cast<Register>(kPoisonSum);
    }
  }
  t.wgmmas.push_back({d, kCount, a, b, accumulate, &multiply_warp<T>});
}

// Of every lane: how many groups may stay under way is in[0].
QK_UNSEEN inline size_t wgmmas_to_finish(const Thread& t, uint32_t pending) {
  const Unseen unseen;
  return t.wgmma_groups.size() <= pending ? 0 : t.wgmma_groups[t.wgmma_groups.size() - pending - 1];
}

QK_UNSEEN inline void finish_wgmmas(Thread& t, size_t end, uint32_t pending) {
  const Unseen unseen;
  t.wgmmas.erase(t.wgmmas.begin(), t.wgmmas.begin() + static_cast<ptrdiff_t>(end));
  t.wgmma_groups.erase(t.wgmma_groups.begin(), t.wgmma_groups.end() - pending);
  for (size_t& group : t.wgmma_groups) group -= end;
  for (auto it = t.accumulators.begin(); it != t.accumulators.end();) {
    bool busy = false;
    for (const Wgmma& left : t.wgmmas) busy |= left.d == it->first;
    if (!busy) {
      std::memcpy(it->first, it->second.data(), it->second.size() * 4);
    }
    it = busy ? std::next(it) : t.accumulators.erase(it);
  }
}

QK_UNSEEN inline Thread* lanes_of_warp() {
  const Unseen unseen;
  return &block->threads[thread->index / kLanes * kLanes];
}
QK_UNSEEN inline uint32_t operand_of(const Warp& w) { return w.lane[0].in[0]; }

inline void wgmma_wait_warp(Warp& w) {
  Thread* const lanes = lanes_of_warp();
  const uint32_t pending = operand_of(w);
  const size_t end = wgmmas_to_finish(lanes[0], pending);
  if (end == 0) return;
  for (size_t i = 0; i < end; ++i) wgmma_of(lanes, i).multiply(lanes, i);
  for (Thread* t = lanes; t < lanes + kLanes; ++t) finish_wgmmas(*t, end, pending);
}

}  // namespace qkernels::host

namespace qkernels::cuda {

using host::TensorMap;

inline void mbarrier_init(uint32_t barrier, int count) {
  const host::Unseen unseen;
  host::shared_memory(barrier, 8);
  host::TransactionBarrier& b = host::block->mbarriers[barrier];
  b.count = b.left = static_cast<unsigned>(count);
}
inline void fence_async_proxy() {
  const host::Unseen unseen;
  for (auto& [address, b] : host::block->mbarriers) b.fenced = true;
}
inline void mbarrier_arrive(uint32_t barrier) { host::mbarrier_arrive(barrier, 0); }
inline void mbarrier_arrive_expect(uint32_t barrier, uint32_t bytes) { host::mbarrier_arrive(barrier, bytes); }
inline void mbarrier_wait(uint32_t barrier, uint32_t parity) { host::mbarrier_wait(barrier, parity); }
inline void copy_bulk(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
  host::copy_bulk(to, from, bytes, barrier);
}
inline void copy_tile(uint32_t to, const TensorMap* map, int column, int row, int matrix, uint32_t barrier) {
  host::copy_tile(to, *map, column, row, matrix, barrier);
}

inline void wgmma_fence() {
  const host::Unseen unseen;
  host::thread->wgmma_fenced = true;
}
inline void wgmma_commit() {
  const host::Unseen unseen;
  host::thread->wgmma_groups.push_back(host::thread->wgmmas.size());
  host::thread->wgmma_fenced = false;  // registers are written between groups: each wants a fence of its own
}
template <int kPending>
inline void wgmma_wait() {
  const uint32_t pending[1] = {kPending};
  host::give(0, pending);
  host::warp_instruction("wgmma.wait_group", &host::wgmma_wait_warp);
}
template <int kCount>
inline void wgmma_results(float (&)[kCount]) {}
template <int kCount>
inline void wgmma_results(int32_t (&)[kCount]) {}
template <int kCount>
inline void wgmma_f16(float (&d)[kCount], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  host::issue_wgmma<host::Pairs<host::Fp16>>(d, a, b, accumulate);
}
template <int kCount>
inline void wgmma_bf16(float (&d)[kCount], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  host::issue_wgmma<host::Pairs<host::Bf16>>(d, a, b, accumulate);
}
template <int kCount>
inline void wgmma_s8(int32_t (&d)[kCount], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  host::issue_wgmma<host::Bytes>(d, a, b, accumulate);
}
inline void cluster_barrier() { host::cluster_sync(); }
inline void cluster_barrier_relaxed() { host::cluster_sync(); }
inline bool elect_one() { return host::thread->index % host::kLanes == 0; }
inline Words2 load_cluster8(uint32_t address, int rank) {
  const auto& blocks = host::block->cluster->blocks;
  if (rank < 0 || static_cast<size_t>(rank) >= blocks.size()) host::fail("no such block in the cluster");
  const host::Block& there = *blocks[static_cast<size_t>(rank)];
  if (there.alive == 0) host::fail("a read of the shared memory of a block that has ended");
  host::shared_memory(address, 8);  // blocks of a launch have equally much
  return host::load<Words2>(there.shared + address);
}
template <int kRegisters>
inline void give_registers() {}
template <int kRegisters>
inline void take_registers() {}

}  // namespace qkernels::cuda
