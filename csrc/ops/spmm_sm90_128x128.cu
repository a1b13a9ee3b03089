// SPDX-License-Identifier: Apache-2.0
//
// spmm_sm90 with tiles of 128 rows of W x 128 tokens.
#include "ops/spmm_sm90.cuh"

template cudaError_t slope::launch_spmm_sm90_tile<128, 128, 6, 1, 1>(const slope::SpmmSm90Args&,
                                                                     slope::FloatKind, unsigned,
                                                                     bool, cudaStream_t);
