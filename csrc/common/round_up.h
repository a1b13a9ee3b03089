// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

namespace slope {

// The smallest multiple of `multiple` that is not below `size`; both positive or size 0.
constexpr int64_t round_up(int64_t size, int64_t multiple) {
  return (size + multiple - 1) / multiple * multiple;
}

// size / by, rounded up.
constexpr int64_t ceil_div(int64_t size, int64_t by) { return (size + by - 1) / by; }

}  // namespace slope
