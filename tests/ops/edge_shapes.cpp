// Runs the CPU kernels of one instruction set over edge shapes, every buffer in an allocation of exactly the size that
// the contract in kernels.h gives it, and compares with a product in double. Built by test_sanitizers.py with
// -fsanitize=address,undefined.
//
//   edge_shapes ISA          exit code 77 if this CPU lacks it
//   edge_shapes ISA short    qweight one byte too small: must be caught
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#include "experts.h"
#include "kernels.h"

namespace cpu = qkernels::cpu;
using qkernels::Type;

namespace {

int random_below(int n) {
  static uint32_t state = 1;
  state = state * 1664525u + 1013904223u;
  return static_cast<int>((state >> 8) % static_cast<uint32_t>(n));
}

size_t bytes_of(Type type) { return qkernels::size_of(type); }

// `size` whole numbers from -3 to 3 (0 to 3 as kUInt8; 1, 2 or 4 as kE8M0 and kE4M3), as doubles and in memory of their
// type
struct Numbers {
  Type type;
  std::vector<double> values;
  void* memory;

  Numbers(Type t, int64_t size) : type(t), values(static_cast<size_t>(size)), memory(std::malloc(bytes_of(t) * size)) {
    static const uint16_t half[] = {0xc200, 0xc000, 0xbc00, 0, 0x3c00, 0x4000, 0x4200};
    static const uint16_t bf16[] = {0xc040, 0xc000, 0xbf80, 0, 0x3f80, 0x4000, 0x4040};
    for (size_t i = 0; i < values.size(); ++i) {
      const bool power = t == Type::kE8M0 || t == Type::kE4M3;
      const int exponent = random_below(3);
      const int v = power ? 1 << exponent : t == Type::kUInt8 ? random_below(4) : random_below(7) - 3;
      values[i] = v;
      if (t == Type::kUInt8) static_cast<uint8_t*>(memory)[i] = static_cast<uint8_t>(v);
      if (t == Type::kInt8) static_cast<int8_t*>(memory)[i] = static_cast<int8_t>(v);
      if (t == Type::kE8M0) static_cast<uint8_t*>(memory)[i] = static_cast<uint8_t>(127 + exponent);
      if (t == Type::kE4M3) static_cast<uint8_t*>(memory)[i] = static_cast<uint8_t>((7 + exponent) << 3);
      if (t == Type::kFloat) static_cast<float*>(memory)[i] = static_cast<float>(v);
      if (t == Type::kHalf) static_cast<uint16_t*>(memory)[i] = half[v + 3];
      if (t == Type::kBFloat16) static_cast<uint16_t*>(memory)[i] = bf16[v + 3];
    }
  }
  ~Numbers() { std::free(memory); }
  Numbers(const Numbers&) = delete;
};

double read(Type type, const void* memory, int64_t i) {
  if (type == Type::kFloat) return static_cast<const float*>(memory)[i];
  const uint32_t word = static_cast<const uint16_t*>(memory)[i];
  if (type == Type::kBFloat16) {
    const uint32_t bits = word << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
  }
  const int exponent = word >> 10 & 31, mantissa = word & 1023;
  const double magnitude = exponent ? std::ldexp(1024 + mantissa, exponent - 25) : std::ldexp(mantissa, -24);
  return word & 0x8000 ? -magnitude : magnitude;
}

void two_threads(int64_t n, void* context, cpu::Body body) {
  std::thread other([&] { body(context, n / 2, n); });
  body(context, 0, n / 2);
  other.join();
}

struct Shape {
  int64_t M, N, K, group;
  int bits;
  Type x, scale, zero, bias;
  bool offsets, ordered, strided, int8;
  qkernels::Codebook codebook = qkernels::Codebook::kIntegers;
  qkernels::Factors factors = qkernels::Factors::kNone;
};

// A scheme with a codebook or with products, in the place of what else a shape has.
void make_special(Shape& s, int which) {
  using qkernels::Codebook;
  using qkernels::Factors;
  static const Codebook books[] = {Codebook::kE2M1, Codebook::kIq4Nl, Codebook::kE4M3, Codebook::kE5M2};
  static const Factors factors[] = {Factors::kK2, Factors::kK3,    Factors::kK45,   Factors::kK45,
                                    Factors::kK6, Factors::kIq4Xs, Factors::kNvfp4M};
  static const int bits[] = {2, 3, 4, 5, 6, 4, 4}, group[] = {16, 16, 32, 32, 16, 32, 16};
  s.zero = Type::kNone, s.offsets = false;
  if (which < 4) {
    s.codebook = books[which], s.bits = qkernels::codebook_bits(books[which]);
    s.scale = which % 2 == 0 ? Type::kE8M0 : Type::kE4M3;
    return;
  }
  const int i = which - 4;
  s.factors = factors[i], s.bits = bits[i], s.group = group[i];
  s.scale = cpu::kind_of(s.factors).small, s.offsets = cpu::kind_of(s.factors).offsets;
  if (s.factors == Factors::kIq4Xs) s.codebook = Codebook::kIq4Nl;
  if (s.factors == Factors::kNvfp4M) s.codebook = Codebook::kE2M1;
}

// The number that a code means without a zero point.
double plain(const Shape& s, int code) {
  return s.codebook == qkernels::Codebook::kIntegers ? code - (1 << (s.bits - 1))
                                                     : qkernels::codebook_value(s.codebook, code);
}

// x of one token as the kernels with int8 activations see it
void quantize(std::vector<double>& x) {
  float largest = 0;
  for (const double v : x) largest = std::max(largest, static_cast<float>(std::abs(v)));
  if (largest == 0) return;
  for (double& v : x) v = std::rint(static_cast<float>(v) / largest * 127.0f) * (largest / 127.0f);
}

// `bytes` of memory twice, as the buffers of two experts lie.
void* twice(const void* memory, int64_t bytes) {
  if (memory == nullptr) return nullptr;
  char* both = static_cast<char*>(std::malloc(2 * bytes));
  std::memcpy(both, memory, bytes), std::memcpy(both + bytes, memory, bytes);
  return both;
}

// The same product by two experts that have the same weight, each with a part of the rows in turned order, and one row
// that is nobody's: how many rows differ from the dense product in any bit.
int run_grouped(const cpu::Call& call, const cpu::Strides& bytes, const cpu::Kernels& kernels) {
  cpu::Stack stack{call, bytes, 2};
  void* buffers[] = {twice(call.qweight, bytes.qweight),
                     twice(call.scales, bytes.scales),
                     twice(call.zeros, bytes.zeros),
                     twice(call.outer_scales, bytes.outer_scales),
                     twice(call.outer_zeros, bytes.outer_zeros),
                     twice(call.bias, bytes.bias)};
  stack.call.qweight = static_cast<uint8_t*>(buffers[0]), stack.call.scales = buffers[1];
  stack.call.zeros = buffers[2], stack.call.outer_scales = buffers[3], stack.call.outer_zeros = buffers[4];
  stack.call.bias = buffers[5];
  const int64_t M = call.M, R = M + 1, row_bytes = call.N * static_cast<int64_t>(bytes_of(call.x_type));
  std::vector<int64_t> rows(static_cast<size_t>(R)), offsets{0, M / 3, M};
  for (int64_t r = 0; r < R; ++r) rows[r] = (M - 1) - r % M;
  char* y = static_cast<char*>(std::malloc(R * row_bytes));
  std::memset(y, 0xff, R * row_bytes);
  const cpu::Grouped grouped{stack, call.x, call.x_type, M, R, rows.data(), offsets.data(), y, call.x_type};
  const int64_t room = cpu::workspace_bytes(grouped, kernels);
  void* workspace = std::malloc(room);
  std::memset(workspace, 0xff, room);
  cpu::grouped_gemm(grouped, kernels, workspace, 2, two_threads);
  int wrong = 0;
  for (int64_t r = 0; r < M; ++r) {
    wrong += std::memcmp(y + r * row_bytes, static_cast<char*>(call.y) + rows[r] * row_bytes, row_bytes) != 0;
  }
  for (int64_t i = 0; i < row_bytes; ++i) wrong += y[M * row_bytes + i] != 0;
  std::free(y), std::free(workspace);
  for (void* buffer : buffers) std::free(buffer);
  return wrong;
}

// Where bit i of a code of 3 bits is, of column k of a block: the lane, and the bit of it.
struct Place {
  int lane, bit;
};
Place place_of_three(bool int8, int k, int i) {
  const int octet = k / 8, unit = int8 ? k / 4 % 2 : k / 2 % 4, begin = int8 ? 8 * (k % 4) : 16 * (k % 2);
  if (octet < 3) return {octet, begin + 3 * unit + i};
  if (int8) return i < 2 ? Place{unit, begin + 6 + i} : Place{2, begin + 6 + unit};
  return unit < 3 ? Place{unit, begin + 12 + i} : Place{i, begin + 15};
}

// The number of wrong entries of y.
int run(const Shape& s, const cpu::Kernels& kernels, bool short_of_a_byte) {
  cpu::Call call{cpu::make_problem(s.M, s.N, s.K, s.bits, s.group)};
  // The sizes of buffers by themselves, not from the call.
  static const int low_bits[] = {0, 0, 2, 3, 4, 4, 4, 8, 8}, high_bits[] = {0, 0, 0, 0, 0, 1, 2, 0, 0};
  static const int block_columns[] = {0, 0, 16, 32, 8, 32, 16, 8, 8};
  const int low = low_bits[s.bits], high = high_bits[s.bits], block = block_columns[s.bits];
  const int64_t tiles = (s.N + 31) / 32, block_bytes = block * 32 * (low + high) / 8;
  const int64_t tile_bytes = (s.K + block - 1) / block * block_bytes;
  const int64_t G = (s.K - 1) / s.group + 1, groups = tiles * G * 32;

  std::vector<int> codes(static_cast<size_t>(s.N * s.K));
  uint8_t* qweight = static_cast<uint8_t*>(std::malloc(tiles * tile_bytes - (short_of_a_byte ? 1 : 0)));
  std::memset(qweight, 0, tiles * tile_bytes - (short_of_a_byte ? 1 : 0));
  for (int64_t n = 0; n < s.N; ++n) {
    for (int64_t k = 0; k < s.K; ++k) {
      int code = random_below(1 << s.bits);
      if (s.bits == 8 && s.codebook != qkernels::Codebook::kIntegers) code &= 0xb7;  // of middling size
      codes[n * s.K + k] = code;
      const int64_t row_at = n % cpu::kTileRows * cpu::kLaneBytes;
      for (int i = 0; s.bits == 3 && !short_of_a_byte && i < 3; ++i) {
        const auto [lane, bit] = place_of_three(s.int8, static_cast<int>(k % block), i);
        const int64_t at = n / cpu::kTileRows * tile_bytes + k / block * block_bytes + lane * cpu::kLineBytes + row_at;
        qweight[at + bit / 8] |= static_cast<uint8_t>((code >> i & 1) << bit % 8);
      }
      int64_t plane = n / cpu::kTileRows * tile_bytes + k / block * block_bytes;
      for (const int width : {low, high}) {
        if (width == 0 || s.bits == 3 || short_of_a_byte) continue;
        const int64_t lane = k % block / (32 / width), i = k % block % (32 / width);
        const int64_t bit = s.int8 ? 8 * (i & 3) + width * (i >> 2) : 16 * (i & 1) + width * (i >> 1);
        const int64_t at = lane * cpu::kLineBytes + row_at + bit / 8;
        const int field = (width == low ? code : code >> low) & ((1 << width) - 1);
        qweight[plane + at] |= static_cast<uint8_t>(field << bit % 8);
        plane += block * width * 32 / 8;
      }
    }
  }
  const int64_t step = s.strided ? 3 : 1, row = s.K * step + (s.strided ? 5 : 0);
  Numbers x(s.x, (s.M - 1) * row + (s.K - 1) * step + 1), scales(s.scale, groups);
  const bool products = s.factors != qkernels::Factors::kNone, any_zeros = s.zero != Type::kNone || s.offsets;
  Numbers zeros(s.zero == Type::kNone ? Type::kUInt8 : s.zero, any_zeros ? groups : 0);
  const int64_t per = !products ? 1 : s.factors == qkernels::Factors::kNvfp4M ? G : 256 / s.group;
  const int64_t S = (G + per - 1) / per;
  Numbers outer(Type::kHalf, products ? tiles * S * 32 : 0),
      outer_zeros(Type::kHalf, products && s.offsets ? tiles * S * 32 : 0);
  Numbers bias(s.bias == Type::kNone ? Type::kFloat : s.bias, s.bias == Type::kNone ? 0 : s.N);
  std::vector<int32_t> order(static_cast<size_t>(s.K));
  for (int64_t k = 0; k < s.K; ++k) order[k] = static_cast<int32_t>(s.ordered ? (k * 5 + 3) % s.K : k);
  if (s.ordered) order[0] = -7, order[s.K - 1] = 2000000000;  // clamped, not followed

  call.x = x.memory, call.x_type = s.x, call.x_row_stride = row, call.x_column_stride = step;
  call.qweight = qweight, call.scales = scales.memory, call.scale_type = s.scale;
  if (s.zero != Type::kNone) call.zeros = zeros.memory, call.zero_type = s.zero, call.zeros_are_offsets = s.offsets;
  if (s.bias != Type::kNone) call.bias = bias.memory, call.bias_type = s.bias;
  call.k_order = s.ordered ? order.data() : nullptr;
  call.int8_activations = s.int8, call.codebook = s.codebook, call.factors = s.factors;
  if (products) {
    call.outer_type = Type::kHalf, call.S = S, call.outer_shift = cpu::kind_of(s.factors).outer_shift;
    call.outer_scales = outer.memory, call.zeros_are_offsets = s.offsets;
    if (s.offsets) call.zeros = zeros.memory, call.outer_zeros = outer_zeros.memory;
  }
  call.y = std::malloc(bytes_of(s.x) * s.M * s.N);
  void* workspace = std::malloc(cpu::workspace_bytes(call, kernels));
  std::memset(workspace, 0xff, cpu::workspace_bytes(call, kernels));
  cpu::gemm(call, kernels, workspace, 2, two_threads);

  int wrong = 0;
  std::vector<double> plain_y(static_cast<size_t>(s.M * s.N)), step_of(static_cast<size_t>(s.M * s.N)),
      weight_of(static_cast<size_t>(s.N));  // of x as it is
  double top = 0;                           // of all |x|
  const bool rest = cpu::has_rest(call);
  const double rounding = s.x == Type::kFloat ? 0 : s.x == Type::kHalf ? 1.0 / 2048 : 1.0 / 256;
  for (int64_t m = 0; m < s.M; ++m) {
    std::vector<double> token(static_cast<size_t>(s.K));
    for (int64_t k = 0; k < s.K; ++k) token[k] = x.values[m * row + k * step];
    const std::vector<double> whole = token;
    double largest = 0;
    for (const double v : whole) largest = std::max(largest, std::abs(v));
    top = std::max(top, largest);
    if (s.int8) quantize(token);
    for (int64_t n = 0; n < s.N; ++n) {
      double magnitude = 0;  // of all terms: with a rest, the product with code - mid and that with the rest
      double y = s.bias == Type::kNone ? 0 : bias.values[n];
      for (int64_t k = 0; k < s.K; ++k) {
        const int64_t at = (n / cpu::kTileRows * G + k / s.group) * cpu::kTileRows + n % cpu::kTileRows;
        const int64_t above = (n / cpu::kTileRows * S + k / s.group / per) * cpu::kTileRows + n % cpu::kTileRows;
        const double scale = scales.values[at] * (products ? outer.values[above] : 1), code = codes[n * s.K + k];
        const double zero = !any_zeros ? 0
                            : products ? -zeros.values[at] * outer_zeros.values[above]
                                       : zeros.values[at];
        const double w = s.offsets               ? code * scale + zero
                         : s.zero == Type::kNone ? plain(s, codes[n * s.K + k]) * scale
                                                 : (code - zero) * scale;
        const int64_t column = order[k] < 0 ? 0 : order[k] >= s.K ? s.K - 1 : order[k];
        y += w * token[column];
        plain_y[m * s.N + n] += w * whole[column];
        step_of[m * s.N + n] += std::abs(w) * largest / 127;
        if (m == 0) weight_of[n] += std::abs(w);
        const double product = (code - (1 << (s.bits - 1))) * scale;
        magnitude += std::abs(token[column]) * (rest ? std::abs(product) + std::abs(w - product) : std::abs(w));
      }
      // Exact but for the output's rounding; with int8 activations, each group and the token's scale round in fp32 too
      // (tests/ops/test_int8.py counts).
      const double roundings = static_cast<double>(rest ? 2 * G + 7 : G + 4);
      const double scaled = s.int8 ? std::ldexp(roundings * (magnitude + std::abs(y)), -24) : 0;
      wrong += !(std::abs(read(s.x, call.y, m * s.N + n) - y) <= scaled + rounding * (std::abs(y) + scaled));
    }
  }
  // Other roundings of x, with buffers of their own size: within three steps (half of one for a code and for what is
  // clamped, half for a zero point, half where the quotient is rounded to bf16) of the product with x as it is.
  // Static ones: steps of the largest of all rows, with room for a zero point of 5.
  using qkernels::Rounding;
  for (const auto rounding_of_x :
       {Rounding::kWide, Rounding::kZeroPoint, Rounding::kOutliers, Rounding::kStatic, Rounding::kStaticZero}) {
    if (!s.int8 || s.M * s.N > 700) continue;
    cpu::Call other = call;
    other.rounding = rounding_of_x;
    const bool is_static = qkernels::is_static(rounding_of_x);
    const double step_of_all = top > 0 ? top / 120 : 1;
    other.x_scale = static_cast<float>(step_of_all), other.x_zero = rounding_of_x == Rounding::kStaticZero ? 5 : 0;
    other.y = std::malloc(bytes_of(s.x) * s.M * s.N);
    void* room = std::malloc(cpu::workspace_bytes(other, kernels));
    std::memset(room, 0xff, cpu::workspace_bytes(other, kernels));
    cpu::gemm(other, kernels, room, 2, two_threads);
    for (int64_t i = 0; i < s.M * s.N; ++i) {
      const double y = plain_y[i] + (s.bias == Type::kNone ? 0 : bias.values[i % s.N]);
      const double steps = 3 * (is_static ? weight_of[i % s.N] * step_of_all : step_of[i]);
      const double bound = steps + rounding * (std::abs(y) + steps) + 1e-6 * std::abs(y);
      wrong += !(std::abs(read(s.x, other.y, i) - y) <= bound);
    }
    std::free(room), std::free(other.y);
  }
  static int calls = 0;
  if (!s.strided && ++calls % 3 == 0) {  // experts have x in contiguous rows
    const auto size = [](Type type) { return static_cast<int64_t>(bytes_of(type)); };
    wrong += run_grouped(call,
                         {tiles * tile_bytes, groups * size(s.scale),
                          any_zeros ? groups * size(s.zero == Type::kNone ? Type::kUInt8 : s.zero) : 0,
                          products ? tiles * S * 32 * 2 : 0, products && s.offsets ? tiles * S * 32 * 2 : 0,
                          s.bias == Type::kNone ? 0 : s.N * size(s.bias)},
                         kernels);
  }
  std::free(workspace), std::free(call.y), std::free(qweight);
  return wrong;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2 || cpu::choose(argv[1]) != nullptr) return 77;
  const cpu::Kernels& kernels = *cpu::current().kernels;
  const cpu::Kernels& int8 = cpu::int8_kernels(kernels);
  const bool short_of_a_byte = argc > 2 && std::strcmp(argv[2], "short") == 0;
  const Type floats[] = {Type::kFloat, Type::kHalf, Type::kBFloat16};
  int cases = 0, wrong = 0;
  for (const int64_t M : {1, 2, 4, 5, 8, 9, 13, 33, 65}) {
    for (const int64_t N : {1, 31, 33, 64, 70}) {
      for (const int64_t K : {1, 7, 8, 9, 40, 129, 264}) {
        for (int round = 0; round < 2; ++round, ++cases) {  // everything else in turn, at prime or coprime steps
          const int64_t group[] = {8, K, 24, 128, K, 16, 136};
          const int bits[] = {4, 8, 2, 6, 4, 3, 5, 7};
          const int zero = cases % 11 % 4;
          const Type zero_type = zero == 0 ? Type::kNone : zero == 1 ? Type::kUInt8 : floats[cases % 3];
          const Type bias_type = cases % 4 == 3 ? Type::kNone : floats[cases % 4];
          wrong += run({M, N, K, group[cases % 7], bits[cases % 8], floats[cases % 13 % 3], floats[cases % 17 % 3],
                        zero_type, bias_type, zero == 3, cases % 2 == 1, cases % 19 % 3 == 0, false},
                       kernels, short_of_a_byte);
          wrong += run({M, N, K, group[cases % 7], bits[cases % 8], floats[cases % 13 % 3], floats[cases % 17 % 3],
                        zero_type, bias_type, zero == 3, cases % 2 == 1, cases % 19 % 3 == 0, true},
                       int8, short_of_a_byte);
          Shape special{M,
                        N,
                        K,
                        group[cases % 7],
                        0,
                        floats[cases % 13 % 3],
                        Type::kNone,
                        Type::kNone,
                        bias_type,
                        false,
                        cases % 2 == 1,
                        cases % 19 % 3 == 0,
                        cases % 5 > 2};
          make_special(special, cases % 11);
          if (special.bits == 8) special.int8 = false;
          wrong += run(special, special.int8 ? int8 : kernels, short_of_a_byte);
        }
      }
    }
  }
  std::printf("%s: %d cases, %d wrong entries\n", kernels.name, cases, wrong);
  return wrong != 0;
}
