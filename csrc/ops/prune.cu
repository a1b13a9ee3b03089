// SPDX-License-Identifier: Apache-2.0
//
// prune_24:          bit j of group g = scores[4g+j] is among the two largest of scores[4g .. 4g+3]
// prune_transposed:  the same along columns, on the magnitudes of a compressed weight
//
// Both rank by integer keys that order as the floats do: NaN is +inf, -0 equals 0. Of four keys,
// key i loses to key j > i if key j is greater, else j loses to i (a tie keeps the lower index);
// two losses or more prune.
//
// prune_24. A thread owns kUnroll bytes of bitmask, kThreads bytes apart, and the 16 or 32 bytes of
// scores of each. Traffic per element of b bytes: b + 1/8.
//
// prune_transposed. A block owns a tile of 128 rows x 128 bytes of dense (common/tile.cuh), which
// holds keys instead of elements: magnitude + 1 where kept, 0 where pruned, so that a kept zero
// goes before what was pruned and ties among the pruned keep the lowest. A lane owns the columns of
// its word (two of 2-byte elements, ranked together in packed arithmetic) and the rows of its warp,
// 16 of 128, that is two bytes of each column's row of bitmask_t; they gather in shared memory and
// leave as 16 bytes a column. Traffic per dense element: b/2 + 1/8 read, 1/8 written.
//
// Both are memory-bound: the limit is bytes over copy bandwidth.
//
// Preconditions, which the launcher's caller checks: as in the Params.
#include "common/tile.cuh"
#include "ops/prune.h"

namespace slope {
namespace {

constexpr int kThreads = 256;
constexpr int kUnroll = 4;

// ---- keys --------------------------------------------------------------------------------

template <FloatKind kKind>
struct Float;

template <>
struct Float<FloatKind::kHalf> {
  static constexpr int kBytes = 2;
  static constexpr uint32_t kInfinity = 0x7c00;
};
template <>
struct Float<FloatKind::kBFloat16> {
  static constexpr int kBytes = 2;
  static constexpr uint32_t kInfinity = 0x7f80;
};
template <>
struct Float<FloatKind::kFloat> {
  static constexpr int kBytes = 4;
  static constexpr uint32_t kInfinity = 0x7f800000;
};

// Orders as the float with these bits does.
template <FloatKind kKind>
__device__ __forceinline__ int32_t score_key(uint32_t bits) {
  constexpr uint32_t kSign = 1u << (8 * Float<kKind>::kBytes - 1);
  const uint32_t magnitude = bits & (kSign - 1);
  if (magnitude > Float<kKind>::kInfinity) {  // NaN
    return static_cast<int32_t>(Float<kKind>::kInfinity);
  }
  return bits & kSign ? -static_cast<int32_t>(magnitude) : static_cast<int32_t>(magnitude);
}

// Keys of the magnitudes in a unit's word: `kept` has all bits of a kept element set.
template <FloatKind kKind>
__device__ __forceinline__ uint32_t magnitude_keys(uint32_t word, uint32_t kept) {
  if constexpr (Float<kKind>::kBytes == 2) {
    constexpr uint32_t kInfinities = Float<kKind>::kInfinity * 0x10001u;
    return (__vminu2(word & 0x7fff7fff, kInfinities) + 0x00010001u) & kept;
  } else {
    return (min(word & 0x7fffffff, Float<kKind>::kInfinity) + 1) & kept;
  }
}

// ---- ranking -----------------------------------------------------------------------------

__device__ __forceinline__ uint32_t keep_two(const int32_t (&key)[4]) {
  int loss[4] = {0, 0, 0, 0};
#pragma unroll
  for (int j = 1; j < 4; ++j) {
#pragma unroll
    for (int i = 0; i < j; ++i) {
      const bool j_wins = key[j] > key[i];
      loss[i] += j_wins;
      loss[j] += !j_wins;
    }
  }
  uint32_t nibble = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    nibble |= (loss[i] < 2 ? 1u : 0u) << i;
  }
  return nibble;
}

// Rank of unsigned keys; a word is two 16-bit keys of two columns, or one 32-bit key.
template <int kElementBytes>
struct Ranking;

template <>
struct Ranking<2> {
  static constexpr int kColumnsPerLane = 2;
  static __device__ __forceinline__ uint32_t wins(uint32_t a, uint32_t b) {
    return __vcmpgtu2(a, b);  // 0xffff in each half where a > b
  }
  static __device__ __forceinline__ uint32_t add(uint32_t a, uint32_t b) { return __vadd2(a, b); }
  static __device__ __forceinline__ uint32_t sub(uint32_t a, uint32_t b) { return __vsub2(a, b); }
  static constexpr uint32_t kOne = 0x00010001;
};

template <>
struct Ranking<4> {
  static constexpr int kColumnsPerLane = 1;
  static __device__ __forceinline__ uint32_t wins(uint32_t a, uint32_t b) {
    return a > b ? ~0u : 0u;
  }
  static __device__ __forceinline__ uint32_t add(uint32_t a, uint32_t b) { return a + b; }
  static __device__ __forceinline__ uint32_t sub(uint32_t a, uint32_t b) { return a - b; }
  static constexpr uint32_t kOne = 1;
};

// losses[i] = how many of the other three go before key i, in each half (in the word).
template <int kElementBytes>
__device__ __forceinline__ void count_losses(const uint32_t* keys, uint32_t (&losses)[4]) {
  using R = Ranking<kElementBytes>;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    losses[i] = i * R::kOne;  // as if all before it won
  }
#pragma unroll
  for (int j = 1; j < 4; ++j) {
#pragma unroll
    for (int i = 0; i < j; ++i) {
      const uint32_t minus_one_if_j_wins = R::wins(keys[j], keys[i]);
      losses[i] = R::sub(losses[i], minus_one_if_j_wins);
      losses[j] = R::add(losses[j], minus_one_if_j_wins);
    }
  }
}

