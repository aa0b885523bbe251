// How an instance of decode is found and launched, for one type of activations, each a translation unit of its own: 41
// instances. 14 of 8 tokens, for each width 4 for the usual scales and zeros (GroupKind) in groups of 32 and of 64 or
// more, and 3 for all others and groups of 16; 7 of 16 tokens, where only symmetric 4 bit in groups of 64 and more has
// one of its own (the others do not fit 128 registers); 4 of 32. Codes that are no integers: 5 of 8 and 5 of 32 tokens.
// Codes in planes and under factors of 256 weights: 6 of 8 tokens.
#pragma once
#include "blocks.h"
#include "decode.cuh"
#include "launchers.h"

namespace qkernels::cuda {

struct DecodeLaunch {
  DecodeArguments p;
  int tokens;
  dim3 grid;
  size_t shared;
  cudaStream_t stream;

  template <class F, int kTokenTiles>
  cudaError_t run() const {
    return launch(decode<F, kTokenTiles>, grid, dim3(p.warps_n * p.warps_k * 32), shared, stream, p);
  }
};

inline bool is_16_bit(Type type) { return type == Type::kHalf || type == Type::kBFloat16; }

template <class T, int kWidth, int kGroups>
cudaError_t launch_8(const DecodeLaunch& launch) {
  const GroupFormat& f = launch.p.format;
  if (is_16_bit(f.scale_type) && f.zero_type == Type::kNone) {
    return launch.run<BiasedFormat<T, kWidth, kGroups, GroupKind::kSymmetric16>, 1>();
  }
  if (is_16_bit(f.scale_type) && f.zero_type == Type::kUInt8) {
    return launch.run<BiasedFormat<T, kWidth, kGroups, GroupKind::kInteger16>, 1>();
  }
  return launch.run<BiasedFormat<T, kWidth, kGroups, GroupKind::kAny>, 1>();
}

template <class T, int kWidth>
cudaError_t launch_width(const DecodeLaunch& launch) {
  const GroupFormat& f = launch.p.format;
  const int groups = f.groups_per_step;
  switch (launch.tokens) {
    case 8:
      return groups == 1   ? launch_8<T, kWidth, 1>(launch)
             : groups == 2 ? launch_8<T, kWidth, 2>(launch)
                           : launch.run<BiasedFormat<T, kWidth, 4, GroupKind::kAny>, 1>();
    case 16:
      if constexpr (kWidth == 4) {
        if (groups == 1 && is_16_bit(f.scale_type) && f.zero_type == Type::kNone) {
          return launch.run<BiasedFormat<T, 4, 1, GroupKind::kSymmetric16>, 2>();
        }
      }
      return groups == 1   ? launch.run<BiasedFormat<T, kWidth, 1, GroupKind::kAny>, 2>()
             : groups == 2 ? launch.run<BiasedFormat<T, kWidth, 2, GroupKind::kAny>, 2>()
                           : launch.run<Format<T, kWidth, true>, 2>();
    default:
      return groups > 1 ? launch.run<Format<T, kWidth, true>, 4>() : launch.run<Format<T, kWidth, false>, 4>();
  }
}

template <class T, int kTokenTiles>
cudaError_t launch_coded(const DecodeLaunch& launch, Coding coding) {
  const bool short_groups = launch.p.format.groups_per_step > 1;
  if (coding == Coding::kFloat8) {
    return short_groups ? launch.run<CodedFormat<T, Coding::kFloat8, true>, kTokenTiles>()
                        : launch.run<CodedFormat<T, Coding::kFloat8, false>, kTokenTiles>();
  }
  if (!short_groups) return launch.run<CodedFormat<T, Coding::kTable, false>, kTokenTiles>();
  return coding == Coding::kE2M1 ? launch.run<CodedFormat<T, Coding::kE2M1, true>, kTokenTiles>()
                                 : launch.run<CodedFormat<T, Coding::kTable, true>, kTokenTiles>();
}

// Groups of 32 of 2, 3, 5 and 6 bits are taken for pairs of groups of 16.
template <class T>
cudaError_t launch_planes(const DecodeLaunch& launch, const Weight& w) {
  if (w.codebook != Codebook::kIntegers) return launch.run<PlanesFormat<T, Planes::kIq4Nl, 2>, 1>();
  if (w.width == 4) return launch.run<PlanesFormat<T, Planes::k4, 2>, 1>();
  const bool short_groups = w.groups_per_step > 1 || w.outers != 0;
  if (w.width < 4) {
    return short_groups ? launch.run<PlanesFormat<T, Planes::k2And3, 4>, 1>()
                        : launch.run<PlanesFormat<T, Planes::k2And3, 1>, 1>();
  }
  return short_groups ? launch.run<PlanesFormat<T, Planes::k5And6, 4>, 1>()
                      : launch.run<PlanesFormat<T, Planes::k5And6, 1>, 1>();
}

template <class T>
cudaError_t launch_decode(const Call& call, const Config& config, cudaStream_t stream) {
  const int warps = config.warps_n * config.warps_k;
  if ((config.tokens != 8 && config.tokens != 16 && config.tokens != 32) || warps < 1 ||
      warps > most_decode_warps(config.tokens) || call.x.M > config.tokens || config.splits < 1 || config.stages == 1 ||
      config.stages > kMostDecodeStages) {
    return cudaErrorInvalidValue;
  }
  DecodeArguments p{};
  p.weight = call.weight, p.format = group_format(call.weight, call.type), p.x = call.x, p.out = call.out;
  p.aligned = is_aligned(call.x);
  p.rows = call.rows;
  p.warps_n = config.warps_n, p.warps_k = config.warps_k;
  p.steps_per_block = divide_up(call.weight.steps, config.splits);
  p.stage_bytes = stage_bytes(call.weight);
  p.stages = decode_stages(config, call.weight.width);
  p.warp_bytes = decode_warp_bytes(config.tokens, p.stage_bytes, p.stages);
  const size_t shared = decode_shared_bytes(config, call.x.M, p.stage_bytes, call.weight.width, call.weight.steps);
  const dim3 grid(divide_up(call.weight.strips, config.warps_n), config.splits,
                  call.rows.given() ? call.rows.blocks : 1);
  const DecodeLaunch launch{p, config.tokens, grid, shared, stream};
  const Coding coding = coding_of(call.weight);
  if (coding == Coding::kPlanes) {
    return config.tokens == kPlanesDecodeTokens ? launch_planes<T>(launch, call.weight) : cudaErrorInvalidValue;
  }
  if (is_coded(coding)) {
    return config.tokens == 8    ? launch_coded<T, 1>(launch, coding)
           : config.tokens == 32 ? launch_coded<T, 4>(launch, coding)
                                 : cudaErrorInvalidValue;
  }
  return call.weight.width == 4 ? launch_width<T, 4>(launch) : launch_width<T, 8>(launch);
}

}  // namespace qkernels::cuda
