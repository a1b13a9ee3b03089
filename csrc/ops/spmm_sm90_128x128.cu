// SPDX-License-Identifier: Apache-2.0
//
// spmm_sm90 with tiles of 128 rows of W x 128 tokens.
#include "ops/spmm_sm90.cuh"

namespace slope {

cudaError_t launch_spmm_sm90_128x128(const SpmmSm90Args& args, FloatKind kind, unsigned blocks,
                                     cudaStream_t stream) {
  return sm90::launch<sm90::Tile<1, 128, 6, 1>>(args, kind, blocks, stream);
}

}  // namespace slope
