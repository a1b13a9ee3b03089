// SPDX-License-Identifier: Apache-2.0
//
// What meets W along its columns, by tiles in shared memory:
//
//   bitmask_t  = of each four rows of W, the two of largest magnitude (pruned elements rank last)
//   values_t   = compress(W^T, bitmask_t), 0 where bitmask_t keeps what bitmask pruned
//
// Three switches: W comes compressed, or dense and is pruned and compressed on the way (and written
// so); bitmask_t is given or chosen; values_t is written or not.
//
//   op                         source      bitmask_t  values_t  bytes per element of b bytes
//   transpose_values           compressed  given      written   b/2 + 1/8 + 1/8 + b/2
//   prune_transposed           compressed  chosen     -         b/2 + 1/8 + 1/8
//   double_prune_              compressed  chosen     written   b/2 + 1/8 + 1/8 + b/2
//   prune_compress_transposed  dense       chosen     written   b + 2 (b/2 + 1/8)
//
// ops/adamw.cu has a source of its own: values that it updates on the way.
//
// Tile. A block owns kTileRows rows x kTileRowBytes bytes of values of each, that is 256 columns of
// 2-byte or 128 columns of 4-byte elements, and holds it in shared memory compressed. A store of
// values_t then covers kTileRows / 2 elements of a row, whole 32-byte sectors without gaps:
//
//                 columns                              rows
//          +---------------------+              +----------------+
//     rows | values    32 KB     |  bitmask_t   | 4 KB (2 KB)    | columns
//          +---------------------+              |                |
//     rows | bitmask  4 KB (2 KB)|              |                |
//          +---------------------+              +----------------+
//
// Work. A warp owns a strip, 128 rows x 32 bytes of values (32 or 16 columns); lane i of it owns
// rows 4i to 4i+3, so that a group of columns is 4 x 4 elements in its registers: it expands them,
// transposes, and keeps two of each column. Two values are one word (two words) of values_t; the 32
// lanes store 128 (256) bytes of one row of values_t:
//
//             column c                          row c of values_t
//   lane 0    rows   0 ..   3      ----->       | 2 values |
//   lane 1    rows   4 ..   7      ----->                  | 2 values |
//   ...                                                               ...
//   lane 31   rows 124 .. 127      ----->                                 | 2 values |
//
// Shared memory, each array free of bank conflicts in both directions:
//   values     16-byte chunks; chunk c of row r at c ^ (r / 4). A lane reads its rows' chunks.
//   bitmask    words of 32 columns, the four rows of a lane side by side: 16 bytes, one load
//   bitmask_t  transposed bytes: byte b of column c is column c of row b, so that a lane reads the
//              masks of 16 (8) columns in one load. Threads transpose 4 x 4 bytes on the way.
//
// All reads of a compressed tile are in flight at once, of a dense one eight a thread; several
// blocks on a multiprocessor overlap theirs with the stores of others. Elements are moved as bits.
//
// Preconditions, which the launcher's caller checks: as in WeightParams; every nibble of the
// bitmasks that are read has exactly two bits. Others give unspecified values but no stray access.
#pragma once

#include <cuda_runtime.h>

#include "common/async_copy.cuh"
#include "common/launch.cuh"
#include "common/rank.cuh"
#include "common/round_up.h"

namespace slope {

constexpr int kTileRows = 128;
constexpr int kTileRowBytes = 256;  // of values

constexpr int kStripRows = 128;     // of a warp
constexpr int kStripRowBytes = 32;  // of values
constexpr int kChunkBytes = 16;     // of values
constexpr int kLaneRows = kGroup;   // of a strip
constexpr int kMaskWordColumns = 32;

constexpr int kTileStrips = kTileRowBytes / kStripRowBytes;
constexpr int kTileThreads = 32 * kTileStrips * (kTileRows / kStripRows);
constexpr int kTileBlocksPerSm = 1024 / kTileThreads;  // at 64 registers a thread
static_assert(kTileRows % kStripRows == 0 && kTileRowBytes % kStripRowBytes == 0);

// ---- tile --------------------------------------------------------------------------------

template <int kElementBytes>
struct Tile {
  static constexpr int kColumns = kTileRowBytes * (kGroup / kKept) / kElementBytes;
  static constexpr int kRowChunks = kTileRowBytes / kChunkBytes;
  static constexpr int kChunkColumns = kChunkBytes * (kGroup / kKept) / kElementBytes;  // 16 or 8
  static constexpr int kChunkGroups = kChunkColumns / kGroup;                           // 4 or 2
  static constexpr int kMaskRowWords = kColumns / kMaskWordColumns;
  static constexpr int kMaskColumnBytes = kTileRows / kColumnsPerByte;
  static constexpr int kMaskColumnWords = kMaskColumnBytes / 4;

