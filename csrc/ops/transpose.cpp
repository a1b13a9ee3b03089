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
  const int64_t columns = values.size(1) * 2;
  check_columns(kOp, "values", "out", rows);
  check_tile_rows(kOp, rows);
  check_bitmask(kOp, "bitmask_t", bitmask_t, columns, rows, "values", values);
  check(out.is_cuda() && out.get_device() == values.get_device(), "slope::", kOp,
        ": out must be on the same device as values");
  check(out.scalar_type() == values.scalar_type(), "slope::", kOp,
        ": out must have the dtype of values");
  check(out.dim() == 2 && out.size(0) == columns && out.size(1) == rows / 2, "slope::", kOp,
        ": out must be [in, out/2] = [", columns, ", ", rows / 2, "], got ", ShapeOf{out});
  check(out.is_contiguous(), "slope::", kOp, ": out must be contiguous");
  check(reinterpret_cast<uintptr_t>(out.const_data_ptr()) % 8 == 0, "slope::", kOp,
        ": out must start at a multiple of 8 bytes");
  if (values.numel() == 0) {
    return;
  }

  const torch::stable::accelerator::DeviceGuard guard(values.get_device());
  const Tensor source = contiguous_16b(values);
  const Tensor mask = contiguous_16b(bitmask);
  const Tensor mask_t = contiguous_16b(bitmask_t);
  const TransposeParams params{
      .values = source.const_data_ptr(),
      .bitmask = static_cast<const uint8_t*>(mask.const_data_ptr()),
      .bitmask_t = static_cast<const uint8_t*>(mask_t.const_data_ptr()),
      .out = out.mutable_data_ptr(),
      .rows = rows,
      .columns = columns,
      .element_bytes = static_cast<int>(values.element_size()),
  };
  check_cuda(launch_transpose_values(params, current_stream(values, kOp)), kOp);
}

}  // namespace
}  // namespace slope

STABLE_TORCH_LIBRARY_IMPL(slope, CUDA, m) {
  m.impl("transpose_values", TORCH_BOX(&slope::transpose_values));
}
