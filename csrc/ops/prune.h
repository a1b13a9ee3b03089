// SPDX-License-Identifier: Apache-2.0
//
// Launchers of prune_24 and prune_transposed.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace slope {

// Element types by what their bits mean.
enum class FloatKind { kHalf, kBFloat16, kFloat };

struct PruneParams {
  const void* scores;  // [elements], 16-byte aligned
  uint8_t* bitmask;    // [elements / 8]
  int64_t elements;    // multiple of 8
  FloatKind kind;
};

// bitmask <- the two largest of each four scores; ties: the lower index; NaN counts as +inf.
cudaError_t launch_prune_24(const PruneParams& params, cudaStream_t stream);

struct PruneTransposedParams {
  const void* values;      // [rows, columns / 2], 16-byte aligned
  const uint8_t* bitmask;  // [rows, columns / 8]
  uint8_t* bitmask_t;      // [columns, rows / 8]
  int64_t rows;            // multiple of 8, at most 128 * 65535
  int64_t columns;         // multiple of 8
  FloatKind kind;
};

// bitmask_t <- of the kept elements the two of largest magnitude of each four rows; ties: the lower
// row; where fewer are kept, the lowest pruned rows fill up.
cudaError_t launch_prune_transposed(const PruneTransposedParams& params, cudaStream_t stream);

}  // namespace slope
