// SPDX-License-Identifier: Apache-2.0
//
// spmm_sm90 with tiles of 128 rows of W x 256 tokens, X shared by clusters of two.
#include "ops/spmm_sm90.cuh"

namespace slope {

cudaError_t launch_spmm_sm90_128x256(const SpmmSm90Args& args, FloatKind kind, unsigned blocks,
                                     cudaStream_t stream) {
  return sm90::launch<sm90::Tile<1, 256, 4, 2>>(args, kind, blocks, stream);
}

}  // namespace slope
