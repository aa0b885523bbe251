// The loops that the vector instruction sets share, as templates over the vectors (V) and how codes are unpacked (U).
//
// V, a set of vectors:
//   X             an element of staged x                   kRows       rows of a tile in one vector
//   Sum           fp32 accumulators, one row a lane        kStep       columns that one multiplication takes
//   Weight, Input operands of one multiplication           kTokens     rows of x a block of `multiply_block` takes
//   kHalf         vectors of a tile that such a block works on at a time
//   kDecodeVectors[m - 1]: vectors of rows that the decode path works on for m rows of x, at most those of
//                 tiles_together(m) tiles. A multiplication must wait for the previous one into the same sum (4 to 6
//                 cycles), so 8 or more sums are kept in flight where there are registers.
//   kRunsTogether 2: one row of x is summed over two runs of a tile at the same time, so that as many sums are in
//                 flight as two tiles have, and few rows have codes fetched into L2 as well; 1: over one
//   kPairs        whether two rows of x are multiplied by two rows of the weight at once: see tile_pairs.h
// U, an unpacker for V, made of a Call:
//   Zero          what is subtracted from the codes of one vector of rows, per group
//   Raw           the bytes of one octet of columns of one vector of rows
//   kOctetBytes   from one octet to the next, on average over a block
//   kBlockOctets  octets of a block
//   kByBlocks     whether loops over whole blocks are worth their code, in which each octet's number is known
//   kFactors      what scales (and offsets) are products of, a group: kNone, or see tile_products.h
//   load(block, i): of octet i of the block that begins there
//   kMemoryBytes  of those, how many come from memory and are worth prefetching: all, or none
//   kPanel        whether more than kMaxDecodeTokens rows of x are worth unpacking a run once, into L1, or every
//                 kMaxDecodeTokens of them unpack it again on its way into the products
//   value(raw, s, zero): code - zero of columns kStep * s ... of the octet, exact
//
// Everything is in an unnamed namespace, so that each instruction set has its own copy.
#pragma once
#include <cstdint>

#include "kernels.h"
#include "rows.h"
#include "tile_pairs.h"

