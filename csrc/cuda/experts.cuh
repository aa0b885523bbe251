// The small kernels around products with stacked experts: which rows and strips each block takes, rows of x in the
// order of experts, and what becomes of the fp32 sums. Each is bound by the bytes it moves.
#pragma once
#include "activate.cuh"
#include "copy.cuh"
#include "experts.h"
#include "output.cuh"
#include "weights.cuh"

namespace qkernels::cuda {

constexpr int kExpertThreads = 256;
constexpr int kScanBytes = kExpertThreads * 4;

// --- which blocks there are ---

// A slot for each block of at most `size` rows. Expert e has slots from first / size + e on, where `first` is its first
// row: never fewer than it needs, since floor((a + b) / size) + 1 - floor(a / size) >= ceil(b / size). So no expert has
// to know how many blocks the others have; a slot that is left over has no rows.
struct BlockTable {
  RowBlock* slots;
  int count;  // total / size + experts
  int size, experts;
};

QK_DEVICE void fill_slots(const BlockTable& t, int expert, int first, int rows) {
  const int base = first / t.size + expert;
  const int begin = expert == 0 ? 0 : base,
            end = expert == t.experts - 1 ? t.count : (first + rows) / t.size + expert + 1;
  for (int slot = begin + static_cast<int>(threadIdx.x); slot < end; slot += kExpertThreads) {
    const int done = (slot - base) * t.size, left = slot < base ? 0 : rows - done;
    const uint32_t row = left > 0 ? first + done : 0;
    const uint32_t count = left <= 0 ? 0 : left < t.size ? left : t.size;
    store_global16(t.slots + slot, {{static_cast<uint32_t>(expert), row, row, count}});
  }
}

// Over the threads of a block, up to this one's and of all: sums, or the largest.
struct Scanned {
  int here, all;
};
template <bool kLargest>
QK_DEVICE Scanned scanned(uint32_t shared, int own) {
  const int thread = threadIdx.x;
  store_shared4(shared + 4 * thread, own);
  __syncthreads();
  for (int step = 1; step < kExpertThreads; step *= 2) {
    const int other = thread >= step ? static_cast<int>(load_shared4(shared + 4 * (thread - step))) : 0;
    __syncthreads();
    own = kLargest ? (other > own ? other : own) : own + other;
    store_shared4(shared + 4 * thread, own);
    __syncthreads();
  }
  const int all = load_shared4(shared + 4 * (kExpertThreads - 1));
  __syncthreads();
  return {own, all};
}

struct RouteArguments {
  RowBlocks pairs;  // ids
  int count;        // of pairs
  BlockTable table;
  int32_t* place;  // [count]: where a pair comes among the rows that are sorted by expert; pairs of no expert: not set
};

// A stable sort by expert, one expert a block: it counts the pairs of the experts before it and its own, and then
// places these. Every block reads all ids, from L2: 128 experts x 16384 pairs are 16 MB.
__global__ void __launch_bounds__(kExpertThreads) route(const RouteArguments p) {
  QK_SHARED(shared);
  const uint32_t scan = shared_address(shared);
  const int expert = blockIdx.x, each = (p.count + kExpertThreads - 1) / kExpertThreads;
  const int begin = each * threadIdx.x, end = begin + each < p.count ? begin + each : p.count;
  int before = 0, own = 0;
  for (int i = begin; i < end; ++i) {
    const int id = expert_at(p.pairs, i);
    before += id >= 0 && id < expert, own += id == expert;
  }
  const int first = scanned<false>(scan, before).all;
  const Scanned mine = scanned<false>(scan, own);
  int row = first + mine.here - own;
  for (int i = begin; i < end; ++i) {
    if (expert_at(p.pairs, i) == expert) store_global4(p.place + i, row++);
  }
  fill_slots(p.table, expert, first, mine.all);
}

struct AlignArguments {
  const int64_t* offsets;  // [experts + 1]
  int count;               // of rows
  BlockTable table;
  int32_t* ids;  // [count]: a row's expert, or -1
};

// An offset from outside, 0 ... count.
QK_DEVICE int clamped_offset(const int64_t* offset, int count) {
  const Words2 v = load_global8(offset);
  if (static_cast<int32_t>(v.word[1]) < 0) return 0;
  return v.word[1] != 0 || v.word[0] > static_cast<uint32_t>(count) ? count : static_cast<int>(v.word[0]);
}

// The same of rows that are sorted: one expert a block, whose first row is the largest offset so far.
__global__ void __launch_bounds__(kExpertThreads) align(const AlignArguments p) {
  QK_SHARED(shared);
  const int expert = blockIdx.x, thread = threadIdx.x;
  int largest = 0;
  for (int e = thread; e <= expert; e += kExpertThreads) {
    const int offset = clamped_offset(p.offsets + e, p.count);
    largest = offset > largest ? offset : largest;
  }
  const int first = scanned<true>(shared_address(shared), largest).all;
  const int next = clamped_offset(p.offsets + expert + 1, p.count), end = next > first ? next : first;
  fill_slots(p.table, expert, first, end - first);
  for (int r = first + thread; r < end; r += kExpertThreads) store_global4(p.ids + r, expert);
  if (expert == 0) {
    for (int r = thread; r < first; r += kExpertThreads) store_global4(p.ids + r, 0xffffffffu);
  }
  if (expert == p.table.experts - 1) {
    for (int r = end + thread; r < p.count; r += kExpertThreads) store_global4(p.ids + r, 0xffffffffu);
  }
}

// --- rows of x in the order of experts: [count, steps * 64], zero past K ---

struct GatherArguments {
  Activations from;
  bool aligned;         // 16-byte copies
  const int64_t* rows;  // row i is rows[i] of x, clamped; null:
  RowBlocks pairs;      // pair i goes to row place[i], and is row i / per of x; without ids and place row i is row i
  const int32_t* place;
  int count, steps;
  uint16_t* to;
};

__global__ void __launch_bounds__(kExpertThreads) gather(const GatherArguments p) {
  const int chunks = p.steps * 8;
  const int64_t all = static_cast<int64_t>(p.count) * chunks;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kExpertThreads + threadIdx.x; i < all;
       i += static_cast<int64_t>(gridDim.x) * kExpertThreads) {
    const int row = static_cast<int>(i / chunks), k = static_cast<int>(i % chunks) * 8;
    int64_t from = row, to = row;
    if (p.rows != nullptr) {
      from = clamped_offset(p.rows + row, p.from.M - 1);
    } else if (p.place != nullptr) {
      if (expert_at(p.pairs, row) < 0) continue;
      from = row / p.pairs.per, to = load_global4(p.place + row);
    }
    const Words4 v = !p.aligned     ? gather8(p.from, static_cast<int>(from), k)
                     : k < p.from.K ? load_global16(p.from.x + from * p.from.row_stride + k)
                                    : Words4{};
    store_global16(p.to + to * chunks * 8 + k, v);
  }
}

