// SPDX-License-Identifier: Apache-2.0
//
// Which two of four: ranking of floating-point keys.
//
// Of four keys, i loses to j > i if key j is greater, else j loses to i (a tie keeps the lower
// index); a key that loses twice or more is pruned, and "at least two of three" is one instruction
// (LOP3). NaN is replaced by +inf first. 16-bit keys are ranked two groups at a time: every word
// holds the same position of both, in its halves.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common/unit.cuh"
#include "common/weight.h"

namespace slope {

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

// Pair: the vector type of two 16-bit floats; kInfinity, kNegativeOne: one of them in both halves.
template <typename Pair, uint32_t kInfinity, uint32_t kNegativeOne>
struct PairKeys {
  static constexpr uint32_t kSigns = 0x80008000;
  static constexpr uint32_t kMinusOne = kNegativeOne;
  static __device__ __forceinline__ uint32_t nan_to_infinity(uint32_t word) {
    return bits_as<uint32_t>(__hmin2(bits_as<Pair>(word), bits_as<Pair>(kInfinity)));
  }
  static __device__ __forceinline__ uint32_t greater(uint32_t a, uint32_t b) {
    return __hgt2_mask(bits_as<Pair>(a), bits_as<Pair>(b));
  }
};

template <>
struct Keys<FloatKind::kHalf> : PairKeys<__half2, 0x7c007c00, 0xbc00bc00> {};

template <>
struct Keys<FloatKind::kBFloat16> : PairKeys<__nv_bfloat162, 0x7f807f80, 0xbf80bf80> {};

template <>
struct Keys<FloatKind::kFloat> {
  static constexpr uint32_t kSigns = 0x80000000;
  static constexpr uint32_t kMinusOne = 0xbf800000;
  static __device__ __forceinline__ uint32_t nan_to_infinity(uint32_t word) {
    return __float_as_uint(fminf(__uint_as_float(word), __uint_as_float(0x7f800000)));
  }
  static __device__ __forceinline__ uint32_t greater(uint32_t a, uint32_t b) {
    return __uint_as_float(a) > __uint_as_float(b) ? ~0u : 0u;
  }
};

// What an element is ranked by: itself, or its magnitude.
template <FloatKind kKind>
struct Signed {
  static __device__ __forceinline__ uint32_t key(uint32_t word) {
    return Keys<kKind>::nan_to_infinity(word);
  }
};

template <FloatKind kKind>
struct Magnitude {
  static __device__ __forceinline__ uint32_t key(uint32_t word) {
    return Keys<kKind>::nan_to_infinity(word & ~Keys<kKind>::kSigns);
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

// Bits of bitmask of a unit, ranked by By<kKind>::key.
template <FloatKind kKind, template <FloatKind> typename By>
__device__ __forceinline__ uint32_t prune_unit(uint4 unit) {
  const uint4 k{By<kKind>::key(unit.x), By<kKind>::key(unit.y), By<kKind>::key(unit.z),
                By<kKind>::key(unit.w)};
  if constexpr (kBytesOf<kKind> == 2) {
    // (a b)(c d)(e f)(g h) -> (a e)(b f)(c g)(d h)
    const uint32_t bits =
        keep_two<kKind>(__byte_perm(k.x, k.z, 0x5410), __byte_perm(k.x, k.z, 0x7632),
                        __byte_perm(k.y, k.w, 0x5410), __byte_perm(k.y, k.w, 0x7632));
    return (bits & 0x0f) | (bits >> 12 & 0xf0);
  } else {
    return keep_two<kKind>(k.x, k.y, k.z, k.w) & 0x0f;
  }
}

// Nibbles of four columns, one in each byte, that keep two of the rows 0 to 3 of each.
template <FloatKind kKind>
__device__ __forceinline__ uint32_t
prune_columns(const typename Group<kBytesOf<kKind>>::Dense (&keys)[4]) {
  const uint32_t x = keep_two<kKind>(keys[0].x, keys[1].x, keys[2].x, keys[3].x);
  const uint32_t y = keep_two<kKind>(keys[0].y, keys[1].y, keys[2].y, keys[3].y);
  if constexpr (kBytesOf<kKind> == 2) {
    return __byte_perm(x, y, 0x6420);
  } else {
    const uint32_t z = keep_two<kKind>(keys[0].z, keys[1].z, keys[2].z, keys[3].z);
    const uint32_t w = keep_two<kKind>(keys[0].w, keys[1].w, keys[2].w, keys[3].w);
    return (x & 0x0f) | (y & 0x0f) << 8 | (z & 0x0f) << 16 | (w & 0x0f) << 24;
  }
}

}  // namespace slope