namespace qkernels::cpu {
namespace {

constexpr int kOctet = 8;

template <class T>
struct As {  // a type as a value
  using type = T;
};

template <int kValue>
struct Number {  // the same
  static constexpr int value = kValue;
};

template <class U, Factors kOf>
struct Products : U {
  using U::U;
  static constexpr Factors kFactors = kOf;
};

// Where the planes of octet i of a block lie, and by how many bits to rotate a line to the left so that the octet's
// codes begin at bit 0 of the low plane and at bit planes.low of the high one.
template <int kBits>
struct BlockOf {
  static constexpr Planes planes = planes_of(kBits);
  static constexpr int kBlockOctets = block_columns(kBits) / kOctet;
  static constexpr Factors kFactors = Factors::kNone;
  static constexpr int64_t kOctetBytes = kTileRows * kBits, kMemoryBytes = kOctetBytes;
  static constexpr bool kByBlocks = kBits == 3;  // an octet's number decides in which lines its codes are
  static constexpr int low_line(int i) { return i * planes.low / 4; }
  static constexpr int high_line(int) { return kBlockOctets * planes.low / 4; }
  static constexpr int low_left(int i) { return 32 - i * planes.low % 4 * 4; }
  static constexpr int high_left(int i) { return 32 + planes.low - i * planes.high * 4; }
};

// Fetches the codes at `codes`, of some octets: normally those of the next run (2 KB of 4-bit codes; 1 and 4 KB were
// slower). While a run meets many rows of x nothing else would fetch it: worth 1.5 x at M = 16, and 1.2 x at M = 1
// and 8. After a tile's last run another tile comes (3 % at M = 1). Its address may lie past the weights: a
// prefetch of nothing does nothing.
//
// kFurther: also those 14 KB behind, into L2, for two runs at a time are no stream that the hardware sees (Zen 4, one
// core, M = 1: Q4_K 28 GB/s, 6 KB behind 27, without 15). Octets that are no whole lines are then fetched into L2 alone
// (Q5_K 23 GB/s, into both 18).
template <class U>
constexpr int64_t kRunBytes = kRun / kOctet * U::kOctetBytes;
template <class U, int kOctets, bool kFurther>
QK_INLINE void prefetch_codes(const uint8_t* codes) {
#pragma GCC unroll 8
  for (int64_t line = 0; line < U::kMemoryBytes * kOctets; line += 64) {
    if (!kFurther || U::kMemoryBytes % 64 == 0) __builtin_prefetch(codes + line);
    if (kFurther) __builtin_prefetch(codes + 14336 + line, 0, 2);
  }
}

// Fetches a tile's scales or zeros (`base`) four groups before they are wanted, at its end those of `next_tile`: worth
// 8 to 12 % at M = 1 and groups of 32, whose scales are a ninth of the bytes.
QK_INLINE void prefetch_group(const Call& call, const void* base, int64_t bytes, int64_t tile, int64_t next_tile,
                              int64_t g) {
  constexpr int64_t kAhead = 4;
  if (base == nullptr) return;
  const int64_t row = g + kAhead < call.G ? tile * call.G : (next_tile - 1) * call.G;
  const uint8_t* at = static_cast<const uint8_t*>(base) + (row + g + kAhead) * bytes;
  __builtin_prefetch(at);
  if (bytes > 64) __builtin_prefetch(at + 64);
}

// Weights that `unpack_run` wrote to L1, read back as if they were codes.
template <class V>
struct Panel {
  struct Zero {};
  using Raw = const uint8_t*;
  static constexpr int kSteps = kOctet / V::kStep;
  static constexpr int64_t kOctetBytes = kSteps * kTileRows * kLaneBytes, kMemoryBytes = 0;
  static constexpr int kBlockOctets = 1;
  static constexpr bool kByBlocks = false;
  static QK_INLINE Raw load(const uint8_t* at, int) { return at; }
  QK_INLINE typename V::Weight value(Raw raw, int s, Zero) const {
    return V::load_weight(raw + s * kTileRows * kLaneBytes);
  }
};

// The octet at `codes`, which is octet `octet` of its tile. The block that it lies in begins before it.
template <class U>
QK_INLINE typename U::Raw load_octet(const uint8_t* codes, int64_t octet) {
  const int i = static_cast<int>(octet % U::kBlockOctets);
  return U::load(codes - i * U::kOctetBytes, i);
}

// acc[n][r][v] += weights of vector v in run n times row r of x, over `octets` octets of columns each. Runs lie one
// after another; the first begins at `codes`, with octet `first` of the tiles, and x[n] is where row 0 has the columns
// of run n. kKnown: so many octets instead, from octet kFirst of a block on, and nothing is asked for at run time.
template <class V, class U, int kVectors, int kTokens, int kRuns, int kKnown = 0, int kFirst = 0>
QK_INLINE void accumulate(const U& unpacker, const typename U::Zero (&zero)[kRuns][kVectors], const uint8_t* codes,
                          int64_t tile_bytes, int64_t ahead, const typename V::X* const (&x)[kRuns], int64_t x_stride,
                          int64_t first, int octets, typename V::Sum (&acc)[kRuns][kTokens][kVectors]) {
  constexpr int kPerTile = kTileRows / V::kRows, kSteps = kOctet / V::kStep;
  constexpr bool kPairs = V::kPairs && kTokens % 2 == 0, kFurther = V::kRunsTogether > 1 && kTokens <= kFewTokens;
  // Four rows of x a pointer, addressed as p, p + s, p + 2 s, p + 3 s: gcc would compute an address for each row and
  // step, run out of registers, and reload them all from the stack. The empty asm hides how the pointers are related.
  constexpr int kPointers = (kTokens + 3) / 4;
  const typename V::X* rows[kRuns][kPointers];
#pragma GCC unroll 2
  for (int n = 0; n < kRuns; ++n) {
#pragma GCC unroll 4
    for (int i = 0; i < kPointers; ++i) {
      rows[n][i] = x[n] + 4 * i * x_stride;
      asm("" : "+r"(rows[n][i]));
    }
  }
  if constexpr (kPairs) {
    for (int r = 0; r < kTokens; r += 2)
      for (int v = 0; v < kVectors; ++v) V::pair(acc[0][r][v], acc[0][r + 1][v]);
  }
  const int64_t run_bytes = octets * U::kOctetBytes;
  const uint8_t* fetched = codes + ahead;
  // `apart`: octets from one run to the next, modulo a block
  const auto add_octet = [&](int64_t octet, int apart) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int t = 0; t * kPerTile < kVectors; ++t) prefetch_codes<U, kRuns, kFurther>(fetched + t * tile_bytes);
    typename U::Raw raw[kRuns][kVectors];
#pragma GCC unroll 2
    for (int n = 0; n < kRuns; ++n) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        const int64_t at = (v / kPerTile) * tile_bytes + (v % kPerTile) * V::kRows * kLaneBytes;
        raw[n][v] = load_octet<U>(codes + n * run_bytes + at, octet + n * apart);
      }
    }
    if constexpr (kPairs) {
      add_pairs<V, U, kSteps>(unpacker, zero[0], raw[0], rows[0], x_stride, acc[0]);
    } else {
#pragma GCC unroll 8
      for (int s = 0; s < kSteps; ++s) {
        typename V::Weight weight[kRuns][kVectors];
#pragma GCC unroll 2
        for (int n = 0; n < kRuns; ++n) {
#pragma GCC unroll 8
          for (int v = 0; v < kVectors; ++v) weight[n][v] = unpacker.value(raw[n][v], s, zero[n][v]);
        }
#pragma GCC unroll 2
        for (int n = 0; n < kRuns; ++n) {
#pragma GCC unroll 16
          for (int r = 0; r < kTokens; ++r) {
            const typename V::Input input = V::broadcast(rows[n][r / 4] + (r % 4) * x_stride + s * V::kStep);
#pragma GCC unroll 8
            for (int v = 0; v < kVectors; ++v) acc[n][r][v] = V::multiply_add(acc[n][r][v], weight[n][v], input);
          }
        }
      }
    }
    codes += U::kOctetBytes;
    fetched += kRuns * U::kOctetBytes;
