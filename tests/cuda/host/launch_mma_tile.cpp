// The launchers of csrc/cuda/problem.h, and the choice of heuristics.h, by name.
#include <cstring>

#include "a8.h"
#include "call.h"
#include "heuristics.h"
#include "launchers.h"

namespace {

using namespace qkernels::cuda;
using qkernels::Type;
using Named = qkernels::host::Call;

Type type_named(const Named& call, const char* name) { return static_cast<Type>(call.integer(name)); }

Weight weight_of(const Named& call) {
  Weight w = make_weight(call.integer("N"), call.integer("K"), static_cast<int>(call.integer("bits")),
                         call.integer("group"), call.integer("act", 0) == 0);
  w.codes = call.pointer<uint8_t>("codes");
  w.scales = call.pointer<uint8_t>("scales");
  w.zeros = call.pointer<uint8_t>("zeros");
  w.scale_type = type_named(call, "scale_type"), w.zero_type = type_named(call, "zero_type");
  w.zeros_are_offsets = call.integer("zeros_are_offsets") != 0;
  set_codebook(w, static_cast<qkernels::Codebook>(call.integer("codebook", 0)));
  set_factors(w, static_cast<qkernels::Factors>(call.integer("factors", 0)));
  w.outer = call.pointer<uint8_t>("outer"), w.outer_type = static_cast<Type>(call.integer("outer_type", 0));
  w.outer_zeros = call.pointer<uint8_t>("outer_zeros");
  w.outer_zero_type = static_cast<Type>(call.integer("outer_zero_type", 0));
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
  return {static_cast<Path>(call.integer("path")),    static_cast<int>(call.integer("tokens")),
          static_cast<int>(call.integer("warps_n")),  static_cast<int>(call.integer("warps_k")),
          static_cast<int>(call.integer("splits")),   call.integer("half_accumulate") != 0,
          static_cast<int>(call.integer("stages", 0))};
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
  c.rounding = static_cast<qkernels::Rounding>(call.integer("act", 0));
  c.x_static = call.pointer<float>("x_static");
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

// offsets: of scales, zeros, marks, list, partial sums in the workspace, and its bytes.
int run_workspace_a8(const Named& call) {
  const WorkspaceA8 at = workspace_a8(call_of(call), config_of(call));
  const int64_t offsets[] = {at.scales, at.zeros, at.marks, at.list, at.partial, at.bytes};
  std::memcpy(call.pointer<int64_t>("offsets"), offsets, sizeof offsets);
  return 0;
}

int run_quantize_a8(const Named& call) {
  const qkernels::cuda::Call c = call_of(call);
  return quantize_a8(c, workspace_a8(c, config_of(call)), call.pointer<uint8_t>("workspace"), nullptr);
}

// active_BLOCKS_SIZE: of clusters; 0 where it is not given.
Problem problem_of(const Named& call) {
  auto number = [&](const char* name) { return static_cast<int>(call.integer(name)); };
  auto other = [&](const char* name, int otherwise) { return static_cast<int>(call.integer(name, otherwise)); };
  Problem p{};
  p.M = number("M"), p.N = number("N"), p.K = number("K"), p.bits = number("bits"), p.act_bits = other("act_bits", 16);
  p.group_bytes = number("group_bytes"), p.half = number("half") != 0, p.aligned = number("aligned") != 0;
  p.sm = number("sm"), p.multiprocessors = number("multiprocessors");
  p.groups_per_step = number("groups_per_step"), p.steps_per_group = number("steps_per_group");
  p.groups = number("groups"), p.float_zeros = number("float_zeros") != 0;
  p.coding = coding_of(static_cast<qkernels::Codebook>(other("codebook", 0)));
  if (other("planes", 0) != 0) p.coding = Coding::kPlanes;
  for (int blocks = 1; blocks <= 2; ++blocks) {
    for (const int size : {2, 3, 4, 8}) {
      const std::string name = "active_" + std::to_string(blocks) + "_" + std::to_string(size);
      p.clusters.active[blocks - 1][size] = other(name.c_str(), 0);
    }
  }
  return p;
}

int run_clusters(const Named& call) {
  Device device{};
  Clusters clusters{};
  if (const int error = current_device(&device)) return error;
  if (const int error = clusters_of(device, &clusters)) return error;
  std::memcpy(call.pointer<int32_t>("active"), &clusters, sizeof clusters);
  return 0;
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
    kPredict("predict", run_predict), kQuantizeA8("quantize_a8", run_quantize_a8),
    kWorkspaceA8("workspace_a8", run_workspace_a8), kClusters("clusters", run_clusters);

}  // namespace
