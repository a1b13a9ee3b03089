// SPDX-License-Identifier: Apache-2.0
//
// spmm_sm90 with tiles of 256 rows of W x 192 tokens, X shared by clusters of two.
#include "ops/spmm_sm90.cuh"

namespace slope {

cudaError_t launch_spmm_sm90_256x192(const SpmmSm90Args& args, FloatKind kind, unsigned blocks,
                                     cudaStream_t stream) {
  return sm90::launch<sm90::Tile<2, 192, 4, 2>>(args, kind, blocks, stream);
}

}  // namespace slope
