// The ops of between.h on torch's stable ABI: last checks, allocation, and the call. Their schemas are in
// qkernels/ops/between.py.
#include "between.h"
#include "tensors.h"

namespace qkernels::cpu {
namespace {

// Contiguous, of the shape of t.
Tensor empty_as(const Tensor& t) {
  const auto sizes = t.sizes();
  const int64_t dims = static_cast<int64_t>(sizes.size());
  int64_t shape[8], strides[8];
  STD_TORCH_CHECK(dims <= 8, "at most 8 dimensions are taken, got ", dims);
  for (int64_t i = dims - 1, stride = 1; i >= 0; --i) {
    shape[i] = sizes[i], strides[i] = stride;
    stride *= sizes[i] > 1 ? sizes[i] : 1;
  }
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dims, shape, strides, dtype_of(t), aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

Type floating_type(const Tensor& t, const char* name) {
  const Type type = type_of(static_cast<ScalarType>(dtype_of(t))).type;
  STD_TORCH_CHECK(is_floating(type), name, " must be float32, bfloat16 or float16, got another dtype");
  return type;
}

void check_type(const Tensor& t, const char* name, Type type) {
  STD_TORCH_CHECK(type_of(static_cast<ScalarType>(dtype_of(t))).type == type, name,
                  " must have the dtype of the first");
}

Tensor rms_norm(const Tensor& x_in, const Tensor& weight, double epsilon, bool one_added) {
  Norm n{};
  n.type = floating_type(x_in, "x");
  check_type(weight, "weight", n.type);
  const int64_t dims = static_cast<int64_t>(x_in.sizes().size());
  STD_TORCH_CHECK(weight.sizes().size() == 1 && weight.is_contiguous(), "weight must be contiguous [n]");
  n.n = weight.size(0);
  STD_TORCH_CHECK(dims >= 1 && x_in.size(dims - 1) == n.n && n.n > 0 && n.n % kLaneWidth == 0,
                  "x must be [..., n] of a weight [n], n a multiple of 16");
  const Tensor x = x_in.is_contiguous() ? x_in : torch::stable::contiguous(x_in);
  Tensor y = empty_as(x);
  n.x = x.const_data_ptr(), n.weight = weight.const_data_ptr(), n.y = y.mutable_data_ptr();
  n.rows = x.numel() / n.n, n.x_stride = n.n;
  n.epsilon = static_cast<float>(epsilon), n.one_added = one_added;
  norm(n, kernels_now(false), parallel_for);
  return y;
}

Tensor gated(const Tensor& gate_in, const Tensor& up_in, bool gelu) {
  Gate g{};
  g.type = floating_type(gate_in, "gate");
  check_type(up_in, "up", g.type);
  g.n = gate_in.numel();
  STD_TORCH_CHECK(gate_in.sizes().equals(up_in.sizes()) && g.n % kLaneWidth == 0,
                  "gate and up must have one shape and a multiple of 16 values");
  const Tensor from = gate_in.is_contiguous() ? gate_in : torch::stable::contiguous(gate_in);
  const Tensor up = up_in.is_contiguous() ? up_in : torch::stable::contiguous(up_in);
  Tensor y = empty_as(from);
  g.gate = from.const_data_ptr(), g.up = up.const_data_ptr(), g.y = y.mutable_data_ptr();
  g.gelu = gelu;
  gate(g, kernels_now(false), parallel_for);
  return y;
}

Tensor rotated(const Tensor& x, const Tensor& cos, const Tensor& sin) {
  Rotation r{};
  r.type = floating_type(x, "x");
  check_type(cos, "cos", r.type), check_type(sin, "sin", r.type);
  STD_TORCH_CHECK(x.sizes().size() == 4 && x.stride(3) == 1, "x must be [B, H, T, D] with dense heads");
  r.B = x.size(0), r.H = x.size(1), r.T = x.size(2), r.D = x.size(3);
  for (const Tensor* t : {&cos, &sin}) {
    STD_TORCH_CHECK(t->sizes().size() == 3 && t->is_contiguous() && (t->size(0) == 1 || t->size(0) == r.B) &&
                        t->size(1) == r.T && t->size(2) == r.D && t->size(0) == cos.size(0),
                    "cos and sin must be contiguous [B or 1, T, D] of x [B, H, T, D]");
  }
  STD_TORCH_CHECK(r.D > 0 && r.D % (2 * kLaneWidth) == 0, "D must be a multiple of 32, got ", r.D);
  for (int i = 0; i < 3; ++i) r.strides[i] = x.stride(i);
  r.angles_stride = cos.size(0) == 1 ? 0 : r.T * r.D;
  Tensor y = empty_as(x);
  r.x = x.const_data_ptr(), r.cos = cos.const_data_ptr(), r.sin = sin.const_data_ptr(), r.y = y.mutable_data_ptr();
  rotate(r, kernels_now(false), parallel_for);
  return y;
}

Tensor attended(const Tensor& q, const Tensor& keys, const Tensor& values, const OptionalTensor& mask, double scale) {
  Attention a{};
  a.type = floating_type(q, "q");
  check_type(keys, "keys", a.type), check_type(values, "values", a.type);
  STD_TORCH_CHECK(q.sizes().size() == 4 && keys.sizes().size() == 4 && keys.sizes().equals(values.sizes()) &&
                      q.size(2) == 1 && q.size(0) == keys.size(0) && q.size(3) == keys.size(3),
                  "q must be [B, H, 1, D], and keys and values [B, G, P, D]");
  a.B = q.size(0), a.H = q.size(1), a.D = q.size(3), a.G = keys.size(1), a.P = keys.size(2);
  STD_TORCH_CHECK(a.G > 0 && a.H % a.G == 0 && a.P > 0, "heads must share keys evenly, and there must be a key");
  STD_TORCH_CHECK(a.D > 0 && a.D % kLaneWidth == 0 && a.D <= kMostHead, "D must be a multiple of 16 up to ", kMostHead,
                  ", got ", a.D);
  STD_TORCH_CHECK(q.stride(3) == 1 && keys.stride(3) == 1 && values.stride(3) == 1, "heads must be dense");
  for (int i = 0; i < 2; ++i) a.q_strides[i] = q.stride(i);
  for (int i = 0; i < 3; ++i) a.key_strides[i] = keys.stride(i), a.value_strides[i] = values.stride(i);
  if (mask.has_value()) {
    const auto type = static_cast<ScalarType>(dtype_of(*mask));
    a.mask_type = type == ScalarType::Bool ? Type::kUInt8 : type_of(type).type;
    STD_TORCH_CHECK(a.mask_type == Type::kUInt8 || is_floating(a.mask_type), "mask must be of bool or floating");
    STD_TORCH_CHECK(mask->sizes().size() == 2 && (mask->size(0) == 1 || mask->size(0) == a.B) && mask->size(1) == a.P &&
                        mask->is_contiguous(),
                    "mask must be contiguous [B or 1, P]");
    a.mask = mask->const_data_ptr(), a.mask_stride = mask->size(0) == 1 ? 0 : a.P;
  }
  a.scale = static_cast<float>(scale);
  Tensor y = empty_as(q);
  a.score_stride = (a.P + kLaneWidth - 1) / kLaneWidth * kLaneWidth;
  Tensor scores = empty(aoti_torch_dtype_float32(), {a.B * a.G * (kHeadsTogether + 1), a.score_stride});
  a.q = q.const_data_ptr(), a.keys = keys.const_data_ptr(), a.values = values.const_data_ptr();
  a.y = y.mutable_data_ptr(), a.scores = static_cast<float*>(scores.mutable_data_ptr());
  attend(a, kernels_now(false), parallel_for);
  return y;
}

}  // namespace
}  // namespace qkernels::cpu

STABLE_TORCH_LIBRARY_IMPL(qkernels, CPU, m) {
  using namespace qkernels::cpu;
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("gated", TORCH_BOX(&gated));
  m.impl("rotated", TORCH_BOX(&rotated));
  m.impl("attended", TORCH_BOX(&attended));
}
