// SPDX-License-Identifier: Apache-2.0
//
// transpose_values:  values_t = compress(decompress(values, bitmask)^T, bitmask_t)
//
// The kernel is that of common/tile.cuh: a compressed W, a mask that is given. Traffic per dense
// element of b bytes: b/2 + 1/8 + 1/8 read, b/2 written (bf16: 2.25). Memory-bound.
#include "common/tile.cuh"
#include "ops/transpose.h"

namespace slope {

cudaError_t launch_transpose_values(const WeightParams& weight, cudaStream_t stream) {
  // Nothing is ranked, so both 2-byte types are one
  return weight.kind == FloatKind::kFloat
             ? launch_tile<FloatKind::kFloat, false, false, true>(weight, stream)
             : launch_tile<FloatKind::kHalf, false, false, true>(weight, stream);
}

}  // namespace slope
