// SPDX-License-Identifier: Apache-2.0
//
// prune_24:          bit j of group g = scores[4g+j] is among the two largest of scores[4g .. 4g+3]
// prune_transposed:  the same along columns, on the magnitudes of a compressed weight
//
// Ranking. Of four keys, i loses to j > i if key j is greater, else j loses to i (a tie keeps the
// lower index); a key that loses twice or more is pruned, and "at least two of three" is one
// instruction (LOP3). NaN is replaced by +inf first. 16-bit keys are ranked two groups at a time:
// every word holds the same position of both, in its halves.
//
// prune_24. A thread owns kUnroll bytes of bitmask, kThreads bytes apart, and the 16 or 32 bytes of
// scores of each. Traffic per element of b bytes: b + 1/8.
//
// prune_transposed. A block owns a tile of 128 rows x 128 bytes of dense (common/tile.cuh), which
// holds magnitudes where kept and -1 where pruned, so that a kept zero goes before what was pruned
// and ties among the pruned keep the lowest. A lane owns the columns of its word (two of 16-bit
// elements, one of 32-bit ones) and the rows of its warp, 16 of 128, that is two bytes of each
// column's row of bitmask_t; they gather in shared memory and leave as 16 bytes a column. Traffic
// per dense element: b/2 + 1/8 read, 1/8 written.
//
// Both are memory-bound: the limit is bytes over copy bandwidth.
//
// Preconditions, which the launcher's caller checks: as in the Params.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common/tile.cuh"
#include "ops/prune.h"

namespace slope {
namespace {

constexpr int kThreads = 256;
constexpr int kUnroll = 4;

// ---- keys: one word, that is two 16-bit floats or one 32-bit float -------------------------

template <typename To, typename From>
__device__ __forceinline__ To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

template <FloatKind kKind>
struct Keys;

template <>
struct Keys<FloatKind::kHalf> {
  static constexpr int kBytes = 2;
  static constexpr uint32_t kSigns = 0x80008000;
  static constexpr uint32_t kMinusOne = 0xbc00bc00;
  static __device__ __forceinline__ uint32_t nan_to_infinity(uint32_t word) {
    return bits_as<uint32_t>(
        __hmin2(bits_as<__half2>(word), bits_as<__half2>(uint32_t{0x7c007c00})));
  }
  static __device__ __forceinline__ uint32_t greater(uint32_t a, uint32_t b) {
    return __hgt2_mask(bits_as<__half2>(a), bits_as<__half2>(b));
  }
};

template <>
struct Keys<FloatKind::kBFloat16> {
  static constexpr int kBytes = 2;
  static constexpr uint32_t kSigns = 0x80008000;
  static constexpr uint32_t kMinusOne = 0xbf80bf80;
  static __device__ __forceinline__ uint32_t nan_to_infinity(uint32_t word) {
    return bits_as<uint32_t>(
        __hmin2(bits_as<__nv_bfloat162>(word), bits_as<__nv_bfloat162>(uint32_t{0x7f807f80})));
  }
  static __device__ __forceinline__ uint32_t greater(uint32_t a, uint32_t b) {
    return __hgt2_mask(bits_as<__nv_bfloat162>(a), bits_as<__nv_bfloat162>(b));
  }
};

template <>
struct Keys<FloatKind::kFloat> {
  static constexpr int kBytes = 4;
  static constexpr uint32_t kSigns = 0x80000000;
  static constexpr uint32_t kMinusOne = 0xbf800000;
  static __device__ __forceinline__ uint32_t nan_to_infinity(uint32_t word) {
    return __float_as_uint(fminf(__uint_as_float(word), __uint_as_float(0x7f800000)));
  }
  static __device__ __forceinline__ uint32_t greater(uint32_t a, uint32_t b) {
    return __uint_as_float(a) > __uint_as_float(b) ? ~0u : 0u;
  }
};

// ---- ranking -----------------------------------------------------------------------------

__device__ __forceinline__ uint32_t fewer_than_two(uint32_t a, uint32_t b, uint32_t c) {
  return ~((a & b) | (a & c) | (b & c));
}

// Four bits in each half (16-bit keys) or in the low half (32-bit keys): bit i = keep key i.
template <FloatKind kKind>
__device__ __forceinline__ uint32_t keep_two(uint32_t k0, uint32_t k1, uint32_t k2, uint32_t k3) {
  using K = Keys<kKind>;
  const uint32_t w01 = K::greater(k1, k0), w02 = K::greater(k2, k0), w03 = K::greater(k3, k0);
  const uint32_t w12 = K::greater(k2, k1), w13 = K::greater(k3, k1), w23 = K::greater(k3, k2);
  return (fewer_than_two(w01, w02, w03) & 0x00010001) |
         (fewer_than_two(~w01, w12, w13) & 0x00020002) |
         (fewer_than_two(~w02, ~w12, w23) & 0x00040004) |
         (fewer_than_two(~w03, ~w13, ~w23) & 0x00080008);
}

// ---- prune_24 ----------------------------------------------------------------------------

// The bitmask byte of 8 scores.
template <FloatKind kKind>
__device__ __forceinline__ uint32_t prune_byte(const uint32_t (&scores)[2 * Keys<kKind>::kBytes]) {
  uint32_t k[2 * Keys<kKind>::kBytes];
#pragma unroll
  for (int i = 0; i < 2 * Keys<kKind>::kBytes; ++i) {
    k[i] = Keys<kKind>::nan_to_infinity(scores[i]);
  }
  if constexpr (Keys<kKind>::kBytes == 2) {
    // (a b)(c d)(e f)(g h) -> (a e)(b f)(c g)(d h)
    const uint32_t bits =
        keep_two<kKind>(__byte_perm(k[0], k[2], 0x5410), __byte_perm(k[0], k[2], 0x7632),
                        __byte_perm(k[1], k[3], 0x5410), __byte_perm(k[1], k[3], 0x7632));
    return (bits & 0x0f) | (bits >> 12 & 0xf0);
  } else {
    return (keep_two<kKind>(k[0], k[1], k[2], k[3]) & 0x0f) |
           (keep_two<kKind>(k[4], k[5], k[6], k[7]) << 4 & 0xf0);
  }
}

template <FloatKind kKind>
__global__ void __launch_bounds__(kThreads)
    prune_24_kernel(const uint4* __restrict__ scores,  // [bytes * kWords / 4]
                    uint8_t* __restrict__ bitmask,     // [bytes]
                    int64_t bytes) {
  constexpr int kWords = 2 * Keys<kKind>::kBytes;  // of the 8 scores of a byte
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
      bitmask[byte] = static_cast<uint8_t>(prune_byte<kKind>(words[i]));
    }
  }
}

