// The types of values in buffers, for the kernels of the CPU and of CUDA alike. No torch and no CUDA in here.
#pragma once

// A constexpr function that kernels call, too.
#ifdef __CUDACC__
#define QK_CONSTEXPR __host__ __device__ constexpr
#else
#define QK_CONSTEXPR constexpr
#endif

namespace qkernels {

enum class Type : int { kNone, kUInt8, kFloat, kHalf, kBFloat16 };

// static: an inline function that was compiled for AVX-512 must not stand in for one that was not (cpu/target.h).

// Bytes of one value.
static QK_CONSTEXPR int size_of(Type type) {
  return type == Type::kNone ? 0 : type == Type::kUInt8 ? 1 : type == Type::kFloat ? 4 : 2;
}

static QK_CONSTEXPR bool is_floating(Type type) { return type != Type::kNone && type != Type::kUInt8; }

}  // namespace qkernels
