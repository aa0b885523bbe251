// The twins of wgmma and TMA by themselves: one warpgroup, 64 x 64 bytes of a in registers, kTokens rows of b. What the
// registers and bytes mean is up to the test, which has it from the PTX manual.
#include "call.h"
#include "tensor_map.h"

namespace {

using namespace qkernels::cuda;
using Named = qkernels::host::Call;

struct Arguments {
  TensorMap map;       // of b
  int row, matrix;     // of its tile
  const uint32_t* a;   // [128 threads][2 instructions][4]
  uint8_t* tile;       // what TMA left in shared memory
  int32_t *early, *d;  // [128 threads][kTokens / 2]: before the wait, and after it
};

// Two instructions, the second accumulates; b comes in 64 bytes a row.
template <int kTokens>
void multiply_tile(const Arguments p) {
  constexpr uint32_t kBarrier = kTokens * 64;
  const int thread = threadIdx.x;
  if (thread == 0) {
    mbarrier_init(kBarrier, 1);
    fence_async_proxy();
    mbarrier_arrive_expect(kBarrier, kTokens * 64);
    copy_tile(0, &p.map, 0, p.row, p.matrix, kBarrier);
  }
  __syncthreads();
  mbarrier_wait(kBarrier, 0);
  for (int i = thread; i < kTokens * 16; i += 128) {
    const uint32_t word = load_shared4(i * 4);
    std::memcpy(p.tile + i * 4, &word, 4);
  }
  int32_t d[kTokens / 2] = {};
  uint32_t a[2][4];
  std::memcpy(a, p.a + thread * 8, sizeof a);
  wgmma_fence();
  for (int i = 0; i < 2; ++i) wgmma_s8(d, a[i], wgmma_descriptor<64>(0) + 2 * i, i > 0);
  wgmma_commit();
  std::memcpy(p.early + thread * (kTokens / 2), d, sizeof d);
  wgmma_wait<0>();
  std::memcpy(p.d + thread * (kTokens / 2), d, sizeof d);
}

int run(const Named& call) {
  Arguments p{{},
              static_cast<int>(call.integer("row", 0)),
              static_cast<int>(call.integer("matrix", 0)),
              call.pointer<uint32_t>("a"),
              call.pointer<uint8_t>("tile"),
              call.pointer<int32_t>("early"),
              call.pointer<int32_t>("d")};
  const int tokens = static_cast<int>(call.integer("tokens")), rows = static_cast<int>(call.integer("rows"));
  const cudaError_t error =
      encode_tensor_map(&p.map, call.pointer<uint16_t>("b"), call.integer("matrices", 1), rows, 32, 32, tokens, 32);
  if (error != cudaSuccess) return error;
  const auto kernel = tokens == 64 ? multiply_tile<64> : tokens == 128 ? multiply_tile<128> : multiply_tile<256>;
  return launch(kernel, dim3(1), dim3(128), tokens * 64 + 16, nullptr, p);
}

const qkernels::host::Registered kWgmma("wgmma_s8", run);

}  // namespace
