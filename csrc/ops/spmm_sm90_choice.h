// SPDX-License-Identifier: Apache-2.0
//
// Which kernels make a product of spmm_sm90: plain arithmetic, of sizes and of what a device has
// room for. Without the low-rank tail, so that a product is made in one way with and without.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "ops/spmm_sm90_tiles.h"

namespace slope {

struct Sm90Product {
  int64_t rows, columns, tokens;  // of W, of W and X, of X

  Sm90Product with_rows(int64_t count) const { return {count, columns, tokens}; }
};

// What a device runs at the same time.
struct Sm90Room {
  int processors;                               // multiprocessors
  std::array<int, kSm90Tiles.size()> clusters;  // of each tile
};

// How the product of some rows of W is cut into tiles, and the microseconds that it takes.
struct Sm90Cut {
  int tile;
  int64_t row_tiles, token_tiles;  // those of a cluster are one
  int64_t clusters;                // 0: the device cannot run them
  bool starts_early;               // LaunchShape
  double time;                     // infinite: not to be chosen
};

// W's rows by one kernel, or the first by one and the rest by another.
struct Sm90Split {
  int64_t first_rows;
  Sm90Cut first, rest;  // rest counts if there are more rows than the first
};

// What a tuner found for the products of a device: rows below first_rows by `tile`, the rest by
// `rest_tile`; first_rows 0: `tile` makes all; tile -1: nothing. Plain data: it also crosses to the
// Python module.
struct SpmmSm90Tuned {
  int32_t device;
  bool bfloat16;
  int64_t rows, columns, tokens;
  int64_t first_rows;
  int32_t tile, rest_tile;
};

// Tells what tuners found for a device; false: not all, so ask again.
using SpmmSm90Loader = bool (*)(int device);

// `is_rest`: the product has the rows that come second in a split.
Sm90Cut sm90_cut(int tile, const Sm90Product& product, const Sm90Room& room, bool is_rest = false);

// One kernel, unless two do it sooner.
Sm90Split sm90_split(const Sm90Product& product, const Sm90Room& room);

// sm90_split's, then what else takes less than `factor` times as long as that by the same times:
// for a tuner, since they err.
std::vector<Sm90Split> sm90_candidates(const Sm90Product& product, const Sm90Room& room,
                                       double factor);

}  // namespace slope
