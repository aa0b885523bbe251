// What a whole warp computes in one instruction. The fragments are those of the PTX manual, sections "Matrix Fragments
// for mma.m16n8k16" and "... m16n8k32"; l is the lane, g = l / 4 its group, t = l % 4 its place in the group.
#pragma once
#include "half_host.h"
#include "machine.h"

namespace qkernels::host {

// Where the operands of mma lie in LaneRegisters::in.
constexpr int kOperandA = 0, kOperandB = 4, kOperandC = 6;

constexpr int kRows = 16, kColumns = 8;

// d = a b + c of one warp in fp32. The hardware aligns the products of 8 or 16 k to the largest and truncates; here
// they are added one by one. Where every partial sum is exact there is no difference.
template <int kDepth>
void multiply(const float (&a)[kRows][kDepth], const float (&b)[kDepth][kColumns], float (&d)[kRows][kColumns]) {
  for (int i = 0; i < kRows; ++i) {
    float sum[kColumns] = {};
    for (int k = 0; k < kDepth; ++k) {
      for (int j = 0; j < kColumns; ++j) sum[j] += a[i][k] * b[k][j];
    }
    for (int j = 0; j < kColumns; ++j) d[i][j] += sum[j];
  }
}

// Registers a0..a3 hold rows g, g + 8, g, g + 8 and columns 2 t, 2 t, 2 t + 8, 2 t + 8; b0, b1 rows 2 t, 2 t + 8 of
// column g; two elements each.
template <class T>
QK_UNSEEN void gather_16(const Warp& w, float (&a)[kRows][16], float (&b)[16][kColumns]) {
  for (unsigned l = 0; l < kLanes; ++l) {
    const uint32_t* in = w.lane[l].in;
    const unsigned g = l / 4, k = l % 4 * 2;
    for (unsigned r = 0; r < 4; ++r) {
      a[g + r % 2 * 8][k + r / 2 * 8] = low<T>(in[kOperandA + r]);
      a[g + r % 2 * 8][k + r / 2 * 8 + 1] = high<T>(in[kOperandA + r]);
    }
    for (unsigned r = 0; r < 2; ++r) {
      b[k + r * 8][g] = low<T>(in[kOperandB + r]);
      b[k + r * 8 + 1][g] = high<T>(in[kOperandB + r]);
    }
  }
}

// 32-bit accumulators: d0, d1 are columns 2 t, 2 t + 1 of row g, d2, d3 of row g + 8.
template <class T>
QK_UNSEEN void mma_warp(Warp& w) {
  float a[kRows][16], b[16][kColumns], d[kRows][kColumns];
  gather_16<T>(w, a, b);
  for (unsigned l = 0; l < kLanes; ++l) {
    for (unsigned r = 0; r < 4; ++r) d[l / 4 + r / 2 * 8][l % 4 * 2 + r % 2] = bits_float(w.lane[l].in[kOperandC + r]);
  }
  multiply(a, b, d);
  for (unsigned l = 0; l < kLanes; ++l) {
    for (unsigned r = 0; r < 4; ++r) w.lane[l].out[r] = float_bits(d[l / 4 + r / 2 * 8][l % 4 * 2 + r % 2]);
  }
}

// 16-bit accumulators: d0 holds both columns of row g, d1 of row g + 8.
QK_UNSEEN inline void mma_warp_accumulate_f16(Warp& w) {
  float a[kRows][16], b[16][kColumns], d[kRows][kColumns];
  gather_16<Fp16>(w, a, b);
  for (unsigned l = 0; l < kLanes; ++l) {
    for (unsigned r = 0; r < 2; ++r) {
      d[l / 4 + r * 8][l % 4 * 2] = low<Fp16>(w.lane[l].in[kOperandC + r]);
      d[l / 4 + r * 8][l % 4 * 2 + 1] = high<Fp16>(w.lane[l].in[kOperandC + r]);
    }
  }
  multiply(a, b, d);
  for (unsigned l = 0; l < kLanes; ++l) {
    for (unsigned r = 0; r < 2; ++r) {
      const float* row = d[l / 4 + r * 8] + l % 4 * 2;
      w.lane[l].out[r] = pack<Fp16>(row[0], row[1]);
    }
  }
}

// 8 bit, m16n8k32: as for 16 bit with four elements in a register, k in steps of 4 t and 4 t + 16.
QK_UNSEEN inline void mma_warp_s8(Warp& w) {
  int32_t a[kRows][32], b[32][kColumns];
  const auto byte = [](uint32_t v, unsigned i) { return static_cast<int32_t>(static_cast<int8_t>(v >> (8 * i))); };
  for (unsigned l = 0; l < kLanes; ++l) {
    const uint32_t* in = w.lane[l].in;
    for (unsigned e = 0; e < 4; ++e) {
      const unsigned g = l / 4, k = l % 4 * 4 + e;
      for (unsigned r = 0; r < 4; ++r) a[g + r % 2 * 8][k + r / 2 * 16] = byte(in[kOperandA + r], e);
      for (unsigned r = 0; r < 2; ++r) b[k + r * 16][g] = byte(in[kOperandB + r], e);
    }
  }
  for (unsigned l = 0; l < kLanes; ++l) {
    for (unsigned r = 0; r < 4; ++r) {
      const unsigned i = l / 4 + r / 2 * 8, j = l % 4 * 2 + r % 2;
      uint32_t sum = w.lane[l].in[kOperandC + r];  // unsigned: it wraps, as without .satfinite
      for (unsigned k = 0; k < 32; ++k) sum += static_cast<uint32_t>(a[i][k] * b[k][j]);
      w.lane[l].out[r] = sum;
    }
  }
}

// in: the row (16 bytes) whose address this lane gave.
template <unsigned kMatrices, bool kTransposed>
QK_UNSEEN void load_matrix_warp(Warp& w) {
  for (unsigned l = 0; l < kLanes; ++l) {
    for (unsigned m = 0; m < kMatrices; ++m) {
      const auto element = [&](unsigned row, unsigned column) {
        return w.lane[8 * m + row].in[column / 2] >> (column % 2 * 16) & 0xffff;
      };
      const unsigned i = l / 4, j = l % 4 * 2;
      w.lane[l].out[m] =
          kTransposed ? element(j, i) | element(j + 1, i) << 16 : element(i, j) | element(i, j + 1) << 16;
    }
  }
}

// in[0]: the value, in[1]: the lane to read. An index past the warp wraps, as with a full mask.
QK_UNSEEN inline void shuffle_warp(Warp& w) {
  for (unsigned l = 0; l < kLanes; ++l) w.lane[l].out[0] = w.lane[w.lane[l].in[1] % kLanes].in[0];
}

QK_UNSEEN inline void any_warp(Warp& w) {
  uint32_t any = 0;
  for (unsigned l = 0; l < kLanes; ++l) any |= w.lane[l].in[0];
  for (unsigned l = 0; l < kLanes; ++l) w.lane[l].out[0] = any;
}

}  // namespace qkernels::host