  alignas(16) uint8_t values[kTileRows * kTileRowBytes];
  alignas(16) uint32_t bitmask[kTileRows * kMaskRowWords];
  alignas(16) uint32_t bitmask_t[kColumns * kMaskColumnWords];

  __device__ __forceinline__ uint8_t* chunk(int row, int chunk) {
    const int place = chunk ^ row / kLaneRows % kRowChunks;
    return values + row * kTileRowBytes + place * kChunkBytes;
  }

  // Word `word` of the masks of rows 4 * lane_rows to 4 * lane_rows + 3.
  __device__ __forceinline__ uint32_t* mask_words(int lane_rows, int word) {
    const int place = word ^ lane_rows / (8 / kMaskRowWords) % kMaskRowWords;
    return bitmask + (lane_rows * kMaskRowWords + place) * kLaneRows;
  }

  // Byte `byte` of the masks of columns 4 * group to 4 * group + 3. Chunks of 16 columns are
  // exchanged so that all threads of a warp meet different banks: those of a strip, whose lanes
  // have 16 bytes after each other, and those that transpose, with every fourth byte.
  __device__ __forceinline__ uint32_t* mask_t_bytes(int byte, int group) {
    const int swizzle = (byte >> 1 & 6) ^ (byte >> 4 & 1) ^ (byte & 1) ^ (byte & 2) << 1;
    constexpr int kGroups = kColumns / kGroup;
    return bitmask_t + byte * kGroups + (group ^ swizzle * 4 % kGroups);
  }
};

// Words that are loaded and stored as one.
template <int kCount>
struct alignas(4 * kCount) Words {
  uint32_t word[kCount];
};

// Where a tile lies in W.
struct TileView {
  int64_t row0, column0;
  int rows_left, columns_left;  // from there to the end of W
};

__device__ __forceinline__ int clamp_to_int(int64_t size) {
  return static_cast<int>(min(size, int64_t{1} << 30));
}

// ---- masks in pieces of four bytes ---------------------------------------------------------

// Bytes [0, 4) of `mask`, of which `bytes_left` exist; the others are 0.
__device__ __forceinline__ uint32_t load_mask_word(const uint8_t* mask, int bytes_left,
                                                   bool aligned) {
  if (aligned) {
    return bytes_left > 0 ? *reinterpret_cast<const uint32_t*>(mask) : 0;
  }
  uint32_t word = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    word |= (i < bytes_left ? uint32_t{mask[i]} : 0) << (8 * i);
  }
  return word;
}

__device__ __forceinline__ void store_mask_word(uint8_t* mask, uint32_t word, int bytes_left,
                                                bool aligned) {
  if (aligned) {
    if (bytes_left > 0) {
      *reinterpret_cast<uint32_t*>(mask) = word;
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (i < bytes_left) {
      mask[i] = static_cast<uint8_t>(word >> (8 * i));
    }
  }
}

// Byte j of word i becomes byte i of word j.
__device__ __forceinline__ void transpose_bytes(uint32_t (&words)[4]) {
  const uint32_t low01 = __byte_perm(words[0], words[1], 0x5140);
  const uint32_t low23 = __byte_perm(words[2], words[3], 0x5140);
  const uint32_t high01 = __byte_perm(words[0], words[1], 0x7362);
  const uint32_t high23 = __byte_perm(words[2], words[3], 0x7362);
  words[0] = __byte_perm(low01, low23, 0x5410);
  words[1] = __byte_perm(low01, low23, 0x7632);
  words[2] = __byte_perm(high01, high23, 0x5410);
  words[3] = __byte_perm(high01, high23, 0x7632);
}

// Calls visit(byte, group, mask, bytes_left): four bytes from `byte` on of the masks of the columns
// of a group of the tile, and where in bitmask_t the first of these masks is.
template <int kElementBytes, typename Mask, typename Visit>
__device__ __forceinline__ void visit_mask_t(Mask* bitmask_t, int64_t rows, const TileView& view,
                                             Visit visit) {
  using T = Tile<kElementBytes>;
#pragma unroll
  for (int first = 0; first < T::kMaskColumnWords * T::kColumns / kGroup; first += kTileThreads) {
    const int task = first + threadIdx.x;
    const int byte = task % T::kMaskColumnWords * 4;
    const int group = task / T::kMaskColumnWords;
    if (group < T::kColumns / kGroup) {
      const bool inside = group * kGroup < view.columns_left;
      visit(byte, group,
            bitmask_t + (view.column0 + group * kGroup) * (rows / 8) + view.row0 / 8 + byte,
            inside ? view.rows_left / 8 - byte : 0);
    }
  }
}

template <int kElementBytes>
__device__ __forceinline__ void load_mask_t(Tile<kElementBytes>& tile, const uint8_t* bitmask_t,
                                            int64_t rows, const TileView& view) {
  const bool aligned = rows % 32 == 0;
  visit_mask_t<kElementBytes>(
      bitmask_t, rows, view, [&](int byte, int group, const uint8_t* mask, int bytes_left) {
        uint32_t words[kGroup];
#pragma unroll
        for (int i = 0; i < kGroup; ++i) {
          words[i] = load_mask_word(mask + i * (rows / 8), bytes_left, aligned);
        }
        transpose_bytes(words);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          *tile.mask_t_bytes(byte + i, group) = words[i];
        }
      });
}

