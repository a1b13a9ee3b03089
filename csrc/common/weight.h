// SPDX-License-Identifier: Apache-2.0
//
// A 2:4 weight W as the launchers take it. No torch header.
#pragma once

#include <cstdint>

namespace slope {

// Element types by what their bits mean.
enum class FloatKind { kHalf, kBFloat16, kFloat };

template <FloatKind kKind>
constexpr int kBytesOf = kKind == FloatKind::kFloat ? 4 : 2;

// Every form of W, row-major and contiguous. Each launcher says what it reads and what it writes;
// it looks at no other. Alignment: dense, values and bitmask 16 bytes, values_t 8, bitmask_t 4.
struct WeightParams {
  const void* dense = nullptr;   // [rows, columns]
  void* values = nullptr;        // [rows, columns / 2], same type as dense
  uint8_t* bitmask = nullptr;    // [rows, columns / 8], 1 = kept
  void* values_t = nullptr;      // [columns, rows / 2], the double-pruned W, transposed
  uint8_t* bitmask_t = nullptr;  // [columns, rows / 8]
  int64_t rows;                  // multiple of 8 and at most 128 * 65535 where W is transposed
  int64_t columns;               // multiple of 8
  FloatKind kind;
};

}  // namespace slope
