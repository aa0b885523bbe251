// What some roundings of x (../activations.h) leave to be added to the sums of the int8 products, before y is rounded
// (../cpu/apart.h has the same for the CPU):
//
//   zero points  codes q of x stand for (q - z) s. The products give s sum(q w); a row of ones behind those of x gives
//                sum(w) for every row of the weight, and z s times it is subtracted.
//   kOutliers    stored columns of x with an entry of 6 or more (in fp16) are multiplied here, as they are, in fp32;
//                their codes are 0.
//
// No size depends on values and nothing waits for the host, so that all of it may be captured: marks are bits of all
// columns, and a list of those that are marked is as long as there are columns. The products leave their sums in the
// workspace (GemmA8Arguments.stored is kNone), and finish_a8 is what else add_parts would be.
#pragma once
#include "a8.h"
#include "output.cuh"
#include "quantize_a8.cuh"
#include "sum_again.cuh"

namespace qkernels::cuda {

constexpr int kMarkThreads = 64;     // of 16 columns each
constexpr int kFinishTokens = 32;    // of a block: four a warp
constexpr int kFinishColumns = 32;   // marked ones that are added together
constexpr int kFinishThreads = 256;  // a lane has two columns of y
QK_CONSTEXPR int finish_shared_bytes() { return kFinishColumns * (kStripRows + kFinishTokens) * 4; }

// --- which columns are marked ---

struct MarkColumns {
  Activations x;
  bool aligned, half;
  int columns, rows;  // stored ones; rows of x that one block looks at
  uint16_t* marks;    // [blocks of rows][columns / 16], a bit a column
};

__global__ void __launch_bounds__(kMarkThreads) mark_columns(const MarkColumns p) {
  const int k = (blockIdx.x * kMarkThreads + threadIdx.x) * 16;
  if (k >= p.columns) return;
  // 6, or what becomes 6 in fp16: the least bf16 from 5.998046875 on is 6 itself.
  const uint32_t least = p.half ? 0x4600u : 0x40c0u, infinity = infinity_of(p.half);
  const int first = blockIdx.y * p.rows, end = first + p.rows < p.x.M ? first + p.rows : p.x.M;
  uint32_t marked = 0;
  for (int m = first; m < end; ++m) {
    const Words4 low = load_tokens8(p.x, p.aligned, m, k), high = load_tokens8(p.x, p.aligned, m, k + 8);
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const uint32_t magnitude = half_of(i < 8 ? low : high, i % 8) & 0x7fffu;
      marked |= static_cast<uint32_t>(magnitude >= least && magnitude <= infinity) << i;
    }
  }
  store_global2(p.marks + static_cast<int64_t>(blockIdx.y) * (p.columns / 16) + k / 16, static_cast<uint16_t>(marked));
}

QK_DEVICE int bits_of(uint32_t word) {
  int count = 0;
#pragma unroll
  for (int i = 0; i < 16; ++i) count += word >> i & 1;
  return count;
}

// The marks of all blocks of rows, joined; and `list`: how many there are, then each column, in order. One block, which
// goes through 4096 columns at a time.
__global__ void __launch_bounds__(kQuantizeThreads)
    list_marked(const uint16_t* marks, int words, int blocks, uint16_t* joined, int32_t* list) {
  QK_SHARED(shared);
  const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5;
  const uint32_t totals = shared_address(shared);
  int before = 0;  // marked columns of earlier rounds
  for (int first = 0; first < words; first += kQuantizeThreads) {
    const int word = first + thread;
    uint32_t marked = 0;
    if (word < words) {
      for (int i = 0; i < blocks; ++i) marked |= load_global2(marks + static_cast<int64_t>(i) * words + word);
      store_global2(joined + word, static_cast<uint16_t>(marked));
    }
    const int count = bits_of(marked);
    uint32_t until = count;  // of this lane and those before it
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
      const uint32_t other = shuffle(until, lane >= d ? lane - d : lane);
      if (lane >= d) until += other;
    }
    __syncthreads();  // the totals of the round before are read
    if (lane == 31) store_shared4(totals + warp * 4, until);
    __syncthreads();
    int at = before + static_cast<int>(until) - count;
#pragma unroll
    for (int i = 0; i < kQuantizeThreads / 32; ++i) {
      const int total = static_cast<int>(load_shared4(totals + i * 4));
      if (i < warp) at += total;
      before += total;
    }
    for (int i = 0; i < 16; ++i) {
      if ((marked >> i & 1) != 0) store_global4(list + 1 + at++, static_cast<uint32_t>(word * 16 + i));
    }
  }
  if (thread == 0) store_global4(list, static_cast<uint32_t>(before));
}

