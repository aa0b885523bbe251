// What the loops of tile_decode.h, tile_panel.h and tile_products.h have in common, as templates over the vectors (V)
// and how codes are unpacked (U): octets of codes times rows of x, and how columns are cut into groups and runs.
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
  const typename V::Sum mid = V::set1(static_cast<float>(mid_of(call)));
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

}  // namespace
}  // namespace qkernels::cpu
