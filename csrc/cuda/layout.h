// The bytes of layout mma_tile, as qkernels/layouts/mma_tile.py packs them: the contract between the packer and every
// kernel. Plain C++: the tests compile it alone and compare it with the packer.
//
//   qweight [strips][K_pad / 64][64 * 64 * width / 8 bytes]     a strip is 64 rows, K_pad % 64 == 0
//   scales  [strips][G_pad][64]     row 8 j + r of the strip at 8 r + j
//   zeros   [strips][G_pad][64]     likewise; uint8, or floating
//   outer_scales, outer_zeros [strips][S][64]     likewise
//
// A base tile is 16 rows x 64 columns of 4-bit codes or 16 x 32 of 8-bit codes, 512 bytes either way, 16 of each lane.
// Lane 4 r + c holds its fragments of the A operand of mma.m16n8k16 for consecutive 16 columns:
//   a0 a1  row r,     columns 2 c, 2 c + 1        a4 a5  row r,     columns 2 c + 8, 2 c + 9
//   a2 a3  row r + 8, columns 2 c, 2 c + 1        a6 a7  row r + 8, columns 2 c + 8, 2 c + 9
//   4 bit, one word for 16 columns:  nibbles a0 a2 a4 a6 a1 a3 a5 a7, lowest first
//   8 bit, two words for 16 columns: bytes a0 a2 a1 a3 | a4 a6 a5 a7
// Codes of 2, 3, 5 and 6 bits lie in planes, lowest first: 2, 2 + 1, 4 + 1, 4 + 2. A plane of p bits is p * 512 bytes
// for 64 columns; of each tile a lane has p words, and 16 bytes of 4 / p tiles in a row. A nibble of a word of two bits
// has the bits of two runs of 16 columns, that of the word of one bit those of runs 0, 2, 1, 3. Rows past N have code 0
// and scale 0; columns past K have code 0 and meet x = 0, groups past G have scale 0.
#pragma once
#include <cstdint>

#include "../types.h"

namespace qkernels::cuda {

constexpr int kStripRows = 64;
constexpr int kTileRows = 16;
constexpr int kTileBytes = 512;
// The kernels advance by this many columns at a time: one row of tiles in 4 bit, two in 8 bit.
constexpr int kStepColumns = 64;

// Bytes of a strip's codes for kStepColumns columns: 512 for each bit, in a row.
QK_CONSTEXPR int step_bytes(int width) { return kStripRows * kStepColumns * width / 8; }

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Groups that are stored. Short groups fill the last 64 columns, so that every step finds all of its scales.
constexpr int64_t padded_groups(int64_t K, int64_t group) {
  const int64_t groups = K <= group ? 1 : (K + group - 1) / group;
  return groups > 1 && group < kStepColumns ? round_up(K, kStepColumns) / group : groups;
}

struct CodePlace {
  int64_t byte;  // in the codes of the row's strip
  int shift;     // of the code in that byte
};

// Where the code of row n (0 ... 63 of its strip) and stored column k is: of 4 or 8 bits.
QK_CONSTEXPR CodePlace code_place(int n, int64_t k, int width) {
  const int tile = n / 16, high = n / 8 % 2, r = n % 8;
  const int right = k / 8 % 2, c = k / 2 % 4, odd = k % 2;
  const int tile_columns = width == 4 ? 64 : 32;
  const int step = k % tile_columns / 16;
  const int64_t lane_start = (k / tile_columns * 4 + tile) * kTileBytes + (4 * r + c) * 16;
  if (width == 4) return {lane_start + 4 * step + 2 * odd + right, 4 * high};
  return {lane_start + 4 * (2 * step + right) + 2 * odd + high, 0};
}

// The planes of a code of 2 to 6 bits: how many of its bits are in the low one, and in the other.
QK_CONSTEXPR int low_plane(int width) { return width < 4 ? 2 : 4; }
QK_CONSTEXPR int high_plane(int width) { return width - low_plane(width); }

// Of the bits of 16 columns `run` in a nibble of a plane.
QK_CONSTEXPR int plane_bit(int run, int plane) {
  return plane == 4 ? 0 : plane == 2 ? 2 * (run % 2) : 2 * (run % 2) + run / 2;
}
// The same in a plane of 1, 2 or 4 bits, of column k = 0 ... 63 of a step.
QK_CONSTEXPR CodePlace plane_place(int n, int k, int plane) {
  const int tile = n / 16, high = n / 8 % 2, r = n % 8, run = k / 16;
  const int right = k / 8 % 2, c = k / 2 % 4, odd = k % 2;
  const int word = tile * plane + run * plane / 4, bit = 4 * (4 * odd + 2 * right + high) + plane_bit(run, plane);
  return {word / 4 * kTileBytes + (4 * r + c) * 16 + word % 4 * 4 + bit / 8, bit % 8};
}

// Where row n of a strip is among the 64 scales (zeros) of a group.
QK_CONSTEXPR int group_place(int n) { return n % 8 * 8 + n / 8; }

}  // namespace qkernels::cuda
