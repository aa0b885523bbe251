// The twin of the driver's cuTensorMapEncodeTiled, as csrc/cuda/tensor_map.h calls it: it refuses what the driver does.
#pragma once
#include "async_host.h"
#include "runtime_host.h"

namespace qkernels::host {

inline cudaError_t encode_tensor_map(TensorMap* map, const uint16_t* from, int64_t matrices, int rows, int columns,
                                     int64_t stride, int tile_rows, int tile_columns) {
  const bool valid = from != nullptr && reinterpret_cast<uintptr_t>(from) % 16 == 0 && matrices > 0 &&
                     matrices <= int64_t{1} << 32 && rows > 0 && columns > 0 && stride % 8 == 0 && stride >= columns &&
                     tile_rows > 0 && tile_rows <= 256 && (tile_columns == 32 || tile_columns == 64);
  if (!valid) return cudaErrorInvalidValue;
  *map = {from, matrices, rows, columns, stride, tile_rows, tile_columns};
  return cudaSuccess;
}

}  // namespace qkernels::host
