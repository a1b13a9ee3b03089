// SPDX-License-Identifier: Apache-2.0
//
// pack_metadata:  of every group of four the nibble i0 | i1 << 2, i0 < i1 the kept columns, in the
//                 order in which cuSPARSELt's kernels read it
//
//   bitmask   0011  0101  1001  0110  1010  1100     bit j = column j kept
//   metadata  0100  1000  1100  1001  1101  1110     i0 in the low, i1 in the high two bits
//
// Ownership. A lane owns rows r and r + 8, r = 16 (lane / 8) + lane % 8, of 64, and kWords times 32
// columns of them; both layouts keep these two rows of 32 columns together, in 8 bytes. A warp owns
// the 64 rows, so that its stores are 256 (kSm90) or 128 (kSm80) contiguous bytes.
//
//   kSm90   atoms of 64 rows x 32 columns, 256 bytes, along columns first; in an atom lane * 8.
//           byte q = group of row r | group of row r + 8 << 4, groups in the order 0 4 1 5 2 6 3 7
//   kSm80   super-tiles of 128 rows x 64 columns, along rows first; in one, blocks of 32 x 32.
//           16-bit word q = 4 groups of a row: (r, left) (r + 8, left) (r, right) (r + 8, right)
//
// Traffic per dense element: 1/8 byte read, 1/8 written.
//
// Preconditions, which the launcher's caller checks: as in PackMetadataParams; exactly two bits in
// every nibble.
#include <type_traits>

#include "common/launch.cuh"
#include "common/round_up.h"
#include "ops/pack.h"

namespace slope {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kWarpRows = 64;

// Eight nibbles of bitmask -> eight nibbles of indices.
__device__ __forceinline__ uint32_t indices_of(uint32_t mask) {
  constexpr uint32_t kOnes = 0x11111111;
  const uint32_t not_0 = ~mask, bit_1 = mask >> 1, bit_2 = mask >> 2, bit_3 = mask >> 3;
  return (not_0 & bit_1 & kOnes)            // i0 = 1
         | (not_0 & ~bit_1 & kOnes) << 1    // i0 = 2
         | ((bit_3 | ~bit_2) & kOnes) << 2  // i1 = 1 or 3
         | ((bit_3 | bit_2) & kOnes) << 3;  // i1 = 2 or 3
}

template <MetadataLayout kLayout>
__device__ __forceinline__ uint2 interleave(uint32_t upper, uint32_t lower) {
  if constexpr (kLayout == MetadataLayout::kSm90) {
    const uint32_t even = (upper & 0x0f0f0f0f) | (lower & 0x0f0f0f0f) << 4;  // groups 0 2 4 6
    const uint32_t odd = (upper >> 4 & 0x0f0f0f0f) | (lower & 0xf0f0f0f0);   // groups 1 3 5 7
    return {__byte_perm(even, odd, 0x6420), __byte_perm(even, odd, 0x7531)};
  } else {
    return {__byte_perm(upper, lower, 0x5410), __byte_perm(upper, lower, 0x7632)};
  }
}

// Where the 8 bytes of a lane go: row0 the warp's first row, word the columns over 32.
template <MetadataLayout kLayout>
__device__ __forceinline__ int64_t place_of(int64_t rows, int64_t words, int64_t row0, int64_t word,
                                            int lane) {
  if constexpr (kLayout == MetadataLayout::kSm90) {
    return (row0 / 64 * words + word) * 32 + lane;
  } else {
    const int64_t super_tile = word / 2 * (rows / 128) + row0 / 128;   // 128 pieces of 8 bytes
    const int64_t block = word % 2 * 4 + row0 % 128 / 32 + lane / 16;  // 16 pieces each
    return super_tile * 128 + block * 16 + lane % 8 * 2 + lane / 8 % 2;
  }
}

// kWords: words of 32 columns that a lane loads at once, 4 (16 bytes) or 1.
template <MetadataLayout kLayout, int kWords>
__global__ void __launch_bounds__(kThreads)
    pack_metadata_kernel(const uint32_t* bitmask,  // [rows, words]
                         uint2* metadata, int64_t rows, int64_t words) {
  using Vector = std::conditional_t<kWords == 4, uint4, uint32_t>;
  const int lane = threadIdx.x % 32;
  const int64_t word = (int64_t{blockIdx.x} * kWarps + threadIdx.x / 32) * kWords;
  const int64_t row0 = int64_t{blockIdx.y} * kWarpRows;
  const int64_t row = row0 + lane / 8 * 16 + lane % 8;
  wait_for_previous_kernel();
  let_next_kernel_start();
  if (word >= words) {
    return;
  }

  union {
    Vector vector;
    uint32_t word[kWords];
  } upper, lower;
  upper.vector = *reinterpret_cast<const Vector*>(&bitmask[row * words + word]);
  lower.vector = *reinterpret_cast<const Vector*>(&bitmask[(row + 8) * words + word]);

#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    metadata[place_of<kLayout>(rows, words, row0, word + i, lane)] =
        interleave<kLayout>(indices_of(upper.word[i]), indices_of(lower.word[i]));
  }
}

