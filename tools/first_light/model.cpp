// The model of csrc/cuda/heuristics.h for fit.py, over many rows at a time and with any numbers of a card.
//
// A row's problem is kProblem ints: N K M bits group zeros(0 none, 1 int, 2 float, 3 offset) half act sm
// multiprocessors; its configuration kConfig ints: path tokens warps_n warps_k splits half_accumulate stages. Clusters
// are one device's, as Clusters has them. Numbers of a card are in the order of card.h.
#include <cmath>

#include "heuristics.h"

using namespace qkernels;
using namespace qkernels::cuda;

namespace {

constexpr int kProblem = 10, kConfig = 7;

Problem problem_at(const int* v, const int* clusters) {
  Weight w = make_weight(v[0], v[1], v[3], v[4], v[7] != 8);
  w.scale_type = Type::kBFloat16;
  w.zero_type = v[5] == 0 ? Type::kNone : v[5] == 1 ? Type::kUInt8 : Type::kBFloat16;
  const Device device{0, v[8], v[9], 0};
  Clusters active{};
  std::copy(clusters, clusters + 18, &active.active[0][0]);
  return problem_of(w, v[2], v[3], v[7], v[6] != 0, v[1] % 8 == 0, device, active);
}

Config config_at(const int* v) { return {static_cast<Path>(v[0]), v[1], v[2], v[3], v[4], v[5] != 0, v[6]}; }

Card card_at(const double* numbers) {
  Card card = cards::kH200;
  for (int i = 0; i < kCardNumbers; ++i) reinterpret_cast<Number*>(&card)[i].value = numbers[i];
  return card;
}

}  // namespace

extern "C" {

int model_numbers() { return kCardNumbers; }
const char* model_name(int i) { return kCardNames[i]; }
void model_card(int sm, double* to) {
  const Card card = card_of(sm);
  for (int i = 0; i < kCardNumbers; ++i) to[i] = reinterpret_cast<const Number*>(&card)[i].value;
}

void model_predict(int rows, const int* problems, const int* configs, const int* clusters, const double* numbers,
                   double* us) {
  const Card card = card_at(numbers);
  for (int i = 0; i < rows; ++i) {
    us[i] = predicted_ns(problem_at(problems + i * kProblem, clusters), card, config_at(configs + i * kConfig)) / 1e3;
  }
}

// The mean of log(predicted / measured)^2 over the rows that `counts`.
double model_loss(int rows, const int* problems, const int* configs, const int* clusters, const double* numbers,
                  const double* us, const char* counts) {
  const Card card = card_at(numbers);
  double sum = 0;
  int used = 0;
  for (int i = 0; i < rows; ++i) {
    if (counts[i] == 0) continue;
    const double ns =
        predicted_ns(problem_at(problems + i * kProblem, clusters), card, config_at(configs + i * kConfig));
    const double off = std::log(ns / (1e3 * us[i]));
    sum += off * off, ++used;
  }
  return used > 0 ? sum / used : 0;
}

}  // extern "C"
