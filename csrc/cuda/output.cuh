// From the lanes' totals to y, or to the workspace where K was split over blocks.
#pragma once
#include "multiply.cuh"

namespace qkernels::cuda {

// Lanes hold rows of y^T; memory wants tokens. A warp turns its totals around in shared memory, [token][64 rows] floats
// with this many floats a token: 2 * 68 = 8 (mod 32), so the four c and eight r of a warp's stores meet 32 different
// banks.
constexpr int kExchangeRow = kStripRows + 4;
QK_CONSTEXPR int exchange_bytes(int tokens) { return tokens * kExchangeRow * 4; }

// Tokens 8 i ... 8 i + 7 of n8 tile i, to token `token` and on of the exchange.
template <int kTokenTiles>
QK_DEVICE void store_exchange(const Totals<kTokenTiles>& totals, int i, uint32_t exchange, int token, int lane) {
  const int r = lane >> 2, c = lane & 3;
#pragma unroll
  for (int tile = 0; tile < kTilesPerStrip; ++tile) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int row = tile * kTileRows + r + (j < 2 ? 0 : 8);
      store_shared4(exchange + ((token + 2 * c + j % 2) * kExchangeRow + row) * 4, float_to_bits(totals[tile][i][j]));
    }
  }
}

// The totals of a warp to y, eight tokens at a time through `exchange` (exchange_bytes(8) of its own). m0: its first
// token; n, n + 1: the lane's columns of y. `store` takes m and the two values.
template <int kTokenTiles, class Store>
QK_DEVICE void turn_around(const Totals<kTokenTiles>& totals, uint32_t exchange, const Output& out, int m0, int n,
                           int lane, const Store& store) {
#pragma unroll
  for (int i = 0; i < kTokenTiles; ++i) {
    store_exchange<kTokenTiles>(totals, i, exchange, 0, lane);
    __syncwarp();
#pragma unroll
    for (int token = 0; token < 8; ++token) {
      const int m = m0 + 8 * i + token;
      const Words2 v = load_shared8(exchange + (token * kExchangeRow + 2 * lane) * 4);
      if (m < out.M && n < out.N_pad) store(m, bits_to_float(v.word[0]), bits_to_float(v.word[1]));
    }
    __syncwarp();
  }
}

QK_DEVICE float load_bias(const Output& out, int n) {
  if (out.bias_type == Type::kNone) return 0.0f;
  if (out.bias_type == Type::kFloat) return bits_to_float(load_global4(out.bias + static_cast<int64_t>(n) * 4));
  const uint16_t bits = load_global2(out.bias + static_cast<int64_t>(n) * 2);
  return out.bias_type == Type::kHalf ? f16_to_float(bits) : bf16_to_float(bits);
}

// A lane's two columns of y, n (even) and n + 1: what is the same for all of its tokens.
struct Columns {
  int n, count;  // of the two, how many y has
  bool paired;   // both are there, and in every row aligned to four bytes
  float low_bias, high_bias;
};

QK_DEVICE Columns columns_of(const Output& out, int n) {
  const int count = n >= out.N ? 0 : n + 1 < out.N ? 2 : 1;
  return {n, count, count == 2 && out.N % 2 == 0, count > 0 ? load_bias(out, n) : 0.0f,
          count > 1 ? load_bias(out, n + 1) : 0.0f};
}

// y[m, n] and y[m, n + 1]: bias is added in fp32, and the sum is rounded once.
template <class T>
QK_DEVICE void store_y(const Output& out, const Columns& columns, int m, float low, float high) {
  if (columns.count == 0) return;
  uint16_t* to = out.y + static_cast<int64_t>(m) * out.N + columns.n;
  const uint32_t pair = T::pack(low + columns.low_bias, high + columns.high_bias);
  if (columns.paired) {
    store_global4(to, pair);
  } else {
    store_global2(to, static_cast<uint16_t>(pair));
    if (columns.count == 2) store_global2(to + 1, static_cast<uint16_t>(pair >> 16));
  }
}

// Two columns of one of several parts of K.
QK_DEVICE void store_partial(const Output& out, int split, int m, int n, float low, float high) {
  float* to = out.partial + (static_cast<int64_t>(split) * out.M + m) * out.N_pad + n;
  store_global8(to, {{float_to_bits(low), float_to_bits(high)}});
}

// The same for one of `splits` parts of K.
template <class T>
QK_DEVICE void store_part(const Output& out, const Columns& columns, int split, int splits, int m, float low,
                          float high) {
  if (splits == 1) {
    store_y<T>(out, columns, m, low, high);
  } else {
    store_partial(out, split, m, columns.n, low, high);
  }
}

}  // namespace qkernels::cuda