// ---- prune_24 ----------------------------------------------------------------------------

template <FloatKind kKind>
__global__ void __launch_bounds__(kThreads)
    prune_24_kernel(const uint4* __restrict__ scores,  // [bytes * kWords / 4]
                    uint8_t* __restrict__ bitmask,     // [bytes]
                    int64_t bytes) {
  constexpr int kWords = 2 * Float<kKind>::kBytes;  // of the 8 scores of a byte
  const int64_t first = int64_t{blockIdx.x} * (kThreads * kUnroll) + threadIdx.x;

  // Load
  uint32_t words[kUnroll][kWords];
#pragma unroll
  for (int i = 0; i < kUnroll; ++i) {
    const int64_t byte = first + i * kThreads;
    if (byte < bytes) {
#pragma unroll
      for (int part = 0; part < kWords / 4; ++part) {
        const uint4 loaded = __ldcs(&scores[byte * (kWords / 4) + part]);
        words[i][4 * part] = loaded.x;
        words[i][4 * part + 1] = loaded.y;
        words[i][4 * part + 2] = loaded.z;
        words[i][4 * part + 3] = loaded.w;
      }
    }
  }

  // Rank and store
#pragma unroll
  for (int i = 0; i < kUnroll; ++i) {
    const int64_t byte = first + i * kThreads;
    if (byte < bytes) {
      uint32_t nibbles = 0;
#pragma unroll
      for (int group = 0; group < 2; ++group) {
        int32_t key[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int element = 4 * group + j;
          const uint32_t bits = kWords == 4 ? words[i][element / 2] >> (element % 2 * 16) & 0xffff
                                            : words[i][element % kWords];
          key[j] = score_key<kKind>(bits);
        }
        nibbles |= keep_two(key) << (4 * group);
      }
      bitmask[byte] = static_cast<uint8_t>(nibbles);
    }
  }
}

// ---- prune_transposed --------------------------------------------------------------------

