// SPDX-License-Identifier: Apache-2.0
//
// weight_grad on CUDA: dW = dY^T X at the kept positions.
//
// A dense product makes some rows of dW at a time, compress reads them at once. The buffer is small
// enough to stay in the L2 cache, so no dense dW is written to memory or left behind, and large
// enough that the product fills the GPU.
#include <algorithm>

#include "common/check_operands.h"
#include "common/cuda_check.h"
#include "ops/compress.h"
#include "ops/spmm.h"

namespace slope {
namespace {

// Rows of dW that are made at a time: all, or a multiple of 256 whose bytes stay below those that
// the L2 cache keeps beside the product's own operands.
int64_t chunk_rows(int64_t rows, int64_t columns, int64_t element_bytes, int64_t l2_bytes) {
  constexpr int64_t kStep = 256;
  const int64_t most = std::max(kStep, l2_bytes * 3 / 4 / (columns * element_bytes));
  const int64_t chunks = (rows + most - 1) / most;
  const int64_t even = (rows + chunks - 1) / chunks;
  return std::min(rows, (even + kStep - 1) / kStep * kStep);
}

int64_t l2_bytes_of(int device) {
  int bytes = 0;
  check_cuda(cudaDeviceGetAttribute(&bytes, cudaDevAttrL2CacheSize, device), "weight_grad");
  return bytes;
}

Tensor weight_grad(const Tensor& dy, const Tensor& x, const Tensor& bitmask) {
  constexpr const char* kOp = "weight_grad";
  check_floating(kOp, "dy", dy);
  check(dy.dim() >= 1, "slope::", kOp, ": dy must have at least 1 dimension, got shape []");
  check(x.is_cuda() && x.get_device() == dy.get_device(), "slope::", kOp,
        ": x must be on the same device as dy");
  check(x.scalar_type() == dy.scalar_type(), "slope::", kOp, ": x must have the dtype of dy");
  bool same_leading = x.dim() == dy.dim();
  for (int64_t dim = 0; same_leading && dim < dy.dim() - 1; ++dim) {
    same_leading = x.size(dim) == dy.size(dim);
  }
  check(same_leading, "slope::", kOp, ": x must have the leading dimensions of dy ", ShapeOf{dy},
        ", got ", ShapeOf{x});
  const int64_t rows = dy.size(dy.dim() - 1);
  const int64_t columns = x.size(x.dim() - 1);
  check_columns(kOp, "x", "in", columns);
  check_bitmask(kOp, "bitmask", bitmask, rows, columns, "dy", dy);

  const torch::stable::accelerator::DeviceGuard guard(dy.get_device());
  Tensor values = torch::stable::new_empty(dy, {rows, columns / 2});
  if (values.numel() == 0 || dy.numel() == 0) {
    return torch::stable::zero_(values);
  }
  const int64_t tokens = dy.numel() / rows;
  const Tensor flat_dy = torch::stable::reshape(dy, {tokens, rows});
  const Tensor flat_x = torch::stable::reshape(x, {tokens, columns});
  const Tensor mask = contiguous_16b(bitmask);
  const auto element_bytes = static_cast<int64_t>(dy.element_size());
  const int64_t step = chunk_rows(rows, columns, element_bytes, l2_bytes_of(dy.get_device()));
  Tensor buffer = torch::stable::new_empty(dy, {step, columns});
  const cudaStream_t stream = current_stream(dy, kOp);

  for (int64_t row = 0; row < rows; row += step) {
    const int64_t count = std::min(step, rows - row);
    Tensor dy_rows(flat_dy);
    dy_rows = torch::stable::transpose(torch::stable::narrow(dy_rows, 1, row, count), 0, 1);
    const Tensor dense = torch::stable::narrow(buffer, 0, 0, count);
    call_op("aten::mm", "out", dy_rows, flat_x, dense);
    const CompressParams params{
        .dense = dense.mutable_data_ptr(),
        .values =
            static_cast<uint8_t*>(values.mutable_data_ptr()) + row * (columns / 2) * element_bytes,
        .bitmask = static_cast<const uint8_t*>(mask.const_data_ptr()) + row * (columns / 8),
        .elements = count * columns,
        .element_bytes = static_cast<int>(element_bytes),
    };
    check_cuda(launch_compress(params, stream), kOp);
  }
  return values;
}

}  // namespace
}  // namespace slope

STABLE_TORCH_LIBRARY_IMPL(slope, CUDA, m) { m.impl("weight_grad", TORCH_BOX(&slope::weight_grad)); }
