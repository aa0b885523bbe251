// A kernel of the lab's own: small, but with every instrument that the real ones play (a cp.async pipeline over a
// swizzled tile, ldmatrix, mma, a barrier a stage, a masked epilogue), to test the emulator and the PTX interpreter.
//
//   y[M, 8 warps] = x[M, K] w^T,  x and w fp16, w [8 warps, K], y fp32, K a multiple of 32
//
// Each QK_BUG_* macro plants one bug; every one of them must be found by the check that is there for its kind:
//   QK_BUG_NO_BARRIER        stages are read without waiting for the other warps' copies
//   QK_BUG_EARLY_PREFETCH    the next stage is requested before the barrier: it may overwrite what a slow warp reads
//   QK_BUG_SHORT_WAIT        wait_group off by one
//   QK_BUG_NO_ROW_MASK       rows past M are stored
//   QK_BUG_DIVERGENT         half of each warp reaches the barrier
//   QK_BUG_NO_SWIZZLE        right results with bank conflicts
//   QK_BUG_BLOCKS_OVERLAP    all blocks also write y's first row
#pragma once
#include "launch.cuh"
#include "ptx.cuh"

namespace qkernels::cuda {

constexpr int kSampleWarps = 4, kSampleRows = 16, kSampleColumns = 8 * kSampleWarps, kSampleDepth = 32;
constexpr int kSampleStages = 3;
constexpr int kSampleRowBytes = 2 * kSampleDepth;
constexpr int kSampleStageBytes = (kSampleRows + kSampleColumns) * kSampleRowBytes;
constexpr int kSampleSharedBytes = kSampleStages * kSampleStageBytes;

struct SampleProblem {
  const uint16_t* x;
  const uint16_t* w;
  float* y;
  int M, K;
};

// Four chunks of 16 bytes a row of 64 bytes: two rows share the 128 bytes of a wavefront, so pairs of rows are told
// apart by where their chunks lie.
QK_DEVICE uint32_t sample_offset(int row, int chunk) {
#ifdef QK_BUG_NO_SWIZZLE
  return row * kSampleRowBytes + chunk * 16;
#else
  return row * kSampleRowBytes + (chunk ^ (row >> 1 & 3)) * 16;
#endif
}

QK_DEVICE void sample_request(const SampleProblem& p, uint32_t shared, int stage) {
  const uint32_t to = shared + stage % kSampleStages * kSampleStageBytes;
  for (int i = threadIdx.x; i < (kSampleRows + kSampleColumns) * 4; i += 32 * kSampleWarps) {
    const int row = i / 4, chunk = i % 4, m = blockIdx.x * kSampleRows + row;
    const size_t k = size_t(stage) * kSampleDepth + chunk * 8;
    if (row < kSampleRows) {
      cp_async16_or_zero(to + sample_offset(row, chunk), p.x + (m < p.M ? m : 0) * size_t(p.K) + k, m < p.M);
    } else {
      cp_async16(to + sample_offset(row, chunk), p.w + (row - kSampleRows) * size_t(p.K) + k);
    }
  }
}

__global__ void __launch_bounds__(32 * kSampleWarps) sample_kernel(SampleProblem p) {
  QK_SHARED(memory);
  const uint32_t shared = shared_address(memory);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, stages = p.K / kSampleDepth;
  for (int s = 0; s < kSampleStages - 1; ++s) {
    if (s < stages) sample_request(p, shared, s);
    cp_async_commit();
  }
  float sum[4] = {};
  for (int s = 0; s < stages; ++s) {
#ifdef QK_BUG_SHORT_WAIT
    cp_async_wait<kSampleStages - 1>();
#else
    cp_async_wait<kSampleStages - 2>();
#endif
#ifdef QK_BUG_EARLY_PREFETCH
    if (s + kSampleStages - 1 < stages) sample_request(p, shared, s + kSampleStages - 1);
    cp_async_commit();
#endif
#ifdef QK_BUG_DIVERGENT
    if (lane < 16) __syncthreads();
#elif !defined(QK_BUG_NO_BARRIER)
    __syncthreads();
#endif
#ifndef QK_BUG_EARLY_PREFETCH
    if (s + kSampleStages - 1 < stages) sample_request(p, shared, s + kSampleStages - 1);
    cp_async_commit();
#endif
    const uint32_t x = shared + s % kSampleStages * kSampleStageBytes, w = x + kSampleRows * kSampleRowBytes;
#pragma unroll
    for (int step = 0; step < kSampleDepth / 16; ++step) {
      uint32_t a[4], b[2];
      load_matrix_x4(a, x + sample_offset(lane % 16, 2 * step + lane / 16));
      load_matrix_x2(b, w + sample_offset(8 * warp + lane % 8, 2 * step + lane / 8 % 2));
      mma_f16(sum, a, b);
    }
  }
  const int row = blockIdx.x * kSampleRows + lane / 4, column = 8 * warp + lane % 4 * 2;
#ifdef QK_BUG_BLOCKS_OVERLAP
  if (lane < 4) store_global4(p.y + column, float_to_bits(sum[0]));
#endif
  for (int half = 0; half < 2; ++half) {
#ifndef QK_BUG_NO_ROW_MASK
    if (row + 8 * half >= p.M) continue;
#endif
    store_global8(p.y + size_t(row + 8 * half) * kSampleColumns + column,
                  Words2{{float_to_bits(sum[2 * half]), float_to_bits(sum[2 * half + 1])}});
  }
}

inline cudaError_t launch_sample(const SampleProblem& p, cudaStream_t stream) {
  return launch(&sample_kernel, dim3((p.M + kSampleRows - 1) / kSampleRows), dim3(32 * kSampleWarps),
                kSampleSharedBytes, stream, p);
}

}  // namespace qkernels::cuda
