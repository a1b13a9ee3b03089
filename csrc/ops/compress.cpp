// SPDX-License-Identifier: Apache-2.0
//
// compress and decompress on CUDA: checks, allocation, launch.
#include "ops/compress.h"

#include "common/cuda_check.h"
#include "common/sparse24.h"
#include "common/torch_stable.h"

namespace slope {
namespace {

// Raises unless `data` (named `name`) is fp16, bf16 or fp32 [rows, cols * keep] and bitmask is
// uint8 [rows, cols / 8] on the same GPU, cols a multiple of 8.
void check_operands(const char* op, const char* name, const Tensor& data, const Tensor& bitmask,
                    bool compressed) {
  const ScalarType dtype = data.scalar_type();
  check(dtype == ScalarType::Half || dtype == ScalarType::BFloat16 || dtype == ScalarType::Float,
        "slope::", op, ": ", name, " must be float16, bfloat16 or float32 on CUDA");
  check(data.dim() == 2, "slope::", op, ": ", name, " must have 2 dimensions, got ", data.dim());
  const int64_t cols = data.size(1) * (compressed ? kGroup / kKept : 1);
  check(cols % kColumnsPerByte == 0, "slope::", op, ": ", name, " must have a last dimension of ",
        compressed ? "in/2 with in" : "in", " a multiple of 8, got ", ShapeOf{data});
  check(bitmask.is_cuda() && bitmask.get_device() == data.get_device(), "slope::", op,
        ": bitmask must be on the same device as ", name);
  check(bitmask.scalar_type() == ScalarType::Byte, "slope::", op, ": bitmask must be uint8");
  check(bitmask.dim() == 2 && bitmask.size(0) == data.size(0) &&
            bitmask.size(1) == cols / kColumnsPerByte,
        "slope::", op, ": bitmask must be [", data.size(0), ", ", cols / kColumnsPerByte, "] for ",
        name, " ", ShapeOf{data}, ", got ", ShapeOf{bitmask});
}

Tensor compress(const Tensor& dense, const Tensor& bitmask) {
  check_operands("compress", "dense", dense, bitmask, /*compressed=*/false);
  const torch::stable::accelerator::DeviceGuard guard(dense.get_device());

  Tensor values = torch::stable::new_empty(dense, {dense.size(0), dense.size(1) / 2});
  if (dense.numel() == 0) {
    return values;
  }
  const Tensor source = contiguous_16b(dense);
  const Tensor mask = contiguous_16b(bitmask);
  const CompressParams params{
      .dense = source.data_ptr(),
      .values = values.mutable_data_ptr(),
      .bitmask = static_cast<const uint8_t*>(mask.const_data_ptr()),
      .elements = dense.numel(),
      .element_bytes = static_cast<int>(dense.element_size()),
  };
  check_cuda(launch_compress(params, current_stream(dense, "compress")), "compress");
  return values;
}

Tensor decompress(const Tensor& values, const Tensor& bitmask) {
  check_operands("decompress", "values", values, bitmask, /*compressed=*/true);
  const torch::stable::accelerator::DeviceGuard guard(values.get_device());

  Tensor dense = torch::stable::new_empty(values, {values.size(0), values.size(1) * 2});
  if (values.numel() == 0) {
    return dense;
  }
  const Tensor source = contiguous_16b(values);
  const Tensor mask = contiguous_16b(bitmask);
  const CompressParams params{
      .dense = dense.mutable_data_ptr(),
      .values = source.data_ptr(),
      .bitmask = static_cast<const uint8_t*>(mask.const_data_ptr()),
      .elements = dense.numel(),
      .element_bytes = static_cast<int>(values.element_size()),
  };
  check_cuda(launch_decompress(params, current_stream(values, "decompress")), "decompress");
  return dense;
}

}  // namespace
}  // namespace slope

STABLE_TORCH_LIBRARY_IMPL(slope, CUDA, m) {
  m.impl("compress", TORCH_BOX(&slope::compress));
  m.impl("decompress", TORCH_BOX(&slope::decompress));
}
