// SPDX-License-Identifier: Apache-2.0
//
// One unit of a 2:4 weight in registers: 16 bytes of dense, 8 bytes of values, 8 or 4 bits of mask.
//
//   2-byte elements: two groups  (a b c d)(e f g h)   a byte of bitmask
//   4-byte elements: one group   (a b c d)            a nibble of bitmask
#pragma once

#include "common/sparse24.h"

namespace slope {

template <int kElementBytes>
struct Unit;

// A word holds two 16-bit elements, the earlier one in its low half. __byte_perm picks bytes from a
// pair of words: element j of a group is bytes 2j and 2j+1, so selector nibbles 0x10 + 0x22 * j.
template <>
struct Unit<2> {
  static constexpr int kElements = 8;

  static __device__ __forceinline__ uint32_t bits(const uint8_t* bitmask, int64_t unit) {
    return bitmask[unit];
  }

  static __device__ __forceinline__ uint32_t keep(uint32_t ab, uint32_t cd, uint32_t nibble) {
    return __byte_perm(ab, cd, 0x1010 + 0x22 * first_kept(nibble) + 0x2200 * second_kept(nibble));
  }

  static __device__ __forceinline__ uint2 compress(uint4 dense, uint32_t bits) {
    return {keep(dense.x, dense.y, bits & 15), keep(dense.z, dense.w, bits >> 4)};
  }

  // Elements j and j+1 of a group whose values are one word; __byte_perm's second word is zero.
  static __device__ __forceinline__ uint32_t place(uint32_t values, uint32_t nibble, int j) {
    const uint32_t low = value_of(nibble, j);
    const uint32_t high = value_of(nibble, j + 1);
    return __byte_perm(values, 0, 0x1010 + 0x22 * low + 0x2200 * high);
  }

  static __device__ __forceinline__ uint4 decompress(uint2 values, uint32_t bits) {
    return {place(values.x, bits & 15, 0), place(values.x, bits & 15, 2),
            place(values.y, bits >> 4, 0), place(values.y, bits >> 4, 2)};
  }
};

template <>
struct Unit<4> {
  static constexpr int kElements = 4;

  // A byte of bitmask serves two units.
  static __device__ __forceinline__ uint32_t bits(const uint8_t* bitmask, int64_t unit) {
    return bitmask[unit / 2] >> (unit % 2 * 4) & 15;
  }

  static __device__ __forceinline__ uint2 compress(uint4 dense, uint32_t nibble) {
    const uint32_t first = first_kept(nibble);
    const uint32_t second = second_kept(nibble);
    return {first == 0 ? dense.x : (first == 1 ? dense.y : dense.z),
            second == 1 ? dense.y : (second == 2 ? dense.z : dense.w)};
  }

  static __device__ __forceinline__ uint32_t place(uint2 values, uint32_t nibble, int j) {
    const uint32_t value = value_of(nibble, j);
    return value == 0 ? values.x : (value == 1 ? values.y : 0u);
  }

  static __device__ __forceinline__ uint4 decompress(uint2 values, uint32_t nibble) {
    return {place(values, nibble, 0), place(values, nibble, 1), place(values, nibble, 2),
            place(values, nibble, 3)};
  }
};

}  // namespace slope
