// SPDX-License-Identifier: Apache-2.0
//
// spmm_sm90 with tiles of 256 rows of W x 168 tokens.
#include "ops/spmm_sm90.cuh"

template struct slope::SpmmSm90Tile<256, 168, 4, 2, 1>;
