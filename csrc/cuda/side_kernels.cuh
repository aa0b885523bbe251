// The small kernels around a matrix product: x into an aligned copy, partial sums into y, codes into plain weights.
// Each is bound by the bytes it moves.
#pragma once
#include "copy.cuh"
#include "output.cuh"

namespace qkernels::cuda {

constexpr int kSideThreads = 256;

// --- x [M, K], any strides, through k_order -> [M, steps * 64], zero past K ---

__global__ void __launch_bounds__(kSideThreads) stage(const Activations a, int steps, uint16_t* to) {
  const int64_t chunks = static_cast<int64_t>(a.M) * steps * 8;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kSideThreads + threadIdx.x; i < chunks;
       i += static_cast<int64_t>(gridDim.x) * kSideThreads) {
    const int m = static_cast<int>(i / (steps * 8)), k = static_cast<int>(i % (steps * 8)) * 8;
    store_global16(to + i * 8, gather8(a, m, k));
  }
}

// --- partial sums [splits][M][N_pad] -> y, added in the order of the splits ---

template <class T>
__global__ void __launch_bounds__(kSideThreads) reduce(const Output out, int splits) {
  const int pairs = out.N_pad / 2;
  const int64_t all = static_cast<int64_t>(out.M) * pairs;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kSideThreads + threadIdx.x; i < all;
       i += static_cast<int64_t>(gridDim.x) * kSideThreads) {
    float low = 0.0f, high = 0.0f;
    for (int s = 0; s < splits; ++s) {
      const Words2 v = load_global8(out.partial + (s * all + i) * 2);
      low += bits_to_float(v.word[0]), high += bits_to_float(v.word[1]);
    }
    store_y<T>(out, static_cast<int>(i / pairs), static_cast<int>(i % pairs) * 2, low, high);
  }
}

// --- codes -> weights [rows, columns] ---

struct DequantizeArguments {
  Weight weight;
  int first_strip, rows;  // rows to write, counted from the first strip's
  int columns;            // of the result
  const int32_t* k_order;
  Type type;
  uint8_t* to;
};

QK_DEVICE float load_group_value(Type type, const uint8_t* base, int64_t i) {
  if (type == Type::kUInt8) return static_cast<float>(load_global1(base + i));
  if (type == Type::kFloat) return bits_to_float(load_global4(base + i * 4));
  const uint16_t bits = load_global2(base + i * 2);
  return type == Type::kHalf ? f16_to_float(bits) : bf16_to_float(bits);
}

// Sixteen columns of one row: 16 bytes per store where the row's start allows it, else one value at a time.
QK_DEVICE void store_columns(const DequantizeArguments& p, int row, int k, const float (&w)[16]) {
  const int64_t start = static_cast<int64_t>(row) * p.columns;
  const int size = size_of(p.type);
  if (p.k_order == nullptr && p.columns % 8 == 0) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (k + 8 * half >= p.columns) return;
      uint8_t* to = p.to + (start + k + 8 * half) * size;
      if (p.type == Type::kFloat) {
#pragma unroll
        for (int i = 0; i < 8; i += 4) {
          const float* v = w + 8 * half + i;
          store_global16(to + 4 * i,
                         {{float_to_bits(v[0]), float_to_bits(v[1]), float_to_bits(v[2]), float_to_bits(v[3])}});
        }
      } else {
        Words4 v;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float low = w[8 * half + 2 * i], high = w[8 * half + 2 * i + 1];
          v.word[i] = p.type == Type::kHalf ? pack_f16x2(low, high) : pack_bf16x2(low, high);
        }
        store_global16(to, v);
      }
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    if (k + i >= p.columns) return;
    int column = k + i;
    if (p.k_order != nullptr) {
      column = static_cast<int>(load_global4(p.k_order + column));
      column = column < 0 ? 0 : column >= p.columns ? p.columns - 1 : column;
    }
    uint8_t* to = p.to + (start + column) * size;
    if (p.type == Type::kFloat) {
      store_global4(to, float_to_bits(w[i]));
    } else {
      store_global2(to,
                    static_cast<uint16_t>(p.type == Type::kHalf ? pack_f16x2(w[i], 0.0f) : pack_bf16x2(w[i], 0.0f)));
    }
  }
}