#pragma GCC unroll 2
    for (int n = 0; n < kRuns; ++n) {
#pragma GCC unroll 4
      for (int i = 0; i < kPointers; ++i) rows[n][i] += kOctet;
    }
  };
  if constexpr (kKnown > 0) {
#pragma GCC unroll 4
    for (int o = 0; o < kKnown; ++o) add_octet(kFirst + o, kKnown);
  } else {
    int o = 0;
    // Two vectors, their zeros, three tokens' sums and the lines of a block are more than AVX2's 16 registers: four
    // tokens take 19.2 ms block by block, 11.8 octet by octet (Zen 4, 32 MB of 3-bit codes).
    constexpr bool kFit = V::kRows != 8 || kTokens < 3 || kVectors == 1;
    if constexpr (U::kByBlocks && kFit) {
      const bool begin = first % U::kBlockOctets == 0 && (kRuns == 1 || octets % U::kBlockOctets == 0);
      for (; begin && o + U::kBlockOctets <= octets; o += U::kBlockOctets) {
#pragma GCC unroll 4
        for (int i = 0; i < U::kBlockOctets; ++i) add_octet(i, 0);
      }
    }
    for (; o < octets; ++o) add_octet(first + o, octets);
  }
  if constexpr (kPairs) {
    for (int r = 0; r < kTokens; r += 2)
      for (int v = 0; v < kVectors; ++v) V::part(acc[0][r][v], acc[0][r + 1][v]);
  }
}

// The total of a vector of rows, with the outer factor that waited.
template <class V>
QK_INLINE typename V::Sum finished(const Call& call, int64_t tile, int64_t row, typename V::Sum total) {
  if (!outer_of_row(call)) return total;
  const typename V::Sum outer = V::widen(call.outer_type, call.outer_scales, tile * kTileRows + row);
  return call.factors == Factors::kNvfp4 ? V::div(total, outer) : V::mul(total, outer);
}

// What a group adds once per row of x where zero points are floating: sum(x) * rest, with rest = (mid - zero) * scale,
// or mid * scale + offset. The products with code - mid stay exact.
template <class V>
QK_INLINE typename V::Sum stored_rest_of(const Call& call, typename V::Sum scale, int64_t at) {
  const typename V::Sum mid = V::set1(static_cast<float>(1 << (call.bits - 1)));
  const typename V::Sum zero = V::widen(call.zero_type, call.zeros, at);
  return call.zeros_are_offsets ? V::fma(mid, scale, zero) : V::mul(V::sub(mid, zero), scale);
}

