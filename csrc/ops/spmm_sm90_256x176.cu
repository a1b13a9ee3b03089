// SPDX-License-Identifier: Apache-2.0
//
// spmm_sm90 with tiles of 256 rows of W x 176 tokens.
#include "ops/spmm_sm90.cuh"

template struct slope::SpmmSm90Tile<256, 176, 4, 2, 1>;
