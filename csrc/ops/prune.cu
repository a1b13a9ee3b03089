// SPDX-License-Identifier: Apache-2.0
//
// prune_24:        bit j of group g = dense[4g+j] is among the two largest of dense[4g .. 4g+3]
// prune_compress:  the same of magnitudes; values[2g], values[2g+1] = the two kept elements
//
// common/rank.cuh says how four are ranked. A unit is 16 bytes of dense, 8 bytes of values and 8 or
// 4 bits of bitmask. One thread owns kUnroll units, kThreads units apart, as in compress.cu: each
// access of a warp covers whole 32-byte sectors, and all loads are in flight before the first use.
//
// Traffic per element of b bytes: b + 1/8, and b/2 for values. Memory-bound: the limit is bytes
// over copy bandwidth.
//
// prune_transposed, double_prune_ and prune_compress_transposed are the kernel of common/tile.cuh.
//
// Preconditions, which the launcher's caller checks: as in WeightParams.
#include "common/round_up.h"
#include "common/tile.cuh"
#include "ops/prune.h"

namespace slope {
namespace {

constexpr int kThreads = 256;
constexpr int kUnroll = 4;

// ---- kernel ------------------------------------------------------------------------------

template <FloatKind kKind, template <FloatKind> typename By, bool kCompress>
__global__ void __launch_bounds__(kThreads)
    prune_kernel(const uint4* dense,  // [units]
                 uint8_t* bitmask,    // [units] or [units / 2]
                 uint2* values,       // [units] if kCompress
                 int64_t units) {
  using U = Unit<kBytesOf<kKind>>;
  const int64_t first = int64_t{blockIdx.x} * (kThreads * kUnroll) + threadIdx.x;
  wait_for_previous_kernel();
  let_next_kernel_start();

  // Load
  uint4 loaded[kUnroll];
#pragma unroll
  for (int i = 0; i < kUnroll; ++i) {
    const int64_t unit = first + i * kThreads;
    loaded[i] = unit < units ? __ldcs(&dense[unit]) : uint4{0, 0, 0, 0};
  }
  const WarpSelectors selectors;

  // Rank and store
#pragma unroll
  for (int i = 0; i < kUnroll; ++i) {
    const int64_t unit = first + i * kThreads;
    const uint32_t bits = prune_unit<kKind, By>(loaded[i]);
    const uint32_t byte = U::byte(bits);
    const uint2 kept = U::compress(loaded[i], bits, selectors);
    if (unit < units) {
      if (unit % U::kPerByte == 0) {
        bitmask[unit / U::kPerByte] = static_cast<uint8_t>(byte);
      }
      if constexpr (kCompress) {
        values[unit] = kept;
      }
    }
  }
}

// ---- launchers ---------------------------------------------------------------------------

template <FloatKind kKind, template <FloatKind> typename By, bool kCompress>
cudaError_t launch_prune(const WeightParams& weight, cudaStream_t stream) {
  const int64_t units = weight.rows * weight.columns / Unit<kBytesOf<kKind>>::kElements;
  constexpr int64_t kUnitsPerBlock = kThreads * kUnroll;
  const auto blocks = static_cast<unsigned>(ceil_div(units, kUnitsPerBlock));
  return launch_kernel<&prune_kernel<kKind, By, kCompress>>(
      {blocks, kThreads}, stream, static_cast<const uint4*>(weight.dense), weight.bitmask,
      static_cast<uint2*>(weight.values), units);
}

template <template <FloatKind> typename By, bool kCompress>
cudaError_t launch_prune_of_kind(const WeightParams& weight, cudaStream_t stream) {
  switch (weight.kind) {
    case FloatKind::kHalf:
      return launch_prune<FloatKind::kHalf, By, kCompress>(weight, stream);
    case FloatKind::kBFloat16:
      return launch_prune<FloatKind::kBFloat16, By, kCompress>(weight, stream);
    case FloatKind::kFloat:
      return launch_prune<FloatKind::kFloat, By, kCompress>(weight, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t launch_prune_24(const WeightParams& weight, cudaStream_t stream) {
  return launch_prune_of_kind<Signed, false>(weight, stream);
}

cudaError_t launch_prune_compress(const WeightParams& weight, cudaStream_t stream) {
  return launch_prune_of_kind<Magnitude, true>(weight, stream);
}

cudaError_t launch_prune_transposed(const WeightParams& weight, cudaStream_t stream) {
  return launch_tile_of_kind<false, true, false>(weight, stream);
}

cudaError_t launch_double_prune(const WeightParams& weight, cudaStream_t stream) {
  return launch_tile_of_kind<false, true, true>(weight, stream);
}

cudaError_t launch_prune_compress_transposed(const WeightParams& weight, cudaStream_t stream) {
  return launch_tile_of_kind<true, true, true>(weight, stream);
}

}  // namespace slope