// Group g is columns first ... first + 8 octets - 1 of the tiles, in runs.
struct Group {
  int64_t first, octets;
};
QK_INLINE Group group_of(const Call& call, int64_t g) {
  const int64_t first = g * call.group, left = call.K - first;
  return {first, ((left < call.group ? left : call.group) + kOctet - 1) / kOctet};
}

// `octets` octets from octet `first` of the tiles on: a group, or at most kRun columns of a longer one.
struct Run {
  int64_t g, first, octets;
  bool ends_group;
};
QK_INLINE Run run_from(const Call& call, int64_t g, int64_t octet) {  // of group g, which octet `octet` is in
  constexpr int64_t kMost = kRun / kOctet;
  const Group group = group_of(call, g);
  const int64_t left = group.first / kOctet + group.octets - octet;
  return {g, octet, left < kMost ? left : kMost, left <= kMost};
}
QK_INLINE Run run_after(const Call& call, const Run& run) {
  return run_from(call, run.g + run.ends_group, run.first + run.octets);
}

// --- up to kMaxDecodeTokens rows of x: unpacked weights go from a register straight into the products ---

template <class V>
constexpr int runs_together(int tokens) {
  return tokens <= 3 ? V::kRunsTogether : 1;
}

// From the run that kVectors vectors of rows are at to the next one, in a tile's last run that of the tiles that
// follow.
template <class V, class U, int kVectors>
QK_INLINE int64_t to_next_run(const Call& call, bool last) {
  constexpr int kTiles = kVectors * V::kRows / kTileRows;
  if constexpr (kTiles > 1) return kRunBytes<U> + (last ? (kTiles - 1) * call.tile_bytes : 0);
  return kRunBytes<U>;
}

// What runs add to the totals, one after another, as if they had been summed in turns.
template <class V, class U, int kVectors, int kTokens, int kRuns>
QK_INLINE void add_runs(const Call& call, const U& unpacker, int64_t tile, int row, int64_t m0,
                        const Run (&runs)[kRuns], typename V::Sum (&total)[kTokens][kVectors]) {
  using Sum = typename V::Sum;
  constexpr int kPerTile = kTileRows / V::kRows;
  const auto at = [&](int n, int v) {
    const int64_t t = tile + v / kPerTile, r = row + (v % kPerTile) * V::kRows;
    return (t * call.G + runs[n].g) * kTileRows + r;
  };
  typename U::Zero zero[kRuns][kVectors];
  const typename V::X* x[kRuns];
  Sum scale[kRuns][kVectors], acc[kRuns][kTokens][kVectors];
#pragma GCC unroll 2
  for (int n = 0; n < kRuns; ++n) {
    for (int t = 0; t * kPerTile < kVectors; ++t) {
      prefetch_group(call, call.scales, call.scale_bytes, tile + t, tile + t + 1, runs[n].g);
      prefetch_group(call, call.zeros, call.zero_bytes, tile + t, tile + t + 1, runs[n].g);
    }
    x[n] = static_cast<const typename V::X*>(call.staged.data) + staged_at(call, m0, runs[n].first * kOctet);
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      zero[n][v] = unpacker.zero(at(n, v));
      scale[n][v] = V::widen(call.scale_type, call.scales, at(n, v));
    }
    for (auto& of_token : acc[n])
      for (Sum& sum : of_token) sum = V::zero();
  }
  const Run& last = runs[kRuns - 1];
  const int64_t ahead = to_next_run<V, U, kVectors>(call, last.ends_group && last.g + 1 == call.G);
  const uint8_t* codes = call.qweight + tile * call.tile_bytes + row * kLaneBytes + runs[0].first * U::kOctetBytes;
  accumulate<V, U, kVectors, kTokens, kRuns>(unpacker, zero, codes, call.tile_bytes, ahead, x, call.staged.row_stride,
                                             runs[0].first, static_cast<int>(runs[0].octets), acc);
#pragma GCC unroll 2
  for (int n = 0; n < kRuns; ++n) {
#pragma GCC unroll 8
    for (int r = 0; r < kTokens; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) total[r][v] = V::fma(acc[n][r][v], scale[n][v], total[r][v]);
    }
    if (call.sums != nullptr && runs[n].ends_group) {
      for (int v = 0; v < kVectors; ++v) {
        const Sum rest = stored_rest_of<V>(call, scale[n][v], at(n, v));
        for (int r = 0; r < kTokens; ++r) {
          total[r][v] = V::fma(rest, V::set1(call.sums[(m0 + r) * call.G + runs[n].g]), total[r][v]);
        }
      }
    }
  }
}

