// What a decoder layer does between its products: norms, gates, rotary positions, attention of single tokens. Small
// things, whose cost in PyTorch is the number of their operators. No torch header in here.
//
// Sums are in fp32, sixteen partial ones and then a tree: the same bits on every instruction set and with any number of
// threads. Results are rounded where transformers rounds them.
#pragma once
#include <cstdint>

#include "kernels.h"

namespace qkernels::cpu {

// y[r] = weight * round(x[r] / rms(x[r])), or of Gemma: round(x[r] / rms(x[r]) * (1 + weight)).
struct Norm {
  const void* x;              // [rows, n]
  const void* weight;         // [n]
  void* y;                    // [rows, n]
  Type type;                  // of all three
  int64_t rows, n, x_stride;  // from a row of x to the next
  float epsilon;
  bool one_added;
};

// y = round(silu(gate)) * up, or gelu by tanh.
struct Gate {
  const void *gate, *up;
  void* y;
  Type type;
  int64_t n;
  bool gelu;
};

// Both halves of a head as the coordinates of D / 2 points, turned by the angles of its position.
struct Rotation {
  const void* x;          // [B, H, T, D], D dense
  const void *cos, *sin;  // [B or 1, T, D]
  void* y;                // [B, H, T, D] contiguous
  Type type;              // of all four
  int64_t B, H, T, D;
  int64_t strides[3];     // of x
  int64_t angles_stride;  // from a sequence's angles to the next one's
};

// One token a sequence over its keys and values; heads that share keys lie together.
struct Attention {
  const void* q;              // [B, H, D]
  const void *keys, *values;  // [B, G, P, D]
  void* y;                    // [B, H, D] contiguous
  Type type;                  // of all four
  int64_t B, H, G, P, D;
  int64_t q_strides[2], key_strides[3], value_strides[3];
  const void* mask;  // [B or 1, P] of floats that are added, or of bytes; null: all are seen
  Type mask_type;    // kUInt8: 0 is not seen
  int64_t mask_stride;
  float scale;
  float* scores;         // [B, G, kHeadsTogether + 1, score_stride]
  int64_t score_stride;  // P in whole vectors
};
constexpr int kHeadsTogether = 4;   // that share keys, in one pass over these
constexpr int64_t kLaneWidth = 16;  // n and D are multiples of it
constexpr int64_t kMostHead = 256;  // D

// The loops of one instruction set, over rows, elements, heads [b, h], and groups of heads [b, g].
struct BetweenLoops {
  void (*norm)(const Norm& norm, int64_t begin, int64_t end);
  void (*gate)(const Gate& gate, int64_t begin, int64_t end);
  void (*rotate)(const Rotation& rotation, int64_t begin, int64_t end);
  void (*attend)(const Attention& attention, int64_t begin, int64_t end);
};
extern const BetweenLoops kBetweenScalar;
#if defined(__x86_64__)
extern const BetweenLoops kBetweenAvx2, kBetweenAvx512;
#endif

void norm(const Norm& norm, const Kernels& kernels, ParallelFor parallel_for);
void gate(const Gate& gate, const Kernels& kernels, ParallelFor parallel_for);
void rotate(const Rotation& rotation, const Kernels& kernels, ParallelFor parallel_for);
void attend(const Attention& attention, const Kernels& kernels, ParallelFor parallel_for);

}  // namespace qkernels::cpu