// A warp takes a 16-row tile and 64 columns. The four lanes of a row read the words that hold 16 columns each of it, so
// that each lane writes 16 values in a row and the four write 128 bytes (16-bit types); the reads are four bytes a
// lane, 16 bytes for four lanes, from lines that L1 keeps. There are 4 (8) times as many bytes to write as to read.
template <int kWidth>
__global__ void __launch_bounds__(kSideThreads, 2) dequantize_tiles(const DequantizeArguments p) {
  const Weight& w = p.weight;
  const int lane = threadIdx.x & 31, r = lane >> 2, c = lane & 3;
  const int step = blockIdx.x * (kSideThreads / 32) + (threadIdx.x >> 5);
  const int tile = blockIdx.y % kTilesPerStrip, strip = blockIdx.y / kTilesPerStrip;
  if (step >= w.steps || step * kStepColumns >= p.columns) return;

  // Columns 16 c ... 16 c + 15 of rows r and r + 8: step c of the words of lanes 4 r + 0 ... 3.
  const uint8_t* codes = w.codes + (static_cast<int64_t>(p.first_strip + strip) * w.steps + step) * step_bytes(kWidth);
  float code[2][16];
#pragma unroll
  for (int lane_c = 0; lane_c < 4; ++lane_c) {
    if constexpr (kWidth == 4) {
      const uint32_t q = load_global4(codes + tile * kTileBytes + (4 * r + lane_c) * 16 + c * 4);
#pragma unroll
      for (int i = 0; i < 8; ++i) {  // right, odd, row 8: which nibble, see layout.h
        const int right = i >> 2, odd = i >> 1 & 1, high = i & 1;
        code[high][8 * right + 2 * lane_c + odd] = static_cast<float>(q >> (4 * (2 * right + high) + 16 * odd) & 15);
      }
    } else {
      const uint8_t* words = codes + (c / 2 * kTilesPerStrip + tile) * kTileBytes + (4 * r + lane_c) * 16 + c % 2 * 8;
      const Words2 q = load_global8(words);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int right = i >> 2, odd = i >> 1 & 1, high = i & 1;
        code[high][8 * right + 2 * lane_c + odd] = static_cast<float>(q.word[right] >> (16 * odd + 8 * high) & 255);
      }
    }
  }

  const int in_step = w.groups_per_step == 4 ? c : w.groups_per_step == 2 ? c / 2 : 0;
  const int64_t group =
      static_cast<int64_t>(p.first_strip + strip) * w.groups + step / w.steps_per_group * w.groups_per_step + in_step;
#pragma unroll
  for (int high = 0; high < 2; ++high) {
    const int row = strip * kStripRows + tile * kTileRows + r + 8 * high;
    if (row >= p.rows) continue;
    const int64_t place = group * kStripRows + 8 * r + 2 * tile + high;
    const float scale = load_group_value(w.scale_type, w.scales, place);
    const float zero =
        w.zero_type == Type::kNone ? static_cast<float>(w.mid) : load_group_value(w.zero_type, w.zeros, place);
    float values[16];
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      // Every operation is rounded by itself, so that the weight is, bit for bit, that of QuantTensor.dequantize.
      const float v = w.zeros_are_offsets ? add_rounded(multiply_rounded(code[high][i], scale), zero)
                                          : multiply_rounded(code[high][i] - zero, scale);
      values[i] = step * kStepColumns + 16 * c + i < w.K ? v : 0.0f;  // stored columns past K
    }
    store_columns(p, row, step * kStepColumns + 16 * c, values);
  }
}

}  // namespace qkernels::cuda
