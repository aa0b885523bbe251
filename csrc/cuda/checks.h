// The last checks of the CUDA ops before a launch (../checks.h has what they share with the CPU's). M, N, K, bits and
// group are those of problem.h, before they are known to fit an int.
#pragma once
#include <limits>

#include "../checks.h"
#include "a8.h"
#include "blocks.h"

namespace qkernels::cuda {

inline std::string place_of(const Buffer& b) {
  return b.device < 0 ? "a tensor on no CUDA device" : text("cuda:", b.device);
}

inline std::string wrong_place(const char* name, const Buffer& b, int device) {
  if (b.device != device) {
    return text(name, " must be on cuda:", device, " like qweight, got ", place_of(b), "; move one of them");
  }
  const uintptr_t past = reinterpret_cast<uintptr_t>(b.data) % 16;
  if (b.contiguous && past == 0) return "";
  return text(name, " must be contiguous and start at a multiple of 16 bytes, got ", described(b),
              past == 0 ? "" : text(" that starts ", past, " bytes past one"));
}

// By the numbers of Factors: which codes and groups go with them, and of which type the small ones are.
struct FactorsTaken {
  Codebook codebook;
  int low_bits, high_bits, group;
  bool offsets;
  Type small;
  const char* name;
};
constexpr FactorsTaken kFactorsTaken[] = {
    {},
    {Codebook::kIntegers, 2, 2, 16, true, Type::kUInt8, "uint8"},
    {Codebook::kIntegers, 3, 3, 16, false, Type::kInt8, "int8"},
    {Codebook::kIntegers, 4, 5, 32, true, Type::kUInt8, "uint8"},
    {Codebook::kIntegers, 6, 6, 16, false, Type::kInt8, "int8"},
    {Codebook::kIq4Nl, 4, 4, 32, false, Type::kInt8, "int8"},
    {Codebook::kE2M1, 4, 4, 16, false, Type::kE4M3, "float8_e4m3fn"},
    {Codebook::kE2M1, 4, 4, 16, false, Type::kE4M3, "float8_e4m3fn"},
};
static_assert(sizeof kFactorsTaken / sizeof kFactorsTaken[0] == static_cast<size_t>(Factors::kCount), "one row each");

inline std::string wrong_factors(const Arguments& a, Shape groups, Shape outer) {
  constexpr auto kLast = static_cast<int64_t>(Factors::kCount) - 1;
  if (a.factors < 0 || a.factors > kLast) return text("factors must be 0 to ", kLast, ", got ", a.factors);
  const FactorsTaken& f = kFactorsTaken[a.factors];
  if (a.codebook != static_cast<int64_t>(f.codebook) || a.bits < f.low_bits || a.bits > f.high_bits ||
      a.group_size != f.group || a.zeros_are_offsets != f.offsets) {
    return text("factors ", a.factors, " take bits ", f.low_bits, " to ", f.high_bits, ", group_size ", f.group,
                ", codebook ", static_cast<int64_t>(f.codebook), " and ", f.offsets ? "offsets" : "no offsets",
                ", got bits=", a.bits, ", group_size=", a.group_size, ", codebook=", a.codebook,
                a.zeros_are_offsets ? " and offsets" : "");
  }
  const auto floating = [](const Buffer* b) { return b != nullptr && is_floating(b->type); };
  const bool zeros = a.zeros != nullptr && a.zeros->type == Type::kUInt8;
  for (const auto& wrong :
       {wrong_factor("scales", &a.scales, true, f.name, a.scales.type == f.small, groups),
        wrong_factor("zeros", a.zeros, f.offsets, "uint8", zeros, groups),
        wrong_factor("outer_scales", a.outer_scales, true, "floating", floating(a.outer_scales), outer),
        wrong_factor("outer_zeros", a.outer_zeros, f.offsets, "floating", floating(a.outer_zeros), outer)}) {
    if (!wrong.empty()) return wrong;
  }
  if (const auto wrong = wrong_place("outer_scales", *a.outer_scales, a.qweight.device); !wrong.empty()) return wrong;
  return f.offsets ? wrong_place("outer_zeros", *a.outer_zeros, a.qweight.device) : "";
}

// The buffers of one weight [N, K].
inline std::string wrong_weight(const Arguments& a, int64_t K) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max() - kStepColumns;
  const int64_t N = a.out_features;
  if (a.qweight.device < 0) return "qweight must be on a CUDA device; move it there";
  if (a.qweight.dims != 2)
    return text("qweight must be 2-D: stacked experts are not taken here, got ", described(a.qweight));
  if (a.bits < 2 || a.bits > 8 || a.group_size < 1 || N < 0 || N > kMost || K < 0 || K > kMost) {
    return text("bits must be 2 to 8, group_size positive, N and K 0 to ", kMost, ", got bits=", a.bits,
                ", group_size=", a.group_size, ", N=", N, ", K=", K);
  }
  if (const auto wrong = wrong_codebook(a); !wrong.empty()) return wrong;
  if (K > a.group_size && a.group_size != 16 && a.group_size != 32 && a.group_size % kStepColumns != 0) {
    return text("group_size must be 16, 32 or a multiple of 64, got ", a.group_size);
  }
  Weight w = make_weight(N, K, static_cast<int>(a.bits), a.group_size, a.act == 0);
  set_factors(w, static_cast<Factors>(a.factors));
  const int64_t strip_bytes = int64_t{w.steps} * step_bytes(w.width);
  if (a.qweight.type != Type::kUInt8 || !has_shape(a.qweight, {w.strips, strip_bytes})) {
    return text("qweight must be uint8 ", in_words({w.strips, strip_bytes}), " for N=", N, ", K=", K, ", bits=", a.bits,
                "; was it packed for another layout? Got ", described(a.qweight));
  }
  const int device = a.qweight.device;
  if (const auto wrong = wrong_place("qweight", a.qweight, device); !wrong.empty()) return wrong;
  const Shape groups = {w.strips, w.groups, kStripRows};
  if (a.factors != 0) {
    const Shape outer = {w.strips, w.outers != 0 ? w.outers : 1, kStripRows};
    if (const auto wrong = wrong_factors(a, groups, outer); !wrong.empty()) return wrong;
  } else {
    // Integers have kernels for scales of 16 and 32 bits alone.
    if (const auto wrong = wrong_scales(a, groups, false, a.codebook != 0); !wrong.empty()) return wrong;
    if (a.outer_scales != nullptr || a.outer_zeros != nullptr) return "outer_scales and outer_zeros go with factors";
  }
  if (const auto wrong = wrong_place("scales", a.scales, device); !wrong.empty()) return wrong;
  if (a.factors == 0) {
    if (const auto wrong = wrong_zeros(a, groups, false); !wrong.empty()) return wrong;
  }
  return a.zeros == nullptr ? "" : wrong_place("zeros", *a.zeros, device);
}

