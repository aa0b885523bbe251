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

// Asks for a step of kStrips strips from strip0 on: codes, scales and zeros, `strip_bytes` from strip to strip. Past N
// they become zeros.
template <int kStrips, int kCodeBytes>
QK_DEVICE void copy_strips(const Weight& w, const GroupFormat& f, int strip0, int step, int group, uint32_t to,
                           int strip_bytes, int thread, int threads) {
#pragma unroll
  for (int s = 0; s < kStrips; ++s, to += strip_bytes) {
    const bool valid = strip0 + s < w.strips;
    const int64_t place = static_cast<int64_t>(valid ? strip0 + s : 0) * w.steps + step;
    for (int i = thread * 16; i < kCodeBytes; i += threads * 16) {
      cp_async16_or_zero(to + i, w.codes + place * kCodeBytes + i, valid);
    }
    copy_groups(w, f, strip0 + s, group, to + kCodeBytes, thread, threads, valid);
  }
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
