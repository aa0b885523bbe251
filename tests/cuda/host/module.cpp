// The host build as a Python module: run a launcher on the emulator, or record what it would launch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "call.h"
#include "runtime_host.h"

namespace py = pybind11;
using namespace qkernels::host;

namespace {

Call make_call(const std::map<std::string, uint64_t>& addresses, const std::map<std::string, int64_t>& integers) {
  Call call;
  for (const auto& [name, address] : addresses) call.buffers[name] = reinterpret_cast<void*>(address);
  call.integers = integers;
  return call;
}

int run(const std::string& launcher, const std::map<std::string, uint64_t>& addresses,
        const std::map<std::string, int64_t>& integers, int schedule, uint64_t seed) {
  settings = {static_cast<Schedule>(schedule), seed};
  return launcher_named(launcher)(make_call(addresses, integers));
}

// A list of (kernel, grid, block, shared bytes, bytes of each parameter).
py::list record(const std::string& launcher, const std::map<std::string, uint64_t>& addresses,
                const std::map<std::string, int64_t>& integers) {
  std::vector<Launch> launches;
  recording = &launches;
  struct Stop {
    ~Stop() { recording = nullptr; }
  } stop;
  const int error = launcher_named(launcher)(make_call(addresses, integers));
  if (error != 0) throw std::runtime_error("the launcher returned error " + std::to_string(error));
  py::list result;
  for (const Launch& l : launches) {
    py::list parameters;
    for (const std::string& p : l.parameters) parameters.append(py::bytes(p));
    result.append(py::make_tuple(l.kernel, py::make_tuple(l.grid.x, l.grid.y, l.grid.z),
                                 py::make_tuple(l.size.x, l.size.y, l.size.z), l.shared_bytes, parameters));
  }
  return result;
}

std::vector<std::string> names() {
  std::vector<std::string> result;
  for (const auto& entry : launchers()) result.push_back(entry.first);
  return result;
}

}  // namespace

PYBIND11_MODULE(QK_MODULE_NAME, m) {
  py::register_exception<KernelError>(m, "KernelError");
  m.def("run", &run);
  m.def("record", &record);
  m.def("launchers", &names);
}
