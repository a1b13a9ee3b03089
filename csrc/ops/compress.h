// SPDX-License-Identifier: Apache-2.0
//
// Launchers of compress and decompress.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/weight.h"

namespace slope {

// One weight, row-major and contiguous; rows do not matter, since no group crosses one.
struct CompressParams {
  void* dense;             // [elements], 2- or 4-byte elements, 16-byte aligned
  void* values;            // [elements / 2], same type, 16-byte aligned
  const uint8_t* bitmask;  // [elements / 8], 1 = kept
  int64_t elements;        // dense elements, a multiple of 8
  int element_bytes;       // 2 (fp16, bf16) or 4 (fp32)
};

// values <- dense at the kept positions. Reads dense and bitmask, writes values.
cudaError_t launch_compress(const CompressParams& params, cudaStream_t stream);

// values <- values + dense at the kept positions, summed in fp32. `kind` is that of the elements.
cudaError_t launch_compress_add(const CompressParams& params, FloatKind kind, cudaStream_t stream);

// dense <- values at the kept positions, +0 elsewhere. Reads values and bitmask, writes dense.
cudaError_t launch_decompress(const CompressParams& params, cudaStream_t stream);

}  // namespace slope
