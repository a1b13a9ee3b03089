// SPDX-License-Identifier: Apache-2.0
//
// transpose_values:  out = compress(decompress(values, bitmask)^T, bitmask_t)
//
// A block moves one tile of 128 rows x 128 bytes of dense (common/tile.cuh):
//
//   values, bitmask --> tile [128 rows][128 bytes] --> columns --> out rows of 128 or 256 bytes
//
// Ownership. A task is a chunk: 16 bytes of one row of `out`, that is 16 rows of one column of
// 2-byte elements or 8 rows of one of 4-byte elements. A lane reads its word of 16 (8) tile rows
// and makes the chunks of its two columns (of its column). Chunks gather in shared memory, so that
// 16 (32) lanes then store a whole row of `out` without gaps:
//
//   staged[column][chunk ^ swizzle(column)]   swizzle: the 8 lanes of a store phase, whose columns
//                                             are 2 (1) apart, hit 8 different groups of banks
//
// Traffic per dense element of b bytes: b/2 + 1/8 + 1/8 read, b/2 written (bf16: 2.25 bytes).
// Memory-bound: the limit is bytes over copy bandwidth.
//
// Preconditions, which the launcher's caller checks: as in TransposeParams; every nibble of both
// bitmasks has exactly two bits. Other nibbles give unspecified values but no stray access.
#include "common/tile.cuh"
#include "ops/transpose.h"

namespace slope {
namespace {

// ---- chunks ------------------------------------------------------------------------------

template <int kElementBytes>
struct Chunk;

template <>
struct Chunk<2> {
  static constexpr int kRows = 16;
  static constexpr int kColumnsPerLane = 2;
  static constexpr int kPerColumn = kTileRows / kRows;

  // Elements of the low (high) halves of 16 words, kept by 16 mask bits.
  static __device__ __forceinline__ uint4 make(const uint32_t (&words)[kRows], int half,
                                               uint32_t bits, const SelectorTable& selectors) {
    const uint32_t selector = half == 0 ? 0x5410 : 0x7632;
    const auto group = [&](int g) {
      const uint32_t ab = __byte_perm(words[4 * g], words[4 * g + 1], selector);
      const uint32_t cd = __byte_perm(words[4 * g + 2], words[4 * g + 3], selector);
      return __byte_perm(ab, cd, selectors.keep(bits >> (4 * g) & 15));
    };
    return {group(0), group(1), group(2), group(3)};
  }

  static __device__ __forceinline__ int swizzle(int column) { return column / 2 % 8; }
};

template <>
struct Chunk<4> {
  static constexpr int kRows = 8;
  static constexpr int kColumnsPerLane = 1;
  static constexpr int kPerColumn = kTileRows / kRows;

  static __device__ __forceinline__ uint4 make(const uint32_t (&words)[kRows], int, uint32_t bits,
                                               const SelectorTable& selectors) {
    const uint2 a =
        Unit<4>::compress({words[0], words[1], words[2], words[3]}, bits & 15, selectors);
    const uint2 b =
        Unit<4>::compress({words[4], words[5], words[6], words[7]}, bits >> 4 & 15, selectors);
    return {a.x, a.y, b.x, b.y};
  }

