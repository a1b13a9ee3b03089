// SPDX-License-Identifier: Apache-2.0
//
// compress and decompress on CUDA: checks, allocation, launch.
#include "ops/compress.h"

#include "common/check_operands.h"
#include "common/cuda_check.h"
#include "common/torch_stable.h"

namespace slope {
namespace {

Tensor compress(const Tensor& dense, const Tensor& bitmask) {
  check_matrix("compress", "dense", dense);
  check_columns("compress", "dense", "its last dimension", dense.size(1));
  check_bitmask("compress", "bitmask", bitmask, dense.size(0), dense.size(1), "dense", dense);
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
  check_compressed("decompress", values, bitmask);
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
