// Which way a problem is run: a pure function of values, so that it can be tested, printed and overruled.
//
// One model for all kernels. A block is so many strips, steps and warps; a step of it costs bytes of memory and of L2,
// multiplications, instructions, bytes of shared memory, and time of the thread that copies. The busiest multiprocessor
// takes as long as the slowest of these, and starts, launches and sums of parts come on top.
//
// measured: no (docs/kernel-log.md). card.h has the numbers and where each is from.
#pragma once
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <string>
#include <tuple>

#include "blocks.h"

namespace qkernels::cuda {

// What a choice depends on. `sm` is 10 * major + minor.
struct Problem {
  int M, N, K;
  int bits, act_bits;  // of codes; of activations: 16, or 8
  int group_bytes;     // bytes of scales and zeros, per strip and 64 columns
  bool half;           // fp16 activations
  bool aligned;        // x can be read 16 bytes at a time, in order
  int sm, multiprocessors;
  int groups_per_step, steps_per_group, groups;  // as Weight has them
  bool float_zeros;                              // zeros or offsets that are no integers
  Coding coding;
  Clusters clusters;  // of the device

  int width() const { return stored_width(bits, act_bits != 8); }
  int strips() const { return divide_up(N, kStripRows); }
  int steps() const { return K > 0 ? divide_up(K, kStepColumns) : 1; }
  int strip_bytes() const { return step_bytes(width()) + group_bytes; }
  bool short_groups() const { return groups_per_step > 1; }
  // Whether gemm_sm90 must scale fragments, which no tile of 16 tokens does (gemm_sm90.cu).
  bool scales_fragments() const { return short_groups() || float_zeros || coding != Coding::kIntegers; }
  // Of scales and zeros: 0 for 16-bit scales alone, 1 with zeros of a byte, 2 for all others.
  int group_kind() const {
    const int value = group_bytes / (groups_per_step * kStripRows);
    return float_zeros || value > 3 ? 2 : value == 3 ? 1 : 0;
  }
};

inline Problem problem_of(const Weight& w, int M, int bits, int act_bits, bool half, bool aligned, const Device& device,
                          const Clusters& clusters) {
  const GroupBytes groups = group_bytes(w);
  return {M,
          w.N,
          w.K,
          bits,
          act_bits,
          groups.all(),
          half,
          aligned,
          device.sm,
          device.multiprocessors,
          w.groups_per_step,
          w.steps_per_group,
          w.groups,
          is_floating(w.zero_type),
          coding_of(w),
          clusters};
}

inline bool operator==(const Problem& a, const Problem& b) {
  auto values = [](const Problem& p) {
    return std::tie(p.M, p.N, p.K, p.bits, p.act_bits, p.group_bytes, p.half, p.aligned, p.sm, p.multiprocessors,
                    p.groups_per_step, p.steps_per_group, p.groups, p.float_zeros, p.coding);
  };
  return values(a) == values(b) && std::memcmp(&a.clusters, &b.clusters, sizeof a.clusters) == 0;
}

// --- the blocks of a configuration, and how they meet the card ---

struct Blocks {
  int strips, steps, warps;  // of one block: strips of 64 rows, steps of 64 columns
  int strip_bytes;           // of one strip in one step
  int resident;              // blocks that a multiprocessor holds at a time; 0: not one
  int64_t busiest;           // blocks that the multiprocessor runs that has most
  int64_t at_once() const { return busiest < resident ? busiest : resident; }
  double codes() const { return static_cast<double>(strips) * steps * strip_bytes; }  // bytes, with scales and zeros
};

inline bool uses_wgmma(Path path) { return path == Path::kGemmSm90 || path == Path::kGemmA8Sm90; }

// Multiprocessors that blocks of clusters find room on. A device that was not asked: clusters of more than two leave
// some over in a part of the card that has 16 or 18 of them (guesses).
inline int usable_multiprocessors(const Problem& p, int splits, int resident) {
  const bool asked = resident <= 2 && splits <= 8;  // as all that add in a cluster
  const int active = asked ? p.clusters.active[resident - 1][splits] : 0;
  if (active > 0) return std::min(p.multiprocessors, std::max(1, active * splits / resident));
  return splits <= 2 ? p.multiprocessors : p.multiprocessors - divide_up(p.multiprocessors, splits == 8 ? 11 : 33);
}

inline Blocks blocks_of(const Problem& p, const Card& card, const Config& c) {
  Blocks b{};
  b.strip_bytes = p.strip_bytes();
  b.steps = divide_up(p.steps(), c.splits);
  int shared = 0, registers = 0, most = 64;  // of a block, of a thread; blocks that launch bounds ask room for
  switch (c.path) {
    case Path::kDecode:
      b.strips = c.warps_n, b.warps = c.warps_n * c.warps_k, registers = c.tokens <= 16 ? 128 : 240;
      shared = static_cast<int>(
          std::min<int64_t>(decode_shared_bytes(c, p.M, b.strip_bytes, p.width(), p.steps()), 1 << 30));
      break;
    case Path::kGemm:
      b.strips = gemm_strips(c.tokens), b.warps = c.tokens == 128 ? 8 : 4, registers = 240;
      shared = gemm_shared_bytes(c, b.strip_bytes, p.width());
      break;
    case Path::kGemmA8:
      b.strips = strips_per_block_a8(c.tokens), b.warps = c.tokens == 128 ? 8 : 4, registers = 240;
      shared = gemm_a8_shared_bytes(c.tokens, b.strip_bytes);
      break;
    case Path::kGemmSm90:
      b.strips = wgmma_strips(c.tokens), b.warps = 4 * b.strips, most = wgmma_blocks(c.tokens);
      if (card.wgmma_macs_per_ns == 0 || wgmma_stages(c.tokens, b.strip_bytes, c.stages) < kLeastWgmmaStages) most = 0;
      break;
    case Path::kGemmA8Sm90:
      b.strips = 2, b.warps = 8, most = 1;
      if (card.wgmma8_macs_per_ns == 0 || (c.tokens == 256 && p.groups > 1)) most = 0;
      break;
    case Path::kDequantize:
      break;
  }
  b.resident = most;  // of kernels for sm_90a, whose rings are as deep as their blocks leave room for
  if (registers != 0) {
    b.resident = std::min(65536 / (32 * b.warps * registers), static_cast<int>(card.shared_bytes) / (shared + 1024));
  }
  const int usable =
      adds_in_cluster(c) && b.resident > 0 ? usable_multiprocessors(p, c.splits, b.resident) : p.multiprocessors;
  const int64_t along_n = divide_up(p.strips(), b.strips > 0 ? b.strips : 1);
  const int64_t along_m = c.path == Path::kDecode ? 1 : divide_up(p.M, c.tokens > 0 ? c.tokens : 1);
  b.busiest = divide_up(along_n * c.splits * along_m, usable);
  return b;
}

// Bytes that a busy multiprocessor has asked for and not got: all stages but one of each warp, or of each block, unless
// its part of K is shorter. gemm_sm80 and gemm_a8 have x on its way too; those for sm_90a have more of it, and only the
// weight is counted.
inline double bytes_on_their_way(const Problem& p, const Config& c, const Blocks& b) {
  if (c.path == Path::kDecode) {
    const int ahead = decode_stages(c, p.width()) - 1, steps = divide_up(b.steps, c.warps_k);
    return static_cast<double>(b.at_once()) * b.warps * std::min(steps, ahead) * b.strip_bytes;
  }
  if (uses_wgmma(c.path)) {
    const int stages = c.path == Path::kGemmSm90 ? wgmma_stages(c.tokens, b.strip_bytes, c.stages)
                                                 : wgmma_a8_stages(c.tokens, b.strip_bytes, c.stages);
    return static_cast<double>(b.at_once()) * b.strips * std::min(b.steps, stages - 1) * b.strip_bytes;
  }
  const int ahead = c.path == Path::kGemmA8 || p.width() <= 4 ? 3 : 2;
  return static_cast<double>(b.at_once()) * ahead * (b.strips * b.strip_bytes + c.tokens * 8.0 * p.act_bits);
}

// What a multiprocessor must have on its way to draw its share of the bandwidth: bandwidth times latency, or its share
// of a weight that is smaller than that.
inline double wanted_bytes(const Problem& p, const Card& card, const Blocks& b) {
  const double flow = card.bytes_per_ns * card.latency_ns;
  const double weight = static_cast<double>(p.strips()) * p.steps() * b.strip_bytes;
  return std::min(flow, weight) / p.multiprocessors;
}

// --- instructions of a warp for 64 columns, in the SASS of nvcc 13.0 for sm_90a and bf16; of branches those of 16-bit
// scales ---

// 64 rows, along the executed path (tools/sass_paths.py; the guard holds some of them):
// [4 bit, 8 bit][groups of 64 and more, of 32, of 16][8, 16, 32 tokens][group_kind].
constexpr double kDecodeRounds[2][3][3][3] = {{{{217, 258, 279}, {263, 318, 350}, {443, 442, 527}},
                                               {{247, 315, 456}, {501, 501, 501}, {919, 919, 919}},
                                               {{666, 664, 664}, {690, 690, 690}, {919, 919, 919}}},
                                              {{{339, 384, 406}, {478, 478, 510}, {587, 587, 672}},
                                               {{371, 439, 563}, {631, 631, 631}, {1145, 1145, 1145}},
                                               {{787, 787, 787}, {918, 918, 918}, {1145, 1145, 1145}}}};
// Of codes that are no integers: [kTable, kE2M1, kFloat8][groups of 64 and more, shorter][8, 32 tokens].
constexpr double kCodedRounds[3][2][2] = {{{531, 654}, {681, 932}}, {{531, 654}, {548, 800}}, {{457, 582}, {607, 859}}};
// Of codes in planes, and of 4 bits under factors and with minima, for 8 tokens:
// [2 and 3 bits, 4 bits, 5 and 6 bits][groups of 64 and more, shorter].
constexpr double kPlanesRounds[3][2] = {{268, 391}, {494, 494}, {357, 482}};
// card.decode_slots: what a round of the first of them costs, by which a fit changes all.
inline double decode_instructions(const Problem& p, const Card& card, int tokens) {
  if (p.coding == Coding::kPlanes) {
    return kPlanesRounds[p.bits < 4       ? 0
                         : p.bits - 3 > 1 ? 2
                                          : 1][p.short_groups()] *
           card.decode_slots / kDecodeRounds[0][0][0][0];
  }
  if (is_coded(p.coding)) {
    return kCodedRounds[static_cast<int>(p.coding) - 1][p.short_groups()][tokens > 8] * card.decode_slots /
           kDecodeRounds[0][0][0][0];
  }
  const auto& rounds = kDecodeRounds[p.bits > 4][p.groups_per_step / 2][tokens / 16];
  return rounds[p.group_kind()] * card.decode_slots / kDecodeRounds[0][0][0][0];
}
// 64 rows and 32 tokens.
inline double gemm_instructions(const Problem& p) {
  return (p.short_groups() ? 1090 : 360) + (p.bits > 4 ? 120 : 0) + (p.float_zeros ? 80 : 0) +
         (is_coded(p.coding) ? 220 : 0);  // a table's permutations
}
// 16 rows and all tokens of a block, along the executed path at 64 tokens; at a group's end an FMA for each of a lane's
// sums, and 35 for its scales, zeros and the wait. Scaled fragments: 210 with the 16-bit scales of a long group, 226 in
// 8 bit, 270 of a table; 31 for each other pair of values; Q4_K about 290.
inline double wgmma_instructions(const Problem& p, int tokens) {
  const int wide = p.width() == 8 ? 22 : 0;
  const bool table = p.coding == Coding::kTable || p.coding == Coding::kE2M1;
  if (tokens == 256 || p.scales_fragments()) {
    const int planes = p.coding != Coding::kPlanes ? 0 : p.bits > 4 ? 36 : p.bits < 4 ? 18 : 30;
    return 180 + wide + (table ? 60 : planes) + (p.short_groups() ? p.groups_per_step : 1) * 48;
  }
  return 86 + wide + (35 + tokens / 2.0) / p.steps_per_group;
}
// Of a lane: each sum of a group is shifted, converted and added.
inline double fold_instructions(const Problem& p, double sums) {
  return 3 * sums * (p.short_groups() ? p.groups_per_step : 1.0 / p.steps_per_group);
}

// --- the model ---

// Fewer tokens than this keep the tensor cores as long (a guess: a wgmma then waits for its 64 x 16 of A).
constexpr int kFullRateTokens = 64;

// What a step of one block takes of a multiprocessor.
struct StepCost {
  double l2_bytes, shared_bytes;
  double macs, macs_per_ns;  // the second: of the whole card
  double slots;              // instructions that one of four schedulers issues
  double producer_clocks;    // of the thread that is longest at it
};

inline StepCost step_cost(const Problem& p, const Card& card, const Config& c, const Blocks& b) {
  const double codes = static_cast<double>(b.strips) * b.strip_bytes;
  const double x = (c.path == Path::kDecode ? p.M : c.tokens) * 8.0 * p.act_bits;
  StepCost s{codes + x, 0, static_cast<double>(b.strips) * kStripRows * kStepColumns * c.tokens, 0, 0, 0};
  const double sums = static_cast<double>(b.strips) * kStripRows * c.tokens;
  switch (c.path) {
    case Path::kDecode:
      s.macs_per_ns = card.macs_per_ns, s.slots = b.strips * decode_instructions(p, card, c.tokens) / 4;
      break;
    case Path::kGemm: {
      // fp16 accumulation is worth twice the rate on GeForce cards, nothing on A100 and H200.
      const bool doubled = c.half_accumulate && p.sm != 80 && p.sm / 10 != 9;
      s.macs_per_ns = (doubled ? 2 : 1) * card.macs_per_ns, s.slots = b.warps / 4 * gemm_instructions(p);
      break;
    }
    case Path::kGemmSm90:
      s.macs_per_ns = card.wgmma_macs_per_ns, s.slots = b.strips * wgmma_instructions(p, c.tokens);
      if (c.tokens < kFullRateTokens) s.macs *= static_cast<double>(kFullRateTokens) / c.tokens;
      s.producer_clocks = card.producer_clocks;
      break;
    case Path::kGemmA8:  // each warp reads 64 rows and 32 tokens from shared memory; both are copied there
      s.macs_per_ns = card.macs8_per_ns, s.slots = fold_instructions(p, sums) / 128;
      s.shared_bytes = b.warps * (step_bytes(p.width()) + 32.0 * kStepColumns) + codes + x;
      break;
    case Path::kGemmA8Sm90:  // each strip's warpgroup reads all tokens, and its own codes
      s.macs_per_ns = card.wgmma8_macs_per_ns, s.slots = fold_instructions(p, sums) / 128;
      s.shared_bytes = b.strips * x + codes + codes + x;
      s.producer_clocks = card.producer_clocks;
      break;
    case Path::kDequantize:
      break;
  }
  return s;
}

// x is read twice, the second time from L2, and written once.
inline double quantize_ns(const Problem& p, const Card& card) {
  return card.launch_ns + 3.0 * p.M * p.steps() * kStepColumns / (card.reached_bandwidth * card.bytes_per_ns);
}
inline double stage_ns(const Problem& p, const Card& card) {
  return p.aligned ? 0.0 : card.launch_ns + 4.0 * p.M * p.K / card.l2_bytes_per_ns;
}

// The model's time for the fused kernels; 1e30 where the card cannot hold a block.
inline double fused_ns(const Problem& p, const Card& card, const Config& c, const Blocks& b) {
  if (b.resident <= 0) return 1e30;
  const bool decode = c.path == Path::kDecode, int8 = has_int8_activations(c.path);
  const StepCost cost = step_cost(p, card, c, b);
  const double sms = card.multiprocessors, clock = card.clock_ghz, steps = static_cast<double>(b.busiest) * b.steps;

  // The whole weight; and the busiest multiprocessor's bytes: it may draw twice its share of the bandwidth while others
  // idle, and no more than what is on its way within one latency.
  const double share = card.bytes_per_ns / p.multiprocessors;
  const double flow = std::min(bytes_on_their_way(p, c, b) / card.latency_ns, 2 * share);
  const double all_bytes = static_cast<double>(p.strips()) * p.steps() * b.strip_bytes;
  const double reached = b.at_once() * b.warps >= 8 ? card.reached_matrix : card.reached_by_few_warps;
  double ns = all_bytes / (card.reached_bandwidth * card.bytes_per_ns);
  for (const double limit : {
           decode || uses_wgmma(c.path) ? b.busiest * b.codes() / flow : 0.0,
           steps * cost.l2_bytes / (card.l2_bytes_per_ns / sms),
           steps * cost.shared_bytes / (128 * clock),
           steps * cost.macs / (reached * cost.macs_per_ns / sms),
           steps * cost.slots / (card.reached_issue * clock),
           divide_up(b.busiest, b.resident) * b.steps * cost.producer_clocks / clock,
       }) {
    ns = std::max(ns, limit);
  }
  ns += divide_up(b.busiest, b.resident) * (decode               ? card.decode_start_ns
                                            : uses_wgmma(c.path) ? card.wgmma_start_ns
                                                                 : card.gemm_start_ns)
                                               .value;
  if (int8) ns += quantize_ns(p, card);
  if (!decode && !int8) ns += stage_ns(p, card);
  if (adds_in_cluster(c)) {
    const double peers = (c.splits - 1.0) / c.splits * b.strips * kStripRows * c.tokens * 4;  // bytes of other blocks
    return ns + card.cluster_barriers_ns + peers / card.cluster_bytes_per_ns;
  }
  if (c.splits > 1) ns += card.launch_ns + 8.0 * c.splits * p.M * p.strips() * kStripRows / card.l2_bytes_per_ns;
  return ns;
}

// The weight is read, written as 16-bit numbers and read again by cuBLAS, which is then as fast as it is.
inline double dequantize_ns(const Problem& p, const Card& card) {
  const double weights = static_cast<double>(p.N) * p.K;
  const double cublas = card.reached_cublas * card.cublas_macs_per_ns * p.multiprocessors / card.multiprocessors;
  return 2 * card.launch_ns + stage_ns(p, card) +
         weights * (p.width() / 8.0 + 2) / (card.reached_bandwidth * card.bytes_per_ns) + weights * p.M / cublas;
}

inline double predicted_ns(const Problem& p, const Card& card, const Config& c) {
  return c.path == Path::kDequantize ? dequantize_ns(p, card) : fused_ns(p, card, c, blocks_of(p, card, c));
}
inline double predicted_ns(const Problem& p, const Config& c) { return predicted_ns(p, card_of(p.sm), c); }

// --- the choice ---

// 1, 2, 3, 4, 6, 8, 12, 16, 24 ... 64: how finely K may be split.
inline int next_splits(int splits) {
  return splits < 4 ? splits + 1 : splits % 3 == 0 ? splits / 3 * 4 : splits / 2 * 3;
}
inline int most_splits(const Problem& p) {
  if (p.act_bits == 8) return std::max(1, p.steps() / 8);  // below 512 columns a block is mostly start and end
  return std::min(64, p.steps());
}

// Every configuration that could run a problem, to `visit`; of tiles, the one that reads x least first.
template <class Visit>
void each_config(const Problem& p, bool half_accumulate, const Visit& visit) {
  auto tiles = [&](Path path, int most, int least) {
    for (int tokens = most; tokens >= least; tokens /= 2) {
      const bool half =
          path == Path::kGemm && half_accumulate && p.half && p.bits <= 4 && tokens > 32 && !is_coded(p.coding);
      for (int splits = 1; splits <= most_splits(p); splits = next_splits(splits)) {
        visit(Config{path, tokens, 0, 0, splits, half});
      }
    }
  };
  if (p.act_bits == 8) {
    tiles(Path::kGemmA8, 128, 32);
    if (p.K > 0) tiles(Path::kGemmA8Sm90, 256, 64);
    return;
  }
  const bool coded = is_coded(p.coding);
  if (p.M <= kMaxDecodeTokens) {
    const int tokens = p.M <= 8 ? 8 : p.M <= 16 && !coded ? 16 : 32;
    const bool runs = p.coding != Coding::kPlanes || tokens == kPlanesDecodeTokens;
    for (int warps = 4; runs && warps <= most_decode_warps(tokens); warps *= 2) {
      for (int warps_n = 1; warps_n <= warps; warps_n *= 2) {
        for (int splits = 1; splits <= most_splits(p); splits = next_splits(splits)) {
          visit(Config{Path::kDecode, tokens, warps_n, warps / warps_n, splits, false});
        }
      }
    }
  }
  coded ? tiles(Path::kGemm, kCodedGemmTokens, kCodedGemmTokens) : tiles(Path::kGemm, 128, 32);
  if (p.K > 0) tiles(Path::kGemmSm90, 256, p.scales_fragments() ? 32 : 16);
  visit(Config{Path::kDequantize, 0, 0, 0, 1, false});
}

constexpr int kDecodeOnly = 16;  // up to here, gemm is only for what decode cannot hold

// The way with the least predicted time. `half_accumulate`: the caller allows fp16 accumulation. `decode_only`: the op
// gemv, which gets another path only where decode cannot hold x.
//
// Of decode, the fastest of those that are not starved of bytes on their way; where all are, the fastest: so the choice
// does not hang on the guess of how much a little less costs. Up to 32 tokens wgmma's rings would hold a little less
// than wanted_bytes, and dequantize + mm is never the better one. Tiles of int8 are smaller than 2 M, but for the
// smallest: it is never slower, and wastes less.
inline Config choose(const Problem& p, const Card& card, bool half_accumulate = false, bool decode_only = false) {
  struct Best {
    Config config{};
    double ns = 1e30;
  } fed, starved, other;
  each_config(p, half_accumulate, [&](const Config& c) {
    if (p.M <= kMaxDecodeTokens && (c.path == Path::kGemmSm90 || c.path == Path::kDequantize)) return;
    if (has_int8_activations(c.path) && c.tokens > 32 && c.tokens >= 2 * p.M) return;
    const Blocks b = blocks_of(p, card, c);
    Best* best = &other;
    if (c.path == Path::kDecode) best = bytes_on_their_way(p, c, b) < wanted_bytes(p, card, b) ? &starved : &fed;
    const double ns = c.path == Path::kDequantize ? dequantize_ns(p, card) : fused_ns(p, card, c, b);
    if (ns < best->ns) *best = {c, ns};
  });
  const Best decode = fed.ns < 1e30 ? fed : starved;
  if (decode.ns < 1e30 && (decode_only || p.M <= kDecodeOnly)) return decode.config;
  return decode.ns <= other.ns ? decode.config : other.config;
}
inline Config choose(const Problem& p, bool half_accumulate = false, bool decode_only = false) {
  return choose(p, card_of(p.sm), half_accumulate, decode_only);
}

// `choose`, which weighs some 200 configurations (2 us), from a table of what this thread has asked before. A model has
// ten shapes and a few M at a time.
inline Config remembered_choice(const Problem& p, bool half_accumulate = false, bool decode_only = false) {
  struct Entry {
    Problem problem;
    bool half_accumulate, decode_only;
    Config config;
  };
  constexpr unsigned kEntries = 256;
  thread_local Entry entries[kEntries] = {};  // sm 0: none
  const unsigned hash = (static_cast<unsigned>(p.M) * 31 + p.N) * 2654435761u ^ static_cast<unsigned>(p.K) * 40503u;
  Entry& e = entries[(hash >> 16 ^ hash) % kEntries];
  if (!(e.problem == p && e.half_accumulate == half_accumulate && e.decode_only == decode_only)) {
    e = {p, half_accumulate, decode_only, choose(p, half_accumulate, decode_only)};
  }
  return e.config;
}

inline std::string describe(const Problem& p) {
  char text[192];
  std::snprintf(text, sizeof text, "M=%d N=%d K=%d, %d bit, %s%s, sm%d with %d multiprocessors%s", p.M, p.N, p.K,
                p.bits, p.half ? "float16" : "bfloat16", p.act_bits == 8 ? " to int8" : "", p.sm, p.multiprocessors,
                p.aligned ? "" : ", x is copied or gathered");
  return text;
}

inline std::string describe(const Config& c) {
  char text[160];
  if (c.path == Path::kDecode) {
    std::snprintf(text, sizeof text, "decode, %d tokens, %d x %d warps over N x K, %d splits of K", c.tokens, c.warps_n,
                  c.warps_k, c.splits);
  } else if (c.path == Path::kDequantize) {
    std::snprintf(text, sizeof text, "dequantize + mm");
  } else {
    const char* name = c.path == Path::kGemm       ? "gemm_sm80"
                       : c.path == Path::kGemmSm90 ? "gemm_sm90"
                       : c.path == Path::kGemmA8   ? "gemm_a8"
                                                   : "gemm_a8_sm90";
    const int strips = c.path == Path::kGemmSm90                       ? wgmma_strips(c.tokens)
                       : c.path != Path::kGemmA8Sm90 && c.tokens == 32 ? 4
                                                                       : 2;
    std::snprintf(text, sizeof text, "%s, %d tokens x %d rows a block, %d splits of K%s", name, c.tokens,
                  strips * kStripRows, c.splits, c.half_accumulate ? ", fp16 accumulation" : "");
  }
  return text;
}

}  // namespace qkernels::cuda
