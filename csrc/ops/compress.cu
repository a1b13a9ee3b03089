// SPDX-License-Identifier: Apache-2.0
//
// compress:    values[2g], values[2g+1] = the two kept elements of dense[4g .. 4g+3]
// decompress:  dense[4g+j] = its value where bit j of group g is set, else +0
//
// Ownership. A unit is 16 bytes of dense, 8 bytes of values and 8 or 4 bits of bitmask: two groups
// of 2-byte elements or one of 4-byte ones. One thread owns kUnroll units, kThreads units apart:
// each access of a warp covers whole 32-byte sectors without gaps (a store of half sectors makes
// the L2 cache merge them), and all loads are in flight before the first use.
//
//   block   | unit 0 .. 255 | 256 .. 511 | 512 .. 767 | 768 .. 1023 |
//   thread t|      t        |   t + 256  |   t + 512  |   t + 768   |
//
// Traffic per dense element of b bytes: b + b/2 + 1/8 (bf16: 3.125). Memory-bound: the limit is
// bytes over copy bandwidth.
//
// Elements are moved as bits, never converted: NaN payloads and -0 survive.
//
// Preconditions, which the launcher's caller checks: as in CompressParams; every nibble of the
// bitmask has exactly two bits. Other nibbles give unspecified values but no stray access.
#include "common/unit.cuh"
#include "ops/compress.h"

namespace slope {
namespace {

constexpr int kThreads = 256;
constexpr int kUnroll = 4;

// ---- kernels -----------------------------------------------------------------------------

template <int kElementBytes>
__global__ void __launch_bounds__(kThreads)
    compress_kernel(const uint4* __restrict__ dense,      // [units]
                    const uint8_t* __restrict__ bitmask,  // [units] or [units / 2]
                    uint2* __restrict__ values,           // [units]
                    int64_t units) {
  const int64_t first = int64_t{blockIdx.x} * (kThreads * kUnroll) + threadIdx.x;

  // Load
  uint4 group[kUnroll];
  uint32_t bits[kUnroll];
#pragma unroll
  for (int i = 0; i < kUnroll; ++i) {
    const int64_t unit = first + i * kThreads;
    if (unit < units) {
      group[i] = __ldcs(&dense[unit]);
      bits[i] = Unit<kElementBytes>::bits(bitmask, unit);
    }
  }

  // Keep and store
#pragma unroll
  for (int i = 0; i < kUnroll; ++i) {
    const int64_t unit = first + i * kThreads;
    if (unit < units) {
      values[unit] = Unit<kElementBytes>::compress(group[i], bits[i], ComputedSelectors());
    }
  }
}

template <int kElementBytes>
__global__ void __launch_bounds__(kThreads)
    decompress_kernel(const uint2* __restrict__ values,     // [units]
                      const uint8_t* __restrict__ bitmask,  // [units] or [units / 2]
                      uint4* __restrict__ dense,            // [units]
                      int64_t units) {
  const int64_t first = int64_t{blockIdx.x} * (kThreads * kUnroll) + threadIdx.x;

  // Load
  uint2 kept[kUnroll];
  uint32_t bits[kUnroll];
#pragma unroll
  for (int i = 0; i < kUnroll; ++i) {
    const int64_t unit = first + i * kThreads;
    if (unit < units) {
      kept[i] = __ldcs(&values[unit]);
      bits[i] = Unit<kElementBytes>::bits(bitmask, unit);
    }
  }

  // Place and store
#pragma unroll
  for (int i = 0; i < kUnroll; ++i) {
    const int64_t unit = first + i * kThreads;
    if (unit < units) {
      dense[unit] = Unit<kElementBytes>::decompress(kept[i], bits[i], ComputedSelectors());
    }
  }
}

// ---- launchers ---------------------------------------------------------------------------

int64_t units_of(const CompressParams& params) {
  return params.elements * params.element_bytes / static_cast<int64_t>(sizeof(uint4));
}

unsigned blocks_of(int64_t units) {
  constexpr int64_t kUnitsPerBlock = kThreads * kUnroll;
  return static_cast<unsigned>((units + kUnitsPerBlock - 1) / kUnitsPerBlock);
}

}  // namespace

cudaError_t launch_compress(const CompressParams& params, cudaStream_t stream) {
  const int64_t units = units_of(params);
  auto* const kernel = params.element_bytes == 2 ? &compress_kernel<2> : &compress_kernel<4>;
  kernel<<<blocks_of(units), kThreads, 0, stream>>>(static_cast<const uint4*>(params.dense),
                                                    params.bitmask,
                                                    static_cast<uint2*>(params.values), units);
  return cudaGetLastError();
}

cudaError_t launch_decompress(const CompressParams& params, cudaStream_t stream) {
  const int64_t units = units_of(params);
  auto* const kernel = params.element_bytes == 2 ? &decompress_kernel<2> : &decompress_kernel<4>;
  kernel<<<blocks_of(units), kThreads, 0, stream>>>(static_cast<const uint2*>(params.values),
                                                    params.bitmask,
                                                    static_cast<uint4*>(params.dense), units);
  return cudaGetLastError();
}

}  // namespace slope
