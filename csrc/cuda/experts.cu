// The launchers of experts.h.
#include "experts.cuh"
#include "launchers.h"

namespace qkernels::cuda {
namespace {

// Enough blocks for every multiprocessor of any card; the kernels loop.
int blocks_for(int64_t threads) {
  return static_cast<int>(std::min<int64_t>(std::max<int64_t>(divide_up(threads, kExpertThreads), 1), 4096));
}

template <class Arguments>
cudaError_t run(void (*kernel)(Arguments), const Arguments& p, int64_t threads, cudaStream_t stream) {
  return launch(kernel, dim3(blocks_for(threads)), dim3(kExpertThreads), 0, stream, p);
}

// Parts of a workspace, one behind the other, 16-byte aligned; of a null one, to count its bytes.
struct Cut {
  uint8_t* start;
  int64_t bytes = 0;

  // Rows of 16-bit values, and the rows in front of them that a product's tensor map spans (gemm_sm90.cuh).
  uint16_t* take_rows(int64_t rows, int columns, const Config& config) {
    const int64_t before = config.path == Path::kGemmSm90 ? int64_t{config.tokens} * columns : 0;
    uint16_t* part = take<uint16_t>(before + rows * columns);
    return part == nullptr ? nullptr : part + before;
  }

  template <class T>
  T* take(int64_t count) {
    T* part = start == nullptr ? nullptr : reinterpret_cast<T*>(start + bytes);
    bytes += round_up(count * static_cast<int64_t>(sizeof(T)), 16);
    return part;
  }
};

int padded_rows(const Weight& w) { return w.strips * kStripRows; }
int padded_columns(const Weight& w) { return w.steps * kStepColumns; }

Sums sums_of(const Stack& s, const float* sums, const RowBlocks& pairs, const int32_t* place) {
  return {sums, s.weight.N, padded_rows(s.weight), s.bias, s.bias_type, pairs, place};
}

BlockTable table_of(const Stack& s, int rows, int size, RowBlock* slots) {
  return {slots, rows / size + s.experts, size, s.experts};
}

// fp32 sums of the rows that `rows` says; or, with `gate_up`, what becomes of them.
cudaError_t multiply_rows(const Stack& stack, const Activations& x, Type type, const Config& config,
                          const RowBlocks& rows, float* sums, const GateUp& gate_up, cudaStream_t stream) {
  const bool tiles = config.path == Path::kGemm, wgmma = config.path == Path::kGemmSm90;
  if (config.splits != 1 || config.half_accumulate || (config.path != Path::kDecode && !tiles && !wgmma)) {
    return cudaErrorInvalidValue;
  }
  Call call{};
  call.weight = stack.weight, call.x = x, call.type = type, call.rows = rows, call.gate_up = gate_up;
  if (!wgmma) call.x.M = rows.table == nullptr ? 1 : config.tokens;
  call.out = {nullptr, nullptr, Type::kNone, 0, stack.weight.N, padded_rows(stack.weight), sums};
  if (gate_up.to != nullptr) call.out.bias = stack.bias, call.out.bias_type = stack.bias_type;
  const bool half = type == Type::kHalf;
  if (wgmma) return launch_gemm_sm90(call, config, stream);
  if (tiles) return half ? launch_gemm_f16(call, config, stream) : launch_gemm_bf16(call, config, stream);
  return half ? launch_decode_f16(call, config, stream) : launch_decode_bf16(call, config, stream);
}

// The blocks' rows as the products take them.
RowBlocks blocks_of_table(const BlockTable& t) { return {t.slots, nullptr, 0, 1, t.experts, t.count}; }

struct GroupedSpace {
  int32_t* ids;
  RowBlock* slots;
  uint16_t* x;
  float* sums;
  int64_t bytes;
};
GroupedSpace space_of(const Grouped& c, const Config& config, void* workspace) {
  Cut cut{static_cast<uint8_t*>(workspace)};
  GroupedSpace s{};
  s.ids = cut.take<int32_t>(c.count);
  s.slots = cut.take<RowBlock>(table_of(c.stack, c.count, config.tokens, nullptr).count);
  s.x = cut.take_rows(c.count, padded_columns(c.stack.weight), config);
  s.sums = cut.take<float>(int64_t{c.count} * padded_rows(c.stack.weight));
  s.bytes = cut.bytes;
  return s;
}

struct BlockSpace {
  int32_t* place;
  RowBlock* slots;
  uint16_t *x, *hidden, *ordered;
  float* sums;  // of up, unless it is activated at once, and then of down
  int64_t bytes;
};
// Values of a row of sums.
int row_of_sums(const Block& c, const BlockConfig& config) {
  const int down = padded_rows(c.down.weight);
  return activates_at_once(c, config) ? down : std::max(padded_rows(c.up.weight), down);
}

// `pairs`: of the tokens that are multiplied at a time.
BlockSpace space_of(const Block& c, const BlockConfig& config, int pairs, void* workspace) {
  Cut cut{static_cast<uint8_t*>(workspace)};
  BlockSpace s{};
  const int64_t rows = pairs;
  const int columns = padded_columns(c.down.weight);
  if (config.sorted) {
    s.place = cut.take<int32_t>(rows);
    s.slots = cut.take<RowBlock>(table_of(c.up, pairs, config.up.tokens, nullptr).count);
    s.x = cut.take_rows(rows, padded_columns(c.up.weight), config.up);
    if (c.down.k_order != nullptr) s.ordered = cut.take_rows(rows, columns, config.down);
  }
  s.hidden = cut.take_rows(rows, columns, config.down);
  s.sums = cut.take<float>(rows * row_of_sums(c, config));
  s.bytes = cut.bytes;
  return s;
}

// Tokens whose sums are in memory at a time.
int tokens_at_once(const Block& c, const BlockConfig& config) {
  const int64_t row = int64_t{4} * row_of_sums(c, config) * c.per;
  return static_cast<int>(std::min<int64_t>(c.x.M, std::max<int64_t>(config.most_bytes / row, 1)));
}

cudaError_t run_tokens(const Block& c, const BlockConfig& config, const BlockSpace& space, cudaStream_t s) {
  const int pairs = c.x.M * c.per, columns = padded_columns(c.down.weight);
  const RowBlocks ids{nullptr, c.ids, c.id_words, c.per, c.up.experts, pairs};
  RowBlocks blocks = ids, of_down = ids;
  Activations x = c.x, hidden{space.hidden, pairs, c.down.weight.K, columns, 1, c.down.k_order};
  x.k_order = c.up.k_order, of_down.per = 1;
  cudaError_t error = cudaSuccess;
  if (config.sorted) {
    const BlockTable table = table_of(c.up, pairs, config.up.tokens, space.slots);
    error = launch(route, dim3(c.up.experts), dim3(kExpertThreads), kScanBytes, s,
                   RouteArguments{ids, pairs, table, space.place});
    if (error != cudaSuccess) return error;
    const int steps = c.up.weight.steps;
    error = run(gather, GatherArguments{x, is_aligned(x), nullptr, ids, space.place, pairs, steps, space.x},
                int64_t{pairs} * steps * 8, s);
    x = {space.x, pairs, steps * kStepColumns, steps * kStepColumns, 1, nullptr};
    blocks = of_down = blocks_of_table(table);
  }
  const bool at_once = activates_at_once(c, config);
  const GateUp gate_up{at_once ? space.hidden : nullptr, c.activation, c.alpha, c.limit};
  if (error == cudaSuccess) error = multiply_rows(c.up, x, c.type, config.up, blocks, space.sums, gate_up, s);
  if (error != cudaSuccess) return error;
  const Sums of_up = sums_of(c.up, space.sums, ids, space.place);
  if (!at_once) {
    error = run(
        activate,
        ActivateArguments{of_up, pairs, c.down.weight.K, columns, c.activation, c.alpha, c.limit, c.type, space.hidden},
        int64_t{pairs} * columns, s);
  }
  if (error == cudaSuccess && config.sorted && c.down.k_order != nullptr) {
    error =
        run(gather, GatherArguments{hidden, false, nullptr, ids, nullptr, pairs, c.down.weight.steps, space.ordered},
            int64_t{pairs} * c.down.weight.steps * 8, s);
    hidden.x = space.ordered, hidden.k_order = nullptr;
  }
  if (hidden.k_order == nullptr) hidden.K = columns;  // those past I are 0
  if (error == cudaSuccess) error = multiply_rows(c.down, hidden, c.type, config.down, of_down, space.sums, {}, s);
  if (error != cudaSuccess) return error;
  const Sums down = sums_of(c.down, space.sums, ids, space.place);
  return run(combine, CombineArguments{down, c.x.M, c.weights, c.weights_type, c.type, c.y},
             int64_t{c.x.M} * c.down.weight.N, s);
}

}  // namespace

int64_t workspace_bytes(const Grouped& call, const Config& config) { return space_of(call, config, nullptr).bytes; }

int grouped_gemm(const Grouped& c, const Config& config, void* workspace, void* stream) {
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  const GroupedSpace space = space_of(c, config, workspace);
  const BlockTable table = table_of(c.stack, c.count, config.tokens, space.slots);
  cudaError_t error = launch(align, dim3(c.stack.experts), dim3(kExpertThreads), kScanBytes, s,
                             AlignArguments{c.offsets, c.count, table, space.ids});
  if (error != cudaSuccess) return error;
  Activations x = c.x;
  x.k_order = c.stack.k_order;
  const int steps = c.stack.weight.steps, columns = steps * kStepColumns;
  error = run(gather, GatherArguments{x, is_aligned(x), c.rows, {}, nullptr, c.count, steps, space.x},
              int64_t{c.count} * steps * 8, s);
  if (error != cudaSuccess) return error;
  error = multiply_rows(c.stack, {space.x, c.count, columns, columns, 1, nullptr}, c.type, config,
                        blocks_of_table(table), space.sums, {}, s);
  if (error != cudaSuccess) return error;
  const RowBlocks ids{nullptr, reinterpret_cast<const uint32_t*>(space.ids), 1, 1, c.stack.experts, c.count};
  return run(finish,
             FinishArguments{sums_of(c.stack, space.sums, ids, nullptr), c.count, c.y_type, static_cast<uint8_t*>(c.y)},
             int64_t{c.count} * c.stack.weight.N, s);
}

int64_t workspace_bytes(const Block& call, const BlockConfig& config) {
  return space_of(call, config, tokens_at_once(call, config) * call.per, nullptr).bytes;
}

int experts(const Block& call, const BlockConfig& config, void* workspace, void* stream) {
  const int most = tokens_at_once(call, config);
  const BlockSpace space = space_of(call, config, most * call.per, workspace);
  for (int done = 0; done < call.x.M; done += most) {
    Block part = call;
    part.x.x += done * call.x.row_stride, part.x.M = std::min(most, call.x.M - done);
    part.ids += int64_t{done} * call.per * call.id_words;
    part.weights += int64_t{done} * call.per * size_of(call.weights_type);
    part.y += int64_t{done} * call.down.weight.N;
    if (const int error = run_tokens(part, config, space, static_cast<cudaStream_t>(stream))) return error;
  }
  return cudaSuccess;
}

}  // namespace qkernels::cuda
