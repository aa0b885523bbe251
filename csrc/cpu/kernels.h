// The CPU kernels' byte contract, what one call looks like to them, and what each instruction set has to offer.
//
// No torch header here or in any file that includes this one, bindings.cpp aside: the kernels can be built and run
// alone (tests/ops does, under the address sanitizer), and nothing inline that was compiled for AVX-512 can end up
// being called on an older CPU.
//
// Layout cpu_tile_a16 (qkernels/layouts/cpu_tile_a16.py packs it), 32 rows a tile:
//   qweight [tiles][K_pad / block][...]      K_pad = K rounded up to whole blocks, columns in k_order. A block of
//   columns
//     is one plane of its codes after the other, lowest bits first (Planes); a plane of w bits is block * w / 32 lines
//     of 128 bytes: one 32-bit little-endian lane a row, with 32 / w columns of the block. Column k of a lane has its w
//     bits from 16 * (k & 1) + w * (k >> 1) on, so that lane >> w i has the pair (2 i, 2 i + 1) at the bottom of its
//     two words. Of 4 and 8 bits a block is an octet, in one lane or two.
//     Of 3 bits a block is 32 columns in three lanes. Octet o = 0, 1, 2 is in lane o, its pair p at bit 3 p of the
//     words; of octet 3, pair p = 0, 1, 2 is at bit 12 of lane p's words, and bit b of pair 3 is bit 15 of lane b's.
//   scales, zeros [tiles][G][32]             group g holds stored columns g * group ... min(K, (g + 1) * group) - 1
//   outer_scales, outer_zeros [tiles][S][32] where scales (and offsets) are products: then `scales` and `zeros` are the
//     small factors, and outer factor s serves groups s * per ... (s + 1) * per - 1, or all of a row
// Layout cpu_tile_a8 (qkernels/layouts/cpu_tile_a8.py), for x quantized to int8: the same, but for the lanes, whose
//   column k has its bits from 8 * (k & 3) + w * (k >> 2) on: byte j has columns j, 4 + j, ...
//   Of 3 bits octet o = 0, 1, 2 is in lane o, its quad q at bit 3 q of the bytes; of octet 3, quad q has its low two
//   bits at bit 6 of lane q's bytes and the third at bit 6 + q of lane 2's.
// Rows past N have code 0 and scale 0; columns past K have code 0 and meet x = 0. With more than one group, `group` is
// a multiple of 8, so that every octet lies in one group.
#pragma once
#include <cstdint>

#include "../activations.h"
#include "../codebooks.h"

