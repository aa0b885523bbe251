// What one memory instruction moves, aligned as it wants it.
#pragma once
#include <cstdint>

namespace qkernels::cuda {

struct alignas(16) Words4 {
  uint32_t word[4];
};
struct alignas(8) Words2 {
  uint32_t word[2];
};

}  // namespace qkernels::cuda
