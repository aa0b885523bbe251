// What the environment asks for, and the log: plain values, so that the host build tests them.
#pragma once
#include <cstdio>
#include <cstring>
#include <mutex>
#include <set>
#include <string>

namespace qkernels::cuda {

// QKERNELS_LOG: on unless unset or 0.
inline bool is_on(const char* value) { return value != nullptr && std::strcmp(value, "0") != 0; }

// QKERNELS_ACCUMULATE: 1 for fp16, 0 for fp32 or unset, -1 for what is neither.
inline int accumulates_half(const char* value) {
  if (value == nullptr || std::strcmp(value, "fp32") == 0) return 0;
  return std::strcmp(value, "fp16") == 0 ? 1 : -1;
}

// Writes a line to stderr the first time that this process comes with it; from any thread.
inline void log_once(const std::string& line) {
  static std::mutex mutex;
  static std::set<std::string> seen;
  const std::lock_guard<std::mutex> lock(mutex);
  if (seen.insert(line).second) std::fprintf(stderr, "qkernels: %s\n", line.c_str());
}

}  // namespace qkernels::cuda
