// SPDX-License-Identifier: Apache-2.0
#include "common/side_stream.h"

#include "common/per_thread.h"

namespace slope {
namespace {

struct SideStream {
  cudaStream_t stream = nullptr;
  cudaEvent_t forked = nullptr, joined = nullptr;

  explicit SideStream(int /*device*/) {
    constexpr const char* kWhat = "side stream";
    check_cuda(cudaEventCreateWithFlags(&forked, cudaEventDisableTiming), kWhat);
    check_cuda(cudaEventCreateWithFlags(&joined, cudaEventDisableTiming), kWhat);
    check_cuda(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), kWhat);
  }
};

}  // namespace

StreamPair::StreamPair(cudaStream_t first, int device, const char* op) : first_(first) {
  const SideStream& side = PerThread<SideStream>::get(device);
  second_ = side.stream;
  joined_ = side.joined;
  check_cuda(cudaEventRecord(side.forked, first_), op);
  check_cuda(cudaStreamWaitEvent(second_, side.forked, 0), op);
}

StreamPair::~StreamPair() {
  // An error here is one of earlier work, which the next call reports.
  cudaEventRecord(joined_, second_);
  cudaStreamWaitEvent(first_, joined_, 0);
}

}  // namespace slope
