// SPDX-License-Identifier: Apache-2.0
#include "common/side_stream.h"

#include <vector>

namespace slope {
namespace {

struct SideStream {
  cudaStream_t stream = nullptr;
  cudaEvent_t forked = nullptr, joined = nullptr;
};

// This thread's, by device. Destroying a stream lets its work end first; at the end of the process
// the calls fail without harm.
struct SideStreams {
  std::vector<SideStream> by_device;

  ~SideStreams() {
    for (const SideStream& side : by_device) {
      if (side.stream != nullptr) {
        cudaStreamDestroy(side.stream);
        cudaEventDestroy(side.forked);
        cudaEventDestroy(side.joined);
      }
    }
  }
};

const SideStream& side_stream(int device, const char* op) {
  thread_local SideStreams mine;
  if (mine.by_device.size() <= static_cast<size_t>(device)) {
    mine.by_device.resize(device + 1);
  }
  SideStream& side = mine.by_device[device];
  if (side.stream == nullptr) {
    SideStream made;
    check_cuda(cudaEventCreateWithFlags(&made.forked, cudaEventDisableTiming), op);
    check_cuda(cudaEventCreateWithFlags(&made.joined, cudaEventDisableTiming), op);
    check_cuda(cudaStreamCreateWithFlags(&made.stream, cudaStreamNonBlocking), op);
    side = made;
  }
  return side;
}

}  // namespace

StreamPair::StreamPair(cudaStream_t first, int device, const char* op) : first_(first) {
  const SideStream& side = side_stream(device, op);
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
