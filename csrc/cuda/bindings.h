// What the bindings of dense products (bindings.cpp) and of stacked experts (bindings_experts.cpp) share.
#pragma once
#include "../inputs.h"
#include "checks.h"
#include "problem.h"

namespace qkernels::cuda {

void* current_stream(int32_t device);
// An error of a launch, as an exception.
void check(int error, const char* what);
// QKERNELS_LOG
bool logs();
// Of arguments that are right.
Weight weight_of(const Arguments& a, int64_t K);
// The current one; refused if it is too old.
Device checked_device();
Clusters checked_clusters(const Device& device);
// Null for no bytes; `to` holds the memory.
void* allocate(const Tensor& like, int64_t bytes, OptionalTensor& to);

}  // namespace qkernels::cuda
