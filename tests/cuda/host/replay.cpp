// The host build as a program, for the sanitizers: replays one call from a file, on buffers that end exactly where they
// should, and writes the buffers back.
//
//   replay CALL RESULT       exit status 0; 1 for a kernel error; 2 for a launch error; the sanitizer's own otherwise
//
// CALL holds lines and then bytes:
//   launcher NAME SCHEDULE SEED
//   integer NAME VALUE
//   buffer NAME BYTES
//   data                     the buffers' bytes follow, in the order of their lines; RESULT holds them in the same way
#include <cstdio>
#include <fstream>
#include <iostream>
#include <sstream>
#include <utility>
#include <vector>

#include "call.h"
#include "runtime_host.h"

using namespace qkernels::host;

namespace {

struct Buffer {
  std::string name;
  size_t bytes;
  void* memory;
};

// 256 bytes, as cudaMalloc gives. Nothing lies between the last byte and the sanitizer's red zone.
void* allocate(size_t bytes) {
  void* p = nullptr;
  if (posix_memalign(&p, 256, bytes == 0 ? 1 : bytes) != 0) throw std::bad_alloc();
  return p;
}

int replay(std::istream& in, std::ostream& out) {
  Call call;
  std::string launcher, line;
  std::vector<Buffer> buffers;
  while (std::getline(in, line) && line != "data") {
    std::istringstream words(line);
    std::string kind, name;
    words >> kind >> name;
    if (kind == "launcher") {
      int schedule = 0;
      words >> schedule >> settings.seed;
      settings.schedule = static_cast<Schedule>(schedule);
      launcher = name;
    } else if (kind == "integer") {
      words >> call.integers[name];
    } else if (kind == "buffer") {
      size_t bytes = 0;
      words >> bytes;
      buffers.push_back({name, bytes, allocate(bytes)});
      call.buffers[name] = buffers.back().memory;
    } else {
      throw std::invalid_argument("not a line of a call: " + line);
    }
    if (!words) throw std::invalid_argument("incomplete line: " + line);
  }
  for (const Buffer& b : buffers) in.read(static_cast<char*>(b.memory), static_cast<std::streamsize>(b.bytes));
  if (!in) throw std::invalid_argument("the call ends too early");
  if (const int error = launcher_named(launcher)(call); error != 0) {
    std::cerr << "launch error " << error << "\n";
    return 2;
  }
  for (const Buffer& b : buffers) {
    out.write(static_cast<const char*>(b.memory), static_cast<std::streamsize>(b.bytes));
    std::free(b.memory);
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) {
    std::cerr << "usage: replay CALL RESULT\n";
    return 3;
  }
  std::ifstream in(argv[1], std::ios::binary);
  std::ofstream out(argv[2], std::ios::binary);
  try {
    return replay(in, out);
  } catch (const KernelError& e) {
    std::cerr << "kernel error: " << e.what() << "\n";
    return 1;
  } catch (const std::exception& e) {
    std::cerr << e.what() << "\n";
    return 3;
  }
}
