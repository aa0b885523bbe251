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

// NVFP4's e4m3 scales under a factor a row, the only ones that these kernels multiply by.
inline std::string wrong_factors(const Arguments& a, Shape groups, Shape outer) {
  const auto factors = static_cast<Factors>(a.factors);
  if ((factors != Factors::kNvfp4 && factors != Factors::kNvfp4M) ||
      static_cast<Codebook>(a.codebook) != Codebook::kE2M1) {
    return text("factors must be 0, or those of NVFP4 with its codebook: the CUDA kernels take no others, got ",
                a.factors, " with codebook ", a.codebook);
  }
  const bool floating = a.outer_scales != nullptr && is_floating(a.outer_scales->type);
  for (const auto& wrong :
       {wrong_factor("scales", &a.scales, true, "float8_e4m3fn", a.scales.type == Type::kE4M3, groups),
        wrong_factor("outer_scales", a.outer_scales, true, "floating", floating, outer),
        wrong_factor("outer_zeros", a.outer_zeros, false, "", false, outer)}) {
    if (!wrong.empty()) return wrong;
  }
  return wrong_place("outer_scales", *a.outer_scales, a.qweight.device);
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
  const Weight w = make_weight(N, K, static_cast<int>(a.bits), a.group_size);
  const int64_t strip_bytes = int64_t{w.steps} * step_bytes(w.width);
  if (a.qweight.type != Type::kUInt8 || !has_shape(a.qweight, {w.strips, strip_bytes})) {
    return text("qweight must be uint8 ", in_words({w.strips, strip_bytes}), " for N=", N, ", K=", K, ", bits=", a.bits,
                "; was it packed for another layout? Got ", described(a.qweight));
  }
  const int device = a.qweight.device;
  if (const auto wrong = wrong_place("qweight", a.qweight, device); !wrong.empty()) return wrong;
  const Shape groups = {w.strips, w.groups, kStripRows};
  if (a.factors != 0) {
    if (const auto wrong = wrong_factors(a, groups, {w.strips, 1, kStripRows}); !wrong.empty()) return wrong;
  } else {
    // Integers have kernels for scales of 16 and 32 bits alone.
    if (const auto wrong = wrong_scales(a, groups, false, a.codebook != 0); !wrong.empty()) return wrong;
    if (a.outer_scales != nullptr || a.outer_zeros != nullptr) return "outer_scales and outer_zeros go with factors";
  }
  if (const auto wrong = wrong_place("scales", a.scales, device); !wrong.empty()) return wrong;
  if (const auto wrong = wrong_zeros(a, groups, false); !wrong.empty() || a.zeros == nullptr) return wrong;
  return wrong_place("zeros", *a.zeros, device);
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
