// Grids of groups, and columns that are rounded one by one while those after them make up for it: what GPTQ spends its
// time on beside products of matrices (qkernels/quantizers/native.py has the twins in PyTorch). No torch header here.
//
// Lanes are rows of the weight, 16 at a time; nothing is contracted, so that each instruction set has the same bits.
#pragma once
#include <atomic>
#include <cstdint>

#include "kernels.h"

namespace qkernels::cpu {

constexpr int64_t kMostColumns = 128;   // that are rounded by one call
constexpr int64_t kMostMembers = 1024;  // of a group whose grid is fitted

// Columns 0 ... n - 1 of a weight, each a row of `columns` [n, N].
struct ColumnsCall {
  const float* columns;
  const float* factor;    // [n, n], upper triangle: what the error of a column is multiplied with for those after it
  const float* scales;    // [G, N]
  const float* zeros;     // [G, N], or null: `middle` for all
  const int64_t* groups;  // [n], which row of scales a column has
  int64_t n, N;
  float middle, most;  // codes are 0 ... most
  uint8_t* codes;      // [n, N]
  float* values;       // [n, N], what codes mean
  float* errors;       // [n, N], in units of the factor's diagonal
};

// Groups of weights, each of which gets the range with the least squared error: all of it, or one of `shares` of it.
struct GridCall {
  const float* groups;      // [rows, size]
  const float* importance;  // [of, size]: row r has that of r % of; or null
  int64_t rows, size, of;
  bool zeros_too;  // integer zero points; else the range is symmetric
  float most;
  Type scale_type;  // the type that scales are stored in, to which they are rounded
  const float* shares;
  int64_t count;
  float* scales;  // [rows]
  float* zeros;   // [rows], or null
  // The first of sixteen rows that hold NaN or inf, or a scale that the type cannot hold; `rows` where there are none.
  std::atomic<int64_t>* not_finite;
};

// Of one instruction set: rows begin ... end - 1.
struct RoundingLoops {
  void (*round_columns)(const ColumnsCall& call, int64_t begin, int64_t end);
  void (*fit_grids)(const GridCall& call, int64_t begin, int64_t end);
};
extern const RoundingLoops kRoundingScalar;
#if defined(__x86_64__)
extern const RoundingLoops kRoundingAvx2;
extern const RoundingLoops kRoundingAvx512;
#endif

void round_columns(const ColumnsCall& call, const Kernels& kernels, int64_t threads, ParallelFor parallel_for);
void fit_grids(const GridCall& call, const Kernels& kernels, int64_t threads, ParallelFor parallel_for);

}  // namespace qkernels::cpu
