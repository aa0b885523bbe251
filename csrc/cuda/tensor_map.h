// How the host describes x to TMA. The encoder belongs to the driver and is fetched at run time: no link to libcuda.
#pragma once
#include "launch.cuh"
#include "problem.h"
#include "ptx_sm90.cuh"
#ifdef QKERNELS_HOST
#include "tensor_map_host.h"
#endif

namespace qkernels::cuda {

// TMA wants rows that do not overlap, at most 2^40 bytes apart; is_aligned() has what it wants besides.
inline bool tma_reads(const Activations& x) {
  return is_aligned(x) && x.row_stride >= x.K && x.row_stride < int64_t{1} << 39;
}

#ifdef QKERNELS_HOST
using host::encode_tensor_map;
#else
// Matrices [rows, columns] of 16-bit values, each of which begins one row behind the one before it, in tiles of
// `tile_rows` x 64 with 128-byte swizzle or of `tile_rows` x 32 with 64-byte swizzle.
inline cudaError_t encode_tensor_map(TensorMap* map, const uint16_t* from, int64_t matrices, int rows, int columns,
                                     int64_t stride, int tile_rows, int tile_columns) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
  if (error != cudaSuccess) return error;
  if (found != cudaDriverEntryPointSuccess) return cudaErrorNotSupported;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows),
                              static_cast<cuuint64_t>(matrices)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(stride) * 2, static_cast<cuuint64_t>(stride) * 2};
  const cuuint32_t box[] = {static_cast<cuuint32_t>(tile_columns), static_cast<cuuint32_t>(tile_rows), 1};
  const cuuint32_t every[] = {1, 1, 1};
  const CUresult result = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function)(
      map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 3, const_cast<uint16_t*>(from), sizes, strides, box, every,
      CU_TENSOR_MAP_INTERLEAVE_NONE, tile_columns == 64 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}
#endif

}  // namespace qkernels::cuda
