// Plain C++: for CPUs without AVX2, and the oracle that the other instruction sets are tested against. It shares
// neither the decoding nor the loops with them.
#include "kernels.h"
#include "rows.h"

namespace qkernels::cpu {
namespace {

int code(const Problem& p, int64_t tile, int row, int64_t k) {
  const uint8_t* bytes = p.qweight + tile * p.tile_bytes;
  if (p.bits <= 4) {
    const int64_t octet = k / 8, i = k % 8, bit = 16 * (i & 1) + 4 * (i >> 1);
    return bytes[(octet * kTileRows + row) * kLaneBytes + bit / 8] >> (bit % 8) & 15;
  }
  const int64_t quad = k / 4, i = k % 4, bit = 16 * (i & 1) + 8 * (i >> 1);
  return bytes[(quad * kTileRows + row) * kLaneBytes + bit / 8];
}

// One tile, rows m0 ... m1 - 1; x is always fp32 here.
void multiply_tile(const Problem& p, int64_t tile, int64_t m0, int64_t m1) {
  const float mid = static_cast<float>(1 << (p.bits - 1));
  const bool exact_zeros = p.zero_type == Type::kUInt8;
  float total[kBlockRows][kTileRows] = {};
  float weight[kRun][kTileRows];
  for (int64_t g = 0; g < p.G; ++g) {
    float scale[kTileRows], zero[kTileRows], rest[kTileRows];
    for (int r = 0; r < kTileRows; ++r) {
      const int64_t at = (tile * p.G + g) * kTileRows + r;
      scale[r] = load(p.scale_type, p.scales, at);
      const float z = load(p.zero_type, p.zeros, at);
      zero[r] = exact_zeros ? z : mid;
      rest[r] = rest_of(p, scale[r], z);
    }
    const int64_t end = p.K < (g + 1) * p.group ? p.K : (g + 1) * p.group;
    for (int64_t first = g * p.group; first < end; first += kRun) {
      const int64_t n = end - first < kRun ? end - first : kRun;
      for (int64_t k = 0; k < n; ++k) {
        for (int r = 0; r < kTileRows; ++r) weight[k][r] = static_cast<float>(code(p, tile, r, first + k)) - zero[r];
      }
      for (int64_t m = m0; m < m1; ++m) {
        const float* x = static_cast<const float*>(p.staged.data) + staged_at(p, m, first);
        float sum[kTileRows] = {};
        for (int64_t k = 0; k < n; ++k) {
          for (int r = 0; r < kTileRows; ++r) sum[r] += weight[k][r] * x[k];
        }
        for (int r = 0; r < kTileRows; ++r) total[m - m0][r] += sum[r] * scale[r];
      }
    }
    for (int64_t m = m0; m < m1 && p.sums != nullptr; ++m) {
      for (int r = 0; r < kTileRows; ++r) total[m - m0][r] += rest[r] * p.sums[m * p.G + g];
    }
  }
  float bias[kTileRows];
  load_bias(p, tile * kTileRows, kTileRows, bias);
  for (int64_t m = m0; m < m1; ++m) store_row(p, m, tile * kTileRows, kTileRows, total[m - m0], bias);
}

void multiply(const Problem& p, int64_t tile, int tiles, int64_t m0, int64_t m1) {
  for (int t = 0; t < tiles; ++t) multiply_tile(p, tile + t, m0, m1);
}

}  // namespace

const Kernels kScalar = {"scalar", Type::kFloat, stage<float>, multiply, 1 << 18};

}  // namespace qkernels::cpu
