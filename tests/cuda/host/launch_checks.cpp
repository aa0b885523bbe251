// The checks of both devices, settings.h and the remembered choice, by name: what the ops do before they launch.
#include <cstdlib>
#include <thread>
#include <vector>

#include "../cpu/checks.h"
#include "call.h"
#include "checks.h"
#include "heuristics.h"
#include "settings.h"

namespace {

namespace cpu = qkernels::cpu;
using namespace qkernels;
using namespace qkernels::cuda;
using Named = qkernels::host::Call;

// One row of `tensors`: given, type, int32, dims, three sizes, contiguous, device, address.
constexpr int kFields = 10;

Buffer buffer_of(const int64_t* row) {
  const char* names[] = {row[2] != 0 ? "int32" : "float64",
                         "uint8",
                         "float32",
                         "float16",
                         "bfloat16",
                         "int8",
                         "float8_e8m0fnu",
                         "float8_e4m3fn"};
  return {reinterpret_cast<const void*>(row[9]),
          static_cast<Type>(row[1]),
          row[2] != 0,
          names[row[1]],
          static_cast<int>(row[3]),
          {row[4], row[5], row[6]},
          row[7] != 0,
          static_cast<int>(row[8])};
}

// question, of CUDA: 0 product, 1 decode, 2 product with int8 activations, 3 dequantize, 4 device; of the CPU:
// 5 product, 6 decode, 7 product with int8 activations. text: what is wrong.
int run_wrong(const Named& call) {
  const int64_t* rows = call.pointer<int64_t>("tensors");  // in the order of Arguments
  Buffer all[9] = {};
  for (int i = 0; i < 9; ++i) all[i] = buffer_of(rows + i * kFields);
  const auto given = [&](int i) { return rows[i * kFields] != 0 ? &all[i] : nullptr; };
  const Arguments a{all[0],
                    all[1],
                    all[2],
                    given(3),
                    given(4),
                    given(5),
                    given(6),
                    given(7),
                    call.integer("N"),
                    call.integer("bits"),
                    call.integer("group"),
                    call.integer("zeros_are_offsets") != 0,
                    call.integer("codebook"),
                    call.integer("factors"),
                    call.integer("act", 0),
                    given(8)};
  const int64_t question = call.integer("question"), K = call.integer("K");
  std::string wrong;
  if (question == 1) wrong = cuda::wrong_decode(a.x);
  if (wrong.empty() && question <= 2) wrong = cuda::wrong_product(a);
  if (wrong.empty() && question == 2) wrong = wrong_a8(a);
  if (question == 3) {
    wrong = wrong_weight(a, K);
    if (wrong.empty()) wrong = cuda::wrong_order(a, K);
  }
  if (question == 4) wrong = wrong_device({0, static_cast<int>(call.integer("sm")), 100, 0});
  if (question == 6) wrong = cpu::wrong_decode(a.x, false);
  if (wrong.empty() && question >= 5) wrong = cpu::wrong_product(a, question == 7);
  std::snprintf(call.pointer<char>("text"), 512, "%s", wrong.c_str());
  return 0;
}

// Each of `threads` threads has each of `lines` lines logged twice, if the environment says so.
int run_log(const Named& call) {
  if (!is_on(std::getenv("QKERNELS_LOG"))) return 0;
  std::vector<std::thread> threads;
  for (int64_t t = 0; t < call.integer("threads"); ++t) {
    threads.emplace_back([&] {
      for (int64_t i = 0; i < 2 * call.integer("lines"); ++i) {
        log_once("line " + std::to_string(call.integer("first") + i / 2));
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  return 0;
}

int run_accumulates(const Named& call) {
  *call.pointer<int32_t>("half") = accumulates_half(std::getenv("QKERNELS_ACCUMULATE"));
  return 0;
}

// `count` problems with M from 1 on, asked twice by each of `threads` threads: how often the table and the model
// differ.
int run_remember(const Named& call) {
  std::vector<std::thread> threads;
  std::vector<int> differ(static_cast<size_t>(call.integer("threads")));
  for (size_t t = 0; t < differ.size(); ++t) {
    threads.emplace_back([&, t] {
      for (int64_t i = 0; i < 2 * call.integer("count"); ++i) {
        const int M = static_cast<int>(i % call.integer("count")) + 1;
        for (const bool half : {false, true}) {
          const Problem p{M, 4096, 4096, 4, 16, 128, true, true, 89, 128, half ? 2 : 1, 2, 32, false, Coding::kIntegers,
                          {}};
          differ[t] += describe(remembered_choice(p, half)) != describe(choose(p, half));
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  int32_t* sum = call.pointer<int32_t>("differ");
  for (const int d : differ) *sum += d;
  return 0;
}

const qkernels::host::Registered kWrong("wrong", run_wrong), kLog("log", run_log),
    kAccumulates("accumulates", run_accumulates), kRemember("remember", run_remember);

}  // namespace