template <int kElementBytes>
__device__ __forceinline__ void store_mask_t(Tile<kElementBytes>& tile, uint8_t* bitmask_t,
                                             int64_t rows, const TileView& view) {
  const bool aligned = rows % 32 == 0;
  visit_mask_t<kElementBytes>(
      bitmask_t, rows, view, [&](int byte, int group, uint8_t* mask, int bytes_left) {
        uint32_t words[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          words[i] = *tile.mask_t_bytes(byte + i, group);
        }
        transpose_bytes(words);
#pragma unroll
        for (int i = 0; i < kGroup; ++i) {
          store_mask_word(mask + i * (rows / 8), words[i], bytes_left, aligned);
        }
      });
}

// ---- sources -----------------------------------------------------------------------------

// Pieces of kBytes: 16, or 8 where rows of values start at multiples of 8 bytes only.
template <int kBytes, int kElementBytes>
__device__ __forceinline__ void load_values(Tile<kElementBytes>& tile, const uint8_t* values,
                                            int64_t row_bytes, const TileView& view) {
  constexpr int kRowPieces = kTileRowBytes / kBytes;
  constexpr int kPieceColumns = kBytes * (kGroup / kKept) / kElementBytes;
  constexpr int kPass = kTileThreads / kRowPieces;  // rows
  const int piece = threadIdx.x % kRowPieces;
  const int row0 = threadIdx.x / kRowPieces;
  const int byte = piece * kBytes;
  const bool inside = piece * kPieceColumns < view.columns_left;
  const uint8_t* source = values + (view.row0 + row0) * row_bytes +
                          view.column0 * kElementBytes / (kGroup / kKept) + byte;
#pragma unroll
  for (int pass = 0; pass < kTileRows; pass += kPass) {
    const int row = pass + row0;
    copy_async<kBytes>(tile.chunk(row, byte / kChunkBytes) + byte % kChunkBytes, source,
                       inside && row < view.rows_left);
    source += kPass * row_bytes;
  }
}

template <int kElementBytes>
__device__ __forceinline__ void load_mask(Tile<kElementBytes>& tile, const uint8_t* bitmask,
                                          int64_t columns, const TileView& view) {
  using T = Tile<kElementBytes>;
  constexpr int kPass = kTileThreads / T::kMaskRowWords;  // rows
  const int word = threadIdx.x % T::kMaskRowWords;
  const int row0 = threadIdx.x / T::kMaskRowWords;
  const int bytes_left = view.columns_left / 8 - 4 * word;
  const uint8_t* source =
      bitmask + (view.row0 + row0) * (columns / 8) + view.column0 / 8 + 4 * word;
  const bool aligned = columns % kMaskWordColumns == 0;
#pragma unroll
  for (int pass = 0; pass < kTileRows; pass += kPass) {
    const int row = pass + row0;
    uint32_t* target = tile.mask_words(row / kLaneRows, word) + row % kLaneRows;
    const bool inside = row < view.rows_left;
    if (aligned) {
      copy_async<4>(target, source, inside && bytes_left > 0);
    } else {
      *target = load_mask_word(source, inside ? bytes_left : 0, false);
    }
    source += kPass * (columns / 8);
  }
}

