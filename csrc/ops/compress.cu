// SPDX-License-Identifier: Apache-2.0
//
// compress:    values[2g], values[2g+1] = the two kept elements of dense[4g .. 4g+3], or += them
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
// Traffic per dense element of b bytes: b + b/2 + 1/8 (bf16: 3.125), adding b/2 more. Memory-bound:
// the limit is bytes over copy bandwidth.
//
// Elements are moved as bits, never converted, but where they are added (in fp32, rounded once):
// NaN payloads and -0 survive.
//
// Preconditions, which the launcher's caller checks: as in CompressParams; every nibble of the
// bitmask has exactly two bits. Other nibbles give unspecified values but no stray access.
#include "common/element.cuh"
#include "common/launch.cuh"
#include "common/round_up.h"
#include "common/unit.cuh"
#include "ops/compress.h"

namespace slope {
namespace {

constexpr int kThreads = 256;
constexpr int kUnroll = 4;

// ---- kernels -----------------------------------------------------------------------------

// a + b, each the values of a unit.
template <FloatKind kKind>
__device__ __forceinline__ uint2 add_values(uint2 a, uint2 b) {
  using Element = typename ElementOf<kKind>::Type;
  constexpr int kValues = sizeof(uint2) / sizeof(Element);
  union Values {
    uint2 words;
    Element at[kValues];
    __device__ Values() {}
  } sum, other;
  sum.words = a;
  other.words = b;
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    assign(sum.at[i], to_float(sum.at[i]) + to_float(other.at[i]));
  }
  return sum.words;
}

template <FloatKind kKind, bool kAdd>
__global__ void __launch_bounds__(kThreads)
    compress_kernel(const uint4* dense,      // [units]
                    const uint8_t* bitmask,  // [units] or [units / 2]
                    uint2* values,           // [units]
                    int64_t units) {
  const int64_t first = int64_t{blockIdx.x} * (kThreads * kUnroll) + threadIdx.x;
  wait_for_previous_kernel();
  let_next_kernel_start();

  using U = Unit<kBytesOf<kKind>>;

  // Load
  uint4 group[kUnroll];
  uint32_t bits[kUnroll];
  uint2 before[kUnroll];
#pragma unroll
  for (int i = 0; i < kUnroll; ++i) {
    const int64_t unit = first + i * kThreads;
    if (unit < units) {
      group[i] = __ldcs(&dense[unit]);
      bits[i] = U::bits(bitmask, unit);
      if constexpr (kAdd) {
        before[i] = values[unit];
      }
    }
  }

  // Keep and store
#pragma unroll
  for (int i = 0; i < kUnroll; ++i) {
    const int64_t unit = first + i * kThreads;
    if (unit < units) {
      const uint2 kept = U::compress(group[i], bits[i], ComputedSelectors());
      values[unit] = kAdd ? add_values<kKind>(before[i], kept) : kept;
    }
  }
}

template <int kElementBytes>
__global__ void __launch_bounds__(kThreads)
    decompress_kernel(const uint2* values,     // [units]
                      const uint8_t* bitmask,  // [units] or [units / 2]
                      uint4* dense,            // [units]
                      int64_t units) {
  const int64_t first = int64_t{blockIdx.x} * (kThreads * kUnroll) + threadIdx.x;
  wait_for_previous_kernel();
  let_next_kernel_start();

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
  return static_cast<unsigned>(ceil_div(units, kUnitsPerBlock));
}

template <FloatKind kKind, bool kAdd>
cudaError_t launch_compress_of(const CompressParams& params, cudaStream_t stream) {
  const int64_t units = units_of(params);
  return launch_kernel<&compress_kernel<kKind, kAdd>>(
      {blocks_of(units), kThreads}, stream, static_cast<const uint4*>(params.dense), params.bitmask,
      static_cast<uint2*>(params.values), units);
}

template <int kElementBytes>
cudaError_t launch_decompress_of(const CompressParams& params, cudaStream_t stream) {
  const int64_t units = units_of(params);
  return launch_kernel<&decompress_kernel<kElementBytes>>(
      {blocks_of(units), kThreads}, stream, static_cast<const uint2*>(params.values),
      params.bitmask, static_cast<uint4*>(params.dense), units);
}

}  // namespace

cudaError_t launch_compress(const CompressParams& params, cudaStream_t stream) {
  // Bits are moved: both 2-byte types are one
  return params.element_bytes == 2 ? launch_compress_of<FloatKind::kHalf, false>(params, stream)
                                   : launch_compress_of<FloatKind::kFloat, false>(params, stream);
}

cudaError_t launch_compress_add(const CompressParams& params, FloatKind kind, cudaStream_t stream) {
  switch (kind) {
    case FloatKind::kHalf:
      return launch_compress_of<FloatKind::kHalf, true>(params, stream);
    case FloatKind::kBFloat16:
      return launch_compress_of<FloatKind::kBFloat16, true>(params, stream);
    case FloatKind::kFloat:
      return launch_compress_of<FloatKind::kFloat, true>(params, stream);
  }
  return cudaErrorInvalidValue;
}

cudaError_t launch_decompress(const CompressParams& params, cudaStream_t stream) {
  return params.element_bytes == 2 ? launch_decompress_of<2>(params, stream)
                                   : launch_decompress_of<4>(params, stream);
}

}  // namespace slope