template <FloatKind kKind>
__global__ void __launch_bounds__(kTileThreads)
    prune_transposed_kernel(CompressedView weight,
                            uint8_t* __restrict__ bitmask_t) {  // [columns, rows / 8]
  constexpr int kBytes = Float<kKind>::kBytes;
  using R = Ranking<kBytes>;
  constexpr int kColumns = kTileColumns<kBytes>;
  constexpr int kWarpRows = kTileRows / (kTileThreads / 32);  // 16
  constexpr int kMaskBytes = kTileRows / 8;                   // of a column of the tile: 16
  __shared__ alignas(16) uint8_t tile[kTileRows * kTilePitch];
  __shared__ alignas(16) uint8_t masks[kColumns][kMaskBytes];

  const int64_t row0 = int64_t{blockIdx.y} * kTileRows;
  const int64_t column0 = int64_t{blockIdx.x} * kColumns;
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;

  load_tile<kBytes>(tile, weight, row0, column0, [](uint4 dense, uint32_t bits) {
    const uint4 kept = Unit<kBytes>::decompress({~0u, ~0u}, bits);
    return uint4{magnitude_keys<kKind>(dense.x, kept.x), magnitude_keys<kKind>(dense.y, kept.y),
                 magnitude_keys<kKind>(dense.z, kept.z), magnitude_keys<kKind>(dense.w, kept.w)};
  });

  // Rank the rows of this warp, four at a time
  uint32_t mask[R::kColumnsPerLane] = {};  // 16 bits each
#pragma unroll
  for (int group = 0; group < kWarpRows / kGroup; ++group) {
    uint32_t keys[4], losses[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      keys[i] = tile_word(tile, warp * kWarpRows + group * 4 + i, lane);
    }
    count_losses<kBytes>(keys, losses);
#pragma unroll
    for (int half = 0; half < R::kColumnsPerLane; ++half) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {  // losses are 0 to 3: bit 1 set means pruned
        mask[half] |= (~losses[i] >> (16 * half + 1) & 1) << (4 * group + i);
      }
    }
  }
#pragma unroll
  for (int half = 0; half < R::kColumnsPerLane; ++half) {
    *reinterpret_cast<uint16_t*>(&masks[lane * R::kColumnsPerLane + half][2 * warp]) =
        static_cast<uint16_t>(mask[half]);
  }
  __syncthreads();

  // Store: 16 lanes a column
  const int64_t mask_bytes = weight.rows / 8;
  for (int task = threadIdx.x; task < kColumns * kMaskBytes; task += kTileThreads) {
    const int column = task / kMaskBytes;
    const int64_t byte = row0 / 8 + task % kMaskBytes;
    if (column0 + column < weight.columns && byte < mask_bytes) {
      bitmask_t[(column0 + column) * mask_bytes + byte] = masks[column][task % kMaskBytes];
    }
  }
}

// Calls launch.template operator()<kind>().
template <typename Launch>
void switch_kind(FloatKind kind, Launch launch) {
  switch (kind) {
    case FloatKind::kHalf:
      return launch.template operator()<FloatKind::kHalf>();
    case FloatKind::kBFloat16:
      return launch.template operator()<FloatKind::kBFloat16>();
    case FloatKind::kFloat:
      return launch.template operator()<FloatKind::kFloat>();
  }
}

}  // namespace

// ---- launchers ---------------------------------------------------------------------------

cudaError_t launch_prune_24(const PruneParams& params, cudaStream_t stream) {
  const int64_t bytes = params.elements / kColumnsPerByte;
  constexpr int64_t kBytesPerBlock = kThreads * kUnroll;
  const auto blocks = static_cast<unsigned>((bytes + kBytesPerBlock - 1) / kBytesPerBlock);
  switch_kind(params.kind, [&]<FloatKind kKind>() {
    prune_24_kernel<kKind><<<blocks, kThreads, 0, stream>>>(
        static_cast<const uint4*>(params.scores), params.bitmask, bytes);
  });
  return cudaGetLastError();
}

cudaError_t launch_prune_transposed(const PruneTransposedParams& params, cudaStream_t stream) {
  const CompressedView weight{static_cast<const uint2*>(params.values), params.bitmask, params.rows,
                              params.columns};
  switch_kind(params.kind, [&]<FloatKind kKind>() {
    const dim3 grid = tile_grid(params.rows, params.columns, kTileColumns<Float<kKind>::kBytes>);
    prune_transposed_kernel<kKind><<<grid, kTileThreads, 0, stream>>>(weight, params.bitmask_t);
  });
  return cudaGetLastError();
}

}  // namespace slope
