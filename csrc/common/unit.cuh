// SPDX-License-Identifier: Apache-2.0
//
// Pieces of a 2:4 weight in registers.
//
//   group  four dense elements, two values, a nibble of bitmask
//   unit   16 bytes of dense, 8 bytes of values: two groups of 2-byte elements, a byte of bitmask;
//          or one group of 4-byte elements, a nibble of bitmask
#pragma once

#include "common/sparse24.h"

namespace slope {

// Bytes 0-7 of a pair of words, picked by the low four nibbles of selector, each below 8; otherwise
// unspecified. As __byte_perm, which spends an instruction on clearing the top bit of each nibble.
__device__ __forceinline__ uint32_t pick_bytes(uint32_t low, uint32_t high, uint32_t selector) {
  uint32_t picked;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(picked) : "r"(low), "r"(high), "r"(selector));
  return picked;
}

// Selectors of pick_bytes for 16-bit elements: element j of four is bytes 2j and 2j+1, so selector
// nibbles 0x10 + 0x22 * j.
//
//   keep(nibble)   from the words (a b)(c d) of a group: its two kept elements
//   place(nibble)  from the word of values and a filler: elements 0, 1 (low 16 bits) and 2, 3
//   (high)
//
// Only the low four bits of nibble are looked at. Computed, for kernels that wait for memory
// anyway; or looked up in the registers of 16 lanes, one shuffle instead of some twenty
// instructions, for those that do not.
struct ComputedSelectors {
  __device__ __forceinline__ uint32_t keep(uint32_t nibble) const {
    nibble &= 15;
    return 0x1010 + 0x22 * first_kept(nibble) + 0x2200 * second_kept(nibble);
  }
  __device__ __forceinline__ uint32_t place(uint32_t nibble) const {
    return 0x10101010 + 0x22 * value_of(nibble, 0) + 0x2200 * value_of(nibble, 1) +
           0x220000 * value_of(nibble, 2) + 0x22000000 * value_of(nibble, 3);
  }
};

// By whole warps.
struct WarpSelectors {
  uint32_t keep_entry = ComputedSelectors().keep(threadIdx.x);  // of nibble lane % 16
  uint32_t place_entry = ComputedSelectors().place(threadIdx.x);

  __device__ __forceinline__ uint32_t keep(uint32_t nibble) const {
    return __shfl_sync(~0u, keep_entry, nibble, 16);
  }
  __device__ __forceinline__ uint32_t place(uint32_t nibble) const {
    return __shfl_sync(~0u, place_entry, nibble, 16);
  }
};

// ---- groups ------------------------------------------------------------------------------

// Only the low four bits of nibble are looked at; without exactly two set, values are unspecified.
template <int kElementBytes>
struct Group;

template <>
struct Group<2> {
  using Values = uint32_t;
  using Dense = uint2;  // (a b)(c d)

  template <typename Selectors>
  static __device__ __forceinline__ Values compress(Dense dense, uint32_t nibble,
                                                    const Selectors& selectors) {
    return pick_bytes(dense.x, dense.y, selectors.keep(nibble));
  }

  // Pruned elements become the low half of filler.
  template <typename Selectors>
  static __device__ __forceinline__ Dense decompress(Values values, uint32_t nibble,
                                                     uint32_t filler, const Selectors& selectors) {
    const uint32_t place = selectors.place(nibble);
    return {pick_bytes(values, filler, place), pick_bytes(values, filler, place >> 16)};
  }
};

template <>
struct Group<4> {
  using Values = uint2;
  using Dense = uint4;

  template <typename Selectors>
  static __device__ __forceinline__ Values compress(Dense dense, uint32_t nibble,
                                                    const Selectors&) {
    return {(nibble & 1) != 0 ? dense.x : ((nibble & 2) != 0 ? dense.y : dense.z),
            (nibble & 8) != 0 ? dense.w : ((nibble & 4) != 0 ? dense.z : dense.y)};
  }

  // Pruned elements become filler.
  template <typename Selectors>
  static __device__ __forceinline__ Dense decompress(Values values, uint32_t nibble,
                                                     uint32_t filler, const Selectors&) {
    return {(nibble & 1) != 0 ? values.x : filler,
            (nibble & 2) != 0 ? ((nibble & 1) != 0 ? values.y : values.x) : filler,
            (nibble & 4) != 0 ? ((nibble & 8) != 0 ? values.x : values.y) : filler,
            (nibble & 8) != 0 ? values.y : filler};
  }
};

// ---- units -------------------------------------------------------------------------------

template <int kElementBytes>
struct Unit;

template <>
struct Unit<2> {
  static constexpr int kElements = 8;
  static constexpr int kPerByte = 1;  // units that share a byte of bitmask

  static __device__ __forceinline__ uint32_t bits(const uint8_t* bitmask, int64_t unit) {
    return bitmask[unit];
  }

  // The byte of bitmask of this lane's bits; the first lane of each kPerByte has it.
  static __device__ __forceinline__ uint32_t byte(uint32_t bits) { return bits; }

  template <typename Selectors>
  static __device__ __forceinline__ uint2 compress(uint4 dense, uint32_t bits,
                                                   const Selectors& selectors) {
    return {Group<2>::compress({dense.x, dense.y}, bits, selectors),
            Group<2>::compress({dense.z, dense.w}, bits >> 4, selectors)};
  }

  template <typename Selectors>
  static __device__ __forceinline__ uint4 decompress(uint2 values, uint32_t bits,
                                                     const Selectors& selectors) {
    const uint2 low = Group<2>::decompress(values.x, bits, 0, selectors);
    const uint2 high = Group<2>::decompress(values.y, bits >> 4, 0, selectors);
    return {low.x, low.y, high.x, high.y};
  }
};

template <>
struct Unit<4> {
  static constexpr int kElements = 4;
  static constexpr int kPerByte = 2;

  static __device__ __forceinline__ uint32_t bits(const uint8_t* bitmask, int64_t unit) {
    return bitmask[unit / 2] >> (unit % 2 * 4) & 15;
  }

  // By whole warps whose lanes have consecutive units.
  static __device__ __forceinline__ uint32_t byte(uint32_t bits) {
    return bits | __shfl_down_sync(~0u, bits, 1) << 4;
  }

  template <typename Selectors>
  static __device__ __forceinline__ uint2 compress(uint4 dense, uint32_t nibble,
                                                   const Selectors& selectors) {
    return Group<4>::compress(dense, nibble, selectors);
  }

  template <typename Selectors>
  static __device__ __forceinline__ uint4 decompress(uint2 values, uint32_t nibble,
                                                     const Selectors& selectors) {
    return Group<4>::decompress(values, nibble, 0, selectors);
  }
};

}  // namespace slope
