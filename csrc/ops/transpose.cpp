// SPDX-License-Identifier: Apache-2.0
//
// transpose_values on CUDA: checks, launch.
#include "ops/transpose.h"

#include "common/check_operands.h"
#include "common/cuda_check.h"
#include "common/torch_stable.h"

namespace slope {
namespace {

void transpose_values(const Tensor& values, const Tensor& bitmask, const Tensor& bitmask_t,
                      Tensor out) {
  constexpr const char* kOp = "transpose_values";
  check_compressed(kOp, values, bitmask);
  const int64_t rows = values.size(0);
  const int64_t columns = values.size(1) * (kGroup / kKept);
  check_transposable(kOp, "values", rows);
  check_bitmask(kOp, "bitmask_t", bitmask_t, columns, rows, "values", values);
  check_values_t(kOp, "out", out, values);
  check_written(kOp, "out", out, 8);
  if (values.numel() == 0) {
    return;
  }

  const torch::stable::accelerator::DeviceGuard guard(values.get_device());
  const Tensor source = contiguous_16b(values);
  const Tensor mask = contiguous_16b(bitmask);
  const Tensor mask_t = contiguous_16b(bitmask_t);
  const WeightParams weight{
      .values = source.data_ptr(),
      .bitmask = static_cast<uint8_t*>(mask.data_ptr()),
      .values_t = out.mutable_data_ptr(),
      .bitmask_t = static_cast<uint8_t*>(mask_t.data_ptr()),
      .rows = rows,
      .columns = columns,
      .kind = kind_of(values),
  };
  check_cuda(launch_transpose_values(weight, current_stream(values, kOp)), kOp);
}

}  // namespace
}  // namespace slope

STABLE_TORCH_LIBRARY_IMPL(slope, CUDA, m) {
  m.impl("transpose_values", TORCH_BOX(&slope::transpose_values));
}
