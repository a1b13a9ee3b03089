// SPDX-License-Identifier: Apache-2.0
//
// linear on CUDA: Y = X W^T + b by the own kernel on Hopper (spmm_sm90.h), by a cached cuSPARSELt
// plan (spmm_plan.h), or with W decompressed where the sparse tensor cores do not take it.
#include "ops/spmm.h"

#include <atomic>
#include <vector>

#include "common/check_operands.h"
#include "common/cuda_check.h"
#include "common/round_up.h"
#include "ops/pack_metadata.h"
#include "ops/spmm_plan.h"
#include "ops/spmm_sm90.h"

namespace slope {
namespace {

constexpr int64_t kTokenMultiple = 8;  // what the library takes of 16-bit dense operands

void warn_dense_product(const Tensor& values) {
  static std::atomic<bool> warned{false};
  if (!warned.exchange(true)) {
    std::ostringstream message;
    message
        << "slope_ext: sparse products need float16 or bfloat16 weights; on compute capability 9.0 "
           "with out in multiples of 8 and in in multiples of 32, else cuSPARSELt >= 0.8 and both "
           "in multiples of 16; a weight with values "
        << ShapeOf{values}
        << " is decompressed and multiplied densely in every call, backward with in and out in "
           "each other's place: results are right, speed and memory are not "
           "(backend=\"reference\" says that this is wanted)";
    aoti_torch_warn("linear", "spmm.cpp", __LINE__, message.str().c_str());
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
  if (weight.metadata && weight.metadata->scalar_type() == ScalarType::Byte &&
      is_packed(weight.values, *weight.metadata)) [[likely]] {
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

  // Allocated in each call: CUDA graphs of torch.compile let nothing of their pool outlive a call
  OptionalTensor copy, workspace;
  if (const auto bytes = static_cast<int64_t>(plan->workspace_bytes()); bytes > 0) {
    workspace = empty_like_device(weight.values, {bytes}, ScalarType::Byte);
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
              const OptionalTensor& metadata_t, const std::string& backend,
              const std::string& activation) {
  constexpr const char* kOp = "linear";
  const SparseWeight weight{values, bitmask, bitmask_t, values_t, metadata, metadata_t};
  check_linear(kOp, x, weight, bias);
  const Activation applied = activation_of(kOp, activation, weight);
  const torch::stable::accelerator::DeviceGuard guard(values.get_device());
  switch (choose_backend(kOp, x, weight, backend)) {
    case Backend::kNative:
      return native_linear(kOp, x, weight, bias, std::nullopt, std::nullopt, applied);
    case Backend::kPlan:
      return activated(plan_linear(kOp, x, weight, bias, std::nullopt), applied);
    case Backend::kDense:
      break;
  }
  return activated(dense_linear(x, weight, bias), applied);
}

// Whether a matrix is the transpose of a contiguous one, 16-byte aligned.
bool is_transpose_16b(const Tensor& matrix) {
  return matrix.dim() == 2 && !matrix.is_contiguous() && matrix.stride(0) == 1 &&
         matrix.stride(1) == matrix.size(0) &&
         reinterpret_cast<uintptr_t>(matrix.const_data_ptr()) % 16 == 0;
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
  if (weight.metadata) {
    check_metadata(op, "metadata", *weight.metadata, "values", values, rows, columns);
  }
  if (weight.metadata_t) {
    check_metadata(op, "metadata_t", *weight.metadata_t, "values", values, columns, rows);
  }
}

Backend choose_backend(const char* op, const Tensor& x, const SparseWeight& weight,
                       const std::string& backend) {
  const bool automatic = backend == "auto";
  check(automatic || backend == "native" || backend == "cusparselt" || backend == "reference",
        "slope::", op, ": backend must be auto, native, cusparselt or reference, got ", backend);
  if (backend == "reference") {
    return Backend::kDense;
  }
  const Tensor& values = weight.values;
  const ScalarType dtype = values.scalar_type();
  const int64_t rows = values.size(0);
  const int64_t columns = values.size(1) * 2;
  const bool empty = values.numel() == 0 || x.numel() == 0;

  // Metadata for the library's kernels says that the weight is meant for those
  const bool for_plan = weight.metadata && weight.metadata->scalar_type() == ScalarType::Byte;
  if (backend == "native" || (automatic && !for_plan)) {
    const bool half = is_half(dtype);
    const bool fits = fits_native(rows, columns);
    const bool runs = half && fits && spmm_sm90_runs(values.get_device());
    if (!automatic) {
      check(half, "slope::", op, ": values must be float16 or bfloat16 for backend native");
      check(fits, "slope::", op,
            ": values must be of a weight with out in multiples of 8 and in in multiples of 32 for "
            "backend native, got out x in = ",
            rows, " x ", columns);
      check(runs, "slope::", op,
            ": backend native needs a GPU of compute capability 9.0 and a build for sm_90a");
    }
    if (runs) {
      return empty ? Backend::kDense : Backend::kNative;
    }
  }

  const bool fits =
      is_half(dtype) && fits_plan(rows, columns) && (!automatic || cusparselt::available());
  if (!automatic) {
    check_packable(op, "values", values, rows, columns);
  } else if (!fits) {
    warn_dense_product(values);
  }
  return fits && !empty ? Backend::kPlan : Backend::kDense;
}

Activation activation_of(const char* op, const std::string& name, const SparseWeight& weight) {
  if (name == "swiglu") {
    const int64_t rows = weight.values.size(0);
    check(rows % (2 * kGateRows) == 0, "slope::", op, ": values must have out a multiple of ",
          2 * kGateRows, " for activation swiglu, got out = ", rows);
    return Activation::kSwiglu;
  }
  check(name == "none" || name == "relu", "slope::", op,
        ": activation must be one of none, relu, swiglu, got ", name);
  return name == "relu" ? Activation::kRelu : Activation::kNone;
}

Tensor activated(const Tensor& y, Activation activation) {
  switch (activation) {
    case Activation::kNone:
      break;
    case Activation::kRelu:
      return call_op("aten::relu_", "", y);
    case Activation::kSwiglu: {
      const int64_t rows = y.size(y.dim() - 1);
      const int64_t tokens = rows == 0 ? 0 : y.numel() / rows;
      Tensor turns = torch::stable::view(y, {tokens, rows / (2 * kGateRows), 2, kGateRows});
      const Tensor gate = call_op("aten::silu", "", torch::stable::select(turns, 2, 0));
      const Tensor product =
          call_op("aten::mul", "Tensor", gate, torch::stable::select(turns, 2, 1));
      return torch::stable::reshape(product, shape_with(y, features_of(rows, activation)));
    }
  }
  return y;
}

Tensor native_linear(const char* op, const Tensor& x, const SparseWeight& weight,
                     const OptionalTensor& bias, const OptionalTensor& tail_x,
                     const OptionalTensor& tail_weight, Activation activation) {
  const int64_t rows = weight.values.size(0);
  const int64_t columns = weight.values.size(1) * 2;
  const cudaStream_t stream = current_stream(weight.values, op);
  const Tensor input = contiguous_16b(x);
  const Tensor values = contiguous_16b(weight.values);
  OptionalTensor words;
  if (weight.metadata && weight.metadata->scalar_type() == ScalarType::Int) [[likely]] {
    words = contiguous_16b(*weight.metadata);
  } else {
    words =
        torch::stable::new_empty(weight.bitmask, {metadata_words(rows, columns)}, ScalarType::Int);
    write_words(op, contiguous_16b(weight.bitmask), words->mutable_data_ptr(), stream);
  }
  const auto aligned = [](const OptionalTensor& tensor) {
    return tensor ? OptionalTensor(contiguous_16b(*tensor)) : std::nullopt;
  };
  OptionalTensor vector;
  if (bias) {
    vector = torch::stable::contiguous(*bias);
  }
  const bool transposed = tail_weight && is_transpose_16b(*tail_weight);
  const OptionalTensor left = aligned(tail_x);
  const OptionalTensor right = transposed ? tail_weight : aligned(tail_weight);
  Tensor y = empty_like_device(x, shape_with(x, features_of(rows, activation)), x.scalar_type());
  const auto pointer = [](const OptionalTensor& tensor) {
    return tensor ? tensor->const_data_ptr() : nullptr;
  };
  const SpmmSm90Params params{
      .x = input.const_data_ptr(),
      .values = values.const_data_ptr(),
      .metadata = words->const_data_ptr(),
      .tail_x = pointer(left),
      .tail_weight = pointer(right),
      .bias = pointer(vector),
      .y = y.mutable_data_ptr(),
      .tokens = x.numel() / columns,
      .rows = rows,
      .columns = columns,
      .rank = right ? right->size(1) : 0,
      .first_rows = 0,
      .kind = values.scalar_type() == ScalarType::Half ? FloatKind::kHalf : FloatKind::kBFloat16,
      .tile = -1,
      .rest_tile = 0,
      .device = values.get_device(),
      .activation = activation,
      .tail_is_transposed = transposed,
  };
  check_cuda(launch_spmm_sm90(params, stream), op);
  return y;
}

Tensor plan_linear(const char* op, const Tensor& x, const SparseWeight& weight,
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
