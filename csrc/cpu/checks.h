// The last checks of the CPU ops (../checks.h has what they share with CUDA's).
#pragma once
#include <algorithm>

#include "../checks.h"
#include "kernels.h"

namespace qkernels::cpu {

inline const char* layout_of(bool int8_activations) { return int8_activations ? "cpu_tile_a8" : "cpu_tile_a16"; }

// Of arguments that are right.
inline Problem problem_of(const Arguments& a, bool int8_activations) {
  Problem p = make_problem(a.x.sizes[0], a.out_features, a.x.sizes[1], static_cast<int>(a.bits), a.group_size);
  p.x_type = a.x.type, p.scale_type = a.scales.type;
  p.zero_type = a.zeros == nullptr ? Type::kNone : a.zeros->type;
  p.zeros_are_offsets = a.zeros_are_offsets;
  p.bias_type = a.bias == nullptr ? Type::kNone : a.bias->type;
  p.int8_activations = int8_activations;
  p.rounding = static_cast<Rounding>(a.act);
  if (a.x_static != nullptr && a.x_static->data != nullptr) {
    const float* given = static_cast<const float*>(a.x_static->data);
    p.x_scale = given[0], p.x_zero = given[1];
  }
  p.codebook = static_cast<Codebook>(a.codebook);
  p.factors = static_cast<Factors>(a.factors);
  if (p.factors != Factors::kNone) {
    p.zero_type = Type::kNone;
    p.outer_type = a.outer_scales == nullptr ? Type::kNone : a.outer_scales->type;
    p.outer_shift = kind_of(p.factors).outer_shift;
    p.S = ((p.G - 1) >> p.outer_shift) + 1;
  }
  return p;
}

inline const void* data_of(const Buffer* b) { return b == nullptr ? nullptr : b->data; }

// A call with a weight's buffers, but for its bias, which may have to be copied.
inline Call call_with(const Arguments& a, bool int8) {
  Call call{problem_of(a, int8)};
  call.qweight = static_cast<const uint8_t*>(a.qweight.data);
  call.scales = a.scales.data, call.zeros = data_of(a.zeros);
  call.outer_scales = data_of(a.outer_scales), call.outer_zeros = data_of(a.outer_zeros);
  call.k_order = static_cast<const int32_t*>(data_of(a.k_order));
  return call;
}

inline std::string wrong_codebook(const Arguments& a, bool int8_activations) {
  if (const auto wrong = qkernels::wrong_codebook(a); !wrong.empty()) return wrong;
  const auto codebook = static_cast<Codebook>(a.codebook);
  if (int8_activations && codebook != Codebook::kIntegers && integer_step(codebook) == 0.0f) {
    return text("codebook ", a.codebook, " has values that are no integers: int8 activations do not multiply them");
  }
  return "";
}

// Small factors in the place of scales and offsets, and the outer ones, all of one type.
inline std::string wrong_factors(const Arguments& a, Shape groups, Shape outer, Factors factors) {
  const FactorKind kind = kind_of(factors);
  if (a.zeros_are_offsets != kind.offsets)
    return text("zeros_are_offsets must be ", kind.offsets, " with these factors");
  // The kernels read a group of planes as the block that it is.
  if (kind.outer_shift < 8 && a.group_size != 256 >> kind.outer_shift) {
    return text("group_size must be ", 256 >> kind.outer_shift, " with these factors, got ", a.group_size);
  }
  const char* small = kind.small == Type::kUInt8 ? "uint8" : kind.small == Type::kInt8 ? "int8" : "float8_e4m3fn";
  const Type type = a.outer_scales == nullptr ? Type::kNone : a.outer_scales->type;
  const auto is = [](const Buffer* b, Type wanted) { return b != nullptr && b->type == wanted; };
  for (const auto& wrong : {wrong_factor("scales", &a.scales, true, small, a.scales.type == kind.small, groups),
                            wrong_factor("outer_scales", a.outer_scales, true, "floating", is_floating(type), outer),
                            wrong_factor("zeros", a.zeros, kind.offsets, "uint8", is(a.zeros, Type::kUInt8), groups),
                            wrong_factor("outer_zeros", a.outer_zeros, kind.offsets, "like outer_scales",
                                         is(a.outer_zeros, type), outer)}) {
    if (!wrong.empty()) return wrong;
  }
  return "";
}

inline std::string wrong_product(const Arguments& a, bool int8_activations) {
  if (a.x.dims != 2 || !is_floating(a.x.type)) {
    return text("x must be float32, bfloat16 or float16 [M, K], got ", described(a.x));
  }
  if (a.bits < 2 || a.bits > 8 || a.group_size < 1 || a.out_features < 0) {
    return text("bits must be 2 to 8, group_size positive and out_features not negative, got bits=", a.bits,
                ", group_size=", a.group_size, ", out_features=", a.out_features);
  }
  if (const auto wrong = wrong_codebook(a, int8_activations); !wrong.empty()) return wrong;
  if (int8_activations) {
    if (const auto wrong = wrong_act(a, Rounding::kStaticZero); !wrong.empty()) return wrong;
    if (const auto wrong = wrong_static(a); !wrong.empty()) return wrong;
    if (a.x_static != nullptr && a.x_static->device >= 0) {
      return text("x_static must be on the CPU like qweight, got cuda:", a.x_static->device);
    }
  }
  if (a.factors < 0 || a.factors >= static_cast<int64_t>(Factors::kCount)) {
    return text("factors must be 0 to ", static_cast<int64_t>(Factors::kCount) - 1, ", got ", a.factors);
  }
  const Problem p = problem_of(a, int8_activations);
  const int64_t tiles = tiles_of(p);
  if (p.G != 1 && p.group % 8 != 0) return text("group_size must be a multiple of 8, got ", p.group);
  const Buffer& qweight = a.qweight;
  if (qweight.type != Type::kUInt8 || !has_shape(qweight, {tiles, p.tile_bytes}) || !qweight.contiguous) {
    return text("qweight must be contiguous uint8 ", in_words({tiles, p.tile_bytes}), " for N=", p.N, ", K=", p.K,
                ", bits=", p.bits, ", got ", described(qweight));
  }
  const Shape groups = {tiles, p.G, kTileRows};
  if (p.factors != Factors::kNone) {
    if (const auto wrong = wrong_factors(a, groups, {tiles, p.S, kTileRows}, p.factors); !wrong.empty()) return wrong;
  } else {
    if (const auto wrong = wrong_scales(a, groups, true, true); !wrong.empty()) return wrong;
    if (const auto wrong = wrong_zeros(a, groups, true); !wrong.empty()) return wrong;
    if (a.outer_scales != nullptr || a.outer_zeros != nullptr) return "outer_scales and outer_zeros go with factors";
  }
  // What fits an int32 sum: see layouts/cpu_tile_a8.py
  const int64_t longest =
      p.zero_type == Type::kUInt8 ? int64_t{1} << 16 : (int64_t{1} << 17) - (reaches_128(p.rounding) ? 1 : 0);
  if (int8_activations && std::min(p.K, p.group) > longest) {
    return text("groups must be at most ", longest, " long with int8 activations, got ", p.group, " of K=", p.K);
  }
  if (const auto wrong = wrong_order(a, p.K, true); !wrong.empty()) return wrong;
  return wrong_bias(a);
}

inline std::string wrong_decode(const Buffer& x, bool int8_activations) {
  return qkernels::wrong_decode(layout_of(int8_activations), x, kMaxDecodeTokens);
}

}  // namespace qkernels::cpu
