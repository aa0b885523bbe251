// The loops of between.h: sixteen floats at a time, which the compiler makes vectors of for the file that includes
// this.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>

#include "between.h"
#include "exponential.h"
#include "rows.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are passed between functions of one file alone
#endif

namespace qkernels::cpu {
namespace {

constexpr int kW = kLaneWidth;
using Floats = float __attribute__((vector_size(4 * kW)));
using Words = uint32_t __attribute__((vector_size(4 * kW)));
using Halves = uint16_t __attribute__((vector_size(2 * kW)));

// Values of a type, sixteen at a time, and how floats are rounded to it.
struct OfFloat {
  using Value = float;
  static inline Floats read(const float* at) {
    Floats v;
    std::memcpy(&v, at, sizeof v);
    return v;
  }
  static inline void write(float* at, Floats v) { std::memcpy(at, &v, sizeof v); }
  static inline Floats rounded(Floats v) { return v; }
};
struct OfBf16 {
  using Value = uint16_t;
  static inline Floats widened(Words words) {
    words <<= 16;
    Floats v;
    std::memcpy(&v, &words, sizeof v);
    return v;
  }
  static inline Words narrowed(Floats v) {  // to_bf16 of each
    Words bits;
    std::memcpy(&bits, &v, sizeof v);
    const Words nan = (Words)((bits & 0x7fffffffu) > 0x7f800000u);
    const Words even = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return (nan & ((bits >> 16) | 0x40u)) | (~nan & even);
  }
  static inline Floats read(const uint16_t* at) {
    Halves halves;
    std::memcpy(&halves, at, sizeof halves);
    return widened(__builtin_convertvector(halves, Words));
  }
  static inline void write(uint16_t* at, Floats v) {
    const Halves halves = __builtin_convertvector(narrowed(v), Halves);
    std::memcpy(at, &halves, sizeof halves);
  }
  static inline Floats rounded(Floats v) { return widened(narrowed(v)); }
};
struct OfHalf {
  using Value = uint16_t;
  static inline Floats read(const uint16_t* at) {
    Floats v;
    for (int i = 0; i < kW; ++i) v[i] = from_half(at[i]);
    return v;
  }
  static inline void write(uint16_t* at, Floats v) {
    for (int i = 0; i < kW; ++i) at[i] = to_half(v[i]);
  }
  static inline Floats rounded(Floats v) {
    for (int i = 0; i < kW; ++i) v[i] = from_half(to_half(v[i]));
    return v;
  }
};

template <class Run>
inline void of_type(Type type, const Run& run) {
  if (type == Type::kFloat) return run(OfFloat{});
  if (type == Type::kHalf) return run(OfHalf{});
  run(OfBf16{});
}

template <class V>
inline typename V::Value* values(const void* p) {
  return static_cast<typename V::Value*>(const_cast<void*>(p));
}

inline Floats all(float f) { return f - Floats{}; }  // lane by lane is what GCC 12 would make of a loop

inline float total(Floats v) {
  float lane[kW];
  std::memcpy(lane, &v, sizeof v);
  for (int half = kW / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
  }
  return lane[0];
}

inline Floats exponentials(Floats v) {
  Floats e;
  for (int i = 0; i < kW; ++i) e[i] = exponential(v[i]);
  return e;
}

void norm_rows(const Norm& n, int64_t begin, int64_t end) {
  of_type(n.type, [&](auto type) {
    using V = decltype(type);
    const auto* weight = values<V>(n.weight);
    for (int64_t r = begin; r < end; ++r) {
      const auto* x = values<V>(n.x) + r * n.x_stride;
      auto* y = values<V>(n.y) + r * n.n;
      Floats squares = all(0.0f);
      for (int64_t i = 0; i < n.n; i += kW) {
        const Floats v = V::read(x + i);
        squares += v * v;
      }
      const Floats factor = all(1.0f / std::sqrt(total(squares) / static_cast<float>(n.n) + n.epsilon));
      for (int64_t i = 0; i < n.n; i += kW) {
        const Floats v = V::read(x + i) * factor, w = V::read(weight + i);
        V::write(y + i, n.one_added ? v * (w + 1.0f) : V::rounded(v) * w);
      }
    }
  });
}

void gate_values(const Gate& g, int64_t begin, int64_t end) {  // in pieces of kLaneWidth
  of_type(g.type, [&](auto type) {
    using V = decltype(type);
    for (int64_t i = begin * kW; i < end * kW; i += kW) {
      const Floats gate = V::read(values<V>(g.gate) + i), up = V::read(values<V>(g.up) + i);
      // 0.5 (1 + tanh z) is the sigmoid of 2 z
      const Floats at = g.gelu ? 1.5957691216f * (gate + 0.044715f * gate * gate * gate) : gate;
      V::write(values<V>(g.y) + i, V::rounded(gate / (1.0f + exponentials(-at))) * up);
    }
  });
}

void rotate_heads(const Rotation& t, int64_t begin, int64_t end) {
  const int64_t half = t.D / 2;
  of_type(t.type, [&](auto type) {
    using V = decltype(type);
    for (int64_t bh = begin; bh < end; ++bh) {
      const int64_t b = bh / t.H, h = bh % t.H;
      for (int64_t p = 0; p < t.T; ++p) {
        const auto* x = values<V>(t.x) + b * t.strides[0] + h * t.strides[1] + p * t.strides[2];
        const auto* cos = values<V>(t.cos) + b * t.angles_stride + p * t.D;
        const auto* sin = values<V>(t.sin) + b * t.angles_stride + p * t.D;
        auto* y = values<V>(t.y) + (bh * t.T + p) * t.D;
        const auto turned = [&](int64_t at, Floats here, Floats there) {
          const Floats along = V::rounded(here * V::read(cos + at)), across = V::rounded(there * V::read(sin + at));
          V::write(y + at, along + across);
        };
        for (int64_t i = 0; i < half; i += kW) {
          const Floats first = V::read(x + i), second = V::read(x + half + i);
          turned(i, first, -second);
          turned(half + i, second, first);
        }
      }
    }
  });
}

// Lane i is the total of v[i], by the tree of `total`: halves are added in pairs of vectors.
#if defined(__clang__)
#define QK_PICKED(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define QK_PICKED(a, b, ...) __builtin_shuffle(a, b, (Words){__VA_ARGS__})
#endif
inline Floats totals(Floats v[kW]) {
  for (int i = 0; i < 8; ++i) {
    const Floats a = v[2 * i], b = v[2 * i + 1];
    v[i] = QK_PICKED(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
           QK_PICKED(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  }
  for (int i = 0; i < 4; ++i) {
    const Floats a = v[2 * i], b = v[2 * i + 1];
    v[i] = QK_PICKED(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
           QK_PICKED(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
  }
  for (int i = 0; i < 2; ++i) {
    const Floats a = v[2 * i], b = v[2 * i + 1];
    v[i] = QK_PICKED(a, b, 0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29) +
           QK_PICKED(a, b, 2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23, 26, 27, 30, 31);
  }
  return QK_PICKED(v[0], v[1], 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
         QK_PICKED(v[0], v[1], 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
}
#undef QK_PICKED

inline Floats chosen(Words where, Floats a, Floats b) {
  Words x, y;
  std::memcpy(&x, &a, sizeof x), std::memcpy(&y, &b, sizeof y);
  x = (where & x) | (~where & y);
  std::memcpy(&a, &x, sizeof a);
  return a;
}

constexpr float kNone = -std::numeric_limits<float>::infinity();

// The positions, in whole vectors, that hold all that is seen of a sequence.
struct Span {
  int64_t begin, end;
};

// The mask in fp32, as what is added to scores, in whole vectors: positions after the last one are not seen.
inline Span read_mask(const Attention& a, int64_t b, float* to) {
  Span span{a.P, 0};
  const auto keep = [&](int64_t p, Floats mask) {
    OfFloat::write(to + p, mask);
    const Words seen = (Words)(mask != kNone);
    uint32_t any = 0;
    for (int i = 0; i < kW; ++i) any |= seen[i];
    if (any != 0) span = {std::min(span.begin, p), std::min(a.P, p + kW)};
  };
  const int64_t at = b * a.mask_stride, whole = a.P / kW * kW;
  const auto of_one = [&](int64_t p) {
    const float mask = load(a.mask_type, a.mask, at + p);
    return a.mask_type != Type::kUInt8 ? mask : mask != 0.0f ? 0.0f : kNone;
  };
  if (a.mask_type == Type::kUInt8) {
    for (int64_t p = 0; p < whole; p += kW) {
      Floats mask;
      for (int i = 0; i < kW; ++i) mask[i] = of_one(p + i);
      keep(p, mask);
    }
  } else {
    of_type(a.mask_type, [&](auto type) {
      using V = decltype(type);
      for (int64_t p = 0; p < whole; p += kW) keep(p, V::read(values<V>(a.mask) + at + p));
    });
  }
  if (whole < a.P) {
    Floats mask = all(kNone);
    for (int64_t p = whole; p < a.P; ++p) mask[p - whole] = of_one(p);
    keep(whole, mask);
  }
  return span;
}

// One group's part of an attention: heads that share keys, a few of which are worked on together.
template <class V>
struct Group {
  const Attention& a;
  const typename V::Value *keys, *from;
  const float* mask;  // null: nothing is added
  Span span;

  // Scores of kHeads heads q [kHeads, D] become weights [kHeads, score_stride], whose sums are returned.
  template <int kHeads>
  void weigh(const float* q, float* weights, float* sums) const {
    Floats most[kHeads], sum[kHeads];
    for (int h = 0; h < kHeads; ++h) most[h] = all(kNone), sum[h] = all(0.0f);
    for (int64_t p = span.begin; p < span.end; p += kW) {
      Floats products[kHeads][kW];
      for (int i = 0; i < kW; ++i) {
        const auto* key = keys + std::min(p + i, span.end - 1) * a.key_strides[2];
        Floats part[kHeads];
        for (int h = 0; h < kHeads; ++h) part[h] = all(0.0f);
        for (int64_t d = 0; d < a.D; d += kW) {
          const Floats k = V::read(key + d);
          for (int h = 0; h < kHeads; ++h) part[h] += OfFloat::read(q + h * a.D + d) * k;
        }
        for (int h = 0; h < kHeads; ++h) products[h][i] = part[h];
      }
      for (int h = 0; h < kHeads; ++h) {
        Floats score = totals(products[h]) * a.scale;
        if (mask != nullptr) score += OfFloat::read(mask + p);
        for (int i = static_cast<int>(std::min<int64_t>(kW, span.end - p)); i < kW; ++i) score[i] = kNone;
        OfFloat::write(weights + h * a.score_stride + p, score);
        most[h] = chosen((Words)(score > most[h]) | (Words)(score != score), score, most[h]);  // a NaN stays
      }
    }
    for (int h = 0; h < kHeads; ++h) {
      float m = kNone;
      for (int i = 0; i < kW; ++i) m = most[h][i] > m || most[h][i] != most[h][i] ? most[h][i] : m;
      const bool seen = m != kNone;
      for (int64_t p = span.begin; p < span.end; p += kW) {
        float* at = weights + h * a.score_stride + p;
        const Floats score = OfFloat::read(at) - m;
        const Floats e = seen ? chosen((Words)(score < -87.0f), all(0.0f), exponentials(score)) : all(0.0f);
        OfFloat::write(at, e);
        sum[h] += e;
      }
      sums[h] = seen ? total(sum[h]) : 1.0f;
    }
  }

  // y [kHeads, D]: values by their weights.
  template <int kHeads>
  void add(const float* weights, const float* sums, typename V::Value* y) const {
    constexpr int kParts = 4;  // registers of each head's sums
    for (int64_t d = 0; d < a.D; d += kParts * kW) {
      const int parts = static_cast<int>(std::min<int64_t>(kParts, (a.D - d) / kW));
      Floats part[kHeads][kParts] = {};
      for (int64_t p = span.begin; p < span.end; ++p) {
        const auto* value = from + p * a.value_strides[2] + d;
        const auto add_to = [&](int i) {
          const Floats v = V::read(value + i * kW);
          for (int h = 0; h < kHeads; ++h) part[h][i] += weights[h * a.score_stride + p] * v;
        };
        if (parts == kParts) {
          for (int i = 0; i < kParts; ++i) add_to(i);
        } else {
          for (int i = 0; i < parts; ++i) add_to(i);
        }
      }
      for (int h = 0; h < kHeads; ++h) {
        for (int i = 0; i < parts; ++i) V::write(y + h * a.D + d + i * kW, part[h][i] / sums[h]);
      }
    }
  }

  template <int kHeads>
  void run(int64_t b, int64_t h, float* weights) const {
    float q[kHeads * kMostHead], sums[kHeads];
    for (int i = 0; i < kHeads; ++i) {
      const auto* x = values<V>(a.q) + b * a.q_strides[0] + (h + i) * a.q_strides[1];
      for (int64_t d = 0; d < a.D; d += kW) OfFloat::write(q + i * a.D + d, V::read(x + d));
    }
    weigh<kHeads>(q, weights, sums);
    add<kHeads>(weights, sums, values<V>(a.y) + (b * a.H + h) * a.D);
  }
};

void attend_groups(const Attention& a, int64_t begin, int64_t end) {
  const int64_t together = a.H / a.G;
  of_type(a.type, [&](auto type) {
    using V = decltype(type);
    for (int64_t bg = begin; bg < end; ++bg) {
      const int64_t b = bg / a.G, g = bg % a.G;
      float* scratch = a.scores + bg * (kHeadsTogether + 1) * a.score_stride;
      float* weights = scratch + a.score_stride;
      const Group<V> group{a, values<V>(a.keys) + b * a.key_strides[0] + g * a.key_strides[1],
                           values<V>(a.values) + b * a.value_strides[0] + g * a.value_strides[1],
                           a.mask == nullptr ? nullptr : scratch,
                           a.mask == nullptr ? Span{0, a.P} : read_mask(a, b, scratch)};
      int64_t h = g * together;
      for (; h + kHeadsTogether <= (g + 1) * together; h += kHeadsTogether)
        group.template run<kHeadsTogether>(b, h, weights);
      for (; h < (g + 1) * together; ++h) group.template run<1>(b, h, weights);
    }
  });
}

}  // namespace
}  // namespace qkernels::cpu
