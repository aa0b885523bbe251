// From global to shared memory: codes, scales and zeros of a strip, and x.
#pragma once
#include "multiply.cuh"

namespace qkernels::cuda {

// Part `part` of `parts` of a number of steps, which differ by one step at most: no block is left over with a short
// rest, or with nothing. The same split for the same numbers, so that sums have the same order in every call.
struct Share {
  int begin, end;

  static QK_DEVICE Share of(int steps, int parts, int part) {
    const int each = steps / parts, more = steps % parts;
    const int begin = part * each + (part < more ? part : more);
    return {begin, begin + each + (part < more ? 1 : 0)};
  }
};

// The expert of a pair; -1: none of ours.
QK_DEVICE int expert_at(const RowBlocks& r, int64_t pair) {
  const uint32_t id = load_global4(r.ids + pair * r.id_words);
  const uint32_t high = r.id_words == 2 ? load_global4(r.ids + pair * 2 + 1) : 0;
  return high == 0 && id < static_cast<uint32_t>(r.experts) ? static_cast<int>(id) : -1;
}

// Which groups a step of 64 columns needs, followed from step to step without a division.
struct GroupWalk {
  int group, left;  // first group of the step, steps until it ends

  static QK_DEVICE GroupWalk at(const Weight& w, int step) {
    return {step / w.steps_per_group * w.groups_per_step, w.steps_per_group - step % w.steps_per_group};
  }
  QK_DEVICE void advance(const Weight& w) {
    if (--left == 0) group += w.groups_per_step, left = w.steps_per_group;
  }
};

// Asks for scales and zeros of a strip and step, by `threads` threads that count from `thread`.
QK_DEVICE void copy_groups(const Weight& w, const GroupFormat& f, int strip, int group, uint32_t to, int thread,
                           int threads, bool valid) {
  const int64_t first = (static_cast<int64_t>(strip) * w.groups + group) * kStripRows;
  const uint8_t* scales = w.scales + (valid ? first * f.scale_size : 0);
  const uint8_t* zeros = w.zeros + (valid ? first * f.zero_size : 0);
  for (int i = thread * 16; i < f.scale_bytes; i += threads * 16) cp_async16_or_zero(to + i, scales + i, valid);
  for (int i = thread * 16; i < f.zero_bytes; i += threads * 16) {
    cp_async16_or_zero(to + f.scale_bytes + i, zeros + i, valid);
  }
}

// The same for outer factors, which follow.
QK_DEVICE void copy_outer(const Weight& w, const GroupFormat& f, int strip, int step, uint32_t to, int thread,
                          int threads, bool valid) {
  const int64_t outer = static_cast<int64_t>(strip) * w.outers + step / kStepsOfOuter;
  const uint8_t* scales = w.outer + (valid ? outer * f.outer_bytes : 0);
  const uint8_t* zeros = w.outer_zeros + (valid ? outer * f.outer_zero_bytes : 0);
  to += f.scale_bytes + f.zero_bytes;
  for (int i = thread * 16; i < f.outer_bytes; i += threads * 16) cp_async16_or_zero(to + i, scales + i, valid);
  for (int i = thread * 16; i < f.outer_zero_bytes; i += threads * 16) {
    cp_async16_or_zero(to + f.outer_bytes + i, zeros + i, valid);
  }
}

// Asks for a step of kStrips strips from strip0 on: codes, scales and zeros, `strip_bytes` from strip to strip. From
// strip `end` on (past N) they become zeros.
template <int kStrips, int kCodeBytes, bool kPlanes = false>
QK_DEVICE void copy_strips(const Weight& w, const GroupFormat& f, int strip0, int end, int step, int group, uint32_t to,
                           int strip_bytes, int thread, int threads) {
#pragma unroll
  for (int s = 0; s < kStrips; ++s, to += strip_bytes) {
    const bool valid = strip0 + s < end;
    const int64_t place = static_cast<int64_t>(valid ? strip0 + s : 0) * w.steps + step;
    const int code_bytes = kPlanes ? f.code_bytes : kCodeBytes;
    for (int i = thread * 16; i < code_bytes; i += threads * 16) {
      cp_async16_or_zero(to + i, w.codes + place * code_bytes + i, valid);
    }
    copy_groups(w, f, strip0 + s, group, to + code_bytes, thread, threads, valid);
    if constexpr (kPlanes) copy_outer(w, f, strip0 + s, step, to + code_bytes, thread, threads, valid);
  }
}

// Of stacked experts: a block's rows. Loads that no compiler repeats or saves: who asks again holds no registers
// between.
QK_DEVICE RowBlock row_block(const RowBlocks& r, int block) {
  if (r.table != nullptr) {
    const Words4 v = load_global16(r.table + block);
    return {static_cast<int>(v.word[0]), static_cast<int>(v.word[1]), static_cast<int>(v.word[2]),
            static_cast<int>(v.word[3])};
  }
  const int expert = expert_at(r, block);
  return {expert, block / r.per, block, expert < 0 ? 0 : 1};
}

// An entry of an order of columns comes from a file: a wrong one must not become a wild read.
QK_DEVICE int clamped(int column, int K) { return column < 0 ? 0 : column >= K ? K - 1 : column; }

// Eight columns of row m of x, stored columns k ... k + 7, k a multiple of 8: gathered, zero past K. For x that
// is_aligned() refuses. The columns first and then the values, eight loads that do not wait for one another.
QK_DEVICE Words4 gather8(const Activations& a, int m, int k) {
  const uint16_t* row = a.x + m * a.row_stride;
  uint32_t value[8] = {};
  if (k + 8 <= a.K) {
    int column[8];
    if (a.k_order == nullptr) {
#pragma unroll
      for (int i = 0; i < 8; ++i) column[i] = k + i;
    } else {
      if (reinterpret_cast<uintptr_t>(a.k_order) % 16 == 0) {
        const Words4 first = load_global16(a.k_order + k), second = load_global16(a.k_order + k + 4);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          column[i] = static_cast<int>(first.word[i]), column[4 + i] = static_cast<int>(second.word[i]);
        }
      } else {  // a view into a larger tensor
#pragma unroll
        for (int i = 0; i < 8; ++i) column[i] = static_cast<int>(load_global4(a.k_order + k + i));
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) column[i] = clamped(column[i], a.K);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) value[i] = load_global2(row + column[i] * a.column_stride);
  } else {  // the last columns
#pragma unroll 1
    for (int i = 0; k + i < a.K; ++i) {
      const int column = a.k_order == nullptr ? k + i : clamped(static_cast<int>(load_global4(a.k_order + k + i)), a.K);
      const uint32_t one = load_global2(row + column * a.column_stride);
#pragma unroll
      for (int j = 0; j < 8; ++j) value[j] = i == j ? one : value[j];
    }
  }
  Words4 v;
#pragma unroll
  for (int i = 0; i < 4; ++i) v.word[i] = value[2 * i] | value[2 * i + 1] << 16;
  return v;
}

}  // namespace qkernels::cuda
