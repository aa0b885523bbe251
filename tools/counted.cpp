// One matrix product of the CPU kernels, so many times over, without torch and on one thread: for tools/guard.py.
//
//   counted ISA CALLS M N K GROUP BITS ACTIVATION_BITS      exit code 77 if this CPU lacks the instruction set
#include <cstdlib>
#include <vector>

#include "kernels.h"

namespace cpu = qkernels::cpu;

int main(int argc, char** argv) {
  if (argc != 9 || cpu::choose(argv[1]) != nullptr) return 77;
  cpu::Problem p{};
  p.int8_activations = std::atoi(argv[8]) == 8;
  const cpu::Kernels& chosen = *cpu::current().kernels;
  const cpu::Kernels& kernels = p.int8_activations ? cpu::int8_kernels(chosen) : chosen;
  p.M = std::atoi(argv[3]), p.N = std::atoi(argv[4]), p.K = std::atoi(argv[5]);
  p.group = std::atoi(argv[6]), p.bits = std::atoi(argv[7]);
  p.G = (p.K - 1) / p.group + 1;
  p.K_pad = (p.K + 7) / 8 * 8;
  p.tile_bytes = p.K_pad * cpu::kTileRows * (p.bits <= 4 ? 4 : 8) / 8;
  const int64_t tiles = cpu::tiles_of(p);
  // The count does not depend on the values: everything is 0.
  std::vector<uint8_t> qweight(tiles * p.tile_bytes);
  std::vector<uint16_t> x(p.M * p.K), y(p.M * p.N), scales(tiles * p.G * cpu::kTileRows);
  p.x = x.data(), p.y = y.data(), p.qweight = qweight.data(), p.scales = scales.data();
  p.x_type = p.scale_type = cpu::Type::kBFloat16;
  p.x_row_stride = p.K, p.x_column_stride = 1;
  std::vector<uint8_t> workspace(cpu::workspace_bytes(p, kernels) + 64);
  const auto serial = [](int64_t n, void* context, cpu::Body body) { body(context, 0, n); };
  for (int i = std::atoi(argv[2]); i > 0; --i) cpu::gemm(p, kernels, workspace.data(), 1, serial);
  return 0;
}