inline std::string wrong_order(const Arguments& a, int64_t K) {
  if (const auto wrong = qkernels::wrong_order(a, K, false); !wrong.empty() || a.k_order == nullptr) return wrong;
  return wrong_place("k_order", *a.k_order, a.qweight.device);
}

// A product: x, the weight, its order, the bias.
inline std::string wrong_product(const Arguments& a) {
  const Buffer& x = a.x;
  if (x.dims != 2 || (x.type != Type::kHalf && x.type != Type::kBFloat16)) {
    return text("x must be bfloat16 or float16 [M, K]: the CUDA kernels take no float32, got ", described(x));
  }
  constexpr int64_t kMostRows = std::numeric_limits<int32_t>::max() / 2;
  if (x.sizes[0] > kMostRows) return text("x has too many rows: ", x.sizes[0], ", at most ", kMostRows);
  if (a.qweight.device < 0) return "qweight must be on a CUDA device, like x; move it there";
  if (x.device != a.qweight.device) {
    return text("x must be on cuda:", a.qweight.device, " like qweight, got ", place_of(x), "; move one of them");
  }
  const int64_t K = x.sizes[1];
  if (const auto wrong = wrong_weight(a, K); !wrong.empty()) return wrong;
  if (const auto wrong = wrong_order(a, K); !wrong.empty()) return wrong;
  if (const auto wrong = wrong_bias(a); !wrong.empty() || a.bias == nullptr) return wrong;
  if (a.bias->device == a.qweight.device) return "";
  return text("bias must be on cuda:", a.qweight.device, " like qweight, got ", place_of(*a.bias));
}

inline std::string wrong_decode(const Buffer& x) { return qkernels::wrong_decode("mma_tile", x, kMaxDecodeTokens); }

// What gemm_mma_tile_a8 asks for beyond that, of a weight that is right.
inline std::string wrong_a8(const Arguments& a) {
  if (a.codebook != 0) return "gemm_mma_tile_a8 takes integer codes: codebook must be 0";
  if (a.zeros != nullptr) return "gemm_mma_tile_a8 takes symmetric weights: zeros must be None";
  const int64_t K = a.x.sizes[1];
  const Weight w = make_weight(a.out_features, K, static_cast<int>(a.bits), a.group_size);
  if (const auto wrong = wrong_act(a, Rounding::kStaticZero); !wrong.empty()) return wrong;
  if (const auto wrong = wrong_static(a); !wrong.empty()) return wrong;
  if (const Buffer* b = a.x_static; b != nullptr && b->device != a.qweight.device) {
    return text("x_static must be on cuda:", a.qweight.device, " like qweight, got ", place_of(*b));
  }
  const int64_t most = kMostGroupColumnsA8 - (reaches_128(static_cast<Rounding>(a.act)) ? 1 : 0);
  if (w.groups_per_step <= 2 && int64_t{w.steps_per_group} * kStepColumns <= most) return "";
  return text("gemm_mma_tile_a8 takes groups of 32 to ", most, " columns, got group_size=", a.group_size, ", K=", K);
}

inline std::string wrong_device(const Device& device) {
  if (device.sm >= 80) return "";
  return text("these kernels need compute capability 8.0 (A100, RTX 30) or later, this device has ", device.sm / 10,
              ".", device.sm % 10);
}

}  // namespace qkernels::cuda
