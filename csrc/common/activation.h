// SPDX-License-Identifier: Apache-2.0
//
// What a product does to its sums before it rounds them; numbered as slope_ext/_check.py lists
// them.
#pragma once

#include <cstdint>

namespace slope {

// kSwiglu: y = silu(gate) * up. Rows of W come in turns, kGateRows of the gate's, as many of the
// up-projection's; y has half as many features.
enum class Activation : int32_t { kNone, kRelu, kSwiglu };

constexpr int kGateRows = 8;

// Features of y for so many rows of W.
constexpr int64_t features_of(int64_t rows, Activation activation) {
  return activation == Activation::kSwiglu ? rows / 2 : rows;
}

}  // namespace slope
