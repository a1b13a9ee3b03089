// SPDX-License-Identifier: Apache-2.0
//
// How every kernel is launched: it may start while the one before it in its stream ends
// (programmatic dependent launch, compute capability 9 on), and waits for the end of that one
// before it reads or writes global memory. Between two kernels there is then no gap, in which one
// has drained and the next is on its way to the multiprocessors: about 1 us of each.
//
//   kernel A   | blocks ................ | last blocks |
//   kernel B                 start, wait | blocks ................ | last blocks |
//
// A kernel calls wait_for_previous_kernel() in all its threads, before it touches global memory:
// the one after it waits for its end alone, which must thus come after the end of all before.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>

namespace slope {

constexpr int kEarlyStartArch = 90;                // 10 * compute capability
constexpr size_t kSharedBytesUnasked = 48 * 1024;  // more needs a function attribute

// Returns when the previous kernel has ended and what it wrote is visible; once all blocks of this
// one have come here, the next may start. Not before: small kernels would queue up on the
// multiprocessors, several deep, and crowd together where there is room left.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

struct LaunchShape {
  dim3 grid;
  unsigned threads;
  size_t shared_bytes = 0;
};

// Launches kKernel on the current device, which may start early if its code for the device waits.
template <auto kKernel, typename... Arguments>
cudaError_t launch_kernel(const LaunchShape& shape, cudaStream_t stream,
                          const Arguments&... arguments) {
  // What is known of the kernel on each device; to ask takes longer than a launch
  static std::atomic<uint64_t> is_ready = 0, starts_early = 0;  // bit: device
  int device = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) {
    return status;
  }
  const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
  if ((is_ready.load(std::memory_order_acquire) & bit) == 0) {
    cudaFuncAttributes attributes{};
    status = cudaFuncGetAttributes(&attributes, kKernel);
    if (status == cudaSuccess && shape.shared_bytes > kSharedBytesUnasked) {
      status = cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(shape.shared_bytes));
    }
    if (status != cudaSuccess) {
      return status == cudaErrorInvalidDeviceFunction ? cudaErrorNoKernelImageForDevice : status;
    }
    if (attributes.ptxVersion >= kEarlyStartArch) {
      starts_early.fetch_or(bit, std::memory_order_relaxed);
    }
    is_ready.fetch_or(bit, std::memory_order_release);
  }

  cudaLaunchAttribute start{};
  start.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  start.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = shape.grid;
  config.blockDim = shape.threads;
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = stream;
  config.attrs = &start;
  config.numAttrs = (starts_early.load(std::memory_order_relaxed) & bit) != 0 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kKernel, arguments...);
}

}  // namespace slope