// ---- prune_transposed --------------------------------------------------------------------

template <FloatKind kKind>
__global__ void __launch_bounds__(kTileThreads)
    prune_transposed_kernel(CompressedView weight,
                            uint8_t* __restrict__ bitmask_t) {  // [columns, rows / 8]
  using K = Keys<kKind>;
  constexpr int kColumns = kTileColumns<K::kBytes>;
  constexpr int kColumnsPerLane = 4 / K::kBytes;
  constexpr int kWarpRows = kTileRows / (kTileThreads / 32);  // 16
  constexpr int kMaskBytes = kTileRows / 8;                   // of a column of the tile: 16
  constexpr int kMaskPitch = kMaskBytes + 2;                  // lanes hit different banks
  __shared__ alignas(16) uint8_t tile[kTileRows * kTilePitch];
  __shared__ alignas(16) uint8_t masks[kColumns * kMaskPitch];
  __shared__ SelectorTable selectors;

  const int64_t row0 = int64_t{blockIdx.y} * kTileRows;
  const int64_t column0 = int64_t{blockIdx.x} * kColumns;
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;

  selectors.fill();
  load_tile<K::kBytes>(tile, weight, row0, column0, [&](uint2 values, uint32_t bits) {
    const uint4 dense = Unit<K::kBytes>::decompress(values, bits, selectors);
    const uint4 kept = Unit<K::kBytes>::decompress({~0u, ~0u}, bits, selectors);
    const auto key = [](uint32_t word, uint32_t kept) {
      return (K::nan_to_infinity(word & ~K::kSigns) & kept) | (K::kMinusOne & ~kept);
    };
    return uint4{key(dense.x, kept.x), key(dense.y, kept.y), key(dense.z, kept.z),
                 key(dense.w, kept.w)};
  });

  // Rank the rows of this warp, four at a time; 16 bits for each column of this lane
  uint32_t mask = 0;
#pragma unroll
  for (int row = 0; row < kWarpRows; row += kGroup) {
    const uint8_t* group = tile + (warp * kWarpRows + row) * kTilePitch;
    mask |= keep_two<kKind>(tile_word(group, 0, lane), tile_word(group, 1, lane),
                            tile_word(group, 2, lane), tile_word(group, 3, lane))
            << row;
  }
#pragma unroll
  for (int half = 0; half < kColumnsPerLane; ++half) {
    const int column = lane * kColumnsPerLane + half;
    *reinterpret_cast<uint16_t*>(&masks[column * kMaskPitch + 2 * warp]) =
        static_cast<uint16_t>(mask >> (16 * half));
  }
  __syncthreads();

  // Store: 16 lanes a column
  const int64_t mask_bytes = weight.rows / 8;
  for (int task = threadIdx.x; task < kColumns * kMaskBytes; task += kTileThreads) {
    const int column = task / kMaskBytes;
    const int64_t byte = row0 / 8 + task % kMaskBytes;
    if (column0 + column < weight.columns && byte < mask_bytes) {
      bitmask_t[(column0 + column) * mask_bytes + byte] =
          masks[column * kMaskPitch + task % kMaskBytes];
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
    const dim3 grid = tile_grid(params.rows, params.columns, kTileColumns<Keys<kKind>::kBytes>);
    prune_transposed_kernel<kKind><<<grid, kTileThreads, 0, stream>>>(weight, params.bitmask_t);
  });
  return cudaGetLastError();
}

}  // namespace slope