template <class V, class U, int kVectors, int kTokens>
void decode_rows(const Call& call, const U& unpacker, int64_t tile, int row, int64_t m0) {
  using Sum = typename V::Sum;
  constexpr int kPerTile = kTileRows / V::kRows;
  Sum total[kTokens][kVectors];
  for (auto& of_token : total)
    for (Sum& sum : of_token) sum = V::zero();
  for (Run run = run_from(call, 0, 0); run.g < call.G;) {
    const Run second = run_after(call, run);
    if constexpr (runs_together<V>(kTokens) > 1) {
      if (second.g < call.G && second.octets == run.octets) {
        add_runs<V, U, kVectors, kTokens, 2>(call, unpacker, tile, row, m0, {run, second}, total);
        run = run_after(call, second);
        continue;
      }
    }
    add_runs<V, U, kVectors, kTokens, 1>(call, unpacker, tile, row, m0, {run}, total);
    run = second;
  }
  constexpr int kCount = kVectors * V::kRows;
  const int64_t n0 = tile * kTileRows + row;
  float bias[kCount], sum[kCount];
  load_bias(call, n0, kCount, bias);
  for (int r = 0; r < kTokens; ++r) {
    for (int v = 0; v < kVectors; ++v) {
      const int first = row + (v % kPerTile) * V::kRows;
      V::store(sum + v * V::kRows, finished<V>(call, tile + v / kPerTile, first, total[r][v]));
    }
    store_row(call, m0 + r, n0, kCount, sum, bias);
  }
}

// tile_products.h
template <class V, class U, int kVectors, int kTokens>
void decode_products(const Call& call, const U& unpacker, int64_t tile, int row, int64_t m0);
template <class V, class U>
void multiply_products(const Call& call, const U& unpacker, int64_t tile, int64_t m0, int64_t m1);

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

// --- more rows: a run of a tile is unpacked into L1, then meets all rows of a block ---

template <class V, class U>
QK_INLINE void unpack_run(const U& unpacker, const typename U::Zero* zero, const uint8_t* codes, int64_t first,
                          int octets, uint8_t* panel) {
  constexpr int kPerTile = kTileRows / V::kRows, kVectorBytes = V::kRows * kLaneBytes;
  for (int o = 0; o < octets; ++o, codes += U::kOctetBytes, panel += Panel<V>::kOctetBytes) {
    prefetch_codes<U, 1, false>(codes + kRunBytes<U>);
#pragma GCC unroll 4
    for (int v = 0; v < kPerTile; ++v) {
      const typename U::Raw raw = load_octet<U>(codes + v * kVectorBytes, first + o);
#pragma GCC unroll 8
      for (int s = 0; s < Panel<V>::kSteps; ++s) {
        V::store_weight(panel + s * kTileRows * kLaneBytes + v * kVectorBytes, unpacker.value(raw, s, zero[v]));
      }
    }
  }
}

// total[r][row ...] += scale * (start[r] + panel times rows of x), for kTokens rows of x and all rows of the tile;
// kStart: whether sums start at anything but 0
template <class V, bool kStart, int kTokens>
void multiply_block(const uint8_t* panel, int octets, const typename V::X* x, int64_t x_stride, const float* scale,
                    [[maybe_unused]] const float* start, float* total) {
  using Sum = typename V::Sum;
  const typename Panel<V>::Zero none[1][V::kHalf] = {};
  const typename V::X* const rows[] = {x};
  for (int row = 0; row < kTileRows; row += V::kHalf * V::kRows) {
    Sum acc[1][kTokens][V::kHalf];
    for (int r = 0; r < kTokens; ++r) {
      for (Sum& sum : acc[0][r]) {
        if constexpr (kStart) {
          sum = V::set1(start[r]);
        } else {
          sum = V::zero();
        }
      }
    }
    accumulate<V, Panel<V>, V::kHalf, kTokens, 1>(Panel<V>(), none, panel + row * kLaneBytes, 0, 0, rows, x_stride, 0,
                                                  octets, acc);
#pragma GCC unroll 16
    for (int r = 0; r < kTokens; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < V::kHalf; ++v) {
        const int at = row + v * V::kRows;
        V::store(total + r * kTileRows + at,
                 V::fma(acc[0][r][v], V::load(scale + at), V::load(total + r * kTileRows + at)));
      }
    }
  }
}