namespace qkernels::cpu {

#if defined(__aarch64__) && defined(__linux__)  // which says what the CPU has; setup.py has the same condition
#define QK_NEON 1
#endif

constexpr int kTileRows = 32;
constexpr int kLaneBytes = 4;
constexpr int kLineBytes = kTileRows * kLaneBytes;  // one lane of each row

// Widths of the planes of a code; `high` is 0 where there is one. Those of 3 bits are no planes: see above.
struct Planes {
  int low, high;
};
static constexpr Planes planes_of(int bits) {
  if (bits > 6) return {8, 0};
  return bits > 4 ? Planes{4, bits - 4} : Planes{bits, 0};
}
static constexpr int stored_bits(int bits) { return planes_of(bits).low + planes_of(bits).high; }
static constexpr int block_columns(int bits) {
  if (bits == 3) return 32;
  const Planes planes = planes_of(bits);
  const int lane = 32 / (planes.high != 0 ? planes.high : planes.low);
  return lane > 8 ? lane : 8;
}

// A group is summed in runs of at most this many columns, and the scale is applied to each run's fp32 sum. It bounds
// the panel of unpacked weights (16 KB in fp32) and the rounding error (see tests/ops/test_numerics.py). Every path of
// an instruction set adds in the same order, so that a row of y depends neither on M nor on the number of threads.
constexpr int64_t kRun = 128;

// The most tokens (rows of x, M) of the decode path, where weights are unpacked in registers and used at once. Where
// there are more, they take turns, or a run is unpacked into L1 for all tokens of a block (kPanel in tile_sums.h).
constexpr int64_t kMaxDecodeTokens = 8;
constexpr int64_t kBlockTokens = 64;
// Up to this M, x is used as it lies, and several tiles are worked on together: a row of x alone leaves the multipliers
// idle for most of the 4 to 6 cycles that a sum takes (M = 1, 57 MiB of weights: 64 % of the read bandwidth with two
// tiles, 77 % with four, 81 % with prefetch_codes at a tile's end). Two to four rows work on two at a time, and gain 1
// to 4 % from the longer stretch of memory.
constexpr int64_t kFewTokens = 4;
constexpr int kMostTiles = 4;
static inline int tiles_together(int64_t M) { return M <= kFewTokens ? kMostTiles : 1; }

// What is multiplied, in numbers; no pointers.
struct Problem {
  int64_t M, N, K;     // tokens (rows of x), rows of the weight, columns of both
  int64_t group, G;    // columns that share a scale; groups in K
  int64_t K_pad;       // K rounded up to whole blocks
  int64_t tile_bytes;  // of one tile's codes
  int bits;
  Type x_type;  // of x, and of y where y_type is kNone
  Type scale_type;
  Type zero_type;          // kNone: symmetric, or `factors` says what zeros are; kUInt8: zero points, subtracted
  bool zeros_are_offsets;  // exactly; floating: zero points, or offsets, which are added after scaling
  Type bias_type;          // kNone: no bias
  bool int8_activations;   // layout cpu_tile_a8
  Rounding rounding;       // of int8 activations
  float x_scale, x_zero;   // of all rows of x, where they are given (is_static)
  Codebook codebook;       // what codes are indices into
  Factors factors;         // what scales are products of
  Type outer_type;         // of the outer factors; kNone: there are none
  int64_t S;               // outer factors of a row
  int outer_shift;         // group g has outer factor g >> outer_shift
  Type y_type;             // kFloat: y is in fp32 whatever x is; kNone: as x
};

// Whether one outer factor serves all of a row: it waits until the row is summed.
static inline bool outer_of_row(const Problem& p) {
  return p.factors == Factors::kNvfp4 || p.factors == Factors::kNvfp4M;
}

// What the ops' number for factors asks of a weight.
struct FactorKind {
  Type small;       // of the small factors
  bool offsets;     // whether there are factors of offsets, too
  int outer_shift;  // log2 of the groups under one outer factor; 31: all of a row
};
static constexpr FactorKind kind_of(Factors factors) {
  switch (factors) {
    case Factors::kK2:
      return {Type::kUInt8, true, 4};
    case Factors::kK3:
    case Factors::kK6:
      return {Type::kInt8, false, 4};
    case Factors::kK45:
      return {Type::kUInt8, true, 3};
    case Factors::kIq4Xs:
      return {Type::kInt8, false, 3};
    default:
      return {Type::kE4M3, false, 31};
  }
}

// Without the types. static: an inline function that was compiled for AVX-512 must not stand in for one that was not
// (target.h).
static inline Problem make_problem(int64_t M, int64_t N, int64_t K, int bits, int64_t group) {
  Problem p{};
  p.M = M, p.N = N, p.K = K, p.bits = bits, p.group = group;
  p.G = K == 0 ? 1 : (K - 1) / group + 1;
  p.K_pad = (K + block_columns(bits) - 1) / block_columns(bits) * block_columns(bits);
  p.tile_bytes = p.K_pad * (kTileRows * stored_bits(bits) / 8);
  return p;
}

static inline int64_t tiles_of(const Problem& p) { return (p.N + kTileRows - 1) / kTileRows; }

// A problem with its buffers, as a kernel takes it.
struct Call : Problem {
  const void* x = nullptr;                        // [M, K] as the caller has it
  int64_t x_row_stride = 0, x_column_stride = 0;  // in elements
  const uint8_t* qweight = nullptr;
  const void* scales = nullptr;
  const void* zeros = nullptr;
  const void* outer_scales = nullptr;
  const void* outer_zeros = nullptr;
  const int32_t* k_order = nullptr;  // [K]: the column of x that each stored column meets; null: its own
  const void* bias = nullptr;        // [N]
  void* y = nullptr;                 // [M, N] contiguous

