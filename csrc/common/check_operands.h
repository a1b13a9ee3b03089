// SPDX-License-Identifier: Apache-2.0
//
// Argument checks that several ops share. Each raises RuntimeError "slope::<op>: <argument> ...".
#pragma once

#include "common/sparse24.h"
#include "common/torch_stable.h"
#include "common/weight.h"

namespace slope {

// `data` (named `name`) must be of fp16, bf16 or fp32; the types with CUDA kernels.
inline void check_floating(const char* op, const char* name, const Tensor& data) {
  const ScalarType dtype = data.scalar_type();
  check(dtype == ScalarType::Half || dtype == ScalarType::BFloat16 || dtype == ScalarType::Float,
        "slope::", op, ": ", name, " must be float16, bfloat16 or float32 on CUDA");
}

// `data` must be a matrix of such a type.
inline void check_matrix(const char* op, const char* name, const Tensor& data) {
  check_floating(op, name, data);
  check(data.dim() == 2, "slope::", op, ": ", name, " must have 2 dimensions, got ", data.dim());
}

// What the bits of a matrix mean that check_matrix let pass.
inline FloatKind kind_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Half:
      return FloatKind::kHalf;
    case ScalarType::BFloat16:
      return FloatKind::kBFloat16;
    default:
      return FloatKind::kFloat;
  }
}

// `size` (the `axis` of argument `name`) must be a multiple of 8: whole bytes of bitmask.
inline void check_columns(const char* op, const char* name, const char* axis, int64_t size) {
  check(size % kColumnsPerByte == 0, "slope::", op, ": ", name, " must have ", axis,
        " a multiple of 8, got ", axis, " = ", size);
}

// `rows` (of argument `name`) must make whole bytes of a transposed bitmask, and tiles of 128 rows
// along a grid dimension of at most 65535 blocks (common/tile.cuh).
inline void check_transposable(const char* op, const char* name, int64_t rows) {
  constexpr int64_t kMaxRows = int64_t{128} * 65535;
  check_columns(op, name, "out", rows);
  check(rows <= kMaxRows, "slope::", op, ": ", name, " must have at most ", kMaxRows, " rows, got ",
        rows);
}

// `bitmask` must be uint8 [rows, columns / 8] on the device of `beside` (named `beside_name`).
inline void check_bitmask(const char* op, const char* name, const Tensor& bitmask, int64_t rows,
                          int64_t columns, const char* beside_name, const Tensor& beside) {
  check(bitmask.is_cuda() && bitmask.get_device() == beside.get_device(), "slope::", op, ": ", name,
        " must be on the same device as ", beside_name);
  check(bitmask.scalar_type() == ScalarType::Byte, "slope::", op, ": ", name, " must be uint8");
  check(
      bitmask.dim() == 2 && bitmask.size(0) == rows && bitmask.size(1) == columns / kColumnsPerByte,
      "slope::", op, ": ", name, " must be [", rows, ", ", columns / kColumnsPerByte, "] beside ",
      beside_name, " ", ShapeOf{beside}, ", got ", ShapeOf{bitmask});
}

// A compressed weight: values [out, in/2] and bitmask [out, in/8], `in` a multiple of 8.
inline void check_compressed(const char* op, const Tensor& values, const Tensor& bitmask) {
  check(values.is_cuda(), "slope::", op,
        ": values must be on the device of the other arguments, a CUDA device");
  check_matrix(op, "values", values);
  const int64_t columns = values.size(1) * (kGroup / kKept);
  check_columns(op, "values", "in", columns);
  check_bitmask(op, "bitmask", bitmask, values.size(0), columns, "values", values);
}

// `tensor` must have the dtype and the device of `values`.
inline void check_like_values(const char* op, const char* name, const Tensor& tensor,
                              const Tensor& values) {
  check(tensor.is_cuda() && tensor.get_device() == values.get_device(), "slope::", op, ": ", name,
        " must be on the same device as values");
  check(tensor.scalar_type() == values.scalar_type(), "slope::", op, ": ", name,
        " must have the dtype of values");
}

// An activation [..., features] that meets `values`.
inline void check_tokens(const char* op, const char* name, const Tensor& x, int64_t features,
                         const Tensor& values) {
  check_like_values(op, name, x, values);
  check(x.dim() >= 1 && x.size(x.dim() - 1) == features, "slope::", op, ": ", name,
        " must have a last dimension of ", features, ", got shape ", ShapeOf{x});
}

// A vector [size], whose `meaning` is told.
inline void check_vector(const char* op, const char* name, const Tensor& vector, int64_t size,
                         const char* meaning, const Tensor& values) {
  check_like_values(op, name, vector, values);
  check(vector.dim() == 1 && vector.size(0) == size, "slope::", op, ": ", name, " must be ",
        meaning, " = [", size, "], got ", ShapeOf{vector});
}

// `values_t` (named `name`) must be the transposed [in, out/2] of `values`.
inline void check_values_t(const char* op, const char* name, const Tensor& values_t,
                           const Tensor& values) {
  const int64_t rows = values.size(1) * (kGroup / kKept);
  const int64_t columns = values.size(0) / (kGroup / kKept);
  check_like_values(op, name, values_t, values);
  check(values_t.dim() == 2 && values_t.size(0) == rows && values_t.size(1) == columns,
        "slope::", op, ": ", name, " must be [in, out/2] = [", rows, ", ", columns, "], got ",
        ShapeOf{values_t});
  check(values_t.is_contiguous(), "slope::", op, ": ", name, " must be contiguous");
}

// `written` (named `name`), which the op overwrites, must be contiguous and aligned to `bytes`.
inline void check_written(const char* op, const char* name, const Tensor& written, int bytes) {
  check(written.is_contiguous(), "slope::", op, ": ", name, " must be contiguous");
  check(reinterpret_cast<uintptr_t>(written.const_data_ptr()) % bytes == 0, "slope::", op, ": ",
        name, " must start at a multiple of ", bytes, " bytes");
}

}  // namespace slope
