// The launchers of csrc/cuda/problem.h, and the choice of heuristics.h, by name.
#include <cstring>

#include "a8.h"
#include "call.h"
#include "heuristics_a8.h"
#include "launchers.h"

namespace {

using namespace qkernels::cuda;
using qkernels::Type;
using Named = qkernels::host::Call;

Type type_named(const Named& call, const char* name) { return static_cast<Type>(call.integer(name)); }

Weight weight_of(const Named& call) {
  Weight w =
      make_weight(call.integer("N"), call.integer("K"), static_cast<int>(call.integer("bits")), call.integer("group"));
  w.codes = call.pointer<uint8_t>("codes");
  w.scales = call.pointer<uint8_t>("scales");
  w.zeros = call.pointer<uint8_t>("zeros");
  w.scale_type = type_named(call, "scale_type"), w.zero_type = type_named(call, "zero_type");
  w.zeros_are_offsets = call.integer("zeros_are_offsets") != 0;
  return w;
}

Activations activations_of(const Named& call) {
  return {call.pointer<uint16_t>("x") + call.integer("x_offset"),
          static_cast<int>(call.integer("M")),
          static_cast<int>(call.integer("K")),
          call.integer("row_stride"),
          call.integer("column_stride"),
          call.pointer<int32_t>("k_order")};
}

Config config_of(const Named& call) {
  return {static_cast<Path>(call.integer("path")),   static_cast<int>(call.integer("tokens")),
          static_cast<int>(call.integer("warps_n")), static_cast<int>(call.integer("warps_k")),
          static_cast<int>(call.integer("splits")),  call.integer("half_accumulate") != 0};
}

qkernels::cuda::Call call_of(const Named& call) {
  qkernels::cuda::Call c{weight_of(call), activations_of(call), {}, type_named(call, "type")};
  c.out = {call.pointer<uint16_t>("y"),
           call.pointer<uint8_t>("bias"),
           type_named(call, "bias_type"),
           c.x.M,
           c.weight.N,
           c.weight.strips * kStripRows,
           nullptr};
  return c;
}

int run_multiply(const Named& call) {
  return multiply(call_of(call), config_of(call), call.pointer<void>("workspace"), nullptr);
}

int run_workspace(const Named& call) {
  *call.pointer<int64_t>("bytes") = workspace_bytes(call_of(call), config_of(call));
  return 0;
}

int run_stage(const Named& call) {
  return stage_x(activations_of(call), weight_of(call).steps, call.pointer<uint16_t>("to"), nullptr);
}

int run_dequantize(const Named& call) {
  return dequantize(weight_of(call), static_cast<int>(call.integer("first")), static_cast<int>(call.integer("count")),
                    static_cast<int>(call.integer("columns")), call.pointer<int32_t>("k_order"),
                    type_named(call, "type"), call.pointer<void>("to"), nullptr);
}

ConfigA8 config_a8_of(const Named& call) {
  return {static_cast<Path>(call.integer("path")), static_cast<int>(call.integer("tokens")),
          static_cast<int>(call.integer("splits"))};
}

int run_multiply_a8(const Named& call) {
  return multiply_a8(call_of(call), config_a8_of(call), call.pointer<void>("workspace"), nullptr);
}

int run_workspace_a8(const Named& call) {
  *call.pointer<int64_t>("bytes") = workspace_a8(call_of(call), config_a8_of(call)).bytes;
  return 0;
}

int run_quantize_a8(const Named& call) {
  return quantize_a8(activations_of(call), type_named(call, "type"), static_cast<int>(call.integer("steps")),
                     call.pointer<int8_t>("to"), call.pointer<float>("token_scales"), nullptr);
}

int run_choose_a8(const Named& call) {
  const Device device{static_cast<int>(call.integer("sm")), static_cast<int>(call.integer("multiprocessors"))};
  const Weight w = weight_of(call);
  const int M = static_cast<int>(call.integer("M"));
  const ConfigA8 c = choose_a8(w, M, device);
  const int32_t fields[] = {static_cast<int>(c.path), c.tokens, c.splits};
  std::memcpy(call.pointer<int32_t>("config"), fields, sizeof fields);
  *call.pointer<double>("ns") = predicted_a8_ns(w, M, device, c);
  return 0;
}

Problem problem_of(const Named& call) {
  auto number = [&](const char* name) { return static_cast<int>(call.integer(name)); };
  return {number("M"),
          number("N"),
          number("K"),
          number("bits"),
          number("group_bytes"),
          number("half") != 0,
          number("aligned") != 0,
          number("sm"),
          number("multiprocessors"),
          number("short_groups") != 0,
          number("float_zeros") != 0};
}

// ns: of a configuration that is given.
int run_predict(const Named& call) {
  *call.pointer<double>("ns") = predicted_ns(problem_of(call), config_of(call));
  return 0;
}

// config: path, tokens, warps_n, warps_k, splits, half_accumulate; text: both values as they print themselves.
int run_choose(const Named& call) {
  const Problem p = problem_of(call);
  const Config c = choose(p, call.integer("half_accumulate") != 0, call.integer("decode_only") != 0);
  const int32_t fields[] = {static_cast<int>(c.path), c.tokens, c.warps_n, c.warps_k, c.splits, c.half_accumulate};
  std::memcpy(call.pointer<int32_t>("config"), fields, sizeof fields);
  *call.pointer<double>("ns") = predicted_ns(p, c);
  std::snprintf(call.pointer<char>("text"), 512, "%s: %s", describe(p).c_str(), describe(c).c_str());
  return 0;
}

const qkernels::host::Registered kMultiply("multiply", run_multiply), kWorkspace("workspace", run_workspace),
    kStage("stage", run_stage), kDequantize("dequantize", run_dequantize), kChoose("choose", run_choose),
    kPredict("predict", run_predict), kMultiplyA8("multiply_a8", run_multiply_a8),
    kWorkspaceA8("workspace_a8", run_workspace_a8), kQuantizeA8("quantize_a8", run_quantize_a8),
    kChooseA8("choose_a8", run_choose_a8);

}  // namespace
