// What lies between an expert's two products, in fp32: of sums, and bit for bit the same wherever it is done.
#pragma once
#include "problem.h"
#include "ptx.cuh"

namespace qkernels::cuda {

// x / (1 + e^-x), of fp32. e^-x is off by |x| 2^-24 of itself at most, and a few units in the last place.
QK_DEVICE float logistic_times(float x, float at) { return x / (1.0f + exp2_approximately(-1.4426950408889634f * at)); }
QK_DEVICE float gelu(float x) { return 0.5f * x * (1.0f + erf_of(x * 0.7071067811865476f)); }
// NaN stays NaN.
QK_DEVICE float at_most(float v, float most) { return v > most ? most : v; }

// Of gate and up, as ops/grouped.py: activate.
QK_DEVICE float gated(Activation kind, float alpha, float limit, float gate, float up) {
  switch (kind) {
    case Activation::kSilu:
      return logistic_times(gate, gate) * up;
    case Activation::kGelu:
      return gelu(gate) * up;
    case Activation::kGeluTanh:  // (1 + tanh(u)) / 2 is the logistic function of 2 u
      return logistic_times(gate, 1.5957691216057308f * (gate + 0.044715f * gate * gate * gate)) * up;
    default:  // kSwigluOai
      gate = at_most(gate, limit), up = -at_most(-at_most(up, limit), limit);
      return (up + 1.0f) * logistic_times(gate, alpha * gate);
  }
}

// Of up alone.
QK_DEVICE float ungated(Activation kind, float up) {
  if (kind == Activation::kSiluAlone) return logistic_times(up, up);
  if (kind == Activation::kGeluAlone) return gelu(up);
  const float positive = up < 0.0f ? 0.0f : up;  // kRelu2Alone
  return positive * positive;
}

}  // namespace qkernels::cuda
