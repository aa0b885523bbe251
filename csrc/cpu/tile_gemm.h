// The loops that the vector instruction sets share, as templates over the vectors (V) and how codes are unpacked (U);
// what both must have stands in tile_sums.h. Which loop serves how many rows of x and which weight is decided here.
#pragma once
#include <cstdint>

#include "tile_decode.h"
#include "tile_panel.h"
#include "tile_products.h"

namespace qkernels::cpu {
namespace {

// Of products two tiles at most: see there.
template <class V, class U>
constexpr int vectors_together(int tokens) {
  const int vectors = V::kDecodeVectors[tokens - 1], two = 2 * kTileRows / V::kRows;
  return U::kFactors != Factors::kNone && vectors > two ? two : vectors;
}

template <class V, class U, int kVectors, int kTokens>
QK_INLINE void decode_any(const Call& call, const U& unpacker, int64_t tile, int row, int64_t m0) {
  if constexpr (U::kFactors != Factors::kNone) {
    decode_products<V, U, kVectors, kTokens>(call, unpacker, tile, row, m0);
  } else {
    decode_rows<V, U, kVectors, kTokens>(call, unpacker, tile, row, m0);
  }
}

// At most kTokens rows of x.
template <class V, class U, int kTokens>
void decode_tiles(const Call& call, const U& unpacker, int64_t tile, int tiles, int64_t m0, int64_t tokens) {
  if constexpr (kTokens > 1) {
    if (tokens < kTokens) return decode_tiles<V, U, kTokens - 1>(call, unpacker, tile, tiles, m0, tokens);
  }
  constexpr int kPerTile = kTileRows / V::kRows, kVectors = vectors_together<V, U>(kTokens);
  if constexpr (kVectors > kPerTile) {
    constexpr int kTiles = kVectors / kPerTile;
    for (; tiles >= kTiles; tiles -= kTiles, tile += kTiles) {
      decode_any<V, U, kVectors, kTokens>(call, unpacker, tile, 0, m0);
    }
  }
  constexpr int kAtOnce = kVectors < kPerTile ? kVectors : kPerTile;
  for (; tiles > 0; --tiles, ++tile) {
    for (int row = 0; row < kTileRows; row += kAtOnce * V::kRows) {
      decode_any<V, U, kAtOnce, kTokens>(call, unpacker, tile, row, m0);
    }
  }
}

// Every kMaxDecodeTokens rows of x with one tile, which stays in L2.
template <class V, class U>
void decode_tile(const Call& call, const U& unpacker, int64_t tile, int64_t m0, int64_t m1) {
  for (int64_t m = m0, end; m < m1; m = end) {
    end = m + kMaxDecodeTokens < m1 ? m + kMaxDecodeTokens : m1;
    decode_tiles<V, U, kMaxDecodeTokens>(call, unpacker, tile, 1, m, end - m);
  }
}

template <class V, class U>
void multiply_with(const Call& call, int64_t tile, int tiles, int64_t m0, int64_t m1) {
  const U unpacker(call);
  const int64_t end = tile + tiles;
  if (m1 - m0 <= kMaxDecodeTokens)
    return decode_tiles<V, U, kMaxDecodeTokens>(call, unpacker, tile, tiles, m0, m1 - m0);
  for (; tile < end; ++tile) {
    if constexpr (U::kPanel) {
      if constexpr (U::kFactors != Factors::kNone) {
        multiply_products<V, U>(call, unpacker, tile, m0, m1);
      } else {
        multiply_tile<V, U>(call, unpacker, tile, m0, m1);
      }
    } else {
      decode_tile<V, U>(call, unpacker, tile, m0, m1);
    }
  }
}

// For each width the unpackers of an instruction set. Codes of 4 bits have a faster one where no integer zero
// points are subtracted: it looks them up in a table, which may as well be a codebook's (Table4). Float8 is that of
// 8-bit codebooks; Sym and Any take bits: they are those in planes, without integer zero points and with any.
template <class V, class Symmetric4, class Zeros4, class Any8, class Table4, class Float8, template <int> class Sym,
          template <int> class Any>
void multiply(const Call& call, int64_t tile, int tiles, int64_t m0, int64_t m1) {
  const bool zeros = call.zero_type == Type::kUInt8;
  const auto with = [&](auto sym, auto any) {
    if (zeros) return multiply_with<V, typename decltype(any)::type>(call, tile, tiles, m0, m1);
    return multiply_with<V, typename decltype(sym)::type>(call, tile, tiles, m0, m1);
  };
  switch (call.factors) {  // one factor a row (NVFP4) is none of a group
    case Factors::kK2:
      return multiply_with<V, Products<Sym<2>, Factors::kK2>>(call, tile, tiles, m0, m1);
    case Factors::kK3:
      return multiply_with<V, Products<Sym<3>, Factors::kK3>>(call, tile, tiles, m0, m1);
    case Factors::kK45:
      if (call.bits == 4) return multiply_with<V, Products<Symmetric4, Factors::kK45>>(call, tile, tiles, m0, m1);
      return multiply_with<V, Products<Sym<5>, Factors::kK45>>(call, tile, tiles, m0, m1);
    case Factors::kK6:
      return multiply_with<V, Products<Sym<6>, Factors::kK6>>(call, tile, tiles, m0, m1);
    case Factors::kIq4Xs:
      return multiply_with<V, Products<Table4, Factors::kIq4Xs>>(call, tile, tiles, m0, m1);
    default:
      break;
  }
  if (codebook_bits(call.codebook) == 8) return multiply_with<V, Float8>(call, tile, tiles, m0, m1);
  if (codebook_bits(call.codebook) == 4) return multiply_with<V, Table4>(call, tile, tiles, m0, m1);
  switch (call.bits) {
    case 2:
      return with(As<Sym<2>>(), As<Any<2>>());
    case 3:
      return with(As<Sym<3>>(), As<Any<3>>());
    case 4:
      return with(As<Symmetric4>(), As<Zeros4>());
    case 5:
      return with(As<Sym<5>>(), As<Any<5>>());
    case 6:
      return with(As<Sym<6>>(), As<Any<6>>());
    default:
      return multiply_with<V, Any8>(call, tile, tiles, m0, m1);
  }
}

}  // namespace
}  // namespace qkernels::cpu
