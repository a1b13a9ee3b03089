// SPDX-License-Identifier: Apache-2.0
//
// What the host side of spmm_sm90 passes to its kernels.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "common/activation.h"
#include "common/divisor.h"
#include "common/weight.h"
#include "ops/spmm_sm90_tiles.h"

namespace slope {

// Tokens that each block of a cluster loads of a tile with `tokens`: whole swizzle patterns of
// eight.
__host__ __device__ constexpr int sm90_x_part(int tokens, int cluster) {
  return (tokens + 8 * cluster - 1) / (8 * cluster) * 8;
}

struct SpmmSm90Args {
  // [0] for tiles that lie within the operand, [1] for those that its end cuts, with as few rows as
  // they need: TMA takes longer over a row out of bounds than over one that exists
  CUtensorMap values[2];       // box [tile rows, 32], 64-byte swizzle
  CUtensorMap x[2];            // box [sm90_x_part, 64], 128-byte swizzle
  CUtensorMap tail_weight[2];  // box [tile rows, 32], 64-byte swizzle; of a transposed one [0] is
                               // all, box [32, 64], 128-byte swizzle
  CUtensorMap tail_x[2];       // box [sm90_x_part, 32], 64-byte swizzle
  CUtensorMap y;               // box [64, 64], 128-byte swizzle; SwiGLU: [64, 32], 64-byte swizzle
  CUtensorMap y_rest;          // as y, but of tile tokens % 64
  const uint4* metadata;       // [row blocks, quads, 128]
  const void* bias;            // [rows] or nullptr
  int rows, tokens;
  int quads;        // of 256 columns
  int row_blocks;   // of 64
  int k_tiles;      // along W's columns
  int tail_tiles;   // along the rank
  int row_tiles;    // along Y's features; those of a cluster are one
  int token_tiles;  // along Y's tokens
  // Tiles go in groups along features, for L2; the last group may be lower than the others
  Divisor group_tiles, group_height, last_height;
  Activation activation;
  bool tail_is_transposed;  // tail_weight is [rank, rows]
};

// The kernel with tiles of kRows of W x kTokens, for each block of a cluster, and a ring of
// kStages; kSegments of W's columns. One file instantiates each.
template <int kRows, int kTokens, int kStages, int kCluster, int kSegments>
struct SpmmSm90Tile {
  static cudaError_t launch(const SpmmSm90Args& args, FloatKind kind, unsigned blocks,
                            bool starts_early, cudaStream_t stream);

  // Clusters that the current device can run at the same time; -1 if that is unknown.
  static int clusters_at_once();
};

}  // namespace slope
