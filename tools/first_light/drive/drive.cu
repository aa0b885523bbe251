// drive: the kernels of csrc/cuda without torch and without Python, for the first minutes on a GPU.
//
//   drive clusters      how many clusters of 2, 3, 4 and 8 blocks this card holds
//   drive list   ...    the configurations and their predicted times; nothing runs
//   drive check  ...    each configuration against fp64: "worst" is the largest error over its bound
//   drive repeat ...    each, --repeats times on poisoned memory: "different" counts the results with other bits
//   drive time   ...    each, in graphs that go round weights worth four L2 caches: "us" is [least, median, most]
//   drive calibrate     what the model's numbers are here (calibrate.cuh)
//
// Problem: --N --K --M 1,8,16 --bits --group (0: one in K) --zeros none|int|float|offset --type bf16|fp16
// --act 16|8|8w|8z|8o6|8s|8sz (as schemes spell it).
// Configurations: --paths decode,gemm,gemm_sm90,gemm_a8,gemm_a8_sm90 --most (of the least predicted time) --stages (of
// decode's ring, 2 to 6, and of those for sm_90a). Timing: --rounds --least-us (of a graph).
//
// One JSON line a configuration, begun and flushed before its launch. Exit status: 0; 1 where a result is wrong; 3
// after an error of CUDA, with which the process ends, since its context is not to be trusted any more.
#include <cmath>
#include <cstring>

#include "calibrate.cuh"
#include "setup.h"

namespace qkernels::drive {
namespace {

constexpr int kMostRows = 64;  // of y that are checked

// What y should be, on the host: fp64, and the sum of the squares of the terms.
struct Truth {
  int rows;
  std::vector<double> exact, squares;
};

Truth truth_of(const Setup& s, const Weight& w, const uint16_t* x) {
  const int N = w.N, K = w.K, rows = std::min(s.M, kMostRows);
  const int64_t count = int64_t{rows} * N;
  float *plain = device_memory<float>(int64_t{N} * K), *seen = device_memory<float>(int64_t{s.M} * K);
  double *exact = device_memory<double>(count), *squares = device_memory<double>(count);
  OK(dequantize(w, 0, w.strips, K, nullptr, Type::kFloat, plain, nullptr));
  OK(launch(see, dim3(divide_up(s.M, kThreads)), dim3(kThreads), 0, nullptr,
            Seen{x, seen, s.M, K, s.type == Type::kHalf, s.rounding, kGivenScale, kGivenZero}));
  OK(launch(reference, dim3(divide_up(count, kThreads)), dim3(kThreads), 0, nullptr,
            Reference{seen, plain, exact, squares, s.M, N, K, rows}));
  OK(cudaDeviceSynchronize());
  Truth t{rows, std::vector<double>(count), std::vector<double>(count)};
  OK(cudaMemcpy(t.exact.data(), exact, count * 8, cudaMemcpyDeviceToHost));
  OK(cudaMemcpy(t.squares.data(), squares, count * 8, cudaMemcpyDeviceToHost));
  for (void* p :
       {static_cast<void*>(plain), static_cast<void*>(seen), static_cast<void*>(exact), static_cast<void*>(squares)}) {
    OK(cudaFree(p));
  }
  return t;
}

float float_of(uint16_t bits, Type type) {
  uint32_t wide = uint32_t{bits} << 16;
  if (type == Type::kHalf) {
    const uint32_t exponent = bits >> 10 & 31, fraction = bits & 1023;
    if (exponent == 0) return (bits >> 15 ? -1.0f : 1.0f) * std::ldexp(static_cast<float>(fraction), -24);
    wide = uint32_t{bits & 0x8000u} << 16 | (exponent == 31 ? 255u : exponent + 112) << 23 | fraction << 13;
  }
  float v;
  std::memcpy(&v, &wide, 4);
  return v;
}

// In units of the bound of benchmarks/kernels/checking.py: y is rounded once, weights perhaps; 8 standard deviations of
// the sum of roundings. What is no number is 1e9. fp16 accumulation rounds 64 products at a time: 16 times the bound.
double worst_of(const Setup& s, const Config& c, const Truth& t, const std::vector<uint16_t>& y) {
  const double unit = s.type == Type::kHalf ? 1.0 / 2048 : 1.0 / 256, loose = c.half_accumulate ? 16 : 1;
  double worst = 0;
  for (size_t i = 0; i < t.exact.size(); ++i) {
    const size_t row = checked_row(static_cast<int>(i / s.weight.N), t.rows, s.M);
    const double off = std::fabs(float_of(y[row * s.weight.N + i % s.weight.N], s.type) - t.exact[i]);
    const double bound = loose * unit * (std::fabs(t.exact[i]) + 4 * std::sqrt(t.squares[i])) + 1e-30;
    worst = off == off ? std::max(worst, off / bound) : 1e9;
    if (worst == 1e9) break;
  }
  return worst;
}

// Launches a configuration on y and a workspace full of NaN, and waits. The error's text; empty if there is none.
struct Run {
  uint16_t* y;
  int64_t count;  // of y