template <MetadataLayout kLayout, int kWords>
cudaError_t launch(const PackMetadataParams& params, cudaStream_t stream) {
  const int64_t words = params.columns / 32;
  constexpr int64_t kBlockWords = kWarps * kWords;
  const dim3 grid(static_cast<unsigned>(ceil_div(words, kBlockWords)),
                  static_cast<unsigned>(params.rows / kWarpRows));
  return launch_kernel<&pack_metadata_kernel<kLayout, kWords>>(
      {grid, kThreads}, stream, reinterpret_cast<const uint32_t*>(params.bitmask),
      static_cast<uint2*>(params.metadata), params.rows, words);
}

template <MetadataLayout kLayout>
cudaError_t launch_layout(const PackMetadataParams& params, cudaStream_t stream) {
  const bool wide =
      params.columns % 128 == 0 && reinterpret_cast<uintptr_t>(params.bitmask) % 16 == 0;
  return wide ? launch<kLayout, 4>(params, stream) : launch<kLayout, 1>(params, stream);
}

// ---- words of spmm_sm90 --------------------------------------------------------------------
//
// words = the same nibbles in the order in which threads of spmm_sm90 take them. Traffic per dense
// element: 1/8 byte read, 1/8 written. Preconditions: as in PackWordsParams.
//
// Element [b, q, l, s] is what lane 4g + t of warp w, l = 32w + 4g + t, gives to the wgmma of
// columns 256q + 64s on: groups of columns 256q + 64s + 16t on, four nibbles of row 64b + 16w + g,
// then four of the row 8 below.
//
// Ownership. A thread owns the four words of its lane, 16 bytes; a block one [b, q]. Its warps read
// 32 bytes each of 16 rows of the bitmask.
constexpr int kQuadThreads = 128;
constexpr int kQuadColumns = 256;
constexpr uint32_t kKeepsFirstTwo = 0x33333333;  // of each group: as good as any beyond the weight

__global__ void __launch_bounds__(kQuadThreads)
    pack_words_kernel(const PackWordsParams params, const unsigned quads) {
  const int lane = threadIdx.x % 32;
  const int64_t row = int64_t{blockIdx.x / quads} * kWarpRows + threadIdx.x / 32 * 16 + lane / 4;
  const int64_t column = int64_t{blockIdx.x % quads} * kQuadColumns + lane % 4 * 16;
  const int64_t row_bytes = params.columns / 8;

  wait_for_previous_kernel();
  let_next_kernel_start();
  uint32_t words[4];
#pragma unroll
  for (int stage = 0; stage < 4; ++stage) {
    uint32_t mask = kKeepsFirstTwo;
    const int64_t first = column + stage * 64;
    if (first < params.columns) {
      const auto* const source = params.bitmask + row * row_bytes + first / 8;
      if (row < params.rows) {
        mask = (mask & 0xffff0000) | *reinterpret_cast<const uint16_t*>(source);
      }
      if (row + 8 < params.rows) {
        const auto below = *reinterpret_cast<const uint16_t*>(source + 8 * row_bytes);
        mask = (mask & 0x0000ffff) | uint32_t{below} << 16;
      }
    }
    words[stage] = indices_of(mask);
  }
  reinterpret_cast<uint4*>(params.words)[int64_t{blockIdx.x} * kQuadThreads + threadIdx.x] = {
      words[0], words[1], words[2], words[3]};
}

}  // namespace

// ---- launchers ---------------------------------------------------------------------------

cudaError_t launch_pack_words(const PackWordsParams& params, cudaStream_t stream) {
  const auto quads = static_cast<unsigned>(ceil_div(params.columns, kQuadColumns));
  const auto blocks = static_cast<unsigned>(ceil_div(params.rows, kWarpRows)) * quads;
  return launch_kernel<&pack_words_kernel>({blocks, kQuadThreads}, stream, params, quads);
}

cudaError_t launch_pack_metadata(const PackMetadataParams& params, cudaStream_t stream) {
  return params.layout == MetadataLayout::kSm90
             ? launch_layout<MetadataLayout::kSm90>(params, stream)
             : launch_layout<MetadataLayout::kSm80>(params, stream);
}

}  // namespace slope

int slope_pack_metadata(const void* params, void* stream) {
  return slope::launch_pack_metadata(*static_cast<const slope::PackMetadataParams*>(params),
                                     static_cast<cudaStream_t>(stream));
}
