// The values that a call is made of, and the launchers' C++ interface. No CUDA and no torch in here.
#pragma once
#include <cstdint>

#include "../activations.h"
#include "../codebooks.h"
#include "layout.h"

namespace qkernels::cuda {

// The weight in layout mma_tile (layout.h), as kernels take it.
struct Weight {
  const uint8_t* codes;  // 16-byte aligned, like scales and zeros
  const uint8_t* scales;
  const uint8_t* zeros;  // null: symmetric
  int N, K;
  int strips;           // of 64 rows
  int steps;            // of 64 columns
  int groups;           // stored per strip (G_pad)
  int groups_per_step;  // 4 or 2 for groups of 16 or 32, else 1
  int steps_per_group;  // 1 for short groups
  int width;            // of a code where it lies: 2 ... 6 or 8
  int mid;              // 2^(bits - 1): the zero of a symmetric weight, and what floating zeros are counted from
  Type scale_type;
  Type zero_type;          // kUInt8: zero points, subtracted exactly; floating: zero points, or
  bool zeros_are_offsets;  // offsets, which are added after scaling
  // Codes that are no integers have no zeros; scales may then be of 8 bits, or multiply (divide by) another one a row.
  Codebook codebook;
  float table[16];       // the values of a codebook of 4 bits
  const uint8_t* outer;  // [strips][64], rows as those of scales; null: none
  Type outer_type;
  bool outer_divides;
  // Of k-quants and IQ4_XS, where scales (and zeros, which are offsets then: -zero * outer) are small integers: how
  // many outer factors a row has, one for kStepsOfOuter steps, [strips][outers][64]; else 0.
  int outers;
  const uint8_t* outer_zeros;
  Type outer_zero_type;
};

constexpr int kStepsOfOuter = 256 / kStepColumns;

QK_CONSTEXPR int stored_width(int bits, bool planes) { return planes && bits <= 6 ? bits : bits <= 4 ? 4 : 8; }

// `group` is QuantScheme.group_length(K): with one group it may be any length, else 16, 32 or a multiple of 64.
// `planes`: codes lie in as many bits as they have, but for int8 activations.
inline Weight make_weight(int64_t N, int64_t K, int bits, int64_t group, bool planes = true) {
  Weight w{};
  w.N = static_cast<int>(N), w.K = static_cast<int>(K);
  w.strips = static_cast<int>(round_up(N, kStripRows) / kStripRows);
  w.steps = static_cast<int>(round_up(K, kStepColumns) / kStepColumns);
  w.groups = static_cast<int>(padded_groups(K, group));
  const bool one = w.groups == 1;
  w.groups_per_step = !one && group < kStepColumns ? static_cast<int>(kStepColumns / group) : 1;
  w.steps_per_group = one                    ? (w.steps > 0 ? w.steps : 1)
                      : group < kStepColumns ? 1
                                             : static_cast<int>(group / kStepColumns);
  w.width = stored_width(bits, planes);
  w.mid = 1 << (bits - 1);
  return w;
}

// How codes become values. All but the first are codebooks, and the last, which multiply_planes.cuh is for.
enum class Coding { kIntegers, kTable, kE2M1, kFloat8, kPlanes };

// kE2M1 is for short groups, as MXFP4 and NVFP4 have; elsewhere a table serves it.
inline Coding coding_of(Codebook codebook) {
  switch (codebook) {
    case Codebook::kIntegers:
      return Coding::kIntegers;
    case Codebook::kE2M1:
      return Coding::kE2M1;
    case Codebook::kE4M3:
    case Codebook::kE5M2:
      return Coding::kFloat8;
    default:
      return Coding::kTable;
  }
}

// Codes in planes, or scales that are products for every 256 weights.
QK_CONSTEXPR bool has_planes(const Weight& w) { return w.outers != 0 || (w.width != 4 && w.width != 8); }
inline Coding coding_of(const Weight& w) { return has_planes(w) ? Coding::kPlanes : coding_of(w.codebook); }

QK_CONSTEXPR bool is_coded(Coding coding) { return coding != Coding::kIntegers; }

// What its codes mean (codebooks.h).
inline void set_codebook(Weight& w, Codebook codebook) {
  w.codebook = codebook;
  for (int code = 0; code < 16; ++code) w.table[code] = codebook_value(codebook, code);
}

// Which of its scales are products.
inline void set_factors(Weight& w, Factors factors) {
  w.outer_divides = factors == Factors::kNvfp4;
  const bool spans = factors != Factors::kNone && factors != Factors::kNvfp4 && factors != Factors::kNvfp4M;
  w.outers = !spans ? 0 : w.steps > kStepsOfOuter ? (w.steps + kStepsOfOuter - 1) / kStepsOfOuter : 1;
}

// Bytes of a strip's scales and zeros for 64 columns, and of the outer factors of both, which each step brings again.
struct GroupBytes {
  int scales, zeros, outer, outer_zeros;
  int all() const { return scales + zeros + outer + outer_zeros; }
};
inline GroupBytes group_bytes(const Weight& w) {
  const int values = w.groups_per_step * kStripRows, outers = w.outers != 0 ? kStripRows : 0;
  return {values * size_of(w.scale_type), values * size_of(w.zero_type), outers * size_of(w.outer_type),
          outers * size_of(w.outer_zero_type)};
}

// x as the caller has it: 16-bit elements, strides in elements, possibly to be read through an order of columns.
struct Activations {
  const uint16_t* x;
  int M, K;
  int64_t row_stride, column_stride;
  const int32_t* k_order;  // null, or the column of x that each stored column meets
};

// Whether 16-byte copies can fetch it: rows aligned, columns in place, and the end of a row at the end of a copy.
inline bool is_aligned(const Activations& a) {
  if (a.K == 0) return true;
  return a.k_order == nullptr && (a.column_stride == 1 || a.K <= 1) && a.row_stride % 8 == 0 && a.K % 8 == 0 &&
         reinterpret_cast<uintptr_t>(a.x) % 16 == 0;
}

// y = x W^T + bias: [M, N], contiguous, in the type of x. With more than one split of K, each leaves fp32 partial sums
// [split][M][strips * 64] in `partial`, and a second launch adds them in order.
struct Output {
  uint16_t* y;
  const uint8_t* bias;
  Type bias_type;  // kNone: no bias
  int M, N, N_pad;
  float* partial;
};

// Rows of x that one block multiplies by one expert's strips, and where their sums go. No rows: a block that is left
// over. Experts lie one behind the other, so strip s of expert e is strip e strips + s.
struct RowBlock {
  int expert, x_row, y_row, count;
};

// Of stacked experts: how a block finds its own on the device, since the host does not know how many rows an expert
// has. Either a table has them (16 bytes each), or blocks are pairs of a token and an expert as they come. Neither: a
// dense product.
struct RowBlocks {
  const RowBlock* table;
  const uint32_t* ids;  // of experts, `id_words` (1 or 2) each, `per` of a token; outside 0 ... experts - 1: no block
  int id_words, per, experts;
  int blocks;  // of the grid: an upper bound; 0: a dense product

