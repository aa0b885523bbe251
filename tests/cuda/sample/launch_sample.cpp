#include "call.h"
#include "sample.cuh"
#include "wrappers.cuh"

using namespace qkernels;

static const host::Registered sample("sample", [](const host::Call& c) -> int {
  const cuda::SampleProblem p{c.pointer<const uint16_t>("x"), c.pointer<const uint16_t>("w"), c.pointer<float>("y"),
                              static_cast<int>(c.integer("M")), static_cast<int>(c.integer("K"))};
  return cuda::launch_sample(p, nullptr);
});

static const host::Registered wrappers("wrappers", [](const host::Call& c) -> int {
  return cuda::launch_wrappers(c.pointer<const uint32_t>("in"), c.pointer<uint32_t>("out"),
                               static_cast<int>(c.integer("rounds")), nullptr);
});
