// SPDX-License-Identifier: Apache-2.0
//
// Elements of a weight as numbers: their C++ types, and conversions by overload.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common/weight.h"

namespace slope {

template <FloatKind kKind>
struct ElementOf;
template <>
struct ElementOf<FloatKind::kHalf> {
  using Type = __half;
};
template <>
struct ElementOf<FloatKind::kBFloat16> {
  using Type = __nv_bfloat16;
};
template <>
struct ElementOf<FloatKind::kFloat> {
  using Type = float;
};

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

__device__ __forceinline__ void assign(float& to, float x) { to = x; }
__device__ __forceinline__ void assign(__half& to, float x) { to = __float2half_rn(x); }
__device__ __forceinline__ void assign(__nv_bfloat16& to, float x) { to = __float2bfloat16_rn(x); }

// Two 16-bit elements in one word, the first in its low half; ReLU is a variant of the conversion.
// NaN stays NaN.
template <FloatKind kKind, bool kRelu>
__device__ __forceinline__ uint32_t pack_pair(float low, float high) {
  static_assert(kBytesOf<kKind> == 2);
  uint32_t word;
  if constexpr (kKind == FloatKind::kHalf && kRelu) {
    asm("cvt.rn.relu.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  } else if constexpr (kKind == FloatKind::kHalf) {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  } else if constexpr (kRelu) {
    asm("cvt.rn.relu.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  }
  return word;
}

}  // namespace slope