  QK_CONSTEXPR bool given() const { return blocks != 0; }
};

// By the numbers of the ops (qkernels/ops/grouped.py: ACTIVATIONS).
enum class Activation : int { kSilu, kGelu, kGeluTanh, kSwigluOai, kRelu2Alone, kSiluAlone, kGeluAlone, kCount };
QK_CONSTEXPR bool is_gated(Activation a) { return a < Activation::kRelu2Alone; }

// Of stacked experts whose rows are gate's and then up's, as many each and a multiple of a strip: what a block that has
// the same rows of both makes of their sums, biased by Output's bias [E][N], in place of storing them.
struct GateUp {
  uint16_t* to;  // [rows, N / 2] in the type of x; null: sums are stored
  Activation activation;
  float alpha, limit;
};

enum class Path : int {
  kDecode,      // few tokens: weights stream past registers, warps on their own
  kGemm,        // blocks with a shared pipeline
  kDequantize,  // dequantize slices of the weight, and torch's mm
  kGemmSm90,    // wgmma, on sm_90a
  kGemmA8,      // x is quantized to int8; any card
  kGemmA8Sm90   // the same on wgmma
};

// How a problem is run: heuristics.h chooses it, the launchers obey it.
struct Config {
  Path path;
  int tokens;            // a block: kDecode 8, 16 or 32, at least M; kGemm and kGemmA8 32, 64 or 128; kGemmSm90 16 ...
                         // 256; kGemmA8Sm90 64, 128, and 256 with one group in K
  int warps_n, warps_k;  // kDecode: the warps of a block over strips and over K
  int splits;            // of K over blocks
  bool half_accumulate;  // kGemm, 4 bit, fp16: accumulate 64 columns in fp16
  int stages = 0;        // of the ring of decode (2 to 6) or of a kernel for sm_90a (2 to what fits), for measurements;
                         // 0: decode_stages, or as many as fit
};

QK_CONSTEXPR bool has_int8_activations(Path path) { return path == Path::kGemmA8 || path == Path::kGemmA8Sm90; }

// A block of gemm_sm90: strips (a consumer warpgroup each), threads with the producer's, blocks that a multiprocessor
// has registers for.
QK_CONSTEXPR int wgmma_strips(int tokens) { return tokens <= 32 ? 1 : 2; }
QK_CONSTEXPR int wgmma_threads(int tokens) { return (wgmma_strips(tokens) + 1) * 128; }
QK_CONSTEXPR int wgmma_blocks(int tokens) { return tokens <= 32 ? 2 : 1; }

// Whether a group's scale cannot wait for the group's sum in gemm_sm90, so that it scales the fragments.
inline bool sums_cannot_be_scaled(const Weight& w) { return w.groups_per_step > 1 || is_floating(w.zero_type); }

// Whether the parts of K are added within a cluster, through its blocks' shared memory, and not in a workspace.
inline bool adds_in_cluster(const Config& c) {
  return c.path == Path::kGemmSm90 && ((c.splits > 1 && c.splits <= 4) || c.splits == 8);
}

// Warps of a decode block: 128 registers a thread up to 16 tokens, 255 for 32.
QK_CONSTEXPR int most_decode_warps(int tokens) { return tokens <= 16 ? 16 : 8; }

// Steps in the ring of a decode warp. With 8 warps of 2 KB steps (32 tokens, 4 bit) five, so that 64 KB are on their
// way. A launch may ask for others.
QK_CONSTEXPR int decode_stages(int tokens, int width) { return tokens == 32 && width == 4 ? 5 : 4; }
constexpr int kMostDecodeStages = 6;

// A call of the fused kernels.
struct Call {
  Weight weight;
  Activations x;
  Output out;
  Type type;                            // of x and y: kHalf or kBFloat16
  Rounding rounding = Rounding::kNone;  // of x, where it is quantized to int8
  const float* x_static = nullptr;      // scale and zero point, where `rounding` is_static
  // Of stacked experts, on kDecode, kGemm and kGemmSm90: the weight is the first expert's, x.M the most rows of a block
  // (kGemmSm90: the rows of x), and fp32 sums of all columns go to out.partial [rows][N_pad]. On kGemmSm90 there is a
  // table, and as many rows as a block has lie in front of x, which nobody reads.
  RowBlocks rows = {};
  GateUp gate_up = {};  // with rows, on kGemmSm90 in blocks of two strips
};

// Bytes of workspace: the staged copy of x, if the path wants one, then the partial sums.
int64_t staged_bytes(const Call& call, const Config& config);
int64_t workspace_bytes(const Call& call, const Config& config);

// All return a cudaError_t (0: success) and enqueue on `stream` only. `workspace`: at least workspace_bytes, 16-byte
// aligned. `multiply` runs every configuration but kDequantize, chosen or forced, and answers cudaErrorInvalidValue to
// one that does not exist; M, N > 0 (K may be 0).
int multiply(const Call& call, const Config& config, void* workspace, void* stream);
// x gathered, padded with zeros: [M, steps * 64] contiguous.
int stage_x(const Activations& x, int steps, uint16_t* to, void* stream);
// Rows of the strips first ... first + count - 1, in `type` (any floating one), `columns` each: the stored columns 0
// ... columns - 1 in their order, or each at k_order[k] if that is given. `to` has the first row of strip `first`.
int dequantize(const Weight& weight, int first, int count, int columns, const int32_t* k_order, Type type, void* to,
               void* stream);

// How many clusters of gemm_sm90 a device runs at a time (cudaOccupancyMaxActiveClusters), by the blocks that a
// multiprocessor holds and by their size. It is the board's own: 132 multiprocessors lie in groups of 14, 16 or 18, and
// a cluster lies in one group. 0: not asked.
struct Clusters {
  int active[2][9];  // [blocks of a multiprocessor - 1][blocks of a cluster]
};

// A device: 10 * major + minor, its multiprocessors, and the bytes of dynamic shared memory that a block may ask for.
struct Device {
  int index, sm, multiprocessors, most_shared;
};
int current_device(Device* device);
// Asks once for each device; all 0 for those that have no clusters of ours.
int clusters_of(const Device& device, Clusters* clusters);

const char* error_text(int error);

}  // namespace qkernels::cuda
