// The ops' last checks before a launch, on plain values: no torch and no CUDA in here, so that the host build runs them
// too. Each returns what is wrong, in words, or "". Values in buffers are not looked at: kernels clamp what they index
// with.
#pragma once
#include <initializer_list>
#include <limits>
#include <sstream>
#include <string>

#include "a8.h"
#include "heuristics.h"

namespace qkernels::cuda {

// A tensor: null where an optional one is not given.
struct Buffer {
  const void* data;
  Type type;   // kNone: none of Type's
  bool int32;  // torch.int32, which Type does not have
  int dims;
  int64_t sizes[3];  // the first three
  bool contiguous;
  int device;  // the index of its CUDA device; -1: it is on none
};

// What an op is called with. M, N, K, bits and group are those of problem.h, before they are known to fit an int.
struct Arguments {
  Buffer x, qweight, scales;
  const Buffer *zeros, *k_order, *bias;
  int64_t out_features, bits, group_size;
  bool zeros_are_offsets;
};

template <class... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

inline bool has_shape(const Buffer& b, std::initializer_list<int64_t> shape) {
  if (b.dims != static_cast<int>(shape.size())) return false;
  const int64_t* size = b.sizes;
  for (const int64_t wanted : shape) {
    if (*size++ != wanted) return false;
  }
  return true;
}

inline std::string wrong_place(const char* name, const Buffer& b, int device) {
  if (b.device != device) return text(name, " must be on cuda:", device, " like qweight; move one of them");
  if (!b.contiguous || reinterpret_cast<uintptr_t>(b.data) % 16 != 0) {
    return text(name, " must be contiguous and start at a multiple of 16 bytes");
  }
  return "";
}

// The buffers of one weight [N, K].
inline std::string wrong_weight(const Arguments& a, int64_t K) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max() - kStepColumns;
  const int64_t N = a.out_features;
  if (a.qweight.device < 0) return "qweight must be on a CUDA device; move it there";
  if (a.qweight.dims != 2) return "qweight must be 2-D: stacked experts are not taken here";
  if (a.bits < 2 || a.bits > 8 || a.group_size < 1 || N < 0 || N > kMost || K < 0 || K > kMost) {
    return text("bits must be 2 to 8, group_size positive, N and K 0 to ", kMost, ", got bits=", a.bits,
                ", group_size=", a.group_size, ", N=", N, ", K=", K);
  }
  if (K > a.group_size && a.group_size != 16 && a.group_size != 32 && a.group_size % kStepColumns != 0) {
    return text("group_size must be 16, 32 or a multiple of 64, got ", a.group_size);
  }
  const Weight w = make_weight(N, K, static_cast<int>(a.bits), a.group_size);
  const int64_t strip_bytes = int64_t{w.steps} * step_bytes(w.width);
  if (a.qweight.type != Type::kUInt8 || !has_shape(a.qweight, {w.strips, strip_bytes})) {
    return text("qweight must be uint8 [", w.strips, ", ", strip_bytes, "] for N=", N, ", K=", K, ", bits=", a.bits,
                "; was it packed for another layout?");
  }
  const int device = a.qweight.device;
  if (const auto wrong = wrong_place("qweight", a.qweight, device); !wrong.empty()) return wrong;
  if (!is_floating(a.scales.type) || !has_shape(a.scales, {w.strips, w.groups, kStripRows})) {
    return text("scales must be floating [", w.strips, ", ", w.groups, ", 64]");
  }
  if (const auto wrong = wrong_place("scales", a.scales, device); !wrong.empty()) return wrong;
  if (a.zeros == nullptr) return a.zeros_are_offsets ? "zeros must be given where zeros_are_offsets is true" : "";
  const Buffer& zeros = *a.zeros;
  const bool fits = is_floating(zeros.type) || (zeros.type == Type::kUInt8 && !a.zeros_are_offsets);
  if (!fits || !has_shape(zeros, {w.strips, w.groups, kStripRows})) {
    return text("zeros must be ", a.zeros_are_offsets ? "floating" : "uint8 or floating", " [", w.strips, ", ",
                w.groups, ", 64] like scales");
  }
  return wrong_place("zeros", zeros, device);
}

inline std::string wrong_order(const Arguments& a, int64_t K) {
  if (a.k_order == nullptr) return "";
  if (!a.k_order->int32 || !has_shape(*a.k_order, {K})) return text("k_order must be int32 [K] = [", K, "]");
  return wrong_place("k_order", *a.k_order, a.qweight.device);
}

// A product: x, the weight, its order, the bias.
inline std::string wrong_product(const Arguments& a) {
  const Buffer& x = a.x;
  if (x.dims != 2 || (x.type != Type::kHalf && x.type != Type::kBFloat16)) {
    return "x must be bfloat16 or float16 [M, K]: the CUDA kernels take no float32";
  }
  if (x.sizes[0] > std::numeric_limits<int32_t>::max() / 2) return text("x has too many rows: ", x.sizes[0]);
  if (a.qweight.device < 0) return "qweight must be on a CUDA device, like x; move it there";
  if (x.device != a.qweight.device) {
    return text("x must be on cuda:", a.qweight.device, " like qweight; move one of them");
  }
  const int64_t K = x.sizes[1];
  if (const auto wrong = wrong_weight(a, K); !wrong.empty()) return wrong;
  if (const auto wrong = wrong_order(a, K); !wrong.empty()) return wrong;
  if (a.bias == nullptr) return "";
  if (!is_floating(a.bias->type) || !has_shape(*a.bias, {a.out_features})) {
    return text("bias must be floating [N] = [", a.out_features, "]");
  }
  if (a.bias->device != a.qweight.device) return text("bias must be on cuda:", a.qweight.device);
  return "";
}

// What gemv asks for beyond that.
inline std::string wrong_decode(const Buffer& x) {
  if (x.dims == 2 && x.sizes[0] <= kMaxDecodeTokens) return "";
  return text("gemv_mma_tile takes M <= ", kMaxDecodeTokens, " rows of x; call gemm_mma_tile");
}

// What gemm_mma_tile_a8 asks for beyond that, of a weight that is right.
inline std::string wrong_a8(const Arguments& a) {
  if (a.zeros != nullptr) return "gemm_mma_tile_a8 takes symmetric weights: zeros must be None";
  const int64_t K = a.x.sizes[1];
  const Weight w = make_weight(a.out_features, K, static_cast<int>(a.bits), a.group_size);
  if (w.groups_per_step <= 2 && int64_t{w.steps_per_group} * kStepColumns <= kMostGroupColumnsA8) return "";
  return text("gemm_mma_tile_a8 takes groups of 32 to ", kMostGroupColumnsA8, " columns, got group_size=", a.group_size,
              ", K=", K);
}

inline std::string wrong_device(const Device& device) {
  if (device.sm >= 80) return "";
  return text("these kernels need compute capability 8.0 (A100, RTX 30) or later, this device has ", device.sm / 10,
              ".", device.sm % 10);
}

}  // namespace qkernels::cuda
