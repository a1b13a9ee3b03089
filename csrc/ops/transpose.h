// SPDX-License-Identifier: Apache-2.0
//
// Launcher of transpose_values.
#pragma once

#include <cuda_runtime.h>

#include "common/weight.h"

namespace slope {

// values_t <- the elements of the transposed W that bitmask_t keeps; 0 where bitmask pruned them.
// Reads values, bitmask and bitmask_t.
cudaError_t launch_transpose_values(const WeightParams& weight, cudaStream_t stream);

}  // namespace slope