  std::string operator()(const Call& call, const Config& c, std::vector<uint16_t>* to) const {
    const int64_t bytes = workspace_bytes(call, c);
    uint8_t* space = device_memory(bytes);
    OK(cudaMemset(space, 0xff, bytes)), OK(cudaMemset(y, 0xff, count * 2));
    const int launched = multiply(call, c, space, nullptr);
    const int ran = launched != 0 ? launched : static_cast<int>(cudaDeviceSynchronize());
    if (ran != 0) return error_text(ran);
    OK(cudaMemcpy(to->data(), y, count * 2, cudaMemcpyDeviceToHost));
    OK(cudaFree(space));
    return "";
  }
};

void end_line(const std::string& error) {
  std::printf(", \"error\": \"%s\"}\n", error.c_str()), std::fflush(stdout);
  std::exit(3);
}

int check(const Setup& s, const Options& o) {
  const Weight w = random_weight(s, 1);
  const uint16_t* x = random_x(s);
  const Truth truth = truth_of(s, w, x);
  const int64_t count = int64_t{s.M} * w.N;
  const Run run{device_memory<uint16_t>(count), count};
  std::vector<uint16_t> y(count);
  int wrong = 0;
  for (const Config& c : configurations(s, o)) {
    begin_line("check", s, c);
    if (const auto error = run(call_of(s, w, x, run.y), c, &y); !error.empty()) end_line(error);
    const double worst = worst_of(s, c, truth, y);
    wrong += worst > 1;
    std::printf(", \"worst\": %.4g}\n", worst), std::fflush(stdout);
  }
  return wrong != 0;
}

int repeat(const Setup& s, const Options& o) {
  const Weight w = random_weight(s, 1);
  const uint16_t* x = random_x(s);
  const int64_t count = int64_t{s.M} * w.N;
  const Run run{device_memory<uint16_t>(count), count};
  std::vector<uint16_t> first(count), again(count);
  int wrong = 0;
  for (const Config& c : configurations(s, o)) {
    begin_line("repeat", s, c);
    if (const auto error = run(call_of(s, w, x, run.y), c, &first); !error.empty()) end_line(error);
    int different = 0;
    const int repeats = o.number("repeats", 200);
    for (int i = 0; i < repeats; ++i) {
      if (const auto error = run(call_of(s, w, x, run.y), c, &again); !error.empty()) end_line(error);
      different += again != first;
    }
    wrong += different;
    std::printf(", \"repeats\": %d, \"different\": %d}\n", repeats, different), std::fflush(stdout);
  }
  return wrong != 0;
}

int time_all(const Setup& s, const Options& o) {
  int l2 = 0, device = 0;
  OK(cudaGetDevice(&device)), OK(cudaDeviceGetAttribute(&l2, cudaDevAttrL2CacheSize, device));
  const int copies = static_cast<int>(std::max<size_t>(2, 4 * static_cast<size_t>(l2) / s.bytes() + 1));
  std::vector<Weight> weights;
  for (int i = 0; i < copies; ++i) weights.push_back(random_weight(s, 17 * i + 1));
  const uint16_t* x = random_x(s);
  uint16_t* y = device_memory<uint16_t>(int64_t{s.M} * s.weight.N);
  for (const Config& c : configurations(s, o)) {
    Call call = call_of(s, weights[0], x, y);
    uint8_t* space = device_memory(workspace_bytes(call, c));
    begin_line("time", s, c);
    if (const int error = multiply(call, c, space, nullptr)) end_line(error_text(error));  // loads the kernel
    if (const int error = static_cast<int>(cudaDeviceSynchronize())) end_line(error_text(error));
    const double least_us = o.number("least-us", 500);
    const int calls = std::max(copies, static_cast<int>(least_us * 1e3 / predicted_ns(s.problem, c)) + 1);
    const std::vector<double> us = sampled(o.number("rounds", 9), calls, [&](int i, cudaStream_t stream) {
      call.weight = weights[i % copies];
      OK(multiply(call, c, space, stream));
    });
    std::printf(", \"us\": [%.3f, %.3f, %.3f], \"calls\": %d}\n", us.front(), us[us.size() / 2], us.back(), calls);
    std::fflush(stdout);
    OK(cudaFree(space));
  }
  return 0;
}

int list(const Setup& s, const Options& o) {
  for (const Config& c : configurations(s, o)) begin_line("list", s, c), std::printf("}\n");
  return 0;
}

int clusters() {
  Device device{};
  Clusters found{};
  OK(current_device(&device)), OK(clusters_of(device, &found));
  for (const int blocks : {1, 2}) {
    for (const int size : {2, 3, 4, 8}) {
      std::printf(
          "{\"mode\": \"clusters\", \"sm\": %d, \"multiprocessors\": %d, \"most_shared\": %d, \"blocks\": %d, "
          "\"size\": %d, \"active\": %d}\n",
          device.sm, device.multiprocessors, device.most_shared, blocks, size, found.active[blocks - 1][size]);
    }
  }
  OK(launch(pause, dim3(1), dim3(1), 0, nullptr, int64_t{1})), OK(cudaDeviceSynchronize());  // the card answers
  return 0;
}

int run(int argc, char** argv) {
  const std::string mode = argc > 1 ? argv[1] : "";
  const Options options(argc, argv);
  if (mode == "clusters") return clusters();
  if (mode == "calibrate") return calibrate(options);
  int (*one)(const Setup&, const Options&) = mode == "check"    ? check
                                             : mode == "repeat" ? repeat
                                             : mode == "time"   ? time_all
                                             : mode == "list"   ? list
                                                                : nullptr;
  if (one == nullptr) {
    return std::fprintf(stderr, "drive clusters|list|check|repeat|time|calibrate [--name value ...]\n"), 64;
  }
  int worst = 0;
  for (const std::string& M : options.list("M", "1")) {
    worst = std::max(worst, one(setup_of(options, std::atoi(M.c_str())), options));
  }
  return worst;
}

}  // namespace
}  // namespace qkernels::drive

int main(int argc, char** argv) { return qkernels::drive::run(argc, argv); }
