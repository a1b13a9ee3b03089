// SPDX-License-Identifier: Apache-2.0
//
// One unit of a 2:4 weight in registers: 16 bytes of dense, 8 bytes of values, 8 or 4 bits of mask.
//
//   2-byte elements: two groups  (a b c d)(e f g h)   a byte of bitmask
//   4-byte elements: one group   (a b c d)            a nibble of bitmask
#pragma once

#include "common/sparse24.h"

namespace slope {

// Selectors of __byte_perm for 16-bit elements. It picks bytes 0-7 from a pair of words: element j
// of four is bytes 2j and 2j+1, so selector nibbles 0x10 + 0x22 * j.
//
//   keep(nibble)   from the words (a b)(c d) of a group: its two kept elements
//   place(nibble)  from the word of values and zero: elements 0, 1 (low 16 bits) and 2, 3 (high)
//
// Computed, for kernels that wait for memory anyway; or looked up in shared memory, one load
// instead of some twenty instructions, for those that do not.
struct ComputedSelectors {
  __device__ __forceinline__ uint32_t keep(uint32_t nibble) const {
    return 0x1010 + 0x22 * first_kept(nibble) + 0x2200 * second_kept(nibble);
  }
  __device__ __forceinline__ uint32_t place(uint32_t nibble) const {
    return 0x10101010 + 0x22 * value_of(nibble, 0) + 0x2200 * value_of(nibble, 1) +
           0x220000 * value_of(nibble, 2) + 0x22000000 * value_of(nibble, 3);
  }
};

struct SelectorTable {
  uint32_t keep_entries[16];
  uint32_t place_entries[16];

  // By 16 threads; a barrier must follow.
  __device__ __forceinline__ void fill() {
    if (threadIdx.x < 16) {
      keep_entries[threadIdx.x] = ComputedSelectors().keep(threadIdx.x);
      place_entries[threadIdx.x] = ComputedSelectors().place(threadIdx.x);
    }
  }
  __device__ __forceinline__ uint32_t keep(uint32_t nibble) const { return keep_entries[nibble]; }
  __device__ __forceinline__ uint32_t place(uint32_t nibble) const { return place_entries[nibble]; }
};

template <int kElementBytes>
struct Unit;

template <>
struct Unit<2> {
  static constexpr int kElements = 8;

  static __device__ __forceinline__ uint32_t bits(const uint8_t* bitmask, int64_t unit) {
    return bitmask[unit];
  }

  template <typename Selectors>
  static __device__ __forceinline__ uint2 compress(uint4 dense, uint32_t bits,
                                                   const Selectors& selectors) {
    return {__byte_perm(dense.x, dense.y, selectors.keep(bits & 15)),
            __byte_perm(dense.z, dense.w, selectors.keep(bits >> 4))};
  }

  template <typename Selectors>
  static __device__ __forceinline__ uint4 decompress(uint2 values, uint32_t bits,
                                                     const Selectors& selectors) {
    const uint32_t low = selectors.place(bits & 15);
    const uint32_t high = selectors.place(bits >> 4);
    return {__byte_perm(values.x, 0, low), __byte_perm(values.x, 0, low >> 16),
            __byte_perm(values.y, 0, high), __byte_perm(values.y, 0, high >> 16)};
  }
};

template <>
struct Unit<4> {
  static constexpr int kElements = 4;

  // A byte of bitmask serves two units.
  static __device__ __forceinline__ uint32_t bits(const uint8_t* bitmask, int64_t unit) {
    return bitmask[unit / 2] >> (unit % 2 * 4) & 15;
  }

  template <typename Selectors>
  static __device__ __forceinline__ uint2 compress(uint4 dense, uint32_t nibble, const Selectors&) {
    const uint32_t first = first_kept(nibble);
    const uint32_t second = second_kept(nibble);
    return {first == 0 ? dense.x : (first == 1 ? dense.y : dense.z),
            second == 1 ? dense.y : (second == 2 ? dense.z : dense.w)};
  }

  static __device__ __forceinline__ uint32_t place(uint2 values, uint32_t nibble, int j) {
    const uint32_t value = value_of(nibble, j);
    return value == 0 ? values.x : (value == 1 ? values.y : 0u);
  }

  template <typename Selectors>
  static __device__ __forceinline__ uint4 decompress(uint2 values, uint32_t nibble,
                                                     const Selectors&) {
    return {place(values, nibble, 0), place(values, nibble, 1), place(values, nibble, 2),
            place(values, nibble, 3)};
  }
};

}  // namespace slope