// Prunes and compresses the tile's rows, into shared memory and to their place in W.
template <FloatKind kKind>
__device__ __forceinline__ void compress_tile(Tile<kBytesOf<kKind>>& tile,
                                              const WeightParams& weight, const TileView& view,
                                              const WarpSelectors& selectors) {
  constexpr int kElementBytes = kBytesOf<kKind>;
  using U = Unit<kElementBytes>;
  constexpr int kRowUnits = kTileRowBytes / 8;
  constexpr int kPass = kTileThreads / kRowUnits;  // rows
  constexpr int kUnroll = 8;
  const int unit_in_tile = threadIdx.x % kRowUnits;
  const int row0 = threadIdx.x / kRowUnits;
  const bool inside = unit_in_tile * U::kElements < view.columns_left;
  const int64_t row_units = weight.columns / U::kElements;
  int64_t unit = (view.row0 + row0) * row_units + view.column0 / U::kElements + unit_in_tile;
  const auto* dense = static_cast<const uint4*>(weight.dense);
  auto* values = static_cast<uint2*>(weight.values);

#pragma unroll 1
  for (int first = row0; first < kTileRows; first += kUnroll * kPass) {
    // Load
    uint4 loaded[kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      loaded[i] = inside && first + i * kPass < view.rows_left ? dense[unit + i * kPass * row_units]
                                                               : uint4{0, 0, 0, 0};
    }

    // Prune, compress, store
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      const int row = first + i * kPass;
      const uint32_t bits = prune_unit<kKind, Magnitude>(loaded[i]);
      const uint32_t byte = U::byte(bits);
      const uint2 kept = U::compress(loaded[i], bits, selectors);
      *reinterpret_cast<uint2*>(tile.chunk(row, unit_in_tile / 2) + unit_in_tile % 2 * 8) = kept;
      const bool owns_byte = unit_in_tile % U::kPerByte == 0;
      const int mask_byte = unit_in_tile / U::kPerByte;
      if (owns_byte) {
        uint32_t* word = tile.mask_words(row / kLaneRows, mask_byte / 4) + row % kLaneRows;
        reinterpret_cast<uint8_t*>(word)[mask_byte % 4] = static_cast<uint8_t>(byte);
      }
      if (inside && row < view.rows_left) {
        values[unit] = kept;
        if (owns_byte) {
          weight.bitmask[unit / U::kPerByte] = static_cast<uint8_t>(byte);
        }
      }
      unit += kPass * row_units;
    }
  }
}

// ---- four columns of a lane ----------------------------------------------------------------

// Group `group` of a row of a chunk.
template <int kElementBytes>
__device__ __forceinline__ typename Group<kElementBytes>::Values values_of(
    const uint32_t (&chunk)[4], int group) {
  if constexpr (kElementBytes == 2) {
    return chunk[group];
  } else {
    return {chunk[2 * group], chunk[2 * group + 1]};
  }
}

template <FloatKind kKind, typename Values>
__device__ __forceinline__ Values magnitudes_of(Values values) {
  if constexpr (kBytesOf<kKind> == 2) {
    return Magnitude<kKind>::key(values);
  } else {
    return {Magnitude<kKind>::key(values.x), Magnitude<kKind>::key(values.y)};
  }
}

// Rows of four groups to columns: element j of group i becomes element i of group j.
__device__ __forceinline__ void transpose_groups(uint2 (&groups)[4]) {
  const uint32_t a01 = __byte_perm(groups[0].x, groups[1].x, 0x5410);
  const uint32_t b01 = __byte_perm(groups[0].x, groups[1].x, 0x7632);
  const uint32_t c01 = __byte_perm(groups[0].y, groups[1].y, 0x5410);
  const uint32_t d01 = __byte_perm(groups[0].y, groups[1].y, 0x7632);
  const uint32_t a23 = __byte_perm(groups[2].x, groups[3].x, 0x5410);
  const uint32_t b23 = __byte_perm(groups[2].x, groups[3].x, 0x7632);
  const uint32_t c23 = __byte_perm(groups[2].y, groups[3].y, 0x5410);
  const uint32_t d23 = __byte_perm(groups[2].y, groups[3].y, 0x7632);
  groups[0] = {a01, a23};
  groups[1] = {b01, b23};
  groups[2] = {c01, c23};
  groups[3] = {d01, d23};
}

