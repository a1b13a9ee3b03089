// SPDX-License-Identifier: Apache-2.0
//
// Launcher of transpose_values.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace slope {

struct TransposeParams {
  const void* values;        // [rows, columns / 2], 16-byte aligned
  const uint8_t* bitmask;    // [rows, columns / 8]
  const uint8_t* bitmask_t;  // [columns, rows / 8]
  void* out;                 // [columns, rows / 2], 8-byte aligned
  int64_t rows;              // multiple of 8, at most 128 * 65535
  int64_t columns;           // multiple of 8
  int element_bytes;         // 2 (fp16, bf16) or 4 (fp32)
};

// out <- the elements of the transposed weight that bitmask_t keeps; 0 where bitmask pruned them.
cudaError_t launch_transpose_values(const TransposeParams& params, cudaStream_t stream);

}  // namespace slope
