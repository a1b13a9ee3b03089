// SPDX-License-Identifier: Apache-2.0
//
// spmm_sm90 with tiles of 128 rows of W x 192 tokens, in two segments of the columns.
#include "ops/spmm_sm90.cuh"

template struct slope::SpmmSm90Tile<128, 192, 5, 1, 2>;
