// SPDX-License-Identifier: Apache-2.0
//
// spmm_sm90 with tiles of 256 rows of W x 152 tokens.
#include "ops/spmm_sm90.cuh"

template cudaError_t slope::launch_spmm_sm90_tile<256, 152, 4, 2, 1>(const slope::SpmmSm90Args&,
                                                                     slope::FloatKind, unsigned,
                                                                     bool, cudaStream_t);
