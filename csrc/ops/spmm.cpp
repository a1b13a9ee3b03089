// SPDX-License-Identifier: Apache-2.0
//
// linear on CUDA: Y = X W^T + b by a cached cuSPARSELt plan (spmm_plan.h), or with W decompressed
// where the sparse tensor cores do not take it.
#include "ops/spmm.h"

#include <atomic>
#include <vector>

#include "common/check_operands.h"
#include "common/cuda_check.h"
#include "common/round_up.h"
#include "ops/pack_metadata.h"
#include "ops/spmm_plan.h"

namespace slope {
namespace {

constexpr int64_t kTokenMultiple = 8;  // what the library takes of 16-bit dense operands

void warn_dense_product(const Tensor& values) {
  static std::atomic<bool> warned{false};
  if (!warned.exchange(true)) {
    std::ostringstream message;
    message
        << "slope_ext: sparse products need cuSPARSELt >= 0.8 and float16 or bfloat16 weights with "
           "out and in multiples of 16; a weight with values "
        << ShapeOf{values}
        << " is decompressed and multiplied densely in every call: results are right, speed "
           "and memory are not (backend=\"reference\" says that this is wanted)";
    aoti_torch_warn("linear", "spmm.cpp", __LINE__, message.str().c_str());
  }
}

// Metadata of a weight [rows, columns] beside `values`, where it is given.
void check_metadata(const char* op, const char* name, const OptionalTensor& metadata,
                    const Tensor& values, int64_t rows, int64_t columns) {
  if (metadata) {
    check(metadata->is_cuda() && metadata->get_device() == values.get_device(), "slope::", op, ": ",
          name, " must be on the same device as values");
    const int64_t bytes = metadata_bytes(rows, columns);
    check(metadata->scalar_type() == ScalarType::Byte && metadata->dim() == 1 &&
              metadata->size(0) == bytes && metadata->is_contiguous(),
          "slope::", op, ": ", name, " must be contiguous uint8 [", bytes, "], got ",
          ShapeOf{*metadata});
  }
}

// Whether `metadata` lies right behind `values`, with the room behind it that kernels want.
bool is_packed(const Tensor& values, const Tensor& metadata) {
  const auto* const start = static_cast<const uint8_t*>(values.const_data_ptr());
  int64_t storage_bytes = 0, offset = 0;
  SLOPE_TORCH_CHECK(aoti_torch_get_storage_size(metadata.get(), &storage_bytes));
  SLOPE_TORCH_CHECK(aoti_torch_get_storage_offset(metadata.get(), &offset));
  return values.is_contiguous() && reinterpret_cast<uintptr_t>(start) % 16 == 0 &&
         start + values.numel() * 2 == metadata.const_data_ptr() &&
         offset + metadata.numel() + kOverreadBytes <= storage_bytes;
}

// The address of [values | metadata]: of the values, where the metadata lies behind them; else of a
// copy, which `copy` then owns.
const void* packed_operand(const SparseWeight& weight, OptionalTensor& copy) {
  if (weight.metadata && is_packed(weight.values, *weight.metadata)) [[likely]] {
    return weight.values.const_data_ptr();
  }
  copy = call_op("slope::pack", "", weight.values, weight.bitmask);
  return copy->const_data_ptr();
}

// y [tokens, out] <- x [tokens, in] W^T [+ y] [+ bias]; tokens a multiple of 8, x, bias and y
// contiguous from a multiple of 16 bytes.
void multiply(const char* op, const Tensor& x, int64_t tokens, const SparseWeight& weight,
              const OptionalTensor& bias, bool accumulate, const Tensor& y) {
  const SpmmProblem problem{
      .rows = weight.values.size(0),
      .columns = weight.values.size(1) * 2,
      .tokens = tokens,
      .device = weight.values.get_device(),
      .bfloat16 = weight.values.scalar_type() == ScalarType::BFloat16,
      .bias = bias.has_value(),
      .accumulate = accumulate,
  };
  const cudaStream_t stream = current_stream(weight.values, op);
  const auto plan = spmm_plan(problem, stream);

  OptionalTensor copy, workspace;
  if (plan->workspace_bytes() > 0) {
    workspace = spmm_workspace(*plan, weight.values, stream);
  }
  const SpmmOperands operands{
      .packed = packed_operand(weight, copy),
      .x = x.const_data_ptr(),
      .bias = bias ? bias->const_data_ptr() : nullptr,
      .y = y.mutable_data_ptr(),
      .workspace = workspace ? workspace->mutable_data_ptr() : nullptr,
  };
  plan->run(operands, stream);
}

// [tokens, features] with zero tokens appended up to `padded`.
Tensor pad_tokens(const Tensor& tensor, int64_t tokens, int64_t features, int64_t padded) {
  const Tensor flat = torch::stable::reshape(tensor, {tokens, features});
  return torch::stable::pad(flat, {0, 0, 0, padded - tokens});
}

Tensor linear(const Tensor& x, const Tensor& values, const Tensor& bitmask,
              const OptionalTensor& bias, const OptionalTensor& bitmask_t,
              const OptionalTensor& values_t, const OptionalTensor& metadata,
              const OptionalTensor& metadata_t, const std::string& backend) {
  constexpr const char* kOp = "linear";
  const SparseWeight weight{values, bitmask, bitmask_t, values_t, metadata, metadata_t};
  check_linear(kOp, x, weight, bias);
  const torch::stable::accelerator::DeviceGuard guard(values.get_device());
  if (takes_plan(kOp, weight, backend) && x.numel() > 0) {
    return sparse_linear(kOp, x, weight, bias, std::nullopt);
  }
  return dense_linear(x, weight, bias);
}

}  // namespace

// ---- for other ops -------------------------------------------------------------------------

void check_linear(const char* op, const Tensor& x, const SparseWeight& weight,
                  const OptionalTensor& bias) {
  const Tensor& values = weight.values;
  check_compressed(op, values, weight.bitmask);
  const int64_t rows = values.size(0);
  const int64_t columns = values.size(1) * 2;
  check_tokens(op, "x", x, columns, values);
  if (bias) {
    check_vector(op, "bias", *bias, rows, "[out]", values);
  }
  check(weight.bitmask_t || !weight.values_t, "slope::", op,
        ": values_t must come with bitmask_t, got None");
  if (weight.bitmask_t) {
    check_columns(op, "values", "out", rows);
    check_bitmask(op, "bitmask_t", *weight.bitmask_t, columns, rows, "values", values);
  }
  if (weight.values_t) {
    check_values_t(op, "values_t", *weight.values_t, values);
  }
  check_metadata(op, "metadata", weight.metadata, values, rows, columns);
  check_metadata(op, "metadata_t", weight.metadata_t, values, columns, rows);
}

bool takes_plan(const char* op, const SparseWeight& weight, const std::string& backend) {
  check(backend == "auto" || backend == "cusparselt" || backend == "reference", "slope::", op,
        ": backend must be auto, cusparselt or reference, got ", backend);
  if (backend == "reference") {
    return false;
  }
  const Tensor& values = weight.values;
  const int64_t rows = values.size(0);
  const int64_t columns = values.size(1) * 2;
  const bool fits = fits_sparse_cores(values.scalar_type(), rows, columns) &&
                    (backend == "cusparselt" || cusparselt::available());
  if (backend == "cusparselt") {
    check_packable(op, "values", values, rows, columns);
  } else if (!fits) {
    warn_dense_product(values);
  }
  return fits && values.numel() > 0;
}

Tensor sparse_linear(const char* op, const Tensor& x, const SparseWeight& weight,
                     const OptionalTensor& bias, const OptionalTensor& addend) {
  const int64_t rows = weight.values.size(0);
  const int64_t columns = weight.values.size(1) * 2;
  const int64_t tokens = x.numel() / columns;
  const OptionalTensor aligned_bias = bias ? OptionalTensor(contiguous_16b(*bias)) : std::nullopt;

  if (tokens % kTokenMultiple == 0) [[likely]] {
    Tensor y = addend ? *addend : empty_like_device(x, shape_with(x, rows), x.scalar_type());
    multiply(op, contiguous_16b(x), tokens, weight, aligned_bias, addend.has_value(), y);
    return y;
  }
  const int64_t padded = round_up(tokens, kTokenMultiple);
  const Tensor y = addend ? pad_tokens(*addend, tokens, rows, padded)
                          : empty_like_device(x, {padded, rows}, x.scalar_type());
  multiply(op, pad_tokens(x, tokens, columns, padded), padded, weight, aligned_bias,
           addend.has_value(), y);
  Tensor cut(y);
  return torch::stable::view(torch::stable::narrow(cut, 0, 0, tokens), shape_with(x, rows));
}

Tensor dense_linear(const Tensor& x, const SparseWeight& weight, const OptionalTensor& bias) {
  const Tensor dense = call_op("slope::decompress", "", weight.values, weight.bitmask);
  return call_op("aten::linear", "", x, dense, bias);
}

std::vector<int64_t> shape_with(const Tensor& x, int64_t features) {
  std::vector<int64_t> shape(x.dim());
  for (int64_t dim = 0; dim < x.dim() - 1; ++dim) {
    shape[dim] = x.size(dim);
  }
  shape.back() = features;
  return shape;
}

}  // namespace slope

STABLE_TORCH_LIBRARY_IMPL(slope, CUDA, m) { m.impl("linear", TORCH_BOX(&slope::linear)); }
