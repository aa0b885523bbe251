// Products with stacked experts: rows of x sorted by expert, each with its expert's weight (grouped_gemm), and a whole
// block made of two of them (experts.cpp). No torch header in here.
//
// One queue holds all the work, over experts, tiles and blocks of rows: a tile is decoded once for at most kBlockTokens
// rows of its expert, and a thread that has no rows of one expert works on another. What a kernel does with a row
// depends neither on the other rows nor on threads (kRun in kernels.h), so results have the same bits every time, and
// those of the dense product.
#pragma once
#include <cstdint>

#include "kernels.h"

namespace qkernels::cpu {

// Bytes from one expert's buffer to the next one's.
struct Strides {
  int64_t qweight, scales, zeros, outer_scales, outer_zeros, bias;
};

// Stacked experts: the Call has the buffers of the first, and no x.
struct Stack {
  Call call;
  Strides strides;
  int64_t experts;
};

// Rows r of y, offsets[e] <= r < offsets[e + 1]: expert e times row rows[r] of x. `offsets` rise from 0 to at most R,
// `rows` are in 0 ... T - 1, or null: row r is row r of x. Rows of y that no expert has are set to 0.
struct Grouped {
  const Stack& stack;
  const void* x;  // [T, K] contiguous
  Type x_type;
  int64_t T, R;
  const int64_t *rows, *offsets;
  void* y;  // [R, N]
  Type y_type;
};
int64_t workspace_bytes(const Grouped& grouped, const Kernels& kernels);
void grouped_gemm(const Grouped& grouped, const Kernels& kernels, void* workspace, int64_t threads,
                  ParallelFor parallel_for);

// y [T, H] = for each token the sum over j = 0 ... k - 1 of weights[t, j] * down(activation(up(x))) of expert ids[t,
// j].
struct Block {
  const Stack &up, &down;
  const void* x;  // [T, H] contiguous
  Type x_type;
  int64_t T, k;
  const int64_t* ids;    // [T, k]; outside 0 ... E - 1: adds nothing
  const float* weights;  // [T, k]
  Activation activation;
  float alpha, limit;
  void* y;
};
// n values of a floating type in fp32.
void widen(Type type, const void* from, int64_t n, float* to);

// `floating`: the kernels of the same choice with floating activations, which has what lies between the products.
// Memory of so many bytes, gone after the call: the bindings take it from torch's allocator.
using Allocate = void* (*)(void* context, int64_t bytes);
void experts(const Block& block, const Kernels& kernels, const Kernels& floating, Allocate allocate, void* context,
             int64_t threads, ParallelFor parallel_for);

}  // namespace qkernels::cpu
