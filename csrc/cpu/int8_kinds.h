// What kinds of weights the loops for int8 activations tell apart when they are compiled.
#pragma once
#include <cstdint>

#include "kernels.h"

namespace qkernels::cpu {
namespace {

enum class Zeros { kNone, kIntegers, kRest };
// kProducts: of two factors a group. What a group asks at run time costs its loop registers: W4A8 with groups of 32, M
// = 16 was 1.4 x slower, 128 1.5 x.
enum class Scales { kStored, kProducts };
// kTable: nibbles that are indices into a codebook of integers; the last four: in planes, or of 3 bits
enum class Codes { kNibbles, kBytes, kTable, kTwo, kThree, kFive, kSix };

// Bits of a code, as it is stored.
constexpr int width_of(Codes codes) {
  switch (codes) {
    case Codes::kBytes:
      return 8;
    case Codes::kTwo:
      return 2;
    case Codes::kThree:
      return 3;
    case Codes::kFive:
      return 5;
    case Codes::kSix:
      return 6;
    default:
      return 4;
  }
}

// L::multiply<kCodes, kZeros, kScales> of the weight that `call` has.
template <class L, Codes kCodes>
void multiply_its_width(const Call& call, int64_t tile, int tiles, int64_t m0, int64_t m1) {
  constexpr Scales kStored = Scales::kStored;
  if (has_rest(call)) return L::template multiply<kCodes, Zeros::kRest, kStored>(call, tile, tiles, m0, m1);
  if (call.zero_type == Type::kUInt8) {
    return L::template multiply<kCodes, Zeros::kIntegers, kStored>(call, tile, tiles, m0, m1);
  }
  return L::template multiply<kCodes, Zeros::kNone, kStored>(call, tile, tiles, m0, m1);
}

// Scales of two factors: each kind has its width and its kind of zeros. One factor for a row waits until the end.
template <class L>
void multiply_its_factors(const Call& call, int64_t tile, int tiles, int64_t m0, int64_t m1) {
  constexpr Scales kProducts = Scales::kProducts;
  switch (call.factors) {
    case Factors::kK2:
      return L::template multiply<Codes::kTwo, Zeros::kRest, kProducts>(call, tile, tiles, m0, m1);
    case Factors::kK3:
      return L::template multiply<Codes::kThree, Zeros::kNone, kProducts>(call, tile, tiles, m0, m1);
    case Factors::kK45:
      if (call.bits == 4) {
        return L::template multiply<Codes::kNibbles, Zeros::kRest, kProducts>(call, tile, tiles, m0, m1);
      }
      return L::template multiply<Codes::kFive, Zeros::kRest, kProducts>(call, tile, tiles, m0, m1);
    case Factors::kK6:
      return L::template multiply<Codes::kSix, Zeros::kNone, kProducts>(call, tile, tiles, m0, m1);
    case Factors::kIq4Xs:
      return L::template multiply<Codes::kTable, Zeros::kNone, kProducts>(call, tile, tiles, m0, m1);
    default:
      return L::template multiply<Codes::kTable, Zeros::kNone, Scales::kStored>(call, tile, tiles, m0, m1);
  }
}

template <class L>
void multiply_its_kind(const Call& call, int64_t tile, int tiles, int64_t m0, int64_t m1) {
  if (call.factors != Factors::kNone) return multiply_its_factors<L>(call, tile, tiles, m0, m1);
  if (call.codebook != Codebook::kIntegers) {
    return L::template multiply<Codes::kTable, Zeros::kNone, Scales::kStored>(call, tile, tiles, m0, m1);
  }
  switch (call.bits) {
    case 2:
      return multiply_its_width<L, Codes::kTwo>(call, tile, tiles, m0, m1);
    case 3:
      return multiply_its_width<L, Codes::kThree>(call, tile, tiles, m0, m1);
    case 4:
      return multiply_its_width<L, Codes::kNibbles>(call, tile, tiles, m0, m1);
    case 5:
      return multiply_its_width<L, Codes::kFive>(call, tile, tiles, m0, m1);
    case 6:
      return multiply_its_width<L, Codes::kSix>(call, tile, tiles, m0, m1);
    default:
      return multiply_its_width<L, Codes::kBytes>(call, tile, tiles, m0, m1);
  }
}

}  // namespace
}  // namespace qkernels::cpu
