// What the ops ask of their arguments, on plain values: no torch and no CUDA in here, so that the host build of the
// tests (tests/cuda/test_checks.py) runs it too. cpu/checks.h and cuda/checks.h say what each side wants of it.
//
// Every `wrong_...` returns what is wrong, in words: what, what was expected, what came; or "". Values in buffers are
// not looked at: kernels clamp what they index with.
#pragma once
#include <cstdint>
#include <initializer_list>
#include <sstream>
#include <string>

#include "activations.h"
#include "codebooks.h"
#include "types.h"

namespace qkernels {

// A tensor.
struct Buffer {
  const void* data;
  Type type;          // kNone: none of Type's
  bool int32;         // torch.int32, which Type does not have
  const char* dtype;  // torch's name of it, for words alone
  int dims;
  int64_t sizes[3];  // the first three
  bool contiguous;
  int device;  // the index of its CUDA device; -1: it is on none
};

// What an op is called with, by the names of its schema (qkernels/ops/weight.py). Null: not given.
struct Arguments {
  Buffer x, qweight, scales;
  const Buffer *zeros, *k_order, *outer_scales, *outer_zeros, *bias;
  int64_t out_features, bits, group_size;
  bool zeros_are_offsets;
  int64_t codebook, factors;         // numbers of the lists in types.h
  int64_t act = 0;                   // of layouts for int8 activations: Rounding
  const Buffer* x_static = nullptr;  // of some of these: scale and zero point of x
};

template <class... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

using Shape = std::initializer_list<int64_t>;

inline bool has_shape(const Buffer& b, Shape shape) {
  if (b.dims != static_cast<int>(shape.size())) return false;
  const int64_t* size = b.sizes;
  for (const int64_t wanted : shape) {
    if (*size++ != wanted) return false;
  }
  return true;
}

// [2, 8192]
inline std::string in_words(Shape shape) {
  std::string words = "[";
  for (const int64_t size : shape) words += (words.size() > 1 ? ", " : "") + std::to_string(size);
  return words + "]";
}

// uint8 [2, 8192]
inline std::string described(const Buffer& b) {
  std::string words = text(b.dtype, " [");
  for (int i = 0; i < b.dims && i < 3; ++i) words += (i > 0 ? ", " : "") + std::to_string(b.sizes[i]);
  return words + (b.dims > 3 ? ", ...]" : "]") + (b.contiguous ? "" : " that is not contiguous");
}

// The buffers that all layouts share. `contiguous`: whether that is asked here, with the type and the shape, or by the
// caller in a question of its own.

inline const char* contiguous_if(bool contiguous) { return contiguous ? "contiguous " : ""; }

// `small`: whether scales of 8 bits will do, too.
inline std::string wrong_scales(const Arguments& a, Shape shape, bool contiguous, bool small) {
  const Type type = a.scales.type;
  const bool fits = is_floating(type) || (small && (type == Type::kE8M0 || type == Type::kE4M3));
  if (fits && has_shape(a.scales, shape) && (a.scales.contiguous || !contiguous)) return "";
  return text("scales must be ", contiguous_if(contiguous), "floating ", in_words(shape), ", got ",
              described(a.scales));
}

inline std::string wrong_zeros(const Arguments& a, Shape shape, bool contiguous) {
  if (a.zeros == nullptr) {
    return a.zeros_are_offsets ? "zeros must be given where zeros_are_offsets is true, got None" : "";
  }
  const Buffer& zeros = *a.zeros;
  const bool fits = is_floating(zeros.type) || (zeros.type == Type::kUInt8 && !a.zeros_are_offsets);
  if (fits && has_shape(zeros, shape) && (zeros.contiguous || !contiguous)) return "";
  return text("zeros must be ", contiguous_if(contiguous), a.zeros_are_offsets ? "floating " : "uint8 or floating ",
              in_words(shape), " like scales, got ", described(zeros));
}

// What the codebook asks of bits and zeros.
inline std::string wrong_codebook(const Arguments& a) {
  if (a.codebook < 0 || a.codebook >= static_cast<int64_t>(Codebook::kCount)) {
    return text("codebook must be 0 to ", static_cast<int64_t>(Codebook::kCount) - 1, ", got ", a.codebook);
  }
  const auto codebook = static_cast<Codebook>(a.codebook);
  if (codebook == Codebook::kIntegers || (codebook_bits(codebook) == a.bits && a.zeros == nullptr)) return "";
  return text("codebook ", a.codebook, " takes ", codebook_bits(codebook), " bits and no zeros, got bits=", a.bits,
              a.zeros == nullptr ? "" : " and zeros");
}

// One buffer of factors: whether it is `there`, and as it should be.
inline std::string wrong_factor(const char* name, const Buffer* b, bool there, const char* type, bool fits,
                                Shape shape) {
  if (b == nullptr) return there ? text(name, " must be given with these factors, got None") : "";
  if (there && fits && has_shape(*b, shape) && b->contiguous) return "";
  return there ? text(name, " must be contiguous ", type, " ", in_words(shape), " with these factors, got ",
                      described(*b))
               : text(name, " must be None with these factors, got ", described(*b));
}

inline std::string wrong_order(const Arguments& a, int64_t K, bool contiguous) {
  if (a.k_order == nullptr) return "";
  const Buffer& order = *a.k_order;
  if (order.int32 && has_shape(order, {K}) && (order.contiguous || !contiguous)) return "";
  return text("k_order must be ", contiguous_if(contiguous), "int32 [K] = [", K, "], got ", described(order));
}

// What layouts for int8 activations are asked beyond the others; `last`: the highest number that there are kernels for.
inline std::string wrong_act(const Arguments& a, Rounding last) {
  if (a.act >= static_cast<int64_t>(Rounding::kFull) && a.act <= static_cast<int64_t>(last)) return "";
  return text("act must be 1 to ", static_cast<int64_t>(last), ", got ", a.act);
}

// Whether scale and zero point of x are given where they are wanted.
inline std::string wrong_static(const Arguments& a) {
  const bool wanted = is_static(static_cast<Rounding>(a.act));
  const Buffer* b = a.x_static;
  if (b == nullptr ? !wanted : wanted && b->type == Type::kFloat && has_shape(*b, {2}) && b->contiguous) return "";
  return text("x_static must be ", wanted ? "contiguous float32 [2]" : "None", " for act=", a.act, ", got ",
              b == nullptr ? "None" : described(*b));
}

inline std::string wrong_bias(const Arguments& a) {
  if (a.bias == nullptr || (is_floating(a.bias->type) && has_shape(*a.bias, {a.out_features}))) return "";
  return text("bias must be floating [N] = [", a.out_features, "], got ", described(*a.bias));
}

// What gemv_<layout> asks for beyond what gemm_<layout> does.
inline std::string wrong_decode(const char* layout, const Buffer& x, int64_t most) {
  if (x.dims == 2 && x.sizes[0] <= most) return "";
  return text("gemv_", layout, " takes M <= ", most, " rows of x, got ",
              x.dims == 2 ? std::to_string(x.sizes[0]) : described(x), "; call gemm_", layout);
}

}  // namespace qkernels
