// SPDX-License-Identifier: Apache-2.0
//
// compress:    values[2g], values[2g+1] = the two kept elements of dense[4g .. 4g+3]
// decompress:  dense[4g+j] = its value where bit j of group g is set, else +0
//
// Ownership. A unit is 16 bytes of values: 8 elements of 2 bytes or 4 of 4 bytes, that is 32 bytes
// of dense and 2 or 1 bytes of bitmask. One thread owns kUnroll units, kThreads units apart, so
// that neighbouring lanes touch neighbouring memory and all loads are in flight before the first
// use:
//
//   block   | unit 0 .. 255 | 256 .. 511 | 512 .. 767 | 768 .. 1023 |
//   thread t|      t        |   t + 256  |   t + 512  |   t + 768   |
//
// Traffic per dense element of b bytes: b + b/2 + 1/8 bytes (bf16: 3.125), all of it 16-byte
// accesses but for the bitmask. Memory-bound: the limit is bytes over copy bandwidth.
//
// Elements are moved as bits, never converted: NaN payloads and -0 survive. A 16-bit weight whose
// element count is an odd multiple of 8 ends in half a unit, which the thread after the last whole
// unit moves.
//
// Preconditions (the launcher's caller checks them): as in CompressParams; every nibble of the
// bitmask has exactly two bits. Other nibbles give unspecified values but no stray access.
#include <algorithm>

#include "common/sparse24.h"
#include "ops/compress.h"

namespace slope {
namespace {

constexpr int kThreads = 256;
constexpr int kUnroll = 4;

// ---- one group of four
// ---------------------------------------------------------------------------

// 16-bit elements: the group is two words (a b)(c d), its values one word. __byte_perm picks bytes
// 0-7 of the pair: element j is bytes 2j and 2j+1, selector nibbles from the lowest byte up.
__device__ __forceinline__ uint32_t compress_group(uint32_t ab, uint32_t cd, uint32_t nibble) {
  const uint32_t selector = 0x1010 + first_kept(nibble) * 0x22 + second_kept(nibble) * 0x2200;
  return __byte_perm(ab, cd, selector);
}

// 32-bit elements.
__device__ __forceinline__ uint2 compress_group(uint4 group, uint32_t nibble) {
  const uint32_t first = first_kept(nibble);
  const uint32_t second = second_kept(nibble);
  return {first == 0 ? group.x : (first == 1 ? group.y : group.z),
          second == 1 ? group.y : (second == 2 ? group.z : group.w)};
}

// Where element j of a group comes from: 0 or 1 = that value, 2 = zero.
__device__ __forceinline__ uint32_t source_of(uint32_t nibble, int j) {
  const uint32_t before = nibble & ((1u << j) - 1);
  return (nibble >> j & 1) == 0 ? 2 : (before == 0 ? 0 : 1);
}

// 16-bit elements 2 * half and 2 * half + 1 of the group, as one word.
__device__ __forceinline__ uint32_t decompress_half(uint32_t values, uint32_t nibble, int half) {
  const uint32_t low = source_of(nibble, 2 * half);
  const uint32_t high = source_of(nibble, 2 * half + 1);
  return __byte_perm(values, 0, 0x1010 + low * 0x22 + high * 0x2200);
}

// 32-bit elements.
__device__ __forceinline__ uint4 decompress_group(uint2 values, uint32_t nibble) {
  const auto pick = [&](int j) {
    const uint32_t source = source_of(nibble, j);
    return source == 0 ? values.x : (source == 1 ? values.y : 0u);
  };
  return {pick(0), pick(1), pick(2), pick(3)};
}

// ---- one unit: 32 bytes of dense <-> 16 bytes of values
// ------------------------------------------

template <int kElementBytes>
struct Unit;

template <>
struct Unit<2> {
  using Mask = uint16_t;  // 16 columns

  static __device__ __forceinline__ uint2 compress_half(uint4 dense, uint32_t byte) {
    return {compress_group(dense.x, dense.y, byte & 15),
            compress_group(dense.z, dense.w, byte >> 4)};
  }
  static __device__ __forceinline__ uint4 decompress_half_unit(uint2 values, uint32_t byte) {
    return {decompress_half(values.x, byte & 15, 0), decompress_half(values.x, byte & 15, 1),
            decompress_half(values.y, byte >> 4, 0), decompress_half(values.y, byte >> 4, 1)};
  }
  static __device__ __forceinline__ uint4 compress(uint4 low, uint4 high, uint32_t mask) {
    const uint2 a = compress_half(low, mask & 255);
    const uint2 b = compress_half(high, mask >> 8);
    return {a.x, a.y, b.x, b.y};
  }
  static __device__ __forceinline__ void decompress(uint4 values, uint32_t mask, uint4& low,
                                                    uint4& high) {
    low = decompress_half_unit({values.x, values.y}, mask & 255);
    high = decompress_half_unit({values.z, values.w}, mask >> 8);
  }
};

template <>
struct Unit<4> {
  using Mask = uint8_t;  // 8 columns

