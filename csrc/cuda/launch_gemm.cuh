// How an instance of gemm is found and launched, for one type of activations: 12 instances, and two with fp16
// accumulation for fp16; 4 for codes that are no integers, 6 for those in planes, all of 64 tokens. Each type is a
// translation unit of its own.
#pragma once
#include "blocks.h"
#include "gemm_sm80.cuh"
#include "launchers.h"

namespace qkernels::cuda {

template <class F, int kWarpsN, int kWarpsM, bool kHalfAccumulate = false>
cudaError_t launch_tile(const GemmArguments& p, const Config& c, cudaStream_t stream) {
  const dim3 grid(p.rows.given() ? p.rows.blocks : divide_up(p.out.M, kWarpsM * kWarpTokens),
                  divide_up(p.weight.strips, kWarpsN), c.splits);
  const int shared = gemm_shared_bytes(c, p.strip_bytes, F::kWidth);
  return launch(gemm<F, kWarpsN, kWarpsM, kHalfAccumulate>, grid, dim3(kWarpsN * kWarpsM * 32), shared, stream, p);
}

template <class F>
cudaError_t launch_tokens(const GemmArguments& p, const Config& c, cudaStream_t stream) {
  if (c.half_accumulate) {
    if constexpr (F::T::kType == Type::kHalf && F::kWidth == 4 && !F::kShortGroups) {
      if (c.tokens == 64) return launch_tile<F, 2, 2, true>(p, c, stream);
      if (c.tokens == 128) return launch_tile<F, 2, 4, true>(p, c, stream);
    }
  }
  switch (c.tokens) {
    case 32:
      return launch_tile<F, 4, 1>(p, c, stream);
    case 64:
      return launch_tile<F, 2, 2>(p, c, stream);
    case 128:
      return launch_tile<F, 2, 4>(p, c, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

template <class F>
cudaError_t launch_coded_gemm(const GemmArguments& p, const Config& c, cudaStream_t stream) {
  if (c.tokens != kCodedGemmTokens || c.half_accumulate) return cudaErrorInvalidValue;
  return launch_tile<F, 2, 2>(p, c, stream);
}

template <class T>
cudaError_t launch_planes_gemm(const GemmArguments& p, const Config& c, cudaStream_t stream) {
  if (p.weight.codebook != Codebook::kIntegers) {
    return launch_coded_gemm<PlanesFormat<T, Planes::kIq4Nl, 2>>(p, c, stream);
  }
  if (p.weight.width == 4) return launch_coded_gemm<PlanesFormat<T, Planes::k4, 2>>(p, c, stream);
  const bool short_groups = p.weight.groups_per_step > 1 || p.weight.outers != 0;
  if (p.weight.width < 4) {
    return short_groups ? launch_coded_gemm<PlanesFormat<T, Planes::k2And3, 4>>(p, c, stream)
                        : launch_coded_gemm<PlanesFormat<T, Planes::k2And3, 1>>(p, c, stream);
  }
  return short_groups ? launch_coded_gemm<PlanesFormat<T, Planes::k5And6, 4>>(p, c, stream)
                      : launch_coded_gemm<PlanesFormat<T, Planes::k5And6, 1>>(p, c, stream);
}

template <class T>
cudaError_t launch_gemm(const Call& call, const Config& c, cudaStream_t stream) {
  if (!is_aligned(call.x) || c.splits < 1) return cudaErrorInvalidValue;
  GemmArguments p{};
  p.weight = call.weight, p.format = group_format(call.weight, call.type), p.out = call.out;
  p.x = call.x.x, p.x_stride = call.x.row_stride, p.x_columns = call.x.K;
  p.strip_bytes = stage_bytes(call.weight), p.rows = call.rows;
  const bool short_groups = p.weight.groups_per_step > 1;
  if (has_planes(p.weight)) return launch_planes_gemm<T>(p, c, stream);
  if (p.weight.codebook != Codebook::kIntegers) {
    if (p.weight.width == 8) {
      return short_groups ? launch_coded_gemm<CodedFormat<T, Coding::kFloat8, true>>(p, c, stream)
                          : launch_coded_gemm<CodedFormat<T, Coding::kFloat8, false>>(p, c, stream);
    }
    return short_groups ? launch_coded_gemm<CodedFormat<T, Coding::kTable, true>>(p, c, stream)
                        : launch_coded_gemm<CodedFormat<T, Coding::kTable, false>>(p, c, stream);
  }
  if (p.weight.width == 4) {
    return short_groups ? launch_tokens<Format<T, 4, true>>(p, c, stream)
                        : launch_tokens<Format<T, 4, false>>(p, c, stream);
  }
  return short_groups ? launch_tokens<Format<T, 8, true>>(p, c, stream)
                      : launch_tokens<Format<T, 8, false>>(p, c, stream);
}

}  // namespace qkernels::cuda