__device__ __forceinline__ void transpose_groups(uint4 (&groups)[4]) {
  const uint4 a = groups[0], b = groups[1], c = groups[2], d = groups[3];
  groups[0] = {a.x, b.x, c.x, d.x};
  groups[1] = {a.y, b.y, c.y, d.y};
  groups[2] = {a.z, b.z, c.z, d.z};
  groups[3] = {a.w, b.w, c.w, d.w};
}

// ---- columns ---------------------------------------------------------------------------------

// By the whole block, once the tile is in shared memory: chooses or reads bitmask_t, writes what
// the switches say. `weight` needs rows, columns, values_t and bitmask_t.
template <FloatKind kKind, bool kChoose, bool kWriteValues>
__device__ __forceinline__ void transpose_tile(Tile<kBytesOf<kKind>>& tile,
                                               const WeightParams& weight, const TileView& view,
                                               const WarpSelectors& selectors) {
  constexpr int kElementBytes = kBytesOf<kKind>;
  using T = Tile<kElementBytes>;
  using G = Group<kElementBytes>;

  // This lane's rows and first column
  const int lane = threadIdx.x % 32;
  const int strip = threadIdx.x / 32 % kTileStrips;
  const int lane_rows = threadIdx.x / 32 / kTileStrips * (kStripRows / kLaneRows) + lane;
  const int row = lane_rows * kLaneRows;
  const int column = strip * 2 * T::kChunkColumns;
  const int mask_t_byte = lane_rows / 2;
  const bool high_nibble = lane_rows % 2 != 0;
  const int columns_left = row < view.rows_left ? view.columns_left : 0;

  const uint4 mask_words =
      *reinterpret_cast<const uint4*>(tile.mask_words(lane_rows, column / kMaskWordColumns));
  const int mask_shift = column % kMaskWordColumns;
  const uint32_t masks[kLaneRows] = {mask_words.x >> mask_shift, mask_words.y >> mask_shift,
                                     mask_words.z >> mask_shift, mask_words.w >> mask_shift};

  using Values = typename G::Values;
  const int64_t values_t_pitch = weight.rows / kGroup;  // in pairs of values
  Values* values_t = static_cast<Values*>(weight.values_t) +
                     (view.column0 + column) * values_t_pitch + (view.row0 + row) / kGroup;

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int chunk = strip * 2 + half;
    const int first_group = chunk * T::kChunkGroups;

    // Read
    uint32_t rows[kLaneRows][4];
#pragma unroll
    for (int i = 0; i < kLaneRows; ++i) {
      const uint4 loaded = *reinterpret_cast<const uint4*>(tile.chunk(row + i, chunk));
      rows[i][0] = loaded.x;
      rows[i][1] = loaded.y;
      rows[i][2] = loaded.z;
      rows[i][3] = loaded.w;
    }
    uint32_t nibbles[T::kChunkGroups];  // of bitmask_t: four columns, low nibble of each byte
    if constexpr (!kChoose) {
      using Bytes = Words<T::kChunkGroups>;
      const Bytes bytes =
          *reinterpret_cast<const Bytes*>(tile.mask_t_bytes(mask_t_byte, first_group));
#pragma unroll
      for (int group = 0; group < T::kChunkGroups; ++group) {
        nibbles[group] = bytes.word[group] >> (high_nibble ? 4 : 0);
      }
    }

#pragma unroll
    for (int group = 0; group < T::kChunkGroups; ++group) {
      const auto expand = [&](typename G::Dense(&groups)[4], uint32_t filler, auto convert) {
#pragma unroll
        for (int i = 0; i < kLaneRows; ++i) {
          const uint32_t nibble = masks[i] >> (half * T::kChunkColumns + group * kGroup);
          groups[i] = G::decompress(convert(values_of<kElementBytes>(rows[i], group)), nibble,
                                    filler, selectors);
        }
      };

      // Choose: a kept zero goes before what was pruned, and of that the lowest rows
      if constexpr (kChoose) {
        typename G::Dense keys[4];
        expand(keys, Keys<kKind>::kMinusOne,
               [](Values values) { return magnitudes_of<kKind>(values); });
        nibbles[group] = prune_columns<kKind>(keys);
      }

      // Transpose, keep, store
      if constexpr (kWriteValues) {
        typename G::Dense groups[4];
        expand(groups, 0, [](Values values) { return values; });
        transpose_groups(groups);
#pragma unroll
        for (int i = 0; i < kGroup; ++i) {
          const Values kept = G::compress(groups[i], nibbles[group] >> (8 * i), selectors);
          if (column + half * T::kChunkColumns + group * kGroup < columns_left) {
            *values_t = kept;
          }
          values_t += values_t_pitch;
        }
      }
    }

    // Two lanes make a byte; the first takes one half of the columns, the second the other
    if constexpr (kChoose) {
      constexpr int kWords = T::kChunkGroups / 2;
      Words<kWords> bytes;
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        const uint32_t mine = high_nibble ? nibbles[i + kWords] : nibbles[i];
        const uint32_t other = high_nibble ? nibbles[i] : nibbles[i + kWords];
        const uint32_t theirs = __shfl_xor_sync(~0u, other, 1);
        bytes.word[i] = high_nibble ? (theirs | mine << 4) : (mine | theirs << 4);
      }
      const int own_group = first_group + (high_nibble ? kWords : 0);
      *reinterpret_cast<Words<kWords>*>(tile.mask_t_bytes(mask_t_byte, own_group)) = bytes;
    }
  }

  if constexpr (kChoose) {
    __syncthreads();
    store_mask_t(tile, weight.bitmask_t, weight.rows, view);
  }
}

