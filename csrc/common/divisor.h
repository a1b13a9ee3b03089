// SPDX-License-Identifier: Apache-2.0
//
// Division on the GPU by a number that the host knows: a multiplication, an addition and a shift in
// place of the tens of instructions of a general one. Granlund and Montgomery, "Division by
// invariant integers using multiplication", 1994, figure 4.1; with numbers below 2^31 its addition
// does not overflow, so that one shift does for its two.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace slope {

struct Divisor {
  uint32_t value;
  uint32_t multiplier;  // floor(2^32 (2^shift - value) / value) + 1
  uint32_t shift;       // the least with 2^shift >= value
};

// 1 <= value < 2^31
constexpr Divisor make_divisor(uint32_t value) {
  uint32_t shift = 0;
  while ((uint32_t{1} << shift) < value) {
    ++shift;
  }
  const uint64_t rest = (uint64_t{1} << shift) - value;
  return {value, static_cast<uint32_t>((rest << 32) / value + 1), shift};
}

// number / divisor.value, 0 <= number < 2^31
__host__ __device__ constexpr int divide(int number, const Divisor& divisor) {
  const auto dividend = static_cast<uint32_t>(number);
  const auto product = static_cast<uint32_t>((uint64_t{dividend} * divisor.multiplier) >> 32);
  return static_cast<int>((product + dividend) >> divisor.shift);
}

static_assert(divide(0x7fffffff, make_divisor(1)) == 0x7fffffff);
static_assert(divide(20, make_divisor(7)) == 2 && divide(21, make_divisor(7)) == 3);
static_assert(divide(0x7ffffffe, make_divisor(0x7fffffff)) == 0);

}  // namespace slope
