// The launchers of csrc/cuda/experts.h, and their choices, by name. Buffers and numbers of a weight have a prefix: up_,
// down_, or none.
#include <cstring>

#include "call.h"
#include "experts.h"

namespace {

using namespace qkernels::cuda;
using qkernels::Type;
using Named = qkernels::host::Call;

struct Part {
  const Named& call;
  std::string prefix;

  int number(const char* name, int otherwise = 0) const {
    return static_cast<int>(call.integer((prefix + name).c_str(), otherwise));
  }
  template <class T>
  T* pointer(const char* name) const {
    return call.pointer<T>((prefix + name).c_str());
  }
  Type type(const char* name) const { return static_cast<Type>(number(name)); }
};

Stack stack_of(const Part& p) {
  Weight w = make_weight(p.number("N"), p.number("K"), p.number("bits"), p.number("group"));
  w.codes = p.pointer<uint8_t>("codes"), w.scales = p.pointer<uint8_t>("scales"), w.zeros = p.pointer<uint8_t>("zeros");
  w.scale_type = p.type("scale_type"), w.zero_type = p.type("zero_type");
  w.zeros_are_offsets = p.number("zeros_are_offsets") != 0;
  set_codebook(w, static_cast<qkernels::Codebook>(p.number("codebook")));
  set_factors(w, static_cast<qkernels::Factors>(p.number("factors")));
  w.outer = p.pointer<uint8_t>("outer"), w.outer_type = p.type("outer_type");
  w.outer_zeros = p.pointer<uint8_t>("outer_zeros"), w.outer_zero_type = p.type("outer_zero_type");
  return {w, p.number("experts"), p.pointer<int32_t>("k_order"), p.pointer<uint8_t>("bias"), p.type("bias_type")};
}

Config config_of(const Part& p) {
  return {static_cast<Path>(p.number("path")),
          p.number("tokens"),
          p.number("warps_n"),
          p.number("warps_k"),
          p.number("splits", 1),
          false,
          p.number("stages")};
}

Activations activations_of(const Named& call) {
  return {call.pointer<uint16_t>("x") + call.integer("x_offset"),
          static_cast<int>(call.integer("M")),
          static_cast<int>(call.integer("x_columns")),
          call.integer("row_stride"),
          call.integer("column_stride"),
          nullptr};
}

Grouped grouped_of(const Named& call) {
  return {stack_of({call, ""}),
          activations_of(call),
          static_cast<Type>(call.integer("type")),
          call.pointer<int64_t>("rows"),
          call.pointer<int64_t>("offsets"),
          static_cast<int>(call.integer("count")),
          call.pointer<void>("y"),
          static_cast<Type>(call.integer("y_type"))};
}

Block block_of(const Named& call) {
  return {stack_of({call, "up_"}),
          stack_of({call, "down_"}),
          activations_of(call),
          static_cast<Type>(call.integer("type")),
          call.pointer<uint32_t>("ids"),
          static_cast<int>(call.integer("id_words")),
          static_cast<int>(call.integer("per")),
          call.pointer<uint8_t>("weights"),
          static_cast<Type>(call.integer("weights_type")),
          static_cast<Activation>(call.integer("activation")),
          static_cast<float>(call.integer("alpha_thousandths", 0)) / 1000.0f,
          static_cast<float>(call.integer("limit", 0)),
          call.pointer<uint16_t>("y")};
}

BlockConfig block_config_of(const Named& call) {
  return {call.integer("sorted") != 0, config_of({call, "up_"}), config_of({call, "down_"}),
          call.integer("most_bytes", int64_t{512} << 20)};
}

int run_grouped(const Named& call) {
  return grouped_gemm(grouped_of(call), config_of({call, ""}), call.pointer<void>("workspace"), nullptr);
}
int run_grouped_workspace(const Named& call) {
  *call.pointer<int64_t>("bytes") = workspace_bytes(grouped_of(call), config_of({call, ""}));
  return 0;
}
int run_experts(const Named& call) {
  return experts(block_of(call), block_config_of(call), call.pointer<void>("workspace"), nullptr);
}
int run_experts_workspace(const Named& call) {
  *call.pointer<int64_t>("bytes") = workspace_bytes(block_of(call), block_config_of(call));
  return 0;
}

// configs [2][6] of up and down: sorted, path, tokens, warps_n, warps_k, splits.
int run_choose_block(const Named& call) {
  const Block b = block_of(call);
  const auto number = [&](const char* name) { return static_cast<int>(call.integer(name)); };
  const Device device{0, number("sm"), number("multiprocessors"), 0};
  const auto problem = [&](const Stack& s, const char* bits) {
    return problem_of(s.weight, b.x.M, number(bits), 16, b.type == Type::kHalf, true, device, {});
  };
  const BlockConfig c = choose_block(problem(b.up, "up_bits"), problem(b.down, "down_bits"), b.x.M,
                                     int64_t{b.x.M} * b.per, b.up.experts, pairs_strips(b.activation, b.down.weight.K));
  int32_t* to = call.pointer<int32_t>("configs");
  for (const Config& one : {c.up, c.down}) {
    const int32_t fields[] = {c.sorted, static_cast<int>(one.path), one.tokens, one.warps_n, one.warps_k, one.splits};
    std::memcpy(to, fields, sizeof fields), to += 6;
  }
  return 0;
}

const qkernels::host::Registered kGrouped("grouped_gemm", run_grouped),
    kGroupedWorkspace("grouped_workspace", run_grouped_workspace), kExperts("experts", run_experts),
    kExpertsWorkspace("experts_workspace", run_experts_workspace), kChooseBlock("choose_block", run_choose_block);

}  // namespace
