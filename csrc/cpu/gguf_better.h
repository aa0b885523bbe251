// The better searches in lanes, step by step as qkernels/formats/gguf/better.py has them: the reasons are there.
#pragma once
#include "gguf_search.h"

namespace qkernels::cpu {
namespace {

constexpr float kWidths[] = {0.86f, 0.9f, 0.94f, 0.98f, 1.0f, 1.03f, 1.06f, 1.1f, 1.15f, 1.22f, 1.32f, 1.5f, 1.8f};
constexpr float kShares[] = {1.05f, 1.0f, 0.95f, 0.87f, 0.68f};
constexpr int kRounds = 2;

// --- grids: the nearest value, and its code ---

struct Integers {
  float low, high, zero;  // `zero`: the code that means 0

  QK_LANE_INLINE Lanes value(Lanes x) const { return nearest_small(clamped(x, all(low), all(high))); }
  QK_LANE_INLINE Lanes code(Lanes x) const { return value(x) + all(zero); }
};
struct Iq4 {
  QK_LANE_INLINE Lanes value(Lanes x) const { return nearest_entry(x).value; }
  QK_LANE_INLINE Lanes code(Lanes x) const { return nearest_entry(x).index; }
};

// The members of all groups of a chunk, sixteen groups after the other, and what an error of each counts.
struct Turned {
  Lanes x[kBlocks * kMostElements / kLanes], w[kBlocks * kMostElements / kLanes];
};
template <int kSize>
QK_LANE_INLINE void turn(const Chunk& c, Turned& t) {
  for (int first = 0; first < c.groups(); first += kLanes) {
    const int at = first / kLanes * kSize;
    load_members<kSize>(c.x + first * kSize, t.x + at);
    if (c.weighted) {
      load_members<kSize>(c.importance + first * kSize, t.w + at);
    } else {
      for (int i = 0; i < kSize; ++i) t.w[at + i] = all(1.0f);
    }
  }
}

struct Scaled {
  Lanes scale, squares, products;
};

template <class Grid>
QK_LANE_INLINE Scaled fit_scale(const Lanes* x, const Lanes* w, int size, Grid grid, const float* ends, int count) {
  const Lanes zero = all(0.0f);
  Lanes weighted[32];
  for (int i = 0; i < size; ++i) weighted[i] = w[i] * x[i];
  Lanes largest = peak_of(x, size);
  const Mask none = magnitude(largest) < all(kTiny);
  largest = select(none, all(1.0f), largest);
  Lanes scale = zero, squares = zero, products = zero, best = zero;
  const auto trial = [&](Lanes factor) {
    Lanes lx = zero, l2 = zero;
    for (int i = 0; i < size; ++i) {
      const Lanes value = grid.value(factor * x[i]);
      lx = lx + weighted[i] * value, l2 = l2 + w[i] * value * value;
    }
    const Mask better = (l2 > zero) & (lx * lx > best * l2);
    scale = select(better, lx / l2, scale), best = select(better, scale * lx, best);
    squares = select(better, l2, squares), products = select(better, lx, products);
  };
  for (int e = 0; e < count; ++e) {
    for (const float width : kWidths) trial(all(width * ends[e]) / largest);
  }
  for (int round = 0; round < 3; ++round) trial(inverse_of(scale));
  return {select(none, zero, scale), squares, products};
}

template <class Grid>
QK_LANE_INLINE Lanes error_of(const Lanes* x, const Lanes* w, int size, Grid grid, Lanes step) {
  const Lanes inverse = inverse_of(step);
  return total(size, [&](int i) {
    const Lanes difference = step * grid.value(inverse * x[i]) - x[i];
    return w[i] * difference * difference;
  });
}

// The halves beside d.
constexpr float kBeside[] = {1 - 0x1p-11f, 1 + 0x1p-10f};

// Q4_0, Q5_0, Q8_0, IQ4_NL
template <class Grid>
void better_scale(const Chunk& c, Grid grid, const float* ends, int count, Found& found) {
  Turned t;
  turn<32>(c, t);
  Lanes d = as_half(fit_scale(t.x, t.w, 32, grid, ends, count).scale);
  Lanes best = error_of(t.x, t.w, 32, grid, d);
  for (const float near : kBeside) {
    const Lanes other = as_half(d * all(near)), error = error_of(t.x, t.w, 32, grid, other);
    const Mask better = error < best;
    d = select(better, other, d), best = select(better, error, best);
  }
  const Lanes inverse = inverse_of(d);
  Lanes codes[32];
  for (int i = 0; i < 32; ++i) codes[i] = grid.code(inverse * t.x[i]);
  store_codes<32>(codes, found.codes);
  store16(found.d, d);
}

// Sixteen lanes of each of a few values of all groups.
struct ByGroup {
  alignas(64) float values[kBlocks * 16];
  QK_LANE_INLINE Lanes at(int first) const { return load16(values + first); }
  QK_LANE_INLINE void put(int first, Lanes v) { store16(values + first, v); }
};
// Sum over the groups of a block, in order.
QK_LANE_INLINE Lanes block_total(const ByGroup& g, int per) {
  return total(per, [&](int s) { return of_blocks(g.values, per, s); });
}

// Q3_K, Q6_K, IQ4_XS
template <int kSize, class Grid>
void better_signed_blocks(const Chunk& c, Grid grid, const float* ends, int half_small, Found& found) {
  const int per = c.per(), groups = c.groups();
  const float half = static_cast<float>(half_small);
  const Integers whole{-half, half - 1, 0.0f};
  const float outer_ends[] = {-half, half - 1};
  Turned t;
  turn<kSize>(c, t);
  ByGroup scale, share, small, error, products, squares;
  for (int first = 0; first < groups; first += kLanes) {
    const int at = first / kLanes * kSize;
    const Scaled fit = fit_scale(t.x + at, t.w + at, kSize, grid, ends, 2);
    scale.put(first, fit.scale), share.put(first, fit.squares);
  }
  Factors16 outer;
  for (int s = 0; s < per; ++s) {
    outer.x[s] = of_blocks(scale.values, per, s), outer.w[s] = of_blocks(share.values, per, s);
  }
  Lanes d = as_half(fit_scale(outer.x, outer.w, per, whole, outer_ends, 2).scale);
  const Lanes inverse = inverse_of(d);
  for (int s = 0; s < per; ++s) to_groups(whole.value(inverse * outer.x[s]), small.values, per, s);

  struct Tried {
    Lanes error, products, squares;
  };
  const auto tried = [&](int first, Lanes step) {
    const Lanes *x = t.x + first / kLanes * kSize, *w = t.w + first / kLanes * kSize, zero = all(0.0f);
    const Lanes inverse_step = inverse_of(step);
    Tried out{zero, zero, zero};
    for (int i = 0; i < kSize; ++i) {
      const Lanes value = grid.value(inverse_step * x[i]), difference = step * value - x[i];
      out.error = out.error + w[i] * difference * difference;
      out.products = out.products + w[i] * x[i] * value;
      out.squares = out.squares + w[i] * value * value;
    }
    return out;
  };
  alignas(64) float ds[kBlocks];
  store16(ds, d);
  for (int first = 0; first < groups; first += kLanes) {
    const Tried now = tried(first, for_groups(ds, per, first) * small.at(first));
    error.put(first, now.error), products.put(first, now.products), squares.put(first, now.squares);
  }
  for (int round = 0; round < kRounds; ++round) {
    for (int first = 0; first < groups; first += kLanes) {
      const Lanes start = small.at(first), d_of = for_groups(ds, per, first);
      Lanes chosen = start;
      Tried best{error.at(first), products.at(first), squares.at(first)};
      for (const float change : {-1.0f, 1.0f}) {
        const Lanes other = clamped(start + all(change), all(-half), all(half - 1));
        const Tried now = tried(first, d_of * other);
        const Mask better = now.error < best.error;
        chosen = select(better, other, chosen), best.error = select(better, now.error, best.error);
        best.products = select(better, now.products, best.products);
        best.squares = select(better, now.squares, best.squares);
      }
      small.put(first, chosen), error.put(first, best.error);
      products.put(first, best.products), squares.put(first, best.squares);
    }
    const Lanes up =
        total(per, [&](int s) { return of_blocks(small.values, per, s) * of_blocks(products.values, per, s); });
    const Lanes down = total(per, [&](int s) {
      const Lanes v = of_blocks(small.values, per, s);
      return v * v * of_blocks(squares.values, per, s);
    });
    const Lanes again = as_half(select(down > all(0.0f), up / down, d));
    alignas(64) float agains[kBlocks];
    store16(agains, again);
    ByGroup errors, others, more;
    for (int first = 0; first < groups; first += kLanes) {
      const Tried now = tried(first, for_groups(agains, per, first) * small.at(first));
      errors.put(first, now.error), others.put(first, now.products), more.put(first, now.squares);
    }
    const Mask better = block_total(errors, per) < block_total(error, per);
    d = select(better, again, d);
    store16(ds, d);
    alignas(64) float flags[kBlocks];
    store16(flags, select(better, all(1.0f), all(0.0f)));
    for (int first = 0; first < groups; first += kLanes) {
      const Mask each = for_groups(flags, per, first) != all(0.0f);
      error.put(first, select(each, errors.at(first), error.at(first)));
      products.put(first, select(each, others.at(first), products.at(first)));
      squares.put(first, select(each, more.at(first), squares.at(first)));
    }
  }
  for (int first = 0; first < groups; first += kLanes) {
    const Lanes* x = t.x + first / kLanes * kSize;
    const Lanes inverse_step = inverse_of(for_groups(ds, per, first) * small.at(first));
    Lanes codes[kSize];
    for (int i = 0; i < kSize; ++i) codes[i] = grid.code(inverse_step * x[i]);
    store_codes<kSize>(codes, found.codes + first * kSize);
    store16(found.small + first, small.at(first));
  }
  store16(found.d, d);
}

QK_LANE_INLINE Lanes share_of(Lanes part, Lanes whole) { return select(whole > all(0.0f), part / whole, all(0.0f)); }

struct Straight {
  Lanes scale, start;
};

template <int kSize>
QK_LANE_INLINE Straight straight_through(const Lanes* x, const Lanes* w, const Lanes* codes, bool below, Lanes sum_w,
                                         Lanes sum_x) {
  const Lanes zero = all(0.0f);
  Lanes l1 = zero, l2 = zero, lx = zero;
  for (int i = 0; i < kSize; ++i) {
    const Lanes weighted = w[i] * codes[i];
    l1 = l1 + weighted, l2 = l2 + weighted * codes[i], lx = lx + weighted * x[i];
  }
  const Lanes determinant = sum_w * l2 - l1 * l1;
  const Mask sound = determinant > zero;
  Lanes scale = select(sound, (sum_w * lx - sum_x * l1) / determinant, zero);
  Lanes start = select(sound, (l2 * sum_x - l1 * lx) / determinant, share_of(sum_x, sum_w));
  if (below) {
    const Mask above = start > zero;
    scale = select(above, select(l2 > zero, lx / l2, zero), scale), start = select(above, zero, start);
  }
  return {scale, start};
}

template <int kSize>
QK_LANE_INLINE void codes_on(const Lanes* x, Straight line, float top, Lanes* codes) {
  const Lanes inverse = inverse_of(line.scale);
  for (int i = 0; i < kSize; ++i) {
    codes[i] = nearest_small(clamped((x[i] - line.start) * inverse, all(0.0f), all(top)));
  }
}

template <int kSize>
Straight fit_straight(const Lanes* x, const Lanes* w, int top_code, bool below, Lanes sum_w, Lanes sum_x) {
  const Lanes zero = all(0.0f);
  const float top = static_cast<float>(top_code);
  const Lanes centre = share_of(sum_x, sum_w), high = most_of(x, kSize);
  Lanes low = least_of(x, kSize);
  if (below) low = select(low > zero, zero, low);
  Straight best_line{zero, below ? select(centre > zero, zero, centre) : centre};
  Lanes best = all(INFINITY), codes[kSize];
  const auto keep = [&](Straight line) {
    const Lanes error = total(kSize, [&](int i) {
      const Lanes difference = line.scale * codes[i] + line.start - x[i];
      return w[i] * difference * difference;
    });
    const Mask better = error < best;
    best_line.scale = select(better, line.scale, best_line.scale);
    best_line.start = select(better, line.start, best_line.start);
    best = select(better, error, best);
  };
  for (const float at_low : kShares) {
    for (const float at_high : kShares) {
      const Lanes first = centre + all(at_low) * (low - centre), last = centre + all(at_high) * (high - centre);
      codes_on<kSize>(x, {(last - first) / all(top), first}, top, codes);
      codes_on<kSize>(x, straight_through<kSize>(x, w, codes, below, sum_w, sum_x), top, codes);
      keep(straight_through<kSize>(x, w, codes, below, sum_w, sum_x));
    }
  }
  for (int round = 0; round < 2; ++round) {
    codes_on<kSize>(x, best_line, top, codes);
    keep(straight_through<kSize>(x, w, codes, below, sum_w, sum_x));
  }
  return best_line;
}

// Q4_1, Q5_1
inline void better_line(const Chunk& c, int top_code, Found& found) {
  const float top = static_cast<float>(top_code);
  Turned t;
  turn<32>(c, t);
  const Lanes *x = t.x, *w = t.w;
  const Lanes sum_w = total(32, [&](int i) { return w[i]; }), sum_x = total(32, [&](int i) { return w[i] * x[i]; });
  const Straight fit = fit_straight<32>(x, w, top_code, false, sum_w, sum_x);
  Lanes d = as_half(fit.scale), start = as_half(fit.start), codes[32];
  const auto error = [&](Lanes scale, Lanes from) {
    codes_on<32>(x, {scale, from}, top, codes);
    return total(32, [&](int i) {
      const Lanes difference = scale * codes[i] + from - x[i];
      return w[i] * difference * difference;
    });
  };
  Lanes best = error(d, start);
  for (const float near : {1.0f, kBeside[0], kBeside[1]}) {
    const Lanes other = as_half(d * all(near));
    codes_on<32>(x, {other, start}, top, codes);
    const Lanes sum_l = total(32, [&](int i) { return w[i] * codes[i]; });
    const Lanes again = as_half(share_of(sum_x - other * sum_l, sum_w)), now = error(other, again);
    const Mask better = now < best;
    d = select(better, other, d), start = select(better, again, start), best = select(better, now, best);
  }
  codes_on<32>(x, {d, start}, top, codes);
  store_codes<32>(codes, found.codes);
  store16(found.d, d), store16(found.dmin, start);
}

// Q2_K, Q4_K, Q5_K
template <int kSize>
void better_line_blocks(const Chunk& c, int top_code, int small_top, Found& found) {
  const int per = c.per(), groups = c.groups();
  const Lanes zero = all(0.0f), top = all(static_cast<float>(top_code));
  const Integers whole{0.0f, static_cast<float>(small_top), 0.0f};
  const float end = whole.high;
  Turned t;
  turn<kSize>(c, t);
  ByGroup sum_w, sum_x, scale, share, l1s, small, minima;
  for (int first = 0; first < groups; first += kLanes) {
    const Lanes *x = t.x + first / kLanes * kSize, *w = t.w + first / kLanes * kSize;
    const Lanes sw = total(kSize, [&](int i) { return w[i]; }), sx = total(kSize, [&](int i) { return w[i] * x[i]; });
    const Straight fit = fit_straight<kSize>(x, w, top_code, true, sw, sx);
    Lanes codes[kSize];
    codes_on<kSize>(x, fit, static_cast<float>(top_code), codes);
    const Lanes l1 = total(kSize, [&](int i) { return w[i] * codes[i]; });
    const Lanes l2 = total(kSize, [&](int i) { return w[i] * codes[i] * codes[i]; });
    const Lanes rest = l2 - share_of(l1 * l1, sw);
    sum_w.put(first, sw), sum_x.put(first, sx), scale.put(first, fit.scale), l1s.put(first, l1);
    share.put(first, select(rest > zero, rest, zero));
  }
  Factors16 outer;
  for (int s = 0; s < per; ++s) {
    outer.x[s] = of_blocks(scale.values, per, s), outer.w[s] = of_blocks(share.values, per, s);
  }
  const auto outer_factor = [&] {
    const Lanes found_scale = fit_scale(outer.x, outer.w, per, whole, &end, 1).scale;
    return as_half(select(found_scale > zero, found_scale, zero));
  };
  Lanes d = outer_factor();
  Lanes inverse = inverse_of(d), smalls[16];
  for (int s = 0; s < per; ++s) {
    smalls[s] = whole.value(inverse * outer.x[s]);
    to_groups(smalls[s], small.values, per, s);
  }
  for (int s = 0; s < per; ++s) {
    const Lanes sw = of_blocks(sum_w.values, per, s), sx = of_blocks(sum_x.values, per, s);
    const Lanes low = share_of((d * smalls[s]) * of_blocks(l1s.values, per, s) - sx, sw);
    outer.x[s] = select(low > zero, low, zero), outer.w[s] = sw;
  }
  Lanes dmin = outer_factor();
  inverse = inverse_of(dmin);
  for (int s = 0; s < per; ++s) to_groups(whole.value(inverse * outer.x[s]), minima.values, per, s);

  struct Tried {
    Lanes error, l1, l2, lx;
  };
  struct Kept {
    ByGroup error, l1, l2, lx;

    QK_LANE_INLINE Tried at(int first) const { return {error.at(first), l1.at(first), l2.at(first), lx.at(first)}; }
    QK_LANE_INLINE void put(int first, const Tried& v) {
      error.put(first, v.error), l1.put(first, v.l1), l2.put(first, v.l2), lx.put(first, v.lx);
    }
  };
  const auto chosen = [](Mask m, const Tried& a, const Tried& b) {
    return Tried{select(m, a.error, b.error), select(m, a.l1, b.l1), select(m, a.l2, b.l2), select(m, a.lx, b.lx)};
  };
  const auto tried = [&](int first, Lanes step, Lanes low) {
    const Lanes *x = t.x + first / kLanes * kSize, *w = t.w + first / kLanes * kSize;
    const Lanes inverse_step = inverse_of(step);
    Tried out{zero, zero, zero, zero};
    for (int i = 0; i < kSize; ++i) {
      const Lanes code = nearest_small(clamped((x[i] + low) * inverse_step, zero, top));
      const Lanes difference = step * code - low - x[i], weighted = w[i] * code;
      out.error = out.error + w[i] * difference * difference;
      out.l1 = out.l1 + weighted, out.l2 = out.l2 + weighted * code, out.lx = out.lx + weighted * x[i];
    }
    return out;
  };
  alignas(64) float ds[kBlocks], dmins[kBlocks];
  store16(ds, d), store16(dmins, dmin);
  Kept best;
  const auto all_tried = [&](const float* scales, const float* lows, Kept& into) {
    for (int first = 0; first < groups; first += kLanes) {
      into.put(first, tried(first, for_groups(scales, per, first) * small.at(first),
                            for_groups(lows, per, first) * minima.at(first)));
    }
  };
  all_tried(ds, dmins, best);
  for (int round = 0; round < kRounds; ++round) {
    for (int first = 0; first < groups; first += kLanes) {
      const Lanes start = small.at(first), below = minima.at(first);
      const Lanes d_of = for_groups(ds, per, first), dmin_of = for_groups(dmins, per, first);
      Lanes scale_code = start, low_code = below;
      Tried least = best.at(first);
      for (const float change : {0.0f, -1.0f, 1.0f}) {
        for (const float shift : {0.0f, -1.0f, 1.0f}) {
          if (change == 0.0f && shift == 0.0f) continue;
          const Lanes other = clamped(start + all(change), zero, all(whole.high));
          const Lanes lower = clamped(below + all(shift), zero, all(whole.high));
          const Tried now = tried(first, d_of * other, dmin_of * lower);
          const Mask better = now.error < least.error;
          scale_code = select(better, other, scale_code), low_code = select(better, lower, low_code);
          least = chosen(better, now, least);
        }
      }
      small.put(first, scale_code), minima.put(first, low_code), best.put(first, least);
    }
    Lanes p = zero, q = zero, r = zero, u = zero, v = zero;
    for (int s = 0; s < per; ++s) {
      const Lanes a = of_blocks(small.values, per, s), b = of_blocks(minima.values, per, s);
      p = p + a * a * of_blocks(best.l2.values, per, s), q = q + a * b * of_blocks(best.l1.values, per, s);
      r = r + b * b * of_blocks(sum_w.values, per, s);
      u = u + a * of_blocks(best.lx.values, per, s), v = v + b * of_blocks(sum_x.values, per, s);
    }
    const Lanes determinant = p * r - q * q;
    const Mask sound = determinant > zero;
    Lanes again = select(sound, (u * r - q * v) / determinant, d);
    Lanes again_min = select(sound, (q * u - p * v) / determinant, dmin);
    const Mask alone = (p > zero) & (zero >= r);
    again = select(alone, u / p, again);
    again = as_half(select(again > zero, again, zero)), again_min = as_half(select(again_min > zero, again_min, zero));
    alignas(64) float agains[kBlocks], again_mins[kBlocks], flags[kBlocks];
    store16(agains, again), store16(again_mins, again_min);
    Kept now;
    all_tried(agains, again_mins, now);
    const Mask better = block_total(now.error, per) < block_total(best.error, per);
    d = select(better, again, d), dmin = select(better, again_min, dmin);
    store16(ds, d), store16(dmins, dmin), store16(flags, select(better, all(1.0f), zero));
    for (int first = 0; first < groups; first += kLanes) {
      best.put(first, chosen(for_groups(flags, per, first) != zero, now.at(first), best.at(first)));
    }
  }
  for (int first = 0; first < groups; first += kLanes) {
    const Lanes* x = t.x + first / kLanes * kSize;
    const Lanes low = for_groups(dmins, per, first) * minima.at(first);
    const Lanes inverse_step = inverse_of(for_groups(ds, per, first) * small.at(first));
    Lanes codes[kSize];
    for (int i = 0; i < kSize; ++i) codes[i] = nearest_small(clamped((x[i] + low) * inverse_step, zero, top));
    store_codes<kSize>(codes, found.codes + first * kSize);
    store16(found.small + first, small.at(first)), store16(found.minima + first, minima.at(first));
  }
  store16(found.d, d), store16(found.dmin, dmin);
}

inline void better_mxfp4(const Chunk& c, Found& found) {
  Turned t;
  turn<32>(c, t);
  alignas(64) float largest[kBlocks], first[kBlocks], d[kBlocks];
  store16(largest, magnitude(peak_of(t.x, 32)));
  for (int b = 0; b < kBlocks; ++b) first[b] = mxfp4_exponent(largest[b]), found.d[b] = 0.0f;
  Lanes exponent = load16(first), best = all(INFINITY), codes[32], chosen[32] = {};
  for (const float change : {0.0f, -1.0f, 1.0f}) {
    const Lanes other = clamped(load16(first) + all(change), all(0.0f), all(254.0f));
    store16(d, other);
    for (float& value : d) value = half_of_e8m0(static_cast<int>(value));
    Lanes errors[32];
    e2m1_codes(t.x, load16(d), codes, errors);
    const Lanes whole = total(32, [&](int i) { return t.w[i] * errors[i] * errors[i]; });
    const Mask better = whole < best;
    for (int i = 0; i < 32; ++i) chosen[i] = select(better, codes[i], chosen[i]);
    exponent = select(better, other, exponent), best = select(better, whole, best);
  }
  store_codes<32>(chosen, found.codes);
  store16(found.small, exponent);
}

}  // namespace
}  // namespace qkernels::cpu
