// What a block of experts computes between and after its two products: plain loops that the compiler vectorizes for the
// file that includes this, as rows.h. Products and sums are rounded one by one: the same bits on every instruction set.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels.h"
#include "rows.h"
#include "target.h"

QK_UNCONTRACTED_BEGIN

#include "exponential.h"

namespace qkernels::cpu {
namespace {

template <Activation kKind>
inline float activated(float alpha, float limit, float gate, float up) {
  switch (kKind) {
    case Activation::kSilu:
      return gate * sigmoid(gate) * up;
    case Activation::kGelu:
      return 0.5f * gate * (1.0f + std::erf(gate * 0.70710678f)) * up;
    case Activation::kGeluTanh:
      return 0.5f * gate * (1.0f + std::tanh(0.79788456f * (gate + 0.044715f * gate * gate * gate))) * up;
    case Activation::kSwigluOai: {
      const float g = gate > limit ? limit : gate;
      const float u = up > limit ? limit : up < -limit ? -limit : up;
      return (u + 1.0f) * (g * sigmoid(g * alpha));
    }
    case Activation::kRelu2Alone:
      return up > 0.0f || up != up ? up * up : 0.0f;
    case Activation::kSiluAlone:
      return up * sigmoid(up);
    default:
      return 0.5f * up * (1.0f + std::erf(up * 0.70710678f));
  }
}

inline void store_values(Type type, void* to, int64_t at, const float* values, int64_t n) {
  if (type == Type::kFloat) {
    std::memcpy(static_cast<float*>(to) + at, values, static_cast<size_t>(n) * 4);
    return;
  }
  uint16_t* half = static_cast<uint16_t*>(to) + at;
  if (type == Type::kBFloat16) {
    for (int64_t i = 0; i < n; ++i) half[i] = to_bf16(values[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) half[i] = to_half(values[i]);
  }
}

constexpr int64_t kPiece = 256;  // values at a time, in memory of the stack

template <Activation kKind>
void activate_by(const Between& b, int64_t m0, int64_t m1) {
  float values[kPiece];
  const float alpha = b.alpha, limit = b.limit;
  for (int64_t m = m0; m < m1; ++m) {
    const float* gate = b.up + m * b.width * (is_gated(kKind) ? 2 : 1);
    const float* up = is_gated(kKind) ? gate + b.width : gate;
    for (int64_t i = 0; i < b.width; i += kPiece) {
      const int64_t n = b.width - i < kPiece ? b.width - i : kPiece;
      for (int64_t c = 0; c < n; ++c) values[c] = activated<kKind>(alpha, limit, gate[i + c], up[i + c]);
      store_values(b.type, b.inner, m * b.width + i, values, n);
    }
  }
}

void activate(const Between& b, int64_t m0, int64_t m1) {
  switch (b.activation) {
    case Activation::kSilu:
      return activate_by<Activation::kSilu>(b, m0, m1);
    case Activation::kGelu:
      return activate_by<Activation::kGelu>(b, m0, m1);
    case Activation::kGeluTanh:
      return activate_by<Activation::kGeluTanh>(b, m0, m1);
    case Activation::kSwigluOai:
      return activate_by<Activation::kSwigluOai>(b, m0, m1);
    case Activation::kRelu2Alone:
      return activate_by<Activation::kRelu2Alone>(b, m0, m1);
    case Activation::kSiluAlone:
      return activate_by<Activation::kSiluAlone>(b, m0, m1);
    default:
      return activate_by<Activation::kGeluAlone>(b, m0, m1);
  }
}

void weigh(const Weighing& w, int64_t t0, int64_t t1) {
  float sums[kPiece];
  for (int64_t t = t0; t < t1; ++t) {
    for (int64_t h = 0; h < w.hidden; h += kPiece) {
      const int64_t n = w.hidden - h < kPiece ? w.hidden - h : kPiece;
      std::memset(sums, 0, sizeof(sums));
      for (int64_t j = 0; j < w.k; ++j) {
        const int64_t place = w.place[t * w.k + j];
        if (place < 0) continue;
        const float weight = w.weights[t * w.k + j];
        const float* row = w.down + place * w.hidden + h;
        for (int64_t c = 0; c < n; ++c) sums[c] += weight * row[c];
      }
      store_values(w.type, w.y, t * w.hidden + h, sums, n);
    }
  }
}

}  // namespace
}  // namespace qkernels::cpu

QK_UNCONTRACTED_END
