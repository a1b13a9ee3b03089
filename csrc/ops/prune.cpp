// SPDX-License-Identifier: Apache-2.0
//
// The ops that choose masks on CUDA: checks, allocation, launch.
#include "ops/prune.h"

#include <tuple>

#include "common/check_operands.h"
#include "common/cuda_check.h"
#include "common/torch_stable.h"

namespace slope {
namespace {

void check_dense(const char* op, const char* name, const Tensor& dense) {
  check_matrix(op, name, dense);
  check_columns(op, name, "its last dimension", dense.size(1));
}

Tensor new_values(const Tensor& like, int64_t rows, int64_t columns) {
  return torch::stable::new_empty(like, {rows, columns / (kGroup / kKept)});
}

Tensor new_bitmask(const Tensor& like, int64_t rows, int64_t columns) {
  return torch::stable::new_empty(like, {rows, columns / kColumnsPerByte}, ScalarType::Byte);
}

Tensor prune_24(const Tensor& scores) {
  constexpr const char* kOp = "prune_24";
  check_dense(kOp, "scores", scores);
  const torch::stable::accelerator::DeviceGuard guard(scores.get_device());

  Tensor bitmask = new_bitmask(scores, scores.size(0), scores.size(1));
  if (scores.numel() == 0) {
    return bitmask;
  }
  const Tensor source = contiguous_16b(scores);
  const WeightParams weight{
      .dense = source.const_data_ptr(),
      .bitmask = static_cast<uint8_t*>(bitmask.mutable_data_ptr()),
      .rows = scores.size(0),
      .columns = scores.size(1),
      .kind = kind_of(scores),
  };
  check_cuda(launch_prune_24(weight, current_stream(scores, kOp)), kOp);
  return bitmask;
}

std::tuple<Tensor, Tensor> prune_compress(const Tensor& dense) {
  constexpr const char* kOp = "prune_compress";
  check_dense(kOp, "dense", dense);
  const int64_t rows = dense.size(0);
  const int64_t columns = dense.size(1);
  const torch::stable::accelerator::DeviceGuard guard(dense.get_device());

  Tensor values = new_values(dense, rows, columns);
  Tensor bitmask = new_bitmask(dense, rows, columns);
  if (dense.numel() != 0) {
    const Tensor source = contiguous_16b(dense);
    const WeightParams weight{
        .dense = source.const_data_ptr(),
        .values = values.mutable_data_ptr(),
        .bitmask = static_cast<uint8_t*>(bitmask.mutable_data_ptr()),
        .rows = rows,
        .columns = columns,
        .kind = kind_of(dense),
    };
    check_cuda(launch_prune_compress(weight, current_stream(dense, kOp)), kOp);
  }
  return {values, bitmask};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> prune_compress_transposed(const Tensor& dense) {
  constexpr const char* kOp = "prune_compress_transposed";
  check_dense(kOp, "dense", dense);
  const int64_t rows = dense.size(0);
  const int64_t columns = dense.size(1);
  check_transposable(kOp, "dense", rows);
  const torch::stable::accelerator::DeviceGuard guard(dense.get_device());

  Tensor values = new_values(dense, rows, columns);
  Tensor bitmask = new_bitmask(dense, rows, columns);
  Tensor values_t = new_values(dense, columns, rows);
  Tensor bitmask_t = new_bitmask(dense, columns, rows);
  if (dense.numel() != 0) {
    const Tensor source = contiguous_16b(dense);
    const WeightParams weight{
        .dense = source.const_data_ptr(),
        .values = values.mutable_data_ptr(),
        .bitmask = static_cast<uint8_t*>(bitmask.mutable_data_ptr()),
        .values_t = values_t.mutable_data_ptr(),
        .bitmask_t = static_cast<uint8_t*>(bitmask_t.mutable_data_ptr()),
        .rows = rows,
        .columns = columns,
        .kind = kind_of(dense),
    };
    check_cuda(launch_prune_compress_transposed(weight, current_stream(dense, kOp)), kOp);
  }
  return {values, bitmask, values_t, bitmask_t};
}

Tensor prune_transposed(const Tensor& values, const Tensor& bitmask) {
  constexpr const char* kOp = "prune_transposed";
  check_compressed(kOp, values, bitmask);
  const int64_t rows = values.size(0);
  const int64_t columns = values.size(1) * (kGroup / kKept);
  check_transposable(kOp, "values", rows);
  const torch::stable::accelerator::DeviceGuard guard(values.get_device());

  Tensor bitmask_t = new_bitmask(values, columns, rows);
  if (values.numel() == 0) {
    return bitmask_t;
  }
  const Tensor source = contiguous_16b(values);
  const Tensor mask = contiguous_16b(bitmask);
  const WeightParams weight{
      .values = source.data_ptr(),
      .bitmask = static_cast<uint8_t*>(mask.data_ptr()),
      .bitmask_t = static_cast<uint8_t*>(bitmask_t.mutable_data_ptr()),
      .rows = rows,
      .columns = columns,
      .kind = kind_of(values),
  };
  check_cuda(launch_prune_transposed(weight, current_stream(values, kOp)), kOp);
  return bitmask_t;
}

void double_prune_(const Tensor& values, const Tensor& bitmask, Tensor bitmask_t, Tensor values_t) {
  constexpr const char* kOp = "double_prune_";
  check_compressed(kOp, values, bitmask);
  const int64_t rows = values.size(0);
  const int64_t columns = values.size(1) * (kGroup / kKept);
  check_transposable(kOp, "values", rows);
  check_bitmask(kOp, "bitmask_t", bitmask_t, columns, rows, "values", values);
  check_written(kOp, "bitmask_t", bitmask_t, 4);
  check_values_t(kOp, "values_t", values_t, values);
  check_written(kOp, "values_t", values_t, 8);
  if (values.numel() == 0) {
    return;
  }

  const torch::stable::accelerator::DeviceGuard guard(values.get_device());
  const Tensor source = contiguous_16b(values);
  const Tensor mask = contiguous_16b(bitmask);
  const WeightParams weight{
      .values = source.data_ptr(),
      .bitmask = static_cast<uint8_t*>(mask.data_ptr()),
      .values_t = values_t.mutable_data_ptr(),
      .bitmask_t = static_cast<uint8_t*>(bitmask_t.mutable_data_ptr()),
      .rows = rows,
      .columns = columns,
      .kind = kind_of(values),
  };
  check_cuda(launch_double_prune(weight, current_stream(values, kOp)), kOp);
}

}  // namespace
}  // namespace slope

STABLE_TORCH_LIBRARY_IMPL(slope, CUDA, m) {
  m.impl("prune_24", TORCH_BOX(&slope::prune_24));
  m.impl("prune_compress", TORCH_BOX(&slope::prune_compress));
  m.impl("prune_compress_transposed", TORCH_BOX(&slope::prune_compress_transposed));
  m.impl("prune_transposed", TORCH_BOX(&slope::prune_transposed));
  m.impl("double_prune_", TORCH_BOX(&slope::double_prune_));
}
