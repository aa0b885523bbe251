// Products with stacked experts: rows of x sorted by expert, each with its expert's weight (grouped_gemm), and a whole
// block made of two of them. The kernels are those of dense products, decode, gemm_sm80 and gemm_sm90: experts lie one
// behind the other, so strip s of expert e is strip e strips + s, and a block reads on the device which rows and strips
// are its own (RowBlocks in problem.h). The host reads nothing: grids are upper bounds, so a CUDA graph can hold a
// call.
//
// Sums of products are fp32, over K in one order; a small kernel makes of them what comes next: bias and activation,
// rounded once, or a token's sum over its experts in their order, rounded once. No atomics, nothing left behind.
#pragma once
#include "heuristics.h"

namespace qkernels::cuda {

// The weight of the first expert; the others' buffers follow.
struct Stack {
  Weight weight;
  int experts;
  const int32_t* k_order;  // of all experts
  const uint8_t* bias;     // [E, N]
  Type bias_type;
};

// y[r] = W_e x[rows[r]] + bias_e for offsets[e] <= r < offsets[e + 1], and 0 for rows of no expert. Rows and offsets
// come from outside: they are clamped, and offsets made to rise.
struct Grouped {
  Stack stack;
  Activations x;  // no order of its own: the stack's is taken
  Type type;      // of x
  const int64_t *rows, *offsets;
  int count;  // of rows
  void* y;    // [count, N] in `y_type`: x's, or fp32
  Type y_type;
};

// y [T, H] = for each token the sum over j = 0 ... per - 1 of weights[t, j] down(activation(up(x))) of expert ids[t,
// j].
struct Block {
  Stack up, down;
  Activations x;
  Type type;
  const uint32_t* ids;  // [T, per], of `id_words` (1 or 2); outside 0 ... E - 1: adds exactly 0
  int id_words, per;
  const uint8_t* weights;  // [T, per]
  Type weights_type;
  Activation activation;
  float alpha, limit;
  uint16_t* y;
};

// How the products of a call are run. Pairs as they come: a block of decode a pair. Else rows are sorted by expert, in
// blocks of `up.tokens`, which is `down`'s, too.
struct BlockConfig {
  bool sorted;
  Config up, down;
  // Of fp32 sums, at a time: 32768 tokens of Qwen3-30B-A3B would have 2 GB of them, and are multiplied part by part.
  int64_t most_bytes = int64_t{512} << 20;
};

// Whether gate's rows and up's are whole strips, so that one block can have both.
inline bool pairs_strips(Activation a, int width) { return is_gated(a) && width % kStripRows == 0; }
// Whether the first product's blocks, of two strips, activate their sums themselves.
inline bool has_two_strips(const Config& up) { return up.path == Path::kGemmSm90 && wgmma_strips(up.tokens) == 2; }
inline bool activates_at_once(const Block& c, const BlockConfig& config) {
  return config.sorted && has_two_strips(config.up) && pairs_strips(c.activation, c.down.weight.K);
}

// --- the choice ---

// An expert is read once a pair where pairs are multiplied as they come. Experts of one token differ; with as many
// pairs as half the experts, chosen evenly, that is 1.27 times the bytes (1 / (2 (1 - e^-1/2))).
inline bool unsorted_is_better(int tokens, int64_t pairs, int experts) { return tokens == 1 || 2 * pairs <= experts; }

// Blocks of an expert with `mean` rows: as a rule the last is half empty.
inline double blocks_of_expert(double mean, int tokens) { return mean <= tokens / 2.0 ? 1.0 : mean / tokens + 0.5; }

struct Tile {
  Config config{};
  double ns = 1e30;
};

// The dense model's fastest configuration of one path and size for `blocks` blocks of rows, each a weight of its own.
inline Tile fastest_tile(const Problem& of_one, Path path, int tokens, int rows, double blocks) {
  const Card card = card_of(of_one.sm);
  Problem p = of_one;
  p.M = rows, p.N = kStripRows * static_cast<int>(std::min(std::max(of_one.strips() * blocks, 1.0), 3e7));
  p.aligned = true;
  Tile best;
  const auto visit = [&](const Config& c) {
    const double ns = fused_ns(p, card, c, blocks_of(p, card, c));
    if (ns < best.ns) best = {c, ns};
  };
  const bool coded = is_coded(p.coding);
  if (path == Path::kGemm) {
    if (!coded || tokens == kCodedGemmTokens) visit({path, tokens, 0, 0, 1, false});
    return best;
  }
  if (path == Path::kGemmSm90) {
    if (p.K > 0) visit({path, tokens, 0, 0, 1, false});
    return best;
  }
  if ((coded && tokens == 16) || (p.coding == Coding::kPlanes && tokens != kPlanesDecodeTokens)) return best;
  for (int warps = 4; warps <= most_decode_warps(tokens); warps *= 2) {
    for (int warps_n = 1; warps_n <= std::min(warps, of_one.strips()); warps_n *= 2) {
      visit({path, tokens, warps_n, warps / warps_n, 1, false});
    }
  }
  return best;
}

// What it costs that the first product's sums go through memory.
inline double stored_ns(const Problem& up, int64_t pairs) {
  const Card card = card_of(up.sm);
  return card.launch_ns + 8.0 * pairs * up.N / (card.reached_bandwidth * card.bytes_per_ns);
}

// The way of both products with the least predicted time. `up`, `down`: problems of one expert; `paired`: pairs_strips.
// K is not split: experts are blocks enough. Sums that are not activated at once are written, read and activated by a
// kernel of their own.
inline BlockConfig choose_block(const Problem& up, const Problem& down, int tokens, int64_t pairs, int experts,
                                bool paired) {
  if (unsorted_is_better(tokens, pairs, experts)) {
    const Tile first = fastest_tile(up, Path::kDecode, 8, 1, static_cast<double>(pairs));
    const Tile second = fastest_tile(down, Path::kDecode, 8, 1, static_cast<double>(pairs));
    if (first.ns < 1e30 && second.ns < 1e30) return {false, first.config, second.config};
  }
  const double touched = static_cast<double>(std::min<int64_t>(pairs, experts)), mean = pairs / std::max(touched, 1.0);
  BlockConfig best{true, {}, {}};
  double least = 1e30;
  const struct {
    Path path;
    int tokens;
  } sizes[] = {{Path::kDecode, 8},     {Path::kDecode, 16},    {Path::kDecode, 32},
               {Path::kGemm, 128},     {Path::kGemm, 64},      {Path::kGemm, 32},
               {Path::kGemmSm90, 256}, {Path::kGemmSm90, 128}, {Path::kGemmSm90, 64}};
  for (const auto& [path, size] : sizes) {  // decode and wgmma as for dense products
    if (path == (mean > kMaxDecodeTokens ? Path::kDecode : Path::kGemmSm90)) continue;
    const double blocks = touched * blocks_of_expert(mean, size);
    const Tile first = fastest_tile(up, path, size, size, blocks),
               second = fastest_tile(down, path, size, size, blocks);
    const double later = paired && !has_two_strips(first.config) ? stored_ns(up, pairs) : 0.0;
    const double ns = first.ns + second.ns + later;
    if (ns < least) least = ns, best = {true, first.config, second.config};
  }
  return best;
}

// Of rows that are sorted already: which expert one has is known once they are cut into blocks.
inline BlockConfig choose_grouped(const Problem& p, int64_t rows, int experts) {
  return choose_block(p, p, 2, std::max<int64_t>(rows, experts / 2 + 1), experts, false);
}

// `choose_block` (up to 10 us) from a table of what this thread has asked before. tokens 0: `choose_grouped`.
inline BlockConfig remembered_block(const Problem& up, const Problem& down, int tokens, int64_t pairs, int experts,
                                    bool paired) {
  struct Entry {
    Problem up, down;
    int tokens, experts;
    int64_t pairs;
    bool paired;
    BlockConfig config;
  };
  constexpr unsigned kEntries = 128;
  thread_local Entry entries[kEntries] = {};  // sm 0: none
  const unsigned hash =
      (static_cast<unsigned>(pairs) * 31 + up.N) * 2654435761u ^ static_cast<unsigned>(down.N) * 40503u;
  Entry& e = entries[(hash >> 16 ^ hash) % kEntries];
  if (!(e.up == up && e.down == down && e.tokens == tokens && e.experts == experts && e.pairs == pairs &&
        e.paired == paired)) {
    const BlockConfig config =
        tokens == 0 ? choose_grouped(up, pairs, experts) : choose_block(up, down, tokens, pairs, experts, paired);
    e = {up, down, tokens, experts, pairs, paired, config};
  }
  return e.config;
}

inline std::string describe(const BlockConfig& c) {
  return (c.sorted ? "rows sorted by expert, " : "pairs as they come, ") + describe(c.up) + " and " + describe(c.down);
}

// --- the launchers: as those of problem.h ---

int64_t workspace_bytes(const Grouped& call, const Config& config);
int grouped_gemm(const Grouped& call, const Config& config, void* workspace, void* stream);
int64_t workspace_bytes(const Block& call, const BlockConfig& config);
int experts(const Block& call, const BlockConfig& config, void* workspace, void* stream);

}  // namespace qkernels::cuda
