// Plain C++: for CPUs without AVX2, and the oracle that the other instruction sets are tested against. It shares
// neither the unpacking nor the loops with them.
#include "experts_loops.h"
#include "kernels.h"
#include "rows.h"

namespace qkernels::cpu {
namespace {

// One tile, rows m0 ... m1 - 1; x is always fp32 here.
void multiply_tile(const Call& call, int64_t tile, int64_t m0, int64_t m1) {
  const bool exact_zeros = call.zero_type == Type::kUInt8;
  float total[kBlockTokens][kTileRows] = {};
  float weight[kRun][kTileRows];
  for (int64_t g = 0; g < call.G; ++g) {
    float scale[kTileRows], zero[kTileRows], rest[kTileRows];
    for (int r = 0; r < kTileRows; ++r) {
      scale[r] = scale_of(call, tile, g, r);
      const float z = zero_of(call, tile, g, r);
      zero[r] = z;
      rest[r] = rest_of(call, scale[r], z);
    }
    const int64_t end = call.K < (g + 1) * call.group ? call.K : (g + 1) * call.group;
    for (int64_t first = g * call.group; first < end; first += kRun) {
      const int64_t n = end - first < kRun ? end - first : kRun;
      for (int64_t k = 0; k < n; ++k) {
        for (int r = 0; r < kTileRows; ++r) {
          const int code = code_at(call, tile, r, first + k);
          weight[k][r] = exact_zeros ? static_cast<float>(code) - zero[r] : plain_value(call, code);
        }
      }
      for (int64_t m = m0; m < m1; ++m) {
        const float* x = static_cast<const float*>(call.staged.data) + staged_at(call, m, first);
        float sum[kTileRows] = {};
        for (int64_t k = 0; k < n; ++k) {
          for (int r = 0; r < kTileRows; ++r) sum[r] += weight[k][r] * x[k];
        }
        for (int r = 0; r < kTileRows; ++r) total[m - m0][r] += sum[r] * scale[r];
      }
    }
    for (int64_t m = m0; m < m1 && call.sums != nullptr; ++m) {
      for (int r = 0; r < kTileRows; ++r) total[m - m0][r] += rest[r] * call.sums[m * call.G + g];
    }
  }
  float bias[kTileRows];
  load_bias(call, tile * kTileRows, kTileRows, bias);
  for (int64_t m = m0; m < m1; ++m) store_row(call, m, tile * kTileRows, kTileRows, total[m - m0], bias);
}

void multiply(const Call& call, int64_t tile, int tiles, int64_t m0, int64_t m1) {
  for (int t = 0; t < tiles; ++t) multiply_tile(call, tile + t, m0, m1);
}

}  // namespace

const Kernels kScalar = {"scalar", Type::kFloat, stage<float>, multiply, 1 << 18, activate, weigh};

}  // namespace qkernels::cpu
