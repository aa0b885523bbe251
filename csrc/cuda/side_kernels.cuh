// The small kernels around a matrix product: x into an aligned copy, partial sums into y, codes into plain weights.
// Each is bound by the bytes it moves.
#pragma once
#include "copy.cuh"
#include "output.cuh"
#include "weights.cuh"

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
    store_y<T>(out, columns_of(out, static_cast<int>(i % pairs) * 2), static_cast<int>(i / pairs), low, high);
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

// Eight columns of one row from k on: 16 bytes per store where the row's start allows it, else one value at a time.
QK_DEVICE void store_columns(const DequantizeArguments& p, int row, int k, const float (&w)[8]) {
  const int64_t start = static_cast<int64_t>(row) * p.columns;
  const int size = size_of(p.type);
  if (p.k_order == nullptr && p.columns % 8 == 0) {
    if (k >= p.columns) return;
    uint8_t* to = p.to + (start + k) * size;
    if (p.type == Type::kFloat) {
#pragma unroll
      for (int i = 0; i < 8; i += 4) {
        store_global16(to + 4 * i, {{float_to_bits(w[i]), float_to_bits(w[i + 1]), float_to_bits(w[i + 2]),
                                     float_to_bits(w[i + 3])}});
      }
    } else {
      Words4 v;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        v.word[i] = p.type == Type::kHalf ? pack_f16x2(w[2 * i], w[2 * i + 1]) : pack_bf16x2(w[2 * i], w[2 * i + 1]);
      }
      store_global16(to, v);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (k + i >= p.columns) return;
    int column = k + i;
    if (p.k_order != nullptr) column = clamped(static_cast<int>(load_global4(p.k_order + column)), p.columns);
    uint8_t* to = p.to + (start + column) * size;
    if (p.type == Type::kFloat) {
      store_global4(to, float_to_bits(w[i]));
    } else {
      store_global2(to,
                    static_cast<uint16_t>(p.type == Type::kHalf ? pack_f16x2(w[i], 0.0f) : pack_bf16x2(w[i], 0.0f)));
    }
  }
}

// A warp takes a 16-row tile and 64 columns. Lane c of a row's four writes columns 8 c ... 8 c + 7 of each half of 32:
// so every 16-byte store of the four is 64 bytes in a row, two whole sectors (16-bit types; each lane writing 16
// columns in a row, a store would meet every other half of four). A lane needs four of the eight codes of each word
// that it reads, so that two lanes read the same; these reads are four bytes from lines that L1 keeps, and there are 4
// (8) times as many bytes to write as to read.
template <int kWidth, bool kCoded>
__global__ void __launch_bounds__(kSideThreads, 2) dequantize_tiles(const DequantizeArguments p) {
  const Weight& w = p.weight;
  const int lane = threadIdx.x & 31, r = lane >> 2, c = lane & 3;
  const int step = blockIdx.x * (kSideThreads / 32) + (threadIdx.x >> 5);
  const int tile = blockIdx.y % kTilesPerStrip, strip = blockIdx.y / kTilesPerStrip;
  if (step >= w.steps || step * kStepColumns >= p.columns) return;

  // Columns 32 j + 8 c ... + 7 of rows r and r + 8: half `right` of the words of 16 columns `s` of lanes 4 r + 0 ... 3.
  const uint8_t* codes = w.codes + (static_cast<int64_t>(p.first_strip + strip) * w.steps + step) * step_bytes(kWidth);
  const int right = c & 1;
  const auto value = [&w](uint32_t code) { return code_value<kCoded>(w, code); };
  float code[2][2][8];  // [j][row r, row r + 8][column]
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const int s = 2 * j + (c >> 1);
#pragma unroll
    for (int lane_c = 0; lane_c < 4; ++lane_c) {
      const int lane_bytes = (4 * r + lane_c) * 16;
      if constexpr (kWidth == 4) {  // nibbles of row r and r + 8, of even and odd columns: which, see layout.h
        const uint32_t q = load_global4(codes + tile * kTileBytes + lane_bytes + s * 4) >> (8 * right);
        code[j][0][2 * lane_c] = value(q & 15), code[j][1][2 * lane_c] = value(q >> 4 & 15);
        code[j][0][2 * lane_c + 1] = value(q >> 16 & 15);
        code[j][1][2 * lane_c + 1] = value(q >> 20 & 15);
      } else {
        const uint32_t q =
            load_global4(codes + (j * kTilesPerStrip + tile) * kTileBytes + lane_bytes + (c >> 1) * 8 + right * 4);
        code[j][0][2 * lane_c] = value(q & 255), code[j][1][2 * lane_c] = value(q >> 8 & 255);
        code[j][0][2 * lane_c + 1] = value(q >> 16 & 255);
        code[j][1][2 * lane_c + 1] = value(q >> 24);
      }
    }
  }

  const int64_t first_group =
      static_cast<int64_t>(p.first_strip + strip) * w.groups + step / w.steps_per_group * w.groups_per_step;
