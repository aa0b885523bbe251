// Runs the CPU kernels of one instruction set over edge shapes, with every buffer in its own allocation of exactly the right
// size, and compares with a product in double. Built by test_sanitizers.py with -fsanitize=address,undefined.
//
//   edge_shapes ISA          exit code 77 if this CPU lacks it
//   edge_shapes ISA short    qweight one byte too small: must be caught
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "kernels.h"

namespace cpu = qkernels::cpu;
using cpu::Type;

namespace {

uint32_t state = 1;
int random_below(int n) {
  state = state * 1664525u + 1013904223u;
  return static_cast<int>((state >> 8) % static_cast<uint32_t>(n));
}

// n elements of a small integer, or of an eighth of one, in the given type; malloc, so that every byte past the end counts
struct Buffer {
  std::unique_ptr<void, decltype(&std::free)> memory{nullptr, &std::free};
  Type type;
  size_t size;

  static size_t bytes_of(Type type) { return type == Type::kUInt8 ? 1 : type == Type::kFloat ? 4 : 2; }
  Buffer(Type t, int64_t n) : type(t), size(static_cast<size_t>(n)) { memory.reset(std::malloc(bytes_of(t) * size + 1)); }
  Buffer(Type t, int64_t n, bool exact_size) : type(t), size(static_cast<size_t>(n)) {
    if (exact_size) memory.reset(std::malloc(bytes_of(t) * size));
  }

  void set(size_t i, float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if (type == Type::kUInt8) {
      static_cast<uint8_t*>(memory.get())[i] = static_cast<uint8_t>(value);
    } else if (type == Type::kFloat) {
      static_cast<float*>(memory.get())[i] = value;
    } else if (type == Type::kBFloat16) {
      static_cast<uint16_t*>(memory.get())[i] = static_cast<uint16_t>(bits >> 16);  // exact for the values used here
    } else {  // exact too: a normal half, or 0
      const uint16_t half = value == 0 ? 0 : ((bits >> 16) & 0x8000) | (((bits & 0x7fffffff) - 0x38000000) >> 13);
      static_cast<uint16_t*>(memory.get())[i] = half;
    }
  }
  double get(size_t i) const {
    if (type == Type::kUInt8) return static_cast<const uint8_t*>(memory.get())[i];
    if (type == Type::kFloat) return static_cast<const float*>(memory.get())[i];
    const uint32_t word = static_cast<const uint16_t*>(memory.get())[i];
    if (type == Type::kHalf) {
      const uint32_t exponent = (word >> 10) & 31, mantissa = word & 1023;
      const double value = exponent ? std::ldexp(1024 + mantissa, static_cast<int>(exponent) - 25) : std::ldexp(mantissa, -24);
      return word & 0x8000 ? -value : value;
    }
    const uint32_t bits = word << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
  }
};
