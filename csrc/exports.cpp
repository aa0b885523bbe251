// What the library exports beside the ops that register themselves: for qkernels/extension.py, through ctypes.
#include "cpu/kernels.h"

#define QK_EXPORT extern "C" __attribute__((visibility("default")))

QK_EXPORT const char* qkernels_cpu_isa() {
  const qkernels::cpu::Kernels* kernels = qkernels::cpu::current().kernels;
  return kernels == nullptr ? nullptr : kernels->name;
}
QK_EXPORT const char* qkernels_cpu_isa_error() { return qkernels::cpu::current().error; }
QK_EXPORT const char* qkernels_cpu_isas() { return qkernels::cpu::available(); }
QK_EXPORT const char* qkernels_cpu_use_isa(const char* name) { return qkernels::cpu::choose(name); }
QK_EXPORT int qkernels_has_cuda() {
#if defined(QKERNELS_CUDA)
  return 1;
#else
  return 0;
#endif
}
// TORCH_CUDA_ARCH_LIST of the build, such as "8.0+PTX;9.0a"; null without CUDA.
QK_EXPORT const char* qkernels_cuda_architectures() {
#if defined(QKERNELS_CUDA_ARCHITECTURES)
  return QKERNELS_CUDA_ARCHITECTURES;
#else
  return nullptr;
#endif
}
