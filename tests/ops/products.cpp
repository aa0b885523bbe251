// Products by the CPU kernels without torch, for machines that run no torch here: calls from standard input, y of each
// to standard output.
//
//   products            the instruction set in use, or what is wrong with QKERNELS_ISA; then those that there are
//   products ISA        exit code 77 if this CPU lacks it
//
// A call is eight whole numbers (int64: int8 activations or not, then those of the op) and eight buffers in the order
// of `Arguments`, each as type (-1: int32, -2: none), dimensions, three sizes, and its bytes. Requests come from
// test_aarch64.py: nothing is checked but what the op checks.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "checks.h"
#include "kernels.h"

namespace cpu = qkernels::cpu;
using qkernels::Type;

namespace {

bool read(void* to, int64_t bytes) { return std::fread(to, 1, static_cast<size_t>(bytes), stdin) == size_t(bytes); }

// A tensor and its memory, of exactly its size
struct Given {
  qkernels::Buffer buffer{};
  std::vector<char> memory;
  bool there = false;

  Given() {
    int64_t header[5];  // type, dimensions, sizes
    if (!read(header, sizeof header)) std::abort();
    if (header[0] == -2) return;
    there = true;
    const bool int32 = header[0] == -1;
    const Type type = int32 ? Type::kNone : static_cast<Type>(header[0]);
    int64_t size = int32 ? 4 : qkernels::size_of(type);
    for (int i = 0; i < header[1]; ++i) size *= header[2 + i];
    memory.resize(static_cast<size_t>(size));
    if (!read(memory.data(), size)) std::abort();
    buffer = {memory.data(), type, int32, "", static_cast<int>(header[1]), {header[2], header[3], header[4]}, true, -1};
  }
  const qkernels::Buffer* pointer() const { return there ? &buffer : nullptr; }
};

void serial(int64_t n, void* context, cpu::Body body) { body(context, 0, n); }

void answer(const int64_t (&n)[8], const cpu::Kernels& chosen) {
  const Given x, qweight, scales, zeros, k_order, outer_scales, outer_zeros, bias;
  const qkernels::Arguments a{x.buffer,
                              qweight.buffer,
                              scales.buffer,
                              zeros.pointer(),
                              k_order.pointer(),
                              outer_scales.pointer(),
                              outer_zeros.pointer(),
                              bias.pointer(),
                              n[1],
                              n[2],
                              n[3],
                              n[4] != 0,
                              n[5],
                              n[6],
                              n[7]};
  const bool int8 = n[0] != 0;
  if (const auto wrong = cpu::wrong_product(a, int8); !wrong.empty()) {
    std::fprintf(stderr, "%s\n", wrong.c_str());
    std::exit(1);
  }
  const cpu::Kernels& kernels = int8 ? cpu::int8_kernels(chosen) : chosen;
  cpu::Call call = cpu::call_with(a, int8);
  call.x = a.x.data, call.x_row_stride = call.K, call.x_column_stride = 1;
  call.bias = cpu::data_of(a.bias);
  std::vector<char> y(static_cast<size_t>(call.M * call.N * qkernels::size_of(call.x_type)), '\x55');
  std::vector<char> workspace(static_cast<size_t>(cpu::workspace_bytes(call, kernels)) + 64, '\xff');
  call.y = y.data();
  cpu::gemm(call, kernels, workspace.data(), 1, serial);
  std::fwrite(y.data(), 1, y.size(), stdout);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) {
    const cpu::Choice choice = cpu::current();
    std::printf("%s\n%s\n", choice.kernels == nullptr ? choice.error : choice.kernels->name, cpu::available());
    return 0;
  }
  if (cpu::choose(argv[1]) != nullptr) return 77;
  for (int64_t numbers[8]; read(numbers, sizeof numbers);) answer(numbers, *cpu::current().kernels);
  return 0;
}