// --- sums of the products -> y ---

struct FinishA8 {
  Weight weight;
  Activations x;
  Output out;           // partial: [splits][rows][N_pad]
  int splits, rows;     // rows: M, or with the one of ones
  const float* zeros;   // [M] zero points times scales; null: none
  const int32_t* list;  // of marked columns; null: none
};

// The sums of row m over the parts of K, in their order.
QK_DEVICE void add_splits(const FinishA8& p, int m, int n, float& low, float& high) {
  for (int s = 0; s < p.splits; ++s) {
    const Words2 v = load_global8(p.out.partial + (static_cast<int64_t>(s) * p.rows + m) * p.out.N_pad + n);
    low += bits_to_float(v.word[0]), high += bits_to_float(v.word[1]);
  }
}

// One block has 32 tokens and a strip of 64 rows of the weight. Marked columns go through shared memory, 32 at a time:
// their weights, dequantized once for all tokens, and x.
template <class T>
__global__ void __launch_bounds__(kFinishThreads) finish_a8(const FinishA8 p) {
  QK_SHARED(shared);
  constexpr int kEach = kFinishTokens / (kFinishThreads / 32);
  const int thread = threadIdx.x, lane = thread & 31;
  const int m0 = blockIdx.x * kFinishTokens, mine = m0 + thread / 32 * kEach;  // the warp's tokens
  const int row0 = blockIdx.y * kStripRows, n = row0 + 2 * lane;
  float low[kEach] = {}, high[kEach] = {};
  float low_ones = 0.0f, high_ones = 0.0f;
  if (p.zeros != nullptr) add_splits(p, p.out.M, n, low_ones, high_ones);
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    if (mine + i >= p.out.M) continue;
    add_splits(p, mine + i, n, low[i], high[i]);
    if (p.zeros != nullptr) {
      const float zero = bits_to_float(load_global4(p.zeros + mine + i));
      low[i] = fmaf(-zero, low_ones, low[i]), high[i] = fmaf(-zero, high_ones, high[i]);
    }
  }

  const int count = p.list == nullptr ? 0 : static_cast<int>(load_global4(p.list));
  const uint32_t weights = shared_address(shared);                    // [column][64 rows]
  const uint32_t tokens = weights + kFinishColumns * kStripRows * 4;  // [column][32 tokens]
#pragma unroll 1
  for (int first = 0; first < count; first += kFinishColumns) {
    const int columns = count - first < kFinishColumns ? count - first : kFinishColumns;
    __syncthreads();  // those before are read
    for (int i = thread; i < columns * kStripRows; i += kFinishThreads) {
      const int k = static_cast<int>(load_global4(p.list + 1 + first + i / kStripRows));
      store_shared4(weights + i * 4, float_to_bits(weight_at<false>(p.weight, row0 + i % kStripRows, k)));
    }
    for (int i = thread; i < columns * kFinishTokens; i += kFinishThreads) {
      const int k = static_cast<int>(load_global4(p.list + 1 + first + i / kFinishTokens));
      const int m = m0 + i % kFinishTokens;
      store_shared4(tokens + i * 4, float_to_bits(m < p.out.M ? x_at<T>(p.x, m, k) : 0.0f));
    }
    __syncthreads();  // weights and x are there
#pragma unroll 1
    for (int i = 0; i < columns; ++i) {
      const Words2 w = load_shared8(weights + (i * kStripRows + 2 * lane) * 4);
      const Words4 x = load_shared16(tokens + (i * kFinishTokens + thread / 32 * kEach) * 4);
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        low[j] = fmaf(bits_to_float(x.word[j]), bits_to_float(w.word[0]), low[j]);
        high[j] = fmaf(bits_to_float(x.word[j]), bits_to_float(w.word[1]), high[j]);
      }
    }
  }
  const Columns columns = columns_of(p.out, n);
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    if (mine + i < p.out.M) store_y<T>(p.out, columns, mine + i, low[i], high[i]);
  }
}

}  // namespace qkernels::cuda
