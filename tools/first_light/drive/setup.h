// What the command line asks for, and the problem, weights and memory that follow from it.
#pragma once
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <sstream>
#include <string>
#include <vector>

#include "heuristics.h"
#include "kernels.cuh"
#ifdef QKERNELS_HOST
#include "memory_host.h"
#endif

namespace qkernels::drive {

// The first error ends the process: its context is not to be trusted any more, and the next process has a new one.
inline void ok(int error, const char* file, int line) {
  if (error == 0) return;
  std::printf("{\"error\": \"%s\", \"at\": \"%s:%d\"}\n", error_text(error), file, line), std::fflush(stdout);
  std::exit(3);
}
#define OK(call) ::qkernels::drive::ok(static_cast<int>(call), __FILE__, __LINE__)

// --name value ...
class Options {
 public:
  Options(int argc, char** argv) {
    for (int i = 2; i + 1 < argc; i += 2) values_[std::string(argv[i]).substr(2)] = argv[i + 1];
  }
  std::string text(const char* name, const char* otherwise) const {
    const auto found = values_.find(name);
    return found == values_.end() ? otherwise : found->second;
  }
  int number(const char* name, int otherwise) const {
    return std::atoi(text(name, std::to_string(otherwise).c_str()).c_str());
  }
  std::vector<std::string> list(const char* name, const char* otherwise) const {
    std::vector<std::string> result;
    std::istringstream all(text(name, otherwise));
    for (std::string one; std::getline(all, one, ',');) result.push_back(one);
    return result;
  }

 private:
  std::map<std::string, std::string> values_;
};

constexpr const char* kPathNames[] = {"decode", "gemm", "dequantize", "gemm_sm90", "gemm_a8", "gemm_a8_sm90"};

// --- memory: each buffer by itself, so that memcheck sees where it ends ---

template <class T = uint8_t>
T* device_memory(int64_t count) {
  void* p = nullptr;
  OK(cudaMalloc(&p, count > 0 ? count * sizeof(T) : 16));
  return static_cast<T*>(p);
}

// By the spelling of qkernels/scheme.py, in the order of Rounding.
constexpr const char* kActs[] = {"16", "8", "8w", "8z", "8o6", "8s", "8sz"};
constexpr float kGivenScale = 1.0f / 128, kGivenZero = 5.0f;  // of static activations

struct Setup {
  int M, bits, group, act_bits;
  Rounding rounding;
  std::string zeros;
  Type type;
  Weight weight;  // without its buffers
  Problem problem;
  size_t code_bytes, scale_bytes, zero_bytes;
  const float* given;  // scale and zero point of static activations; null: others

