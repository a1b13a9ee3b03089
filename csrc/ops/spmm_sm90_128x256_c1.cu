// SPDX-License-Identifier: Apache-2.0
//
// spmm_sm90 with tiles of 128 rows of W x 256 tokens, without clusters.
#include "ops/spmm_sm90.cuh"

template struct slope::SpmmSm90Tile<128, 256, 4, 1, 1>;
