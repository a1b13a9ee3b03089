// SPDX-License-Identifier: Apache-2.0
//
// Copies from global to shared memory that pass by the registers (cp.async, sm_80 and later).
#pragma once

#include <cstdint>

namespace slope {

// Starts a copy of kBytes (4, 8 or 16), both sides aligned to it. Zeros unless inside; the global
// address is then not read.
template <int kBytes>
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool inside) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  const auto target = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const int bytes_read = inside ? kBytes : 0;
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(global),
                 "r"(bytes_read)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(target), "l"(global),
                 "n"(kBytes), "r"(bytes_read)
                 : "memory");
  }
}

// This thread's copies are done; a barrier must follow before others' are read.
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_all;" ::: "memory");
}

}  // namespace slope
