// SPDX-License-Identifier: Apache-2.0
//
// spmm_sm90 with tiles of 256 rows of W x 176 tokens.
#include "ops/spmm_sm90.cuh"

namespace slope {

cudaError_t launch_spmm_sm90_256x176(const SpmmSm90Args& args, FloatKind kind, unsigned blocks,
                                     cudaStream_t stream) {
  return sm90::launch<sm90::Tile<2, 176, 4, 1>>(args, kind, blocks, stream);
}

}  // namespace slope
