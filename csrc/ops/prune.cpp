// SPDX-License-Identifier: Apache-2.0
//
// prune_24 and prune_transposed on CUDA: checks, allocation, launch.
#include "ops/prune.h"

#include "common/check_operands.h"
#include "common/cuda_check.h"
#include "common/torch_stable.h"

namespace slope {
namespace {

FloatKind kind_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Half:
      return FloatKind::kHalf;
    case ScalarType::BFloat16:
      return FloatKind::kBFloat16;
    default:
      return FloatKind::kFloat;  // check_matrix lets no other pass
  }
}

Tensor prune_24(const Tensor& scores) {
  check_matrix("prune_24", "scores", scores);
  check_columns("prune_24", "scores", "its last dimension", scores.size(1));
  const torch::stable::accelerator::DeviceGuard guard(scores.get_device());

  Tensor bitmask = torch::stable::new_empty(
      scores, {scores.size(0), scores.size(1) / kColumnsPerByte}, ScalarType::Byte);
  if (scores.numel() == 0) {
    return bitmask;
  }
  const Tensor source = contiguous_16b(scores);
  const PruneParams params{
      .scores = source.const_data_ptr(),
      .bitmask = static_cast<uint8_t*>(bitmask.mutable_data_ptr()),
      .elements = scores.numel(),
      .kind = kind_of(scores),
  };
  check_cuda(launch_prune_24(params, current_stream(scores, "prune_24")), "prune_24");
  return bitmask;
}

Tensor prune_transposed(const Tensor& values, const Tensor& bitmask) {
  constexpr const char* kOp = "prune_transposed";
  check_compressed(kOp, values, bitmask);
  const int64_t rows = values.size(0);
  const int64_t columns = values.size(1) * 2;
  check_columns(kOp, "values", "out", rows);
  check_tile_rows(kOp, rows);
  const torch::stable::accelerator::DeviceGuard guard(values.get_device());

  Tensor bitmask_t = torch::stable::new_empty(bitmask, {columns, rows / kColumnsPerByte});
  if (values.numel() == 0) {
    return bitmask_t;
  }
  const Tensor source = contiguous_16b(values);
  const Tensor mask = contiguous_16b(bitmask);
  const PruneTransposedParams params{
      .values = source.const_data_ptr(),
      .bitmask = static_cast<const uint8_t*>(mask.const_data_ptr()),
      .bitmask_t = static_cast<uint8_t*>(bitmask_t.mutable_data_ptr()),
      .rows = rows,
      .columns = columns,
      .kind = kind_of(values),
  };
  check_cuda(launch_prune_transposed(params, current_stream(values, kOp)), kOp);
  return bitmask_t;
}

}  // namespace
}  // namespace slope

STABLE_TORCH_LIBRARY_IMPL(slope, CUDA, m) {
  m.impl("prune_24", TORCH_BOX(&slope::prune_24));
  m.impl("prune_transposed", TORCH_BOX(&slope::prune_transposed));
}
