// Which instruction set the CPU kernels use. Decided once, by what the CPU and the operating system support.
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <string>

#include "kernels.h"
#if defined(QK_NEON)
#include <sys/auxv.h>
#endif

namespace qkernels::cpu {
namespace {

#if defined(QK_NEON)
// What Linux says of the CPU, by the bits of its <asm/hwcap.h> (the header of an older system has not all of them).
struct Features {
  bool dotprod, i8mm, bf16;

  Features() {
    const unsigned long first = getauxval(AT_HWCAP), second = getauxval(AT_HWCAP2);
    // CRC32, ATOMICS, ASIMDRDM: what compilers may use of Armv8.2 unasked
    constexpr unsigned long kArmv82 = 1ul << 7 | 1ul << 8 | 1ul << 12;
    const bool armv82 = (first & kArmv82) == kArmv82;
    dotprod = armv82 && (first >> 20 & 1) != 0;
    i8mm = dotprod && (second >> 13 & 1) != 0;
    bf16 = armv82 && (second >> 14 & 1) != 0;
  }
};
const Features& features() {
  static const Features value;
  return value;
}
#endif

struct Isa {
  const Kernels* kernels;
  bool supported;
};

// The instruction sets of this build, plainest first.
struct Isas {
  Isa all[5];
  int size = 0;
  std::string names;  // of those that are supported

  void add(const Kernels& kernels, bool supported) {
    all[size++] = {&kernels, supported};
    if (supported) names.append(names.empty() ? "" : " ").append(kernels.name);
  }

  Isas() {
    add(kScalar, true);
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    add(kAvx2, avx2);
    add(kAvx512, avx512);
    add(kAvx512Bf16, avx512 && __builtin_cpu_supports("avx512bf16"));
#elif defined(QK_NEON)
    add(kNeon, true);
    add(kNeonDotprod, features().dotprod);
    add(kNeonI8mm, features().i8mm);
    add(kNeonBf16, features().bf16);
#endif
  }
};

const Isas& isas() {
  static const Isas value;
  return value;
}

std::string wrong_name(const char* source, const char* name) {
  return std::string(source) + " must be one of \"" + isas().names + "\" on this CPU, got \"" + name + "\"";
}

const Kernels* find(const char* name) {
  for (int i = 0; i < isas().size; ++i) {
    if (isas().all[i].supported && std::strcmp(isas().all[i].kernels->name, name) == 0) return isas().all[i].kernels;
  }
  return nullptr;
}

struct FirstChoice {
  const Kernels* kernels = nullptr;
  std::string error;

  FirstChoice() {
    const char* wanted = std::getenv("QKERNELS_ISA");
    if (wanted != nullptr && *wanted != '\0') {
      kernels = find(wanted);
      if (kernels == nullptr) error = wrong_name("QKERNELS_ISA", wanted) + "; unset it for the best one";
      return;
    }
    for (int i = 0; i < isas().size; ++i) {
      if (isas().all[i].supported) kernels = isas().all[i].kernels;
    }
  }
};

std::atomic<const Kernels*> chosen{nullptr};

}  // namespace

Choice current() {
  if (const Kernels* kernels = chosen.load(std::memory_order_acquire)) return {kernels, nullptr};
  static const FirstChoice first;
  return {first.kernels, first.kernels == nullptr ? first.error.c_str() : nullptr};
}

const Kernels& int8_kernels(const Kernels& kernels) {
#if defined(__x86_64__)
  static const bool vnni = __builtin_cpu_supports("avx512vnni");
  if (&kernels != &kScalar) return vnni && &kernels != &kAvx2 ? kAvx512Vnni : kAvx2Int8;
#elif defined(QK_NEON)
  if (&kernels == &kNeonI8mm || (&kernels == &kNeonBf16 && features().i8mm)) return kNeonI8mmInt8;
  if (&kernels == &kNeonDotprod || (&kernels == &kNeonBf16 && features().dotprod)) return kNeonDotprodInt8;
  if (&kernels != &kScalar) return kNeonInt8;
#endif
  return kScalarInt8;
}

const char* available() { return isas().names.c_str(); }

const char* choose(const char* isa) {
  static thread_local std::string error;
  const Kernels* kernels = find(isa);
  if (kernels == nullptr) return (error = wrong_name("the instruction set", isa)).c_str();
  chosen.store(kernels, std::memory_order_release);
  return nullptr;
}

}  // namespace qkernels::cpu
