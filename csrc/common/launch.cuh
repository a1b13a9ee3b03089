// SPDX-License-Identifier: Apache-2.0
//
// How kernels are launched. Unless its launcher says otherwise, blocks of a kernel may come to the
// multiprocessors while the kernel before it in the stream ends (programmatic dependent launch,
// compute capability 9 on), if that one lets them. Ours do; so the next one's start overlaps the
// last blocks of this one:
//
//   kernel A   | blocks ................ | last blocks |
//   kernel B                 start, wait | blocks ................ | last blocks |
//
// All threads of a kernel call wait_for_previous_kernel() before they touch global memory or leave.
// The wait is for the one kernel before, so a kernel that did not wait would let the next read what
// those before it have not written yet. A kernel of another library that starts early must keep the
// same rule, as PyTorch's and cuBLAS's do.
//
// What a kernel reads may thus be written while it runs, before the wait. So no load is of the
// non-coherent kind, __ldg or by const __restrict__ pointers: the compiler may move these up across
// the wait.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>

namespace slope {

// Returns when the previous kernel has ended and what it wrote is visible.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Once all blocks of this kernel have called this or left, the next kernel may start. Called after
// the wait: before it, small kernels would queue up on the multiprocessors, several deep, and crowd
// together where there is room left.
__device__ __forceinline__ void let_next_kernel_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

struct LaunchShape {
  dim3 grid;
  unsigned threads;
  bool starts_early = true;  // if its code has the wait
  unsigned cluster = 1;      // blocks of a cluster, along x; alone, blocks are in none
};

// Launches kKernel on the current device, with kSharedBytes of dynamic shared memory.
template <auto kKernel, int kSharedBytes = 0, typename... Arguments>
[[nodiscard]] cudaError_t launch_kernel(const LaunchShape& shape, cudaStream_t stream,
                                        const Arguments&... arguments) {
  // What is known of the kernel on each device; to ask takes longer than a launch. Devices from the
  // 64th on are asked about each time
  static std::atomic<uint64_t> is_ready = 0, has_wait = 0;  // bit: device
  int device = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) {
    return status;
  }
  const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
  if ((is_ready.load(std::memory_order_acquire) & bit) == 0) {
    cudaFuncAttributes attributes{};
    status = cudaFuncGetAttributes(&attributes, kKernel);
    if (status == cudaSuccess && kSharedBytes > 0) {
      status =
          cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
    }
    if (status != cudaSuccess) {
      // A launch would say that this build has no code for the device
      return status == cudaErrorInvalidDeviceFunction ? cudaErrorNoKernelImageForDevice : status;
    }
    constexpr int kFirstPtxWithWait = 90;
    if (attributes.ptxVersion >= kFirstPtxWithWait) {
      has_wait.fetch_or(bit, std::memory_order_relaxed);
    }
    is_ready.fetch_or(bit, std::memory_order_release);
  }

  cudaLaunchAttribute wanted[2] = {};
  unsigned count = 0;
  if (shape.starts_early && (has_wait.load(std::memory_order_relaxed) & bit) != 0) {
    wanted[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    wanted[count++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (shape.cluster > 1) {
    wanted[count].id = cudaLaunchAttributeClusterDimension;
    wanted[count++].val.clusterDim = {shape.cluster, 1, 1};
  }
  cudaLaunchConfig_t config{};
  config.gridDim = shape.grid;
  config.blockDim = shape.threads;
  config.dynamicSmemBytes = kSharedBytes;
  config.stream = stream;
  config.attrs = wanted;
  config.numAttrs = count;
  return cudaLaunchKernelEx(&config, kKernel, arguments...);
}

}  // namespace slope