  // x as the kernel reads it: x itself, or a copy that is gathered, converted and padded with zeros. Column k of row m
  // is at k / width * block_stride + m * row_stride + k % width, in elements; `width` is such that a run lies in one
  // block. For more than kFewTokens rows the copy has blocks of about one run: a run of all rows is then a few pages in
  // a row, where rows 8 KB apart would share L1 sets and need a page each (measured: half the speed).
  struct {
    const void* data;
    int64_t width, block_stride, row_stride;
  } staged = {};
  // With int8 activations `staged` is int8 [M, row_stride], and these are what rows_int8.h adds to it.
  float* x_scales = nullptr;                // [M]
  int32_t* x_sums = nullptr;                // [G, M] sums of the codes of x over each group
  float* x_zeros = nullptr;                 // [M] zero point times scale (has_zero_points)
  const uint8_t* marked = nullptr;          // [K] whether a column of x is multiplied apart (Rounding::kOutliers)
  int64_t scale_bytes = 0, zero_bytes = 0;  // of a tile's group, set by `gemm`
  float* sums = nullptr;                    // [M, G] sums of floating x over each group, in fp32; null unless has_rest
};

// Whether the sums of the int8 kernels are not all of y: see apart.h.
static inline bool has_apart(const Problem& p) {
  return has_zero_points(p.rounding) || p.rounding == Rounding::kOutliers;
}

static inline int64_t staged_at(const Call& call, int64_t m, int64_t k) {
  if (call.staged.block_stride == 0) return m * call.staged.row_stride + k;  // one block: no division
  return k / call.staged.width * call.staged.block_stride + m * call.staged.row_stride + k % call.staged.width;
}

// Floating zero points and offsets: products are with code - mid_of, which is exact, and the rest of the weight, the
// same over a group, meets the sum of x.
static inline bool has_rest(const Problem& p) {
  return is_floating(p.zero_type) || (p.zeros_are_offsets && p.factors != Factors::kNone);
}

// Where the outer factor of group g, row `row` of a tile is.
static inline int64_t outer_at(const Problem& p, int64_t tile, int64_t g, int64_t row) {
  return (tile * p.S + (g >> p.outer_shift)) * kTileRows + row;
}

// What is subtracted from a code where no zero point is stored beside it: 2^(bits-1); nothing where offsets are
// products and x is floating, since sums of x are multiplied by small factors alone there (tile_products.h).
static inline int mid_of(const Problem& p) {
  const bool as_stored = p.zeros_are_offsets && p.factors != Factors::kNone && !p.int8_activations;
  return as_stored ? 0 : 1 << (p.bits - 1);
}

// What a code means then, in integers exactly.
static inline float plain_value(const Problem& p, int code) {
  return p.codebook == Codebook::kIntegers ? static_cast<float>(code - mid_of(p)) : codebook_value(p.codebook, code);
}

// By the numbers of the ops (qkernels/ops/grouped.py: ACTIVATIONS).
enum class Activation : int { kSilu, kGelu, kGeluTanh, kSwigluOai, kRelu2Alone, kSiluAlone, kGeluAlone, kCount };
static inline bool is_gated(Activation a) { return a < Activation::kRelu2Alone; }

// Between the products of a block of experts (experts.h): `inner` [R, width] of `up` [R, 2 width], or [R, width] for
// activations without a gate.
struct Between {
  Activation activation;
  float alpha, limit;
  int64_t width;
  const float* up;
  void* inner;
  Type type;  // of inner
};

// After them: y [T, hidden] = for each token the sum over j = 0 ... k - 1 of weights[t, j] * down[place[t, j]]; places
// below 0 add nothing.
struct Weighing {
  const float* down;     // [R, hidden]
  const int64_t* place;  // [T, k]
  const float* weights;  // [T, k]
  int64_t k, hidden;
  void* y;
  Type type;  // of y
};

// The kernels of one instruction set.
struct Kernels {
  const char* name;
  // What bf16 activations are multiplied as: kBFloat16 where there is a bf16 dot product, else kFloat. fp16 and fp32
  // activations are always multiplied as kFloat.
  Type bf16_operand;
  // Rows m0 ... m1 - 1: fill `staged` (if it is not x) and `sums` (if wanted).
  void (*stage)(const Call& call, int64_t m0, int64_t m1);
  // y of `tiles` (at most tiles_together) tiles and rows m0 ... m1 - 1, at most kBlockTokens of them.
  void (*multiply)(const Call& call, int64_t tile, int tiles, int64_t m0, int64_t m1);
  // (M + 1) N K, in multiplications (twice that with more than 4 bits), that one core does in 30 to 90 us: up to there
  // it is not slower than four threads on two cores.
  int64_t little_work;
  // Rows m0 ... m1 - 1 of `inner`, and tokens t0 ... t1 - 1 of y. Null with int8 activations: those of floating ones
  // serve both.
  void (*activate)(const Between& between, int64_t m0, int64_t m1) = nullptr;
  void (*weigh)(const Weighing& weighing, int64_t t0, int64_t t1) = nullptr;
};
constexpr int64_t kLittleWork = int64_t{10} << 20;

extern const Kernels kScalar;
extern const Kernels kScalarInt8;
#if defined(__x86_64__)
extern const Kernels kAvx2Int8;    // AVX2, FMA, F16C
extern const Kernels kAvx512Vnni;  // AVX-512 F, BW, VL, DQ, VNNI
extern const Kernels kAvx2;        // AVX2, FMA, F16C
extern const Kernels kAvx512;      // AVX-512 F, BW, VL, DQ
extern const Kernels kAvx512Bf16;  // the same with AVX512_BF16
#elif defined(QK_NEON)
extern const Kernels kNeonInt8;         // Armv8.0
extern const Kernels kNeonDotprodInt8;  // Armv8.2 with FEAT_DotProd
extern const Kernels kNeonI8mmInt8;     // the same with FEAT_I8MM
extern const Kernels kNeon;             // Armv8.0
extern const Kernels kNeonDotprod;      // the same, beside kNeonDotprodInt8
extern const Kernels kNeonI8mm;         // the same, beside kNeonI8mmInt8
extern const Kernels kNeonBf16;         // Armv8.2 with FEAT_BF16
#endif

// Which kernels are in use: the best that the CPU has, or the one that QKERNELS_ISA names (read once).
struct Choice {
  const Kernels* kernels;  // null: see error
  const char* error;       // null, or what is wrong with QKERNELS_ISA
};
Choice current();
// The kernels with int8 activations that go with them: AVX-512 without VNNI has those of AVX2, NEON with bf16 the best
// that the CPU has.
const Kernels& int8_kernels(const Kernels& kernels);
const char* available();              // the names that this CPU can run, plainest first, separated by spaces
const char* choose(const char* isa);  // replaces the choice; null, or why not

// Runs body(context, begin, end) over parts of 0 ... n - 1, perhaps on several threads.
using Body = void (*)(void* context, int64_t begin, int64_t end);
using ParallelFor = void (*)(int64_t n, void* context, Body body);

// Bytes of scratch memory that `gemm` wants for this call.
int64_t workspace_bytes(const Call& call, const Kernels& kernels);
// y = x W^T + bias. `workspace` is free again on return.
void gemm(Call call, const Kernels& kernels, void* workspace, int64_t threads, ParallelFor parallel_for);

}  // namespace qkernels::cpu