// ---- kernel ------------------------------------------------------------------------------

template <FloatKind kKind, bool kFromDense, bool kChoose, bool kWriteValues>
__global__ void __launch_bounds__(kTileThreads, kTileBlocksPerSm)
    tile_kernel(const WeightParams weight) {
  constexpr int kElementBytes = kBytesOf<kKind>;
  using T = Tile<kElementBytes>;
  extern __shared__ uint4 shared[];
  T& tile = *reinterpret_cast<T*>(shared);
  const int64_t row0 = int64_t{blockIdx.y} * kTileRows;
  const int64_t column0 = int64_t{blockIdx.x} * T::kColumns;
  const TileView view{row0, column0, clamp_to_int(weight.rows - row0),
                      clamp_to_int(weight.columns - column0)};
  const WarpSelectors selectors;
  wait_for_previous_kernel();
  let_next_kernel_start();

  if constexpr (kFromDense) {
    compress_tile<kKind>(tile, weight, view, selectors);
  } else {
    const auto* values = static_cast<const uint8_t*>(weight.values);
    const int64_t row_bytes = weight.columns * kElementBytes / (kGroup / kKept);
    if (row_bytes % 16 == 0) {
      load_values<16>(tile, values, row_bytes, view);
    } else {
      load_values<8>(tile, values, row_bytes, view);
    }
    load_mask(tile, weight.bitmask, weight.columns, view);
    if constexpr (!kChoose) {
      load_mask_t(tile, weight.bitmask_t, weight.rows, view);
    }
    wait_for_copies();
  }
  __syncthreads();
  transpose_tile<kKind, kChoose, kWriteValues>(tile, weight, view, selectors);
}

// ---- launcher ----------------------------------------------------------------------------

template <FloatKind kKind, bool kFromDense, bool kChoose, bool kWriteValues>
cudaError_t launch_tile(const WeightParams& weight, cudaStream_t stream) {
  using T = Tile<kBytesOf<kKind>>;
  const dim3 grid(static_cast<unsigned>(ceil_div(weight.columns, T::kColumns)),
                  static_cast<unsigned>(ceil_div(weight.rows, kTileRows)));
  return launch_kernel<&tile_kernel<kKind, kFromDense, kChoose, kWriteValues>, sizeof(T)>(
      {grid, kTileThreads}, stream, weight);
}

// launch_tile for the type of the weight.
template <bool kFromDense, bool kChoose, bool kWriteValues>
cudaError_t launch_tile_of_kind(const WeightParams& weight, cudaStream_t stream) {
  switch (weight.kind) {
    case FloatKind::kHalf:
      return launch_tile<FloatKind::kHalf, kFromDense, kChoose, kWriteValues>(weight, stream);
    case FloatKind::kBFloat16:
      return launch_tile<FloatKind::kBFloat16, kFromDense, kChoose, kWriteValues>(weight, stream);
    case FloatKind::kFloat:
      return launch_tile<FloatKind::kFloat, kFromDense, kChoose, kWriteValues>(weight, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace slope