  size_t bytes() const { return code_bytes + scale_bytes + zero_bytes; }
};

inline const float* given_of(Rounding rounding) {
  if (!is_static(rounding)) return nullptr;
  const float given[] = {kGivenScale, rounding == Rounding::kStaticZero ? kGivenZero : 0.0f};
  float* to = device_memory<float>(2);
  OK(cudaMemcpy(to, given, sizeof given, cudaMemcpyHostToDevice));
  return to;
}

// --N --K --bits --group (0: one in K) --zeros none|int|float|offset --type bf16|fp16 --act: kActs
inline Setup setup_of(const Options& o, int M) {
  const int N = o.number("N", 4096), K = o.number("K", 4096);
  const std::string act = o.text("act", "16");
  const auto* known = std::find(std::begin(kActs), std::end(kActs), act);
  if (known == std::end(kActs)) std::fprintf(stderr, "--act %s is none of drive's\n", act.c_str()), std::exit(64);
  Setup s{M,
          o.number("bits", 4),
          o.number("group", 128),
          act == "16" ? 16 : 8,
          static_cast<Rounding>(known - std::begin(kActs)),
          o.text("zeros", "none"),
          {},
          {},
          {},
          0,
          0,
          0,
          given_of(static_cast<Rounding>(known - std::begin(kActs)))};
  if (s.group <= 0 || s.group > K) s.group = K;
  s.type = o.text("type", "bf16") == "fp16" ? Type::kHalf : Type::kBFloat16;
  s.weight = make_weight(N, K, s.bits, s.group, s.act_bits != 8);
  s.weight.scale_type = s.type;
  s.weight.zero_type = s.zeros == "none" ? Type::kNone : s.zeros == "int" ? Type::kUInt8 : s.type;
  s.weight.zeros_are_offsets = s.zeros == "offset";
  const size_t groups = size_t(s.weight.strips) * s.weight.groups * kStripRows;
  s.code_bytes = size_t(s.weight.strips) * s.weight.steps * step_bytes(s.weight.width);
  s.scale_bytes = groups * 2, s.zero_bytes = groups * size_of(s.weight.zero_type);
  Device device{};
  Clusters clusters{};
  OK(current_device(&device)), OK(clusters_of(device, &clusters));
  const int rows = M + (has_zero_points(s.rounding) ? 1 : 0);
  s.problem = problem_of(s.weight, rows, s.bits, s.act_bits, s.type == Type::kHalf, K % 8 == 0, device, clusters);
  return s;
}

inline int blocks_for(int64_t count) {
  const int64_t blocks = (count + kThreads - 1) / kThreads;
  return static_cast<int>(blocks < 1 ? 1 : blocks < 1024 ? blocks : 1024);
}

inline void fill_with(uint8_t* to, int64_t count, uint32_t seed, Type type, uint32_t mask, float low, float high) {
  OK(launch(fill, dim3(blocks_for(count)), dim3(kThreads), 0, nullptr, Fill{to, count, seed, type, mask, low, high}));
}

inline Weight random_weight(const Setup& s, uint32_t seed) {
  Weight w = s.weight;
  uint8_t *codes = device_memory(s.code_bytes), *scales = device_memory(s.scale_bytes);
  const uint32_t code = (1u << s.bits) - 1;
  fill_with(codes, s.code_bytes, seed, Type::kUInt8,
            has_planes(w)  ? 0xffu
            : w.width == 4 ? code << 4 | code
                           : code,
            0, 0);
  fill_with(scales, s.scale_bytes / 2, seed + 1, w.scale_type, 0, 0.01f, 0.02f);
  w.codes = codes, w.scales = scales;
  if (s.zero_bytes != 0) {
    uint8_t* zeros = device_memory(s.zero_bytes);
    const bool plain = w.zero_type == Type::kUInt8;
    const float most = w.zeros_are_offsets ? 0.1f : 0.9f * (1 << s.bits);
    fill_with(zeros, plain ? s.zero_bytes : s.zero_bytes / 2, seed + 2, w.zero_type, (1 << s.bits) - 1,
              w.zeros_are_offsets ? -most : 0.0f, most);
    w.zeros = zeros;
  }
  return w;
}

inline uint16_t* random_x(const Setup& s) {
  auto* x = device_memory<uint16_t>(int64_t{s.M} * s.weight.K);
  fill_with(reinterpret_cast<uint8_t*>(x), int64_t{s.M} * s.weight.K, 7, s.type, 0, -1.0f, 1.0f);
  if (s.rounding == Rounding::kOutliers) {  // in three columns, each in another token
    const uint16_t eight = s.type == Type::kHalf ? 0x4800 : 0x4100;
    for (int i = 0; i < 3; ++i) {
      const int64_t row = i * (s.M - 1) / 2, column = i * (s.weight.K - 1) / 2;
      OK(cudaMemcpy(x + row * s.weight.K + column, &eight, 2, cudaMemcpyHostToDevice));
    }
  }
  return x;
}

inline Call call_of(const Setup& s, const Weight& w, const uint16_t* x, uint16_t* y) {
  return {w,
          {x, s.M, w.K, w.K, 1, nullptr},
          {y, nullptr, Type::kNone, s.M, w.N, w.strips * kStripRows, nullptr},
          s.type,
          s.rounding,
          s.given};
}

// --- configurations ---

// Those of --paths that the card can hold, the least predicted time first, --most of them.
inline std::vector<Config> configurations(const Setup& s, const Options& o) {
  std::vector<std::pair<double, Config>> fit;
  const auto paths = o.list("paths", "decode,gemm,gemm_sm90,gemm_a8,gemm_a8_sm90");
  auto consider = [&](Config c) {
    c.stages = o.number("stages", 0);
    bool wanted = c.path != Path::kDequantize && c.splits <= 16;
    wanted = wanted && std::find(paths.begin(), paths.end(), kPathNames[int(c.path)]) != paths.end();
    const bool tile = c.path == Path::kDecode || c.tokens < 4 * s.M || c.tokens <= 64;
    const double ns = wanted && tile ? predicted_ns(s.problem, c) : 1e30;
    if (ns < 1e29) fit.emplace_back(ns, c);
  };
  each_config(s.problem, false, consider);
  if (s.type == Type::kHalf && s.act_bits == 16) {
    each_config(s.problem, true, [&](const Config& c) {
      if (c.half_accumulate) consider(c);
    });
  }
  std::stable_sort(fit.begin(), fit.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
  std::vector<Config> result;
  for (const auto& one : fit) result.push_back(one.second);
  const size_t most = o.number("most", 1 << 20);
  if (result.size() > most) result.resize(most);
  return result;
}

// Written and flushed before the launch: a hang or a fault leaves its name behind, in a line that has no end.
inline void begin_line(const char* mode, const Setup& s, const Config& c) {
  std::printf(
      "{\"mode\": \"%s\", \"N\": %d, \"K\": %d, \"M\": %d, \"bits\": %d, \"group\": %d, \"zeros\": \"%s\", \"half\": "
      "%d, "
      "\"act\": %d, \"rounding\": \"%s\", \"sm\": %d, \"multiprocessors\": %d, \"path\": \"%s\", \"tokens\": %d, "
      "\"warps_n\": %d, "
      "\"warps_k\": %d, \"splits\": %d, \"half_accumulate\": %d, \"stages\": %d, \"predicted_us\": %.3f",
      mode, s.weight.N, s.weight.K, s.M, s.bits, s.group, s.zeros.c_str(), s.type == Type::kHalf, s.act_bits,
      kActs[int(s.rounding)], s.problem.sm, s.problem.multiprocessors, kPathNames[int(c.path)], c.tokens, c.warps_n,
      c.warps_k, c.splits, c.half_accumulate, c.stages, predicted_ns(s.problem, c) / 1e3);
  std::fflush(stdout);
}

}  // namespace qkernels::drive
