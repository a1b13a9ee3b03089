// SPDX-License-Identifier: Apache-2.0
//
// A hash of some integers, for tables in memory.
#pragma once

#include <cstdint>
#include <initializer_list>

namespace slope {

inline uint64_t hash_of(std::initializer_list<int64_t> parts) {
  uint64_t hash = 0;
  for (const int64_t part : parts) {
    hash = (hash ^ static_cast<uint64_t>(part)) * 0x9e3779b97f4a7c15u;
    hash ^= hash >> 32;
  }
  return hash;
}

}  // namespace slope
