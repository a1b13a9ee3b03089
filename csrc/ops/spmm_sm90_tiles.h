// SPDX-License-Identifier: Apache-2.0
//
// How spmm_sm90 cuts its matrices, and the tiles that there are kernels of. No CUDA.
#pragma once

#include <array>

namespace slope {

constexpr int kSm90BlockRows = 64;        // of W in a wgmma
constexpr int kSm90AtomColumns = 32;      // of W in a sparse wgmma
constexpr int kSm90TileColumns = 64;      // of W and X in a stage
constexpr int kSm90QuadColumns = 256;     // of W whose metadata a thread loads at once
constexpr int kSm90QuadBytes = 128 * 16;  // of metadata, for these columns of 64 rows
constexpr int kSm90TailTileColumns = 32;  // of the tail's factors in a stage
constexpr int kSm90OutBox = 64;           // rows of W, and at most so many tokens, in a store

struct Sm90Tile {
  int rows, tokens;  // of W, of X
  int stages;        // of its ring
  int cluster;       // blocks whose tiles lie one under the other
  int segments;      // of W's columns, a block each; these are a cluster too
  double stage_us;   // of a stage, with all blocks at work
  double next_us;    // what a further tile of a block adds beside its stages, without segments
  double sum_us;     // to add up segments
};

// Times by a fit to products of 16 shapes with 1 to 8192 tokens on an H200, in bursts and at the
// power limit (tiles of 64 tokens and three segments: 10 shapes with 8 to 256 tokens; tiles of
// 128 x 192: 10 with 128 to 2048; 128 x 256 in two segments: 8 products, in clusters of four: 6,
// without clusters: 5, beside those of two); what counts is which tile has the least.
// clang-format off: a tile a line
constexpr std::array<Sm90Tile, 20> kSm90Tiles{{
    {256, 192, 4, 2, 1, 0.661, 2.3, 0.0},
    {256, 176, 4, 2, 1, 0.619, 2.0, 0.0},
    {256, 168, 4, 2, 1, 0.583, 3.1, 0.0},
    {256, 160, 4, 2, 1, 0.555, 2.7, 0.0},
    {256, 152, 4, 2, 1, 0.542, 2.8, 0.0},
    {256, 128, 5, 2, 1, 0.464, 2.4, 0.0},
    {128, 256, 4, 1, 1, 0.441, 2.0, 0.0},
    {128, 256, 4, 2, 1, 0.435, 2.9, 0.0},
    {128, 256, 4, 4, 1, 0.416, 2.9, 0.0},
    {128, 256, 4, 1, 2, 0.454, 0.0, 6.6},
    {128, 192, 5, 2, 1, 0.338, 2.7, 0.0},
    {128, 192, 5, 1, 2, 0.318, 0.0, 5.4},
    {128, 128, 6, 1, 1, 0.264, 1.6, 0.0},
    {128, 128, 6, 1, 2, 0.254, 0.0, 1.2},
    {128, 128, 6, 1, 3, 0.254, 0.0, 2.3},
    {128, 128, 6, 1, 4, 0.260, 0.0, 2.4},
    {128, 64, 10, 1, 1, 0.222, 1.2, 0.0},
    {128, 64, 10, 1, 2, 0.222, 0.0, 0.3},
    {128, 64, 10, 1, 3, 0.222, 0.0, 1.2},
    {128, 64, 10, 1, 4, 0.222, 0.0, 2.8},
}};
// clang-format on

}  // namespace slope
