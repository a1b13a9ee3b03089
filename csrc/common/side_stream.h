// SPDX-License-Identifier: Apache-2.0
//
// A second stream beside torch's current one, for work that may overlap with it.
#pragma once

#include "common/cuda_check.h"

// CPU builds of torch lack these symbols. Weak, so that one library file loads on both kinds.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_create_cuda_stream_guard(
    void* stream, int32_t device_index, CUDAStreamGuardHandle* ret_guard);
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_delete_cuda_stream_guard(CUDAStreamGuardHandle guard);

namespace slope {

// Torch's current stream and a second one, forked from it when made and joined when gone: whatever
// was enqueued before comes first, and whatever is enqueued afterwards waits for both. Memory that
// torch's allocator gave out on the first may be used on the second meanwhile. CUDA graphs capture
// fork and join. The second stream belongs to this thread.
class StreamPair {
 public:
  StreamPair(cudaStream_t first, int device, const char* op);
  ~StreamPair();
  StreamPair(const StreamPair&) = delete;
  StreamPair& operator=(const StreamPair&) = delete;

  cudaStream_t first() const { return first_; }
  cudaStream_t second() const { return second_; }

 private:
  cudaStream_t first_;
  cudaStream_t second_;
  cudaEvent_t joined_;
};

// Makes `stream` torch's current stream for a scope.
class StreamGuard {
 public:
  StreamGuard(cudaStream_t stream, int device) {
    SLOPE_TORCH_CHECK(aoti_torch_create_cuda_stream_guard(stream, device, &guard_));
  }
  ~StreamGuard() { aoti_torch_delete_cuda_stream_guard(guard_); }
  StreamGuard(const StreamGuard&) = delete;
  StreamGuard& operator=(const StreamGuard&) = delete;

 private:
  CUDAStreamGuardHandle guard_ = nullptr;
};

}  // namespace slope
