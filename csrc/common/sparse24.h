// SPDX-License-Identifier: Apache-2.0
//
// The 2:4 layout, for host and device code. No torch header.
//
//   dense row     a b c d | e f g h      kept: b, d | e, f   (two of every four, ascending column)
//   values row    b d e f
//   bitmask byte  bit 0 = column 0 ... bit 7 = column 7; 1 = kept
//                 a b c d e f g h
//                 0 1 0 1 1 1 0 0        -> 0b00111010 = 0x3A
//   nibble        the four bits of one group; valid: 3 5 6 9 A C (exactly two bits)
//
// bytes per dense element of b bytes: values b/2, bitmask 1/8.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define SLOPE_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define SLOPE_HOST_DEVICE inline
#endif

namespace slope {

constexpr int kGroup = 4;           // dense columns of one group
constexpr int kKept = 2;            // kept columns of one group
constexpr int kColumnsPerByte = 8;  // dense columns of one bitmask byte

// Column (0..2) of the first kept element. nibble must have two bits set.
SLOPE_HOST_DEVICE uint32_t first_kept(uint32_t nibble) {
#ifdef __CUDA_ARCH__
  return __ffs(nibble) - 1;
#else
  return __builtin_ctz(nibble);
#endif
}

// Column (1..3) of the second kept element. nibble must have two bits set.
SLOPE_HOST_DEVICE uint32_t second_kept(uint32_t nibble) {
#ifdef __CUDA_ARCH__
  return 31 - __clz(nibble);
#else
  return 31 - __builtin_clz(nibble);
#endif
}

// Where element j (0..3) of a group comes from: value 0, value 1, or 2 = it was pruned.
SLOPE_HOST_DEVICE uint32_t value_of(uint32_t nibble, int j) {
  const uint32_t kept_before = nibble & ((1u << j) - 1);
  return (nibble >> j & 1) == 0 ? 2 : (kept_before == 0 ? 0 : 1);
}

}  // namespace slope
