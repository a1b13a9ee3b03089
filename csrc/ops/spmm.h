// SPDX-License-Identifier: Apache-2.0
//
// The sparse product, for the ops that are made of it.
#pragma once

#include <optional>
#include <string>

#include "common/torch_stable.h"

namespace slope {

using OptionalTensor = std::optional<Tensor>;

// A weight in all the forms that linear and its relatives take; see csrc/library.cpp.
struct SparseWeight {
  const Tensor& values;
  const Tensor& bitmask;
  const OptionalTensor& bitmask_t;
  const OptionalTensor& values_t;
  const OptionalTensor& metadata;
  const OptionalTensor& metadata_t;
};

// Raises RuntimeError "slope::<op>: <argument> ..." unless all fit together.
void check_linear(const char* op, const Tensor& x, const SparseWeight& weight,
                  const OptionalTensor& bias);

// Whether sparse_linear takes a cuSPARSELt plan. Raises RuntimeError where `backend` is unknown or
// asks for what the weight does not allow; warns once of a weight that "auto" must decompress.
bool takes_plan(const char* op, const SparseWeight& weight, const std::string& backend);

// x W^T [+ addend] [+ bias] by a plan, on the current device; x not empty. The addend [..., out]
// must be contiguous; the result may be written over it.
Tensor sparse_linear(const char* op, const Tensor& x, const SparseWeight& weight,
                     const OptionalTensor& bias, const OptionalTensor& addend);

// x W^T [+ bias] with W decompressed.
Tensor dense_linear(const Tensor& x, const SparseWeight& weight, const OptionalTensor& bias);

// [..., features] of x with another number of features.
std::vector<int64_t> shape_with(const Tensor& x, int64_t features);

}  // namespace slope
