// SPDX-License-Identifier: Apache-2.0
//
// A tile of a 2:4 weight in shared memory, on its way to the transposed copy.
//
//   tile     128 rows x 128 bytes of dense: 64 columns of 2 bytes or 32 of 4 bytes
//   pitch    144 bytes: rows start 4 banks apart
//   block    256 threads = 8 warps
//
// Loading: 8 lanes own a row, a unit (16 bytes of dense, 8 of values) each: 64-byte segments of
// global memory, rows of shared memory without bank conflicts.
// Reading along columns: a lane owns the 4 bytes of a row at offset 4 * lane, that is two columns
// of 2 bytes or one of 4 bytes; the 32 lanes of a warp read one whole row at a time.
#pragma once

#include "common/unit.cuh"

namespace slope {

constexpr int kTileThreads = 256;
constexpr int kTileRows = 128;
constexpr int kTilePitch = 144;   // bytes
constexpr int kTileRowUnits = 8;  // units of 16 bytes of dense
constexpr int kTileRowsPerPass = kTileThreads / kTileRowUnits;

// A compressed weight [rows, columns], 8-byte aligned values.
struct CompressedView {
  const uint2* values;     // [rows, columns * element_bytes / 16]
  const uint8_t* bitmask;  // [rows, columns / 8]
  int64_t rows;
  int64_t columns;
};

template <int kElementBytes>
constexpr int kTileColumns = 128 / kElementBytes;

// Fills the tile whose corner is (row0, column0) with convert(values of a unit, its mask bits);
// outside of the weight both are 0. Begins and ends with a barrier.
template <int kElementBytes, typename Convert>
__device__ __forceinline__ void load_tile(uint8_t* tile, const CompressedView& weight, int64_t row0,
                                          int64_t column0, Convert convert) {
  constexpr int kPasses = kTileRows / kTileRowsPerPass;
  const int column_unit = threadIdx.x % kTileRowUnits;
  const int first_row = threadIdx.x / kTileRowUnits;
  // One 64-bit product a block; inside of a tile 32 bits do
  const int row_units = static_cast<int>(weight.columns / Unit<kElementBytes>::kElements);
  const int rows_left = static_cast<int>(min(int64_t{kTileRows}, weight.rows - row0));
  const int unit_in_row = static_cast<int>(column0) / Unit<kElementBytes>::kElements + column_unit;
  const uint2* tile_values = weight.values + row0 * row_units;
  const uint8_t* tile_bitmask = weight.bitmask + row0 * (weight.columns / 8);

  // Load
  uint2 values[kPasses];
  uint32_t bits[kPasses];
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    const int row = pass * kTileRowsPerPass + first_row;
    const bool inside = row < rows_left && unit_in_row < row_units;
    const int unit = row * row_units + unit_in_row;
    values[pass] = inside ? tile_values[unit] : uint2{0, 0};
    bits[pass] = inside ? Unit<kElementBytes>::bits(tile_bitmask, unit) : 0;
  }
  __syncthreads();  // what convert reads from shared memory is there

  // Convert into shared memory
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    const int row = pass * kTileRowsPerPass + first_row;
    *reinterpret_cast<uint4*>(tile + row * kTilePitch + column_unit * 16) =
        convert(values[pass], bits[pass]);
  }
  __syncthreads();
}

// The 4 bytes that a lane owns of a row.
__device__ __forceinline__ uint32_t tile_word(const uint8_t* tile, int row, int lane) {
  return *reinterpret_cast<const uint32_t*>(tile + row * kTilePitch + lane * 4);
}

inline dim3 tile_grid(int64_t rows, int64_t columns, int tile_columns) {
  return dim3(static_cast<unsigned>((columns + tile_columns - 1) / tile_columns),
              static_cast<unsigned>((rows + kTileRows - 1) / kTileRows));
}

}  // namespace slope