  static __device__ __forceinline__ uint4 compress(uint4 low, uint4 high, uint32_t mask) {
    const uint2 a = compress_group(low, mask & 15);
    const uint2 b = compress_group(high, mask >> 4);
    return {a.x, a.y, b.x, b.y};
  }
  static __device__ __forceinline__ void decompress(uint4 values, uint32_t mask, uint4& low,
                                                    uint4& high) {
    low = decompress_group({values.x, values.y}, mask & 15);
    high = decompress_group({values.z, values.w}, mask >> 4);
  }
};

// ---- kernels
// -------------------------------------------------------------------------------------

template <int kElementBytes>
__global__ void __launch_bounds__(kThreads)
    compress_kernel(const uint4* __restrict__ dense,      // [2 * units]
                    const uint8_t* __restrict__ bitmask,  // [units * sizeof(Mask)]
                    uint4* __restrict__ values,           // [units]
                    int64_t units, bool half_unit) {
  using Mask = typename Unit<kElementBytes>::Mask;
  const int64_t first = int64_t{blockIdx.x} * (kThreads * kUnroll) + threadIdx.x;

  // Load
  uint4 low[kUnroll], high[kUnroll];
  uint32_t mask[kUnroll];
#pragma unroll
  for (int i = 0; i < kUnroll; ++i) {
    const int64_t unit = first + i * kThreads;
    if (unit < units) {
      low[i] = __ldcs(&dense[2 * unit]);
      high[i] = __ldcs(&dense[2 * unit + 1]);
      mask[i] = reinterpret_cast<const Mask*>(bitmask)[unit];
    }
  }

  // Select and store
#pragma unroll
  for (int i = 0; i < kUnroll; ++i) {
    const int64_t unit = first + i * kThreads;
    if (unit < units) {
      values[unit] = Unit<kElementBytes>::compress(low[i], high[i], mask[i]);
    }
    if constexpr (kElementBytes == 2) {
      if (half_unit && unit == units) {
        reinterpret_cast<uint2*>(values)[2 * unit] =
            Unit<2>::compress_half(dense[2 * unit], bitmask[2 * unit]);
      }
    }
  }
}

template <int kElementBytes>
__global__ void __launch_bounds__(kThreads)
    decompress_kernel(const uint4* __restrict__ values,     // [units]
                      const uint8_t* __restrict__ bitmask,  // [units * sizeof(Mask)]
                      uint4* __restrict__ dense,            // [2 * units]
                      int64_t units, bool half_unit) {
  using Mask = typename Unit<kElementBytes>::Mask;
  const int64_t first = int64_t{blockIdx.x} * (kThreads * kUnroll) + threadIdx.x;

  // Load
  uint4 packed[kUnroll];
  uint32_t mask[kUnroll];
#pragma unroll
  for (int i = 0; i < kUnroll; ++i) {
    const int64_t unit = first + i * kThreads;
    if (unit < units) {
      packed[i] = __ldcs(&values[unit]);
      mask[i] = reinterpret_cast<const Mask*>(bitmask)[unit];
    }
  }

  // Place and store
#pragma unroll
  for (int i = 0; i < kUnroll; ++i) {
    const int64_t unit = first + i * kThreads;
    if (unit < units) {
      uint4 low, high;
      Unit<kElementBytes>::decompress(packed[i], mask[i], low, high);
      dense[2 * unit] = low;
      dense[2 * unit + 1] = high;
    }
    if constexpr (kElementBytes == 2) {
      if (half_unit && unit == units) {
        dense[2 * unit] = Unit<2>::decompress_half_unit(
            reinterpret_cast<const uint2*>(values)[2 * unit], bitmask[2 * unit]);
      }
    }
  }
}

// ---- launchers
// -----------------------------------------------------------------------------------

struct Grid {
  int64_t units;   // whole 16-byte units of values
  bool half_unit;  // one more half unit follows
  unsigned blocks;

  explicit Grid(const CompressParams& params) {
    const int64_t value_bytes = params.elements / 2 * params.element_bytes;
    units = value_bytes / 16;
    half_unit = value_bytes % 16 != 0;
    const int64_t per_block = kThreads * kUnroll;
    blocks = static_cast<unsigned>((units + (half_unit ? 1 : 0) + per_block - 1) / per_block);
  }
};

}  // namespace

cudaError_t launch_compress(const CompressParams& params, cudaStream_t stream) {
  const Grid grid(params);
  auto* const kernel = params.element_bytes == 2 ? &compress_kernel<2> : &compress_kernel<4>;
  kernel<<<grid.blocks, kThreads, 0, stream>>>(static_cast<const uint4*>(params.dense),
                                               params.bitmask, static_cast<uint4*>(params.values),
                                               grid.units, grid.half_unit);
  return cudaGetLastError();
}

cudaError_t launch_decompress(const CompressParams& params, cudaStream_t stream) {
  const Grid grid(params);
  auto* const kernel = params.element_bytes == 2 ? &decompress_kernel<2> : &decompress_kernel<4>;
  kernel<<<grid.blocks, kThreads, 0, stream>>>(static_cast<const uint4*>(params.values),
                                               params.bitmask, static_cast<uint4*>(params.dense),
                                               grid.units, grid.half_unit);
  return cudaGetLastError();
}

}  // namespace slope
