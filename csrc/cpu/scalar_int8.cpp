// Products with int8 activations in plain C++: for CPUs without AVX2, and the oracle of the other instruction sets.
#include "kernels.h"
#include "rows.h"
#include "rows_int8.h"

namespace qkernels::cpu {
namespace {

void multiply_tile(const Call& call, int64_t tile, int64_t m0, int64_t m1) {
  const bool table = call.codebook != Codebook::kIntegers;
  const float step = table ? integer_step(call.codebook) : 1.0f;
  float total[kBlockTokens][kTileRows] = {};
  float scale[kTileRows], rest[kTileRows];
  int zero[kTileRows];
  int32_t weight[kRun][kTileRows];
  int32_t sums[kBlockTokens][kTileRows];
  for (int64_t g = 0; g < call.G; ++g) {
    std::memset(sums, 0, sizeof sums);
    for (int r = 0; r < kTileRows; ++r) {
      const int64_t at = (tile * call.G + g) * kTileRows + r;
      scale[r] = scale_of(call, tile, g, r) * step;
      zero[r] = call.zero_type == Type::kUInt8 ? static_cast<const uint8_t*>(call.zeros)[at] : 1 << (call.bits - 1);
      rest[r] = rest_of(call, scale[r], zero_of(call, tile, g, r));
    }
    const int64_t end = call.K < (g + 1) * call.group ? call.K : (g + 1) * call.group;
    for (int64_t first = g * call.group; first < end; first += kRun) {
      const int64_t n = end - first < kRun ? end - first : kRun;
      for (int64_t k = 0; k < n; ++k) {
        for (int r = 0; r < kTileRows; ++r) {
          const int c = int8_code_at(call, tile, r, first + k);
          weight[k][r] = table ? static_cast<int>(plain_value(call, c) / step) : c - zero[r];
        }
      }
      for (int64_t m = m0; m < m1; ++m) {
        const int8_t* x = static_cast<const int8_t*>(call.staged.data) + m * call.staged.row_stride + first;
        for (int64_t k = 0; k < n; ++k) {
          for (int r = 0; r < kTileRows; ++r) sums[m - m0][r] += weight[k][r] * x[k];
        }
      }
    }
    for (int64_t m = m0; m < m1; ++m) {
      const float x_sum = static_cast<float>(call.x_sums[g * call.M + m]);
      for (int r = 0; r < kTileRows; ++r) {
        total[m - m0][r] += static_cast<float>(sums[m - m0][r]) * scale[r];
        if (has_rest(call)) total[m - m0][r] += rest[r] * x_sum;
      }
    }
  }
  float bias[kTileRows];
  load_bias(call, tile * kTileRows, kTileRows, bias);
  for (int64_t m = m0; m < m1; ++m) {
    for (int r = 0; r < kTileRows; ++r) total[m - m0][r] *= call.x_scales[m];
    store_row(call, m, tile * kTileRows, kTileRows, total[m - m0], bias);
  }
}

void multiply(const Call& call, int64_t tile, int tiles, int64_t m0, int64_t m1) {
  for (int t = 0; t < tiles; ++t) multiply_tile(call, tile + t, m0, m1);
}

}  // namespace

const Kernels kScalarInt8 = {"scalar", Type::kFloat, stage_int8, multiply, 1 << 18};

}  // namespace qkernels::cpu