// --- from sums to what comes next ---

// fp32 sums [rows][N_pad] of a stack's product, and whose they are.
struct Sums {
  const float* sums;
  int N, N_pad;
  const uint8_t* bias;  // [experts][N]
  Type bias_type;
  RowBlocks pairs;       // ids; -1: none
  const int32_t* place;  // of a pair among the rows; null: its own number
};

// Row and expert of a pair.
struct Owner {
  int64_t row;
  int expert;
};
QK_DEVICE Owner owner_of(const Sums& s, int64_t pair) {
  const int expert = expert_at(s.pairs, pair);
  if (expert < 0 || s.place == nullptr) return {pair, expert};
  return {static_cast<int64_t>(load_global4(s.place + pair)), expert};
}

QK_DEVICE float biased_sum(const Sums& s, const Owner& o, int n) {
  const float sum = bits_to_float(load_global4(s.sums + o.row * s.N_pad + n));
  if (s.bias_type == Type::kNone) return sum;
  return sum + load_group_value<false>(s.bias_type, s.bias, static_cast<int64_t>(o.expert) * s.N + n);
}

QK_DEVICE uint16_t rounded(Type type, float v) {
  return static_cast<uint16_t>(type == Type::kHalf ? pack_f16x2(v, 0.0f) : pack_bf16x2(v, 0.0f));
}

struct ActivateArguments {
  Sums up;
  int count;                // of pairs
  int width, padded_width;  // of the result; the second: with zeros, a multiple of 64
  Activation activation;
  float alpha, limit;
  Type type;
  uint16_t* to;  // [rows, padded_width]
};

__global__ void __launch_bounds__(kExpertThreads) activate(const ActivateArguments p) {
  const int64_t all = static_cast<int64_t>(p.count) * p.padded_width;
  const bool has_gate = is_gated(p.activation);
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kExpertThreads + threadIdx.x; i < all;
       i += static_cast<int64_t>(gridDim.x) * kExpertThreads) {
    const int n = static_cast<int>(i % p.padded_width);
    const Owner o = owner_of(p.up, i / p.padded_width);
    if (o.expert < 0) continue;
    float made = 0.0f;
    if (n < p.width) {
      const float up = biased_sum(p.up, o, has_gate ? p.width + n : n);
      made = has_gate ? gated(p.activation, p.alpha, p.limit, biased_sum(p.up, o, n), up) : ungated(p.activation, up);
    }
    store_global2(p.to + o.row * p.padded_width + n, rounded(p.type, made));
  }
}

struct FinishArguments {
  Sums sums;
  int count;
  Type type;
  uint8_t* y;  // [count, N] of `type`
};

__global__ void __launch_bounds__(kExpertThreads) finish(const FinishArguments p) {
  const int64_t all = static_cast<int64_t>(p.count) * p.sums.N;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kExpertThreads + threadIdx.x; i < all;
       i += static_cast<int64_t>(gridDim.x) * kExpertThreads) {
    const Owner o = owner_of(p.sums, i / p.sums.N);
    const float y = o.expert < 0 ? 0.0f : biased_sum(p.sums, o, static_cast<int>(i % p.sums.N));
    if (p.type == Type::kFloat) {
      store_global4(p.y + i * 4, float_to_bits(y));
    } else {
      store_global2(p.y + i * 2, rounded(p.type, y));
    }
  }
}

struct CombineArguments {
  Sums down;
  int tokens;
  const uint8_t* weights;  // [tokens, per]
  Type weights_type, type;
  uint16_t* y;  // [tokens, N]
};

// A token's experts in ascending order of their places, rounded once.
__global__ void __launch_bounds__(kExpertThreads) combine(const CombineArguments p) {
  const int per = p.down.pairs.per;
  const int64_t all = static_cast<int64_t>(p.tokens) * p.down.N;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kExpertThreads + threadIdx.x; i < all;
       i += static_cast<int64_t>(gridDim.x) * kExpertThreads) {
    const int64_t token = i / p.down.N;
    const int n = static_cast<int>(i % p.down.N);
    float total = 0.0f;
    for (int64_t pair = token * per; pair < (token + 1) * per; ++pair) {
      const Owner o = owner_of(p.down, pair);
      if (o.expert < 0) continue;
      total = fmaf(load_group_value<false>(p.weights_type, p.weights, pair), biased_sum(p.down, o, n), total);
    }
    store_global2(p.y + i, rounded(p.type, total));
  }
}

}  // namespace qkernels::cuda
