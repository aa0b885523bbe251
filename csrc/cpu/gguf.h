// Searches for the blocks of GGUF's types (qkernels/formats/gguf/search.py is their twin in PyTorch, with the same
// bits): which there are, and what a call of one looks like. No torch header here.
//
// Sums run over the members of a group in order, and nothing is contracted, so that each instruction set writes the
// same bytes: a least-squares fit decides by errors that differ in the last bit. Lanes are groups, 16 at a time.
#pragma once
#include <atomic>
#include <cstdint>

#include "kernels.h"

namespace qkernels::cpu {

// By ggml's numbers, which the op takes (qkernels/storage/gguf_types.py).
enum class GgufType : int {
  kQ4_0 = 2,
  kQ4_1 = 3,
  kQ5_0 = 6,
  kQ5_1 = 7,
  kQ8_0 = 8,
  kQ2K = 10,
  kQ3K = 11,
  kQ4K = 12,
  kQ5K = 13,
  kQ6K = 14,
  kIq4Nl = 20,
  kIq4Xs = 23,
  kMxfp4 = 39,
};

// Elements and bytes of a block, members of a group, whether the weights of columns go by the variance of the row.
struct GgufShape {
  int elements, bytes, group;
  bool row_variance;
};
static inline GgufShape shape_of(GgufType type) {
  switch (type) {
    case GgufType::kQ4_0:
      return {32, 18, 32, true};
    case GgufType::kQ4_1:
      return {32, 20, 32, true};
    case GgufType::kQ5_0:
      return {32, 22, 32, true};
    case GgufType::kQ5_1:
      return {32, 24, 32, true};
    case GgufType::kQ8_0:
      return {32, 34, 32, false};
    case GgufType::kQ2K:
      return {256, 84, 16, false};
    case GgufType::kQ3K:
      return {256, 110, 16, false};
    case GgufType::kQ4K:
      return {256, 144, 32, false};
    case GgufType::kQ5K:
      return {256, 176, 32, false};
    case GgufType::kQ6K:
      return {256, 210, 16, false};
    case GgufType::kIq4Nl:
      return {32, 18, 32, false};
    case GgufType::kIq4Xs:
      return {256, 136, 32, false};
    case GgufType::kMxfp4:
      return {32, 17, 32, false};
  }
  return {0, 0, 0, false};
}

struct GgufCall {
  GgufType type;
  bool best;           // the better search
  const void* weight;  // [rows, columns], contiguous
  Type weight_type;
  int64_t rows, columns;
  const float* importance;  // [columns], or null
  float* row_variance;      // [rows], filled by row_variances where a search asks for it; or null
  uint8_t* out;
  // The first row that holds inf or NaN, and the first whose scale float16 cannot hold; `rows` where there is none.
  std::atomic<int64_t>* not_finite;
  std::atomic<int64_t>* too_large;
};

// Of one instruction set.
struct GgufSearches {
  void (*row_variances)(const GgufCall& call, int64_t begin, int64_t end);
  void (*search)(const GgufCall& call, int64_t begin, int64_t end);  // blocks begin ... end - 1 of the whole weight
};
extern const GgufSearches kGgufScalar;
#if defined(__x86_64__)
extern const GgufSearches kGgufAvx2;
extern const GgufSearches kGgufAvx512;
#endif

void gguf_blocks(const GgufCall& call, const Kernels& kernels, int64_t threads, ParallelFor parallel_for);

}  // namespace qkernels::cpu
