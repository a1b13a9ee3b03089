// SPDX-License-Identifier: Apache-2.0
//
// Launchers of the ops that choose masks. Of each four the two largest stay; ties: the lower index;
// NaN counts as +inf.
#pragma once

#include <cuda_runtime.h>

#include "common/weight.h"

namespace slope {

// bitmask <- the two largest of each four elements of dense, sign and all.
cudaError_t launch_prune_24(const WeightParams& weight, cudaStream_t stream);

// bitmask <- the two largest magnitudes of each four elements of dense; values <- those elements.
cudaError_t launch_prune_compress(const WeightParams& weight, cudaStream_t stream);

// bitmask_t <- of the kept elements the two of largest magnitude of each four rows; where fewer are
// kept, the lowest pruned rows fill up. Reads values and bitmask.
cudaError_t launch_prune_transposed(const WeightParams& weight, cudaStream_t stream);

// As launch_prune_transposed, and values_t <- the elements that bitmask_t keeps, 0 at fill-ups.
cudaError_t launch_double_prune(const WeightParams& weight, cudaStream_t stream);

// launch_prune_compress and launch_double_prune in one pass over dense.
cudaError_t launch_prune_compress_transposed(const WeightParams& weight, cudaStream_t stream);

}  // namespace slope