template <class V, bool kStart, int kTokens>
QK_INLINE void multiply_last(int64_t tokens, const uint8_t* panel, int octets, const typename V::X* x, int64_t x_stride,
                             const float* scale, const float* start, float* total) {
  if (tokens == kTokens) return multiply_block<V, kStart, kTokens>(panel, octets, x, x_stride, scale, start, total);
  if constexpr (kTokens > 1)
    multiply_last<V, kStart, kTokens - 1>(tokens, panel, octets, x, x_stride, scale, start, total);
}

// The run of a panel with `tokens` rows of x, which begin at x.
template <class V, bool kStart>
void multiply_panel(int64_t tokens, const uint8_t* panel, int octets, const typename V::X* x, int64_t x_stride,
                    const float* scale, const float* start, float* total) {
  for (; tokens >= V::kTokens; tokens -= V::kTokens) {
    multiply_block<V, kStart, V::kTokens>(panel, octets, x, x_stride, scale, start, total);
    x += V::kTokens * x_stride, total += V::kTokens * kTileRows;
    if (kStart) start += V::kTokens;
  }
  multiply_last<V, kStart, V::kTokens - 1>(tokens, panel, octets, x, x_stride, scale, start, total);
}

template <class V, class U>
void multiply_tile(const Call& call, const U& unpacker, int64_t tile, int64_t m0, int64_t m1) {
  using Sum = typename V::Sum;
  constexpr int kPerTile = kTileRows / V::kRows, kRunOctets = kRun / kOctet;
  alignas(64) uint8_t panel[kRunOctets * Panel<V>::kOctetBytes];
  alignas(64) float total[kBlockTokens * kTileRows], scale[kTileRows];
  std::memset(total, 0, static_cast<size_t>(m1 - m0) * kTileRows * sizeof(float));
  const uint8_t* codes = call.qweight + tile * call.tile_bytes;
  const typename V::X* x = static_cast<const typename V::X*>(call.staged.data);
  for (int64_t g = 0; g < call.G; ++g) {
    const Group group = group_of(call, g);
    const int64_t at = (tile * call.G + g) * kTileRows;
    typename U::Zero zero[kPerTile];
    for (int v = 0; v < kPerTile; ++v) {
      zero[v] = unpacker.zero(at + v * V::kRows);
      V::store(scale + v * V::kRows, V::widen(call.scale_type, call.scales, at + v * V::kRows));
    }
    for (int64_t o = 0; o < group.octets; o += kRunOctets) {
      const int octets = static_cast<int>(group.octets - o < kRunOctets ? group.octets - o : kRunOctets);
      const int64_t octet = group.first / kOctet + o;
      unpack_run<V, U>(unpacker, zero, codes + octet * U::kOctetBytes, octet, octets, panel);
      multiply_panel<V, false>(m1 - m0, panel, octets, x + staged_at(call, m0, octet * kOctet), call.staged.row_stride,
                               scale, nullptr, total);
    }
    for (int v = 0; v < kPerTile && call.sums != nullptr; ++v) {
      const Sum rest = stored_rest_of<V>(call, V::load(scale + v * V::kRows), at + v * V::kRows);
      for (int64_t m = m0; m < m1; ++m) {
        float* sum = total + (m - m0) * kTileRows + v * V::kRows;
        V::store(sum, V::fma(rest, V::set1(call.sums[m * call.G + g]), V::load(sum)));
      }
    }
  }
  float bias[kTileRows];
  load_bias(call, tile * kTileRows, kTileRows, bias);
  for (int64_t m = m0; m < m1; ++m) {
    float* sums = total + (m - m0) * kTileRows;
    for (int row = 0; row < kTileRows; row += V::kRows) {
      V::store(sums + row, finished<V>(call, tile, row, V::load(sums + row)));
    }
    store_row(call, m, tile * kTileRows, kTileRows, sums, bias);
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

#include "tile_products.h"
