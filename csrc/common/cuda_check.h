// SPDX-License-Identifier: Apache-2.0
//
// CUDA status codes to exceptions, and torch's current stream.
#pragma once

#include <cuda_runtime.h>

#include "common/torch_stable.h"

// CPU builds of torch lack this symbol. Weak, so that one library file loads on both kinds.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace slope {

// Raises RuntimeError "slope::<op>: ..." unless status is cudaSuccess.
inline void check_cuda(cudaError_t status, const char* op) {
  check(status != cudaErrorNoKernelImageForDevice, "slope::", op,
        ": this build has no kernel for this GPU; rebuild with its compute capability in "
        "SLOPE_CUDA_ARCHS");
  check(status == cudaSuccess, "slope::", op, ": CUDA error: ", cudaGetErrorString(status));
}

// Whether what is enqueued on `stream` goes into a CUDA graph instead of running.
inline bool is_capturing(cudaStream_t stream, const char* op) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check_cuda(cudaStreamIsCapturing(stream, &status), op);
  return status != cudaStreamCaptureStatusNone;
}

inline cudaStream_t current_stream(const Tensor& tensor, const char* op) {
  void* stream = nullptr;
  check(aoti_torch_get_current_cuda_stream != nullptr &&
            aoti_torch_get_current_cuda_stream(tensor.get_device(), &stream) == 0,
        "slope::", op, ": cannot read torch's current CUDA stream");
  return static_cast<cudaStream_t>(stream);
}

}  // namespace slope