#pragma unroll
  for (int high = 0; high < 2; ++high) {
    const int row = strip * kStripRows + tile * kTileRows + r + 8 * high;
    if (row >= p.rows) continue;
    GroupValues group{};
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      if (j == 0 || w.groups_per_step > 1) {
        const int in_step = w.groups_per_step == 4 ? 2 * j + (c >> 1) : w.groups_per_step == 2 ? j : 0;
        const int64_t place = (first_group + in_step) * kStripRows + 8 * r + 2 * tile + high;
        group = load_group_values<kCoded>(w, place);
      }
      const int k = step * kStepColumns + 32 * j + 8 * c;
      float values[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        values[i] = k + i < w.K ? dequantized(w, code[j][high][i], group) : 0.0f;  // stored columns past K
      }
      store_columns(p, row, k, values);
    }
  }
}

// The same of codes in planes and of factors. A lane reads of each plane the word that has its codes.
__global__ void __launch_bounds__(kSideThreads, 2) dequantize_planes(const DequantizeArguments p) {
  const Weight& w = p.weight;
  const int lane = threadIdx.x & 31, r = lane >> 2, c = lane & 3;
  const int step = blockIdx.x * (kSideThreads / 32) + (threadIdx.x >> 5);
  const int tile = blockIdx.y % kTilesPerStrip, strip = blockIdx.y / kTilesPerStrip;
  if (step >= w.steps || step * kStepColumns >= p.columns) return;
  const uint8_t* codes = w.codes + (static_cast<int64_t>(p.first_strip + strip) * w.steps + step) * step_bytes(w.width);
  const int low = low_plane(w.width), high = high_plane(w.width);
  // Of lane 4 r + lane_c and run of 16 columns: a word whose lowest nibble is that of half c % 2, row r.
  const auto word_of = [&](const uint8_t* from, int plane, int run, int lane_c) {
    const int word = tile * plane + run * plane / 4;
    return load_global4(from + word / 4 * kTileBytes + (4 * r + lane_c) * 16 + word % 4 * 4) >>
           (8 * (c & 1) + plane_bit(run, plane));
  };
  for (int j = 0; j < 2; ++j) {
    const int run = 2 * j + (c >> 1), k = step * kStepColumns + 32 * j + 8 * c;
    float value[2][8];  // [row r, row r + 8][column]
#pragma unroll
    for (int lane_c = 0; lane_c < 4; ++lane_c) {
      const uint32_t q = word_of(codes, low, run, lane_c);
      const uint32_t h = high == 0 ? 0 : word_of(codes + low * kTileBytes, high, run, lane_c);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int shift = 16 * (i / 2) + 4 * (i % 2);
        const uint32_t code = (q >> shift & ((1u << low) - 1)) | (h >> shift & ((1u << high) - 1)) << low;
        value[i % 2][2 * lane_c + i / 2] = planes_value(w, code);
      }
    }
    const int in_step = w.groups_per_step == 4 ? run : w.groups_per_step == 2 ? j : 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = strip * kStripRows + tile * kTileRows + r + 8 * half;
      if (row >= p.rows) continue;
      const GroupValues group =
          load_planes_group_values(w, p.first_strip + strip, step, in_step, 8 * r + 2 * tile + half);
      float values[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) values[i] = k + i < w.K ? dequantized(w, value[half][i], group) : 0.0f;
      store_columns(p, row, k, values);
    }
  }
}

}  // namespace qkernels::cuda
