// SPDX-License-Identifier: Apache-2.0
//
// Launcher of pack_metadata.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace slope {

// How the hardware metadata of 16-bit types lies in memory (docs/layouts.md draws both).
enum class MetadataLayout { kSm80, kSm90 };

struct PackMetadataParams {
  const uint8_t* bitmask;  // [rows, columns / 8], 4-byte aligned
  void* metadata;          // [rows * columns / 8] bytes, 8-byte aligned
  int64_t rows;            // multiple of 64 (kSm90) or 128 (kSm80)
  int64_t columns;         // multiple of 32 (kSm90) or 128 (kSm80)
  MetadataLayout layout;
};

// metadata <- where the kept elements are, as indices. Reads bitmask, writes metadata.
cudaError_t launch_pack_metadata(const PackMetadataParams& params, cudaStream_t stream);

}  // namespace slope
