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

inline Floats all(float f) {
  Floats v;
  for (int i = 0; i < kW; ++i) v[i] = f;
  return v;
}

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

// Scores of one head's token with all keys, become weights; returns their sum.
template <class V>
float weights_of(const Attention& a, int64_t b, const float* q, const typename V::Value* keys, float* scores) {
  constexpr float kNone = -std::numeric_limits<float>::infinity();
  float most = kNone;
  for (int64_t p = 0; p < a.P; ++p) {
    const auto* key = keys + p * a.key_strides[2];
    Floats sum = all(0.0f);
    for (int64_t d = 0; d < a.D; d += kW) sum += OfFloat::read(q + d) * V::read(key + d);
    float score = total(sum) * a.scale;
    if (a.mask != nullptr) {
      const int64_t at = b * a.mask_stride + p;
      const float mask = load(a.mask_type, a.mask, at);
      score = a.mask_type != Type::kUInt8 ? score + mask : mask != 0.0f ? score : kNone;
    }
    scores[p] = score;
    most = score > most || score != score ? score : most;  // a NaN stays
  }
  if (most == kNone) {  // nothing is seen
    std::memset(scores, 0, static_cast<size_t>(a.P) * 4);
    return 1.0f;
  }
  Floats sum = all(0.0f);
  int64_t p = 0;
  for (; p + kW <= a.P; p += kW) {
    const Floats score = OfFloat::read(scores + p) - most;
    Floats e = exponentials(score);
    for (int i = 0; i < kW; ++i) e[i] = score[i] < -87.0f ? 0.0f : e[i];
    OfFloat::write(scores + p, e);
    sum += e;
  }
  for (int i = 0; p < a.P; ++p, ++i) {
    const float score = scores[p] - most;
    scores[p] = score < -87.0f ? 0.0f : exponential(score);
    sum[i] += scores[p];
  }
  return total(sum);
}

void attend_groups(const Attention& a, int64_t begin, int64_t end) {
  constexpr int kParts = 4;  // registers of sums
  const int64_t together = a.H / a.G;
  float q[kMostHead];
  of_type(a.type, [&](auto type) {
    using V = decltype(type);
    for (int64_t bg = begin; bg < end; ++bg) {
      const int64_t b = bg / a.G, g = bg % a.G;
      const auto* keys = values<V>(a.keys) + b * a.key_strides[0] + g * a.key_strides[1];
      const auto* from = values<V>(a.values) + b * a.value_strides[0] + g * a.value_strides[1];
      for (int64_t h = g * together; h < (g + 1) * together; ++h) {
        const auto* x = values<V>(a.q) + b * a.q_strides[0] + h * a.q_strides[1];
        for (int64_t d = 0; d < a.D; d += kW) OfFloat::write(q + d, V::read(x + d));
        float* scores = a.scores + (b * a.H + h) * a.P;
        const float sum = weights_of<V>(a, b, q, keys, scores);
        auto* y = values<V>(a.y) + (b * a.H + h) * a.D;
        for (int64_t d = 0; d < a.D; d += kParts * kW) {
          const int parts = static_cast<int>(std::min<int64_t>(kParts, (a.D - d) / kW));
          Floats part[kParts] = {};
          for (int64_t p = 0; p < a.P; ++p) {
            const auto* value = from + p * a.value_strides[2] + d;
            const Floats weight = all(scores[p]);
            if (parts == kParts) {
              for (int i = 0; i < kParts; ++i) part[i] += weight * V::read(value + i * kW);
            } else {
              for (int i = 0; i < parts; ++i) part[i] += weight * V::read(value + i * kW);
            }
          }
          for (int i = 0; i < parts; ++i) V::write(y + d + i * kW, part[i] / sum);
        }
      }
    }
  });
}

}  // namespace
}  // namespace qkernels::cpu
