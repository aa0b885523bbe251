// A call of a launcher by name, as the tests make it: buffers and integers by name. Each launch_*.cpp registers its
// launchers; the Python module and the replay program call them.
#pragma once
#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>

namespace qkernels::host {

struct Call {
  std::map<std::string, void*> buffers;
  std::map<std::string, int64_t> integers;

  // nullptr for a buffer that was not given: optional ones are how a launcher learns that there is no bias.
  template <class T>
  T* pointer(const std::string& name) const {
    const auto found = buffers.find(name);
    return found == buffers.end() ? nullptr : static_cast<T*>(found->second);
  }
  int64_t integer(const std::string& name) const {
    const auto found = integers.find(name);
    if (found == integers.end()) throw std::invalid_argument("the call lacks the integer " + name);
    return found->second;
  }
  int64_t integer(const std::string& name, int64_t otherwise) const {
    const auto found = integers.find(name);
    return found == integers.end() ? otherwise : found->second;
  }
};

// Returns a cudaError_t.
using Launcher = int (*)(const Call&);

inline std::map<std::string, Launcher>& launchers() {
  static std::map<std::string, Launcher> all;
  return all;
}

struct Registered {
  Registered(const char* name, Launcher launcher) { launchers()[name] = launcher; }
};

inline Launcher launcher_named(const std::string& name) {
  const auto found = launchers().find(name);
  if (found == launchers().end()) throw std::invalid_argument("no launcher is called " + name);
  return found->second;
}

}  // namespace qkernels::host