  static __device__ __forceinline__ int swizzle(int column) { return column % 8; }
};

// ---- kernel ------------------------------------------------------------------------------

template <int kElementBytes>
__global__ void __launch_bounds__(kTileThreads)
    transpose_values_kernel(CompressedView weight,
                            const uint8_t* __restrict__ bitmask_t,  // [columns, rows / 8]
                            uint2* __restrict__ out) {  // [columns, rows * element_bytes / 16]
  using C = Chunk<kElementBytes>;
  constexpr int kColumns = kTileColumns<kElementBytes>;
  __shared__ alignas(16) uint8_t tile[kTileRows * kTilePitch];
  __shared__ uint4 staged[kColumns * C::kPerColumn];
  constexpr int kMaskBytes = kTileRows / 8;   // of a column of the tile: 16
  constexpr int kMaskPitch = kMaskBytes + 2;  // lanes hit different banks
  __shared__ alignas(16) uint8_t masks[kColumns * kMaskPitch];
  __shared__ SelectorTable selectors;

  const int64_t row0 = int64_t{blockIdx.y} * kTileRows;
  const int64_t column0 = int64_t{blockIdx.x} * kColumns;
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;

  // Mask of the tile's columns, 16 lanes a column; load_tile ends with a barrier
  const int mask_bytes = static_cast<int>(weight.rows / 8);  // of one row of bitmask_t
  const int mask_bytes_left = mask_bytes - static_cast<int>(row0 / 8);
  const int columns_left = static_cast<int>(min(int64_t{kColumns}, weight.columns - column0));
  const uint8_t* tile_mask = bitmask_t + column0 * mask_bytes + row0 / 8;
#pragma unroll
  for (int task = threadIdx.x; task < kColumns * kMaskBytes; task += kTileThreads) {
    const int column = task / kMaskBytes;
    const int byte = task % kMaskBytes;
    const bool inside = column < columns_left && byte < mask_bytes_left;
    masks[column * kMaskPitch + byte] = inside ? tile_mask[column * mask_bytes + byte] : 0;
  }
  selectors.fill();
  load_tile<kElementBytes>(tile, weight, row0, column0, [&](uint2 values, uint32_t bits) {
    return Unit<kElementBytes>::decompress(values, bits, selectors);
  });

  // Read columns, keep what bitmask_t keeps, stage
#pragma unroll
  for (int chunk = warp; chunk < C::kPerColumn; chunk += kTileThreads / 32) {
    uint32_t words[C::kRows];
#pragma unroll
    for (int i = 0; i < C::kRows; ++i) {
      words[i] = tile_word(tile, chunk * C::kRows + i, lane);
    }
#pragma unroll
    for (int half = 0; half < C::kColumnsPerLane; ++half) {
      const int column = lane * C::kColumnsPerLane + half;
      const uint8_t* mask = &masks[column * kMaskPitch + chunk * (C::kRows / 8)];
      const uint32_t bits =
          C::kRows == 16 ? *reinterpret_cast<const uint16_t*>(mask) : uint32_t{*mask};
      staged[column * C::kPerColumn + (chunk ^ C::swizzle(column))] =
          C::make(words, half, bits, selectors);
    }
  }
  __syncthreads();

  // Store rows of out, 8 bytes a lane: a row starts at a multiple of 8 bytes only
  constexpr int kRowPieces = 2 * C::kPerColumn;
  const int out_pieces = static_cast<int>(weight.rows * kElementBytes / 16);  // of one row of out
  const int pieces_left = out_pieces - static_cast<int>(row0 * kElementBytes / 16);
  uint2* tile_out = out + column0 * out_pieces + row0 * kElementBytes / 16;
#pragma unroll
  for (int task = threadIdx.x; task < kColumns * kRowPieces; task += kTileThreads) {
    const int column = task / kRowPieces;
    const int piece = task % kRowPieces;
    if (column < columns_left && piece < pieces_left) {
      const int chunk = piece / 2 ^ C::swizzle(column);
      const auto* source = reinterpret_cast<const uint2*>(&staged[column * C::kPerColumn + chunk]);
      tile_out[column * out_pieces + piece] = source[piece % 2];
    }
  }
}

}  // namespace

// ---- launcher ----------------------------------------------------------------------------

cudaError_t launch_transpose_values(const TransposeParams& params, cudaStream_t stream) {
  const CompressedView weight{static_cast<const uint2*>(params.values), params.bitmask, params.rows,
                              params.columns};
  const bool narrow = params.element_bytes == 2;
  auto* const kernel = narrow ? &transpose_values_kernel<2> : &transpose_values_kernel<4>;
  const dim3 grid =
      tile_grid(params.rows, params.columns, narrow ? kTileColumns<2> : kTileColumns<4>);
  kernel<<<grid, kTileThreads, 0, stream>>>(weight, params.bitmask_t,
                                            static_cast<uint2*>(params.out));
  return cudaGetLastError();
}

}  // namespace slope
