// llama.cpp's searches (ggml-quants.c; MIT) in lanes, step by step as qkernels/formats/gguf/search.py has them: the
// reasons are there.
#pragma once
#include "gguf_chunk.h"
#include "gguf_tables.h"

namespace qkernels::cpu {
namespace {

// Codes of a fit, not kept but made again: clamp((x - from) * inverse), to nearest, plus `offset`; 0 where `none`.
struct Codes {
  Lanes from, inverse;
  Mask none;
  float low, high, offset;

  QK_LANE_INLINE Lanes of(Lanes x) const {
    const Lanes code = nearest_small(clamped(inverse * (x - from), all(low), all(high))) + all(offset);
    return select(none, all(0.0f), code);
  }
};

struct Line {
  Codes codes;
  Lanes scale, low;  // low: the amount that is subtracted
};

struct Tries {
  float first, step;
  int count;
  float at(int i) const { return first + step * static_cast<float>(i); }
};
constexpr Tries kWeightedTries{-0.9f, 0.05f, 37};

template <int kSize>
Line fit_range(const Group<kSize>& g, int top_code, Tries tries, bool absolute) {
  const Lanes zero = all(0.0f), one = all(1.0f), top = all(static_cast<float>(top_code));
  const Lanes least = least_of(g.x, kSize), high = most_of(g.x, kSize);
  const Lanes low = select(least > zero, zero, least);
  const Mask flat = high == low;
  const Lanes width = select(flat, one, high - low);
  const Lanes sum_w = total(kSize, [&](int i) { return g.w[i]; });
  const Lanes sum_x = total(kSize, [&](int i) { return g.w[i] * g.x[i]; });
  const auto error = [&](auto code, Lanes scale, Lanes start) {
    return total(kSize, [&](int i) {
      const Lanes difference = scale * code(i) + start - g.x[i];
      return g.w[i] * (absolute ? magnitude(difference) : difference * difference);
    });
  };

  Lanes inverse = top / width, from = low, scale = one / inverse, start = low;
  Lanes best;
  {
    Lanes trial[kSize];
    for (int i = 0; i < kSize; ++i) trial[i] = nearest_small(clamped(inverse * (g.x[i] - low), zero, top));
    best = error([&](int i) { return trial[i]; }, scale, start);
  }
  for (int t = 0; t < tries.count; ++t) {
    const Lanes slope_of_trial = all(tries.at(t) + static_cast<float>(top_code)) / select(flat, one, high - start);
    Lanes trial[kSize], sum_l = zero, sum_l2 = zero, sum_xl = zero;
    for (int i = 0; i < kSize; ++i) {
      trial[i] = nearest_small(clamped(slope_of_trial * (g.x[i] - start), zero, top));
      const Lanes weighted = g.w[i] * trial[i];
      sum_l = sum_l + weighted, sum_l2 = sum_l2 + weighted * trial[i], sum_xl = sum_xl + weighted * g.x[i];
    }
    const Lanes determinant = sum_w * sum_l2 - sum_l * sum_l;
    Lanes slope = (sum_w * sum_xl - sum_x * sum_l) / determinant;
    Lanes begin = (sum_l2 * sum_x - sum_l * sum_xl) / determinant;
    const Mask above = begin > zero;
    slope = select(above, sum_xl / sum_l2, slope), begin = select(above, zero, begin);
    const Lanes found = error([&](int i) { return trial[i]; }, slope, begin);
    const Mask better = (determinant > zero) & (found < best);
    inverse = select(better, slope_of_trial, inverse), from = select(better, start, from);
    best = select(better, found, best), scale = select(better, slope, scale), start = select(better, begin, start);
  }
  return {{from, inverse, flat, 0.0f, static_cast<float>(top_code), 0.0f},
          select(flat, zero, scale),
          -select(flat, low, start)};
}

struct Signed {
  Codes codes;
  Lanes scale;
};

// `g` has members x and their weights; codes with their zero at `half`.
template <class Members>
QK_LANE_INLINE Signed fit_signed(const Members& g, int size, int half_code) {
  const Lanes zero = all(0.0f), none_below = all(kTiny);
  const float half = static_cast<float>(half_code);
  Lanes peak = peak_of(g.x, size);
  const Mask none = magnitude(peak) < none_below;
  peak = select(none, all(1.0f), peak);
  Lanes sum_lx, sum_l2, inverse;
  const auto trial = [&](float width) {
    inverse = all(-width) / peak;
    sum_lx = zero, sum_l2 = zero;
    for (int i = 0; i < size; ++i) {
      const Lanes code = nearest_small(clamped(inverse * g.x[i], all(-half), all(half - 1)));
      sum_lx = sum_lx + g.w[i] * g.x[i] * code, sum_l2 = sum_l2 + g.w[i] * code * code;
    }
  };
  trial(half);
  Lanes chosen = inverse, scale = select(sum_l2 != zero, sum_lx / sum_l2, zero), best = scale * sum_lx;
  for (int step = -9; step <= 9; ++step) {
    if (step == 0) continue;
    trial(half + 0.1f * static_cast<float>(step));
    const Mask better = (sum_l2 > zero) & (sum_lx * sum_lx > best * sum_l2);
    chosen = select(better, inverse, chosen), scale = select(better, sum_lx / sum_l2, scale);
    best = select(better, scale * sum_lx, best);
  }
  return {{zero, chosen, none, -half, half - 1, half}, select(none, zero, scale)};
}

// Five rounds in which each member in turn takes its best code given the others'. Returns the scale.
template <class Members>
QK_LANE_INLINE Lanes descend(const Members& g, Lanes* codes, int size, float low, float high, bool positive) {
  const Lanes zero = all(0.0f);
  Lanes sum_lx = total(size, [&](int i) { return g.w[i] * g.x[i] * codes[i]; });
  Lanes sum_l2 = total(size, [&](int i) { return g.w[i] * codes[i] * codes[i]; });
  for (int round = 0; round < 5; ++round) {
    bool changed = false;
    for (int i = 0; i < size; ++i) {
      const Lanes value = g.x[i], w = g.w[i], old = codes[i];
      Lanes lx = sum_lx - w * value * old, l2 = sum_l2 - w * old * old;
      const Mask open = positive ? (lx > zero) & (l2 > zero) : lx > zero;
      Lanes fresh = lesser(nearest(select(open, value * l2 / lx, zero)), all(high));
      if (!positive) fresh = greater(fresh, all(low));
      lx = lx + w * value * fresh, l2 = l2 + w * fresh * fresh;
      Mask better = open & (fresh != old) & (lx * lx * sum_l2 > sum_lx * sum_lx * l2);
      if (!positive) better = better & (l2 > zero);
      codes[i] = select(better, fresh, old);
      sum_lx = select(better, lx, sum_lx), sum_l2 = select(better, l2, sum_l2);
      changed |= any(better);
    }
    if (!changed) break;
  }
  return select(sum_l2 > zero, sum_lx / sum_l2, zero);
}

// Codes 0 ... top of scales or minima, which are not negative; returns the outer factor.
inline Lanes fit_positive(const Factors16& g, int per, int top_code, Lanes* codes) {
  const Lanes zero = all(0.0f);
  const float top = static_cast<float>(top_code);
  Lanes peak = most_of(g.x, per);
  const Mask none = peak < all(kTiny);
  peak = select(none, all(1.0f), peak);
  const auto trial = [&](Lanes inverse, Lanes* found) {
    const Lanes scale = all(1.0f) / inverse;
    return total(per, [&](int i) {
      found[i] = lesser(nearest(inverse * g.x[i]), all(top));
      const Lanes difference = g.x[i] - scale * found[i];
      return g.w[i] * difference * difference;
    });
  };
  Lanes best = trial(all(top) / peak, codes);
  for (int step = -4; step <= 4; ++step) {
    if (step == 0) continue;
    Lanes others[16];
    const Lanes error = trial(all(0.1f * static_cast<float>(step) + top) / peak, others);
    const Mask better = error < best;
    for (int i = 0; i < per; ++i) codes[i] = select(better, others[i], codes[i]);
    best = select(better, error, best);
  }
  const Lanes scale = descend(g, codes, per, 0.0f, top, true);
  for (int i = 0; i < per; ++i) codes[i] = select(none, zero, codes[i]);
  return select(none, zero, scale);
}

// By the largest.
inline Lanes plain_factors(const Factors16& g, int per, int top_code, Lanes* codes) {
  const Lanes zero = all(0.0f), top = all(static_cast<float>(top_code));
  Lanes largest = most_of(g.x, per);
  largest = select(largest > zero, largest, zero);
  const Lanes inverse = select(largest > zero, top / largest, zero);
  for (int i = 0; i < per; ++i) codes[i] = clamped(nearest(inverse * g.x[i]), zero, top);
  return largest / top;
}

// Q2_K, Q4_K, Q5_K
template <int kSize>
void search_lines(const Chunk& c, int top, int small_top, Tries tries, bool absolute, Found& found) {
  const int per = c.per(), groups = c.groups();
  const Lanes zero = all(0.0f);
  alignas(64) float scale[kBlocks * 16], low[kBlocks * 16], share[kBlocks * 16], variance[kBlocks];
  Codes fits[16];
  Group<kSize> g;
  if (c.weighted) {
    block_squares(c, variance);
    for (float& v : variance) v = (absolute ? v : 2 * v) / static_cast<float>(c.shape.elements);
  }
  for (int first = 0; first < groups; first += kLanes) {
    Line line;
    if (c.weighted) {
      load_weighted(c, first, variance, g);
      store16(share + first, total(kSize, [&](int i) { return g.w[i]; }));
      line = fit_range(g, top, kWeightedTries, false);
    } else {
      load_members<kSize>(c.x + first * kSize, g.x);
      const Lanes mean = root(total(kSize, [&](int i) { return g.x[i] * g.x[i]; }) / all(static_cast<float>(kSize)));
      for (int i = 0; i < kSize; ++i) g.w[i] = absolute ? magnitude(g.x[i]) : mean + magnitude(g.x[i]);
      line = fit_range(g, top, tries, absolute);
    }
    store16(scale + first, line.scale), store16(low + first, line.low);
    fits[first / kLanes] = line.codes;
  }
  Factors16 scales, lows;
  for (int s = 0; s < per; ++s) {
    scales.x[s] = of_blocks(scale, per, s), lows.x[s] = of_blocks(low, per, s);
    if (c.weighted) scales.w[s] = lows.w[s] = of_blocks(share, per, s);
  }
  Lanes small[16], minima[16];
  const Lanes d =
      c.weighted ? fit_positive(scales, per, small_top, small) : plain_factors(scales, per, small_top, small);
  const Lanes dmin =
      c.weighted ? fit_positive(lows, per, small_top, minima) : plain_factors(lows, per, small_top, minima);
  store16(found.d, d), store16(found.dmin, dmin);
  const Lanes d_half = as_half(d), dmin_half = as_half(dmin);
  alignas(64) float step[kBlocks * 16], least[kBlocks * 16];
  for (int s = 0; s < per; ++s) {
    to_groups(small[s], found.small, per, s), to_groups(minima[s], found.minima, per, s);
    to_groups(d_half * small[s], step, per, s), to_groups(dmin_half * minima[s], least, per, s);
  }
  for (int first = 0; first < groups; first += kLanes) {
    load_members<kSize>(c.x + first * kSize, g.x);
    const Lanes width = load16(step + first), below = load16(least + first);
    const Mask some = width != zero;
    const Lanes divisor = select(some, width, all(1.0f));
    Lanes codes[kSize];
    for (int i = 0; i < kSize; ++i) {
      const Lanes again = clamped(nearest((g.x[i] + below) / divisor), zero, all(static_cast<float>(top)));
      codes[i] = select(some, again, fits[first / kLanes].of(g.x[i]));
    }
    store_codes<kSize>(codes, found.codes + first * kSize);
  }
}

// The codes of Q3_K and Q6_K once d and the small scales are there; `none` by block.
inline void signed_codes(const Chunk& c, const Lanes* fits, const Codes* kept, float half, Lanes none, Found& found) {
  const int per = c.per(), groups = c.groups();
  const Lanes zero = all(0.0f), d = as_half(load16(found.d));
  alignas(64) float halves[kBlocks], nones[kBlocks];
  store16(halves, d), store16(nones, none);
  for (int first = 0; first < groups; first += kLanes) {
    Lanes x[16], codes[16];
    load_members<16>(c.x + first * 16, x);
    const Lanes step = for_groups(halves, per, first) * load16(found.small + first);
    const Mask some = step != zero, zeros = for_groups(nones, per, first) != zero;
    const Lanes divisor = select(some, step, all(1.0f));
    for (int i = 0; i < 16; ++i) {
      const Lanes again = clamped(nearest(x[i] / divisor), all(-half), all(half - 1)) + all(half);
      const Lanes fit = fits != nullptr ? fits[first + i] : kept[first / kLanes].of(x[i]);
      codes[i] = select(zeros, zero, select(some, again, fit));
    }
    store_codes<16>(codes, found.codes + first * 16);
  }
}

inline void search_q3_k(const Chunk& c, Found& found) {
  const int per = c.per(), groups = c.groups();
  const Lanes zero = all(0.0f);
  alignas(64) float scale[kBlocks * 16], share[kBlocks * 16], variance[kBlocks];
  Codes kept[16];
  Lanes fits[kBlocks * 16];  // [groups / 16][members], where there is no importance
  Group<16> g;
  if (c.weighted) {
    block_squares(c, variance);
    for (float& v : variance) v = 2 * v / 256;
  }
  for (int first = 0; first < groups; first += kLanes) {
    if (c.weighted) {
      load_weighted(c, first, variance, g);
      store16(share + first, total(16, [&](int i) { return g.w[i]; }));
      const Signed fit = fit_signed(g, 16, 4);
      kept[first / kLanes] = fit.codes;
      store16(scale + first, fit.scale);
    } else {
      load_members<16>(c.x + first * 16, g.x);
      const Lanes peak = peak_of(g.x, 16);
      const Mask none = magnitude(peak) < all(kTiny);
      const Lanes inverse = all(-4.0f) / select(none, all(1.0f), peak);
      Lanes* codes = fits + first;
      for (int i = 0; i < 16; ++i) {
        codes[i] = nearest_small(clamped(inverse * g.x[i], all(-4.0f), all(3.0f)));
        g.w[i] = g.x[i] * g.x[i];
      }
      const Lanes found_scale = descend(g, codes, 16, -4.0f, 3.0f, false);
      for (int i = 0; i < 16; ++i) codes[i] = select(none, zero, codes[i] + all(4.0f));
      store16(scale + first, select(none, zero, found_scale));
    }
  }
  Factors16 scales;
  for (int s = 0; s < per; ++s) {
    scales.x[s] = of_blocks(scale, per, s);
    if (c.weighted) scales.w[s] = of_blocks(share, per, s);
  }
  Lanes d;
  if (c.weighted) {
    const Signed outer = fit_signed(scales, per, 32);
    d = outer.scale;
    for (int s = 0; s < per; ++s) to_groups(outer.codes.of(scales.x[s]) - all(32.0f), found.small, per, s);
  } else {
    const Lanes peak = peak_of(scales.x, per);
    const Mask some = peak != zero;
    const Lanes inverse = select(some, all(-32.0f) / peak, zero);
    for (int s = 0; s < per; ++s) {
      const Lanes code = clamped(nearest(inverse * scales.x[s]), all(-32.0f), all(31.0f));
      to_groups(select(some, code, all(-32.0f)), found.small, per, s);
    }
    d = inverse_of(inverse);
  }
  store16(found.d, d);
  signed_codes(c, c.weighted ? nullptr : fits, kept, 4.0f, zero, found);
}

inline void search_q6_k(const Chunk& c, Found& found) {
  const int per = c.per(), groups = c.groups();
  const Lanes zero = all(0.0f);
  alignas(64) float scale[kBlocks * 16];
  Codes kept[16];
  Group<16> g;
  for (int first = 0; first < groups; first += kLanes) {
    load_members<16>(c.x + first * 16, g.x);
    if (c.weighted) {
      load_members<16>(c.importance + first * 16, g.w);
    } else {
      for (int i = 0; i < 16; ++i) g.w[i] = g.x[i] * g.x[i];
    }
    const Signed fit = fit_signed(g, 16, 32);
    kept[first / kLanes] = fit.codes;
    store16(scale + first, fit.scale);
  }
  Lanes scales[16] = {};
  for (int s = 0; s < per; ++s) scales[s] = of_blocks(scale, per, s);
  const Lanes peak = peak_of(scales, per);
  const Mask none = magnitude(peak) < all(kTiny);
  const Lanes inverse = all(-128.0f) / select(none, all(1.0f), peak);
  for (int s = 0; s < per; ++s) {
    to_groups(select(none, zero, lesser(nearest(inverse * scales[s]), all(127.0f))), found.small, per, s);
  }
  store16(found.d, select(none, zero, all(1.0f) / inverse));
  signed_codes(c, nullptr, kept, 32.0f, select(none, all(1.0f), zero), found);
}

// Q4_0, Q5_0
inline void search_signed(const Chunk& c, int half, Found& found) {
  Group<32> g;
  Lanes codes[32];
  if (c.weighted) {
    load_weighted(c, 0, c.variance, g);
    const Signed fit = fit_signed(g, 32, half);
    for (int i = 0; i < 32; ++i) codes[i] = fit.codes.of(g.x[i]);
    store16(found.d, fit.scale);
  } else {
    load_members<32>(c.x, g.x);
    const Lanes d = peak_of(g.x, 32) / all(static_cast<float>(-half)), inverse = inverse_of(d);
    for (int i = 0; i < 32; ++i) {
      codes[i] = lesser(truncated(g.x[i] * inverse + all(static_cast<float>(half) + 0.5f)),
                        all(static_cast<float>(2 * half - 1)));
    }
    store16(found.d, d);
  }
  store_codes<32>(codes, found.codes);
}

// Q4_1, Q5_1
inline void search_range(const Chunk& c, int top, Found& found) {
  Group<32> g;
  Lanes codes[32];
  if (c.weighted) {
    load_weighted(c, 0, c.variance, g);
    const Line line = fit_range(g, top, kWeightedTries, false);
    for (int i = 0; i < 32; ++i) codes[i] = line.codes.of(g.x[i]);
    store16(found.d, line.scale), store16(found.dmin, -line.low);
  } else {
    load_members<32>(c.x, g.x);
    const Lanes low = least_of(g.x, 32), d = (most_of(g.x, 32) - low) / all(static_cast<float>(top));
    const Lanes inverse = inverse_of(d);
    for (int i = 0; i < 32; ++i) {
      codes[i] = lesser(truncated((g.x[i] - low) * inverse + all(0.5f)), all(static_cast<float>(top)));
    }
    store16(found.d, d), store16(found.dmin, low);
  }
  store_codes<32>(codes, found.codes);
}

inline void search_q8_0(const Chunk& c, Found& found) {
  Lanes x[32], codes[32];
  load_members<32>(c.x, x);
  const Lanes d = magnitude(peak_of(x, 32)) / all(127.0f), inverse = inverse_of(d), zero = all(0.0f);
  for (int i = 0; i < 32; ++i) {
    const Lanes relative = x[i] * inverse, whole = truncated(relative);
    const Lanes away = select(relative > zero, all(1.0f), all(-1.0f));
    codes[i] = whole + select(magnitude(relative - whole) >= all(0.5f), away, zero) + all(128.0f);
  }
  store16(found.d, d);
  store_codes<32>(codes, found.codes);
}

// IQ4_NL, IQ4_XS
inline void search_iq4(const Chunk& c, Found& found) {
  const int per = c.per(), groups = c.groups();
  const Lanes zero = all(0.0f);
  alignas(64) float scale[kBlocks * 8], variance[kBlocks];
  Group<32> g;
  if (c.weighted) {
    block_squares(c, variance);
    for (float& v : variance) v = v * (2.0f / static_cast<float>(c.shape.elements));
  }
  for (int first = 0; first < groups; first += kLanes) {
    if (c.weighted) {
      load_weighted(c, first, variance, g);
    } else {
      load_members<32>(c.x + first * 32, g.x);
      for (int i = 0; i < 32; ++i) g.w[i] = g.x[i] * g.x[i];
    }
    Lanes peak = peak_of(g.x, 32);
    const Mask none = magnitude(peak) < all(kTiny);
    peak = select(none, all(1.0f), peak);
    Lanes sum_qx, sum_q2;
    const auto trial = [&](Lanes inverse) {
      sum_qx = zero, sum_q2 = zero;
      for (int i = 0; i < 32; ++i) {
        const Lanes value = nearest_entry(inverse * g.x[i]).value, weighted = g.w[i] * value;
        sum_qx = sum_qx + weighted * g.x[i], sum_q2 = sum_q2 + weighted * value;
      }
    };
    trial(all(1.0f) / (-peak / all(kIq4Table[0])));
    Lanes d = sum_qx / sum_q2, best = d * sum_qx;
    for (int step = -7; step <= 7; ++step) {
      trial(all(static_cast<float>(step) + kIq4Table[0]) / peak);
      const Mask better = (sum_q2 > zero) & (sum_qx * sum_qx > best * sum_q2);
      d = select(better, sum_qx / sum_q2, d), best = select(better, d * sum_qx, best);
    }
    store16(scale + first, select(none, zero, d));
  }
  alignas(64) float inverses[kBlocks * 8];
  if (per == 1) {
    store16(found.d, load16(scale));
    store16(inverses, inverse_of(load16(scale)));
  } else {
    Lanes scales[8] = {};
    for (int s = 0; s < per; ++s) scales[s] = of_blocks(scale, per, s);
    const Lanes outer = -peak_of(scales, per) / all(32.0f), inverse = inverse_of(outer);
    store16(found.d, outer);
    for (int s = 0; s < per; ++s) {
      const Lanes small = clamped(nearest(inverse * scales[s]), all(-32.0f), all(31.0f));
      to_groups(small, found.small, per, s), to_groups(inverse_of(outer * small), inverses, per, s);
    }
  }
  for (int first = 0; first < groups; first += kLanes) {
    Lanes x[32], codes[32];
    load_members<32>(c.x + first * 32, x);
    const Lanes inverse = load16(inverses + first);
    for (int i = 0; i < 32; ++i) codes[i] = nearest_entry(inverse * x[i]).index;
    store_codes<32>(codes, found.codes + first * 32);
  }
}

inline void search_mxfp4(const Chunk& c, Found& found) {
  Lanes x[32], codes[32], errors[32];
  load_members<32>(c.x, x);
  alignas(64) float largest[kBlocks], d[kBlocks];
  store16(largest, magnitude(peak_of(x, 32)));
  for (int b = 0; b < kBlocks; ++b) {
    found.small[b] = mxfp4_exponent(largest[b]);
    d[b] = half_of_e8m0(static_cast<int>(found.small[b])), found.d[b] = 0.0f;
  }
  e2m1_codes(x, load16(d), codes, errors);
  store_codes<32>(codes, found.codes);
}

}  // namespace
}  // namespace qkernels::cpu
