// SPDX-License-Identifier: Apache-2.0
//
// The sparse product, for the ops that are made of it.
#pragma once

#include <cuda_runtime.h>

#include <optional>
#include <string>
#include <vector>

#include "common/activation.h"
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

// What multiplies: the own kernel (spmm_sm90.h), a cuSPARSELt plan, or cuBLAS.
enum class Backend { kNative, kPlan, kDense };

// Raises RuntimeError where `backend` is unknown or asks for what the weight does not allow; warns
// once of a weight that "auto" must decompress. The current device is the weight's.
Backend choose_backend(const char* op, const Tensor& x, const SparseWeight& weight,
                       const std::string& backend);

// What an op does to its result. Raises RuntimeError for a name that is none of them, and for
// "swiglu" where out is no multiple of 16.
Activation activation_of(const char* op, const std::string& name, const SparseWeight& weight);

// activation(y) of a contiguous tensor, in its dtype; may be y, written over.
Tensor activated(const Tensor& y, Activation activation);

// activation(x W^T [+ tail_x tail_weight^T] [+ bias]) by the own kernel, on the current device; x
// not empty. tail_x [..., rank] and tail_weight [out, rank], rank a multiple of 8, or neither;
// tail_weight may be the transpose of a contiguous matrix, which is read as it lies.
Tensor native_linear(const char* op, const Tensor& x, const SparseWeight& weight,
                     const OptionalTensor& bias, const OptionalTensor& tail_x,
                     const OptionalTensor& tail_weight, Activation activation);

// x W^T [+ addend] [+ bias] by a plan, on the current device; x not empty. The addend [..., out]
// must be contiguous; the result may be written over it.
Tensor plan_linear(const char* op, const Tensor& x, const SparseWeight& weight,
                   const OptionalTensor& bias, const OptionalTensor& addend);

// x W^T [+ bias] with W decompressed.
Tensor dense_linear(const Tensor& x, const SparseWeight& weight, const OptionalTensor& bias);

// [..., features] of x with another number of features.
std::vector<int64_t> shape_with(const Tensor& x, int64_t features);

}  // namespace slope
