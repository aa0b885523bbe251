// The types of values in buffers, for the kernels of the CPU and of CUDA alike. No torch and no CUDA in here.
#pragma once

// A constexpr function that kernels call, too.
#ifdef __CUDACC__
#define QK_CONSTEXPR __host__ __device__ constexpr
#else
#define QK_CONSTEXPR constexpr
#endif

namespace qkernels {

// kE8M0 is a power of two, 2^(byte - 127); kE4M3 an 8-bit float. Both are those of scales and small factors.
enum class Type : int { kNone, kUInt8, kFloat, kHalf, kBFloat16, kInt8, kE8M0, kE4M3 };

// What codes mean, and what scales are products of: by the numbers of the ops (qkernels/codebooks.py: CODEBOOK_NUMBERS;
// qkernels/scheme.py: FACTOR_NUMBERS).
enum class Codebook : int { kIntegers, kNf4, kFp4, kE2M1, kIq4Nl, kE4M3, kE5M2, kCount };
enum class Factors : int { kNone, kK2, kK3, kK45, kK6, kIq4Xs, kNvfp4, kNvfp4M, kCount };

// static: an inline function that was compiled for AVX-512 must not stand in for one that was not (cpu/target.h).

// Bytes of one value.
static QK_CONSTEXPR int size_of(Type type) {
  return type == Type::kNone    ? 0
         : type == Type::kFloat ? 4
                                : 1 + (type == Type::kHalf || type == Type::kBFloat16 ? 1 : 0);
}

// 16 and 32 bits wide: what x, biases and floating zeros may be.
static QK_CONSTEXPR bool is_floating(Type type) {
  return type == Type::kFloat || type == Type::kHalf || type == Type::kBFloat16;
}

}  // namespace qkernels
