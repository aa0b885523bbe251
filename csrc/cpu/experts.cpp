// See experts.h.
#include "experts.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "rows.h"
#include "shares.h"
#include "staging.h"

namespace qkernels::cpu {
namespace {

// A region wakes and joins every thread: a few us while each has a core. Up to so many values one thread is as fast
// (gemm.cpp: 64 K are copied in 6 to 8 us).
constexpr int64_t kAlone = 65536;

void for_rows(int64_t rows, int64_t values, void* context, Body body, ParallelFor parallel_for) {
  if (rows * values <= kAlone) return body(context, 0, rows);
  parallel_for(rows, context, body);
}

int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// The call of all rows: as the kernels see it, x has R rows. A16 kernels look at x itself again where sums are not
// finite (sum_again), so x is gathered; int8 codes are made once a token, and those are gathered.
Call call_of(const Grouped& g, int64_t M) {
  Call call = g.stack.call;
  call.M = M;
  call.x = g.x, call.x_type = g.x_type, call.x_row_stride = call.K, call.x_column_stride = 1;
  call.y = g.y, call.y_type = g.y_type;
  return call;
}

Call of_expert(Call one, const Strides& strides, int64_t expert) {
  const auto move = [&](const void* p, int64_t bytes) -> const void* {
    return p == nullptr ? nullptr : static_cast<const char*>(p) + expert * bytes;
  };
  one.qweight = static_cast<const uint8_t*>(move(one.qweight, strides.qweight));
  one.scales = move(one.scales, strides.scales), one.zeros = move(one.zeros, strides.zeros);
  one.outer_scales = move(one.outer_scales, strides.outer_scales);
  one.outer_zeros = move(one.outer_zeros, strides.outer_zeros);
  one.bias = move(one.bias, strides.bias);
  return one;
}

struct Segment {
  int64_t expert, m0, m1, tiles_per_unit, first_unit;
};

struct Work {
  const Grouped& grouped;
  const Kernels& kernels;
  Call call, tokens;  // of R sorted rows; of T tokens (int8 activations)
  std::vector<Segment> segments;
  std::vector<Share> shares;
  int64_t units = 0;

  Work(const Grouped& g, const Kernels& k) : grouped(g), kernels(k), call(call_of(g, g.R)), tokens(call_of(g, g.T)) {}

  void divide(int64_t threads) {
    const int64_t tiles = tiles_of(call);
    int64_t all = 0;
    for (int64_t e = 0; e < grouped.stack.experts; ++e) {
      const int64_t begin = grouped.offsets[e], end = grouped.offsets[e + 1];
      const int64_t rows = rows_of_a_block(end - begin);
      for (int64_t m = begin; m < end; m += rows) {
        segments.push_back({e, m, std::min(end, m + rows), tiles_together(std::min(end - m, rows)), 0});
        all += tiles;
      }
    }
    for (Segment& s : segments) {
      while (s.tiles_per_unit > 1 && all < 4 * threads * s.tiles_per_unit) s.tiles_per_unit /= 2;
      s.first_unit = units;
      units += (tiles + s.tiles_per_unit - 1) / s.tiles_per_unit;
    }
    shares = shares_of(units, threads);
  }

