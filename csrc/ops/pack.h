// SPDX-License-Identifier: Apache-2.0
//
// Launchers of pack_metadata.
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

struct PackWordsParams {
  const uint8_t* bitmask;  // [rows, columns / 8], 2-byte aligned
  uint32_t* words;         // [ceil(rows / 64), ceil(columns / 256), 128, 4], 16-byte aligned
  int64_t rows;            // multiple of 8
  int64_t columns;         // multiple of 32
};

// words <- the metadata as spmm_sm90 wants it; any valid metadata beyond the weight.
cudaError_t launch_pack_words(const PackWordsParams& params, cudaStream_t stream);

// metadata <- where the kept elements are, as indices. Reads bitmask, writes metadata.
cudaError_t launch_pack_metadata(const PackMetadataParams& params, cudaStream_t stream);

}  // namespace slope

// launch_pack_metadata for tests/test_pack.py, of either layout on any device; `params` is a
// PackMetadataParams, the result a cudaError_t.
extern "C" __attribute__((visibility("default"))) int slope_pack_metadata(const void* params,
                                                                          void* stream);
