// One matrix product of the CPU kernels, so many times over, without torch and on one thread: for tools/guard.py.
//
//   counted ISA CALLS M N K GROUP BITS ACTIVATION_BITS      exit code 77 if this CPU lacks the instruction set
#include <cstdlib>
#include <vector>

#include "kernels.h"

namespace cpu = qkernels::cpu;

int main(int argc, char** argv) {
  if (argc != 9 || cpu::choose(argv[1]) != nullptr) return 77;
  int given[6];  // M, N, K, group, bits, bits of activations
  for (int i = 0; i < 6; ++i) given[i] = std::atoi(argv[3 + i]);
  cpu::Call call{cpu::make_problem(given[0], given[1], given[2], given[4], given[3])};
  call.int8_activations = given[5] == 8;
  const cpu::Kernels& chosen = *cpu::current().kernels;
  const cpu::Kernels& kernels = call.int8_activations ? cpu::int8_kernels(chosen) : chosen;
  const int64_t tiles = cpu::tiles_of(call);
  // The count does not depend on the values: everything is 0.
  std::vector<uint8_t> qweight(tiles * call.tile_bytes);
  std::vector<uint16_t> x(call.M * call.K), y(call.M * call.N), scales(tiles * call.G * cpu::kTileRows);
  call.x = x.data(), call.y = y.data(), call.qweight = qweight.data(), call.scales = scales.data();
  call.x_type = call.scale_type = qkernels::Type::kBFloat16;
  call.x_row_stride = call.K, call.x_column_stride = 1;
  std::vector<uint8_t> workspace(cpu::workspace_bytes(call, kernels) + 64);
  const auto serial = [](int64_t n, void* context, cpu::Body body) { body(context, 0, n); };
  for (int i = std::atoi(argv[2]); i > 0; --i) cpu::gemm(call, kernels, workspace.data(), 1, serial);
  return 0;
}