  void run(int64_t unit) const {
    const auto after = std::upper_bound(segments.begin(), segments.end(), unit,
                                        [](int64_t u, const Segment& s) { return u < s.first_unit; });
    const Segment& s = *(after - 1);
    const Call one = of_expert(call, grouped.stack.strides, s.expert);
    const int64_t tile = (unit - s.first_unit) * s.tiles_per_unit;
    kernels.multiply(one, tile, static_cast<int>(std::min(s.tiles_per_unit, tiles_of(one) - tile)), s.m0, s.m1);
  }
};

void stage_tokens(void* context, int64_t m0, int64_t m1) {
  const Work& work = *static_cast<Work*>(context);
  work.kernels.stage(work.tokens, m0, m1);
}

void gather_codes(void* context, int64_t m0, int64_t m1) {
  const Work& work = *static_cast<Work*>(context);
  const Call &to = work.call, &from = work.tokens;
  char* codes = static_cast<char*>(const_cast<void*>(to.staged.data));
  for (int64_t m = m0; m < m1; ++m) {
    const int64_t t = work.grouped.rows[m];
    std::memcpy(codes + m * to.staged.row_stride,
                static_cast<const char*>(from.staged.data) + t * from.staged.row_stride,
                static_cast<size_t>(to.staged.row_stride));
    to.x_scales[m] = from.x_scales[t];
    for (int64_t g = 0; g < to.G; ++g) to.x_sums[g * to.M + m] = from.x_sums[g * from.M + t];
  }
}

void stage_rows(void* context, int64_t m0, int64_t m1) {
  const Work& work = *static_cast<Work*>(context);
  work.kernels.stage(work.call, m0, m1);
}

void gather_rows(void* context, int64_t m0, int64_t m1) {
  const Work& work = *static_cast<Work*>(context);
  const int64_t bytes = work.call.K * size_of(work.call.x_type);
  char* to = static_cast<char*>(const_cast<void*>(work.call.x));
  for (int64_t m = m0; m < m1; ++m) {
    std::memcpy(to + m * bytes, static_cast<const char*>(work.grouped.x) + work.grouped.rows[m] * bytes,
                static_cast<size_t>(bytes));
  }
  work.kernels.stage(work.call, m0, m1);
}

void multiply_units(void* context, int64_t begin, int64_t end) {
  Work& work = *static_cast<Work*>(context);
  work_through(work.shares, begin, end, [&](int64_t unit) { work.run(unit); });
}

// Products with something to be added (apart.h) go expert by expert: columns are marked by the rows of one expert
// alone, as they are in a layer of its own, and the sums of a weight are its own.

int64_t row_of(const Grouped& g, int64_t r) { return g.rows == nullptr ? r : g.rows[r]; }

int64_t most_rows(const Grouped& g) {
  int64_t most = 0;
  for (int64_t e = 0; e < g.stack.experts; ++e) most = std::max(most, g.offsets[e + 1] - g.offsets[e]);
  return most;
}

void one_by_one(const Grouped& g, const Kernels& kernels, void* workspace, int64_t threads, ParallelFor parallel_for) {
  const int64_t K = g.stack.call.K, x_bytes = K * size_of(g.x_type), y_bytes = g.stack.call.N * size_of(g.y_type);
  char* rows = static_cast<char*>(workspace);
  for (int64_t e = 0; e < g.stack.experts; ++e) {
    const int64_t begin = g.offsets[e], count = g.offsets[e + 1] - begin;
    if (count <= 0) continue;
    for (int64_t m = 0; m < count; ++m) {
      std::memcpy(rows + m * x_bytes, static_cast<const char*>(g.x) + row_of(g, begin + m) * x_bytes,
                  static_cast<size_t>(x_bytes));
    }
    Call one = of_expert(call_of(g, count), g.stack.strides, e);
    one.x = rows, one.y = static_cast<char*>(g.y) + begin * y_bytes;
    gemm(one, kernels, rows + aligned(most_rows(g) * x_bytes), threads, parallel_for);
  }
}

void zero_rows(const Grouped& g, int64_t begin, int64_t end) {
  const int64_t bytes = g.stack.call.N * size_of(g.y_type);
  if (end > begin) std::memset(static_cast<char*>(g.y) + begin * bytes, 0, static_cast<size_t>((end - begin) * bytes));
}

// --- the block ---

struct Halfway {
  const Kernels& floating;
  Between between;
};

struct Ending {
  const Kernels& floating;
  Weighing weighing;
};

void activate_rows(void* context, int64_t m0, int64_t m1) {
  const Halfway& h = *static_cast<Halfway*>(context);
  h.floating.activate(h.between, m0, m1);
}

void weigh_rows(void* context, int64_t t0, int64_t t1) {
  const Ending& e = *static_cast<Ending*>(context);
  e.floating.weigh(e.weighing, t0, t1);
}

}  // namespace

void widen(Type type, const void* from, int64_t n, float* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = load(type, from, i);
}

int64_t workspace_bytes(const Grouped& g, const Kernels& kernels) {
  if (has_apart(g.stack.call)) {
    const int64_t most = most_rows(g);
    return aligned(most * g.stack.call.K * size_of(g.x_type)) + workspace_bytes(call_of(g, most), kernels);
  }
  const Call sorted = call_of(g, g.R), tokens = call_of(g, g.T);
  if (g.rows == nullptr) return aligned(staging_bytes(sorted, kernels, true));
  const int64_t first =
      sorted.int8_activations ? staging_bytes(tokens, kernels, true) : g.R * sorted.K * size_of(g.x_type);
  return aligned(staging_bytes(sorted, kernels, true)) + aligned(first);
}

void grouped_gemm(const Grouped& g, const Kernels& kernels, void* workspace, int64_t threads,
                  ParallelFor parallel_for) {
  zero_rows(g, 0, g.offsets[0]);
  zero_rows(g, g.offsets[g.stack.experts], g.R);
  if (g.R == 0 || g.T == 0 || g.stack.call.N == 0) return;
  if (has_apart(g.stack.call)) return one_by_one(g, kernels, workspace, threads, parallel_for);
  Work work(g, kernels);
  char* behind = static_cast<char*>(workspace) + aligned(staging_bytes(work.call, kernels, true));
  lay_staging(work.call, kernels, true, workspace);
  const int64_t K = work.call.K;
  if (g.rows == nullptr) {
    for_rows(g.R, K, &work, stage_rows, parallel_for);
  } else if (work.call.int8_activations) {
    lay_staging(work.tokens, kernels, true, behind);
    for_rows(g.T, K, &work, stage_tokens, parallel_for);
    for_rows(g.R, K, &work, gather_codes, parallel_for);
  } else {
    work.call.x = behind;
    for_rows(g.R, K, &work, gather_rows, parallel_for);
  }
  work.divide(threads);
  if (work.units > 0) parallel_for(static_cast<int64_t>(work.shares.size()), &work, multiply_units);
}

void experts(const Block& b, const Kernels& kernels, const Kernels& floating, Allocate allocate, void* context,
             int64_t threads, ParallelFor parallel_for) {
  const int64_t E = b.up.experts, pairs = b.T * b.k;
  std::vector<int64_t> offsets(static_cast<size_t>(E + 1)), place(static_cast<size_t>(pairs), -1);
  for (int64_t p = 0; p < pairs; ++p) {
    if (b.ids[p] >= 0 && b.ids[p] < E) ++offsets[b.ids[p] + 1];
  }
  for (int64_t e = 0; e < E; ++e) offsets[e + 1] += offsets[e];
  const int64_t R = offsets[E];
  std::vector<int64_t> rows(static_cast<size_t>(R)), next = offsets;
  for (int64_t p = 0; p < pairs; ++p) {
    if (b.ids[p] < 0 || b.ids[p] >= E) continue;
    place[p] = next[b.ids[p]]++;
    rows[place[p]] = p / b.k;
  }

  const int64_t halves = b.up.call.N, width = b.down.call.K, H = b.down.call.N;
  float* up = static_cast<float*>(allocate(context, R * std::max(halves, H) * 4));
  void* inner = allocate(context, R * width * size_of(b.x_type));
  float* down = up;  // whose last reader was the activation: fewer pages, and those are in the cache
  const Grouped first{b.up, b.x, b.x_type, b.T, R, rows.data(), offsets.data(), up, Type::kFloat};
  const Grouped second{b.down, inner, b.x_type, R, R, nullptr, offsets.data(), down, Type::kFloat};
  void* workspace = allocate(context, std::max(workspace_bytes(first, kernels), workspace_bytes(second, kernels)));
  grouped_gemm(first, kernels, workspace, threads, parallel_for);
  Halfway halfway{floating, {b.activation, b.alpha, b.limit, width, up, inner, b.x_type}};
  if (R > 0) for_rows(R, 2 * width, &halfway, activate_rows, parallel_for);
  grouped_gemm(second, kernels, workspace, threads, parallel_for);
  Ending ending{floating, {down, place.data(), b.weights, b.k, H, b.y, b.x_type}};
  if (b.T > 0) for_rows(b.T, b.k * H, &ending, weigh_rows, parallel_for);
}

}  // namespace qkernels::cpu
