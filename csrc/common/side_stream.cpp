// SPDX-License-Identifier: Apache-2.0
#include "common/side_stream.h"

#include "common/per_thread.h"

namespace slope {
namespace {

struct SideStream {
  cudaStream_t stream = nullptr;
  cudaEvent_t forked = nullptr, joined = nullptr;

  void make(const char* op) {
    check_cuda(cudaEventCreateWithFlags(&forked, cudaEventDisableTiming), op);
    check_cuda(cudaEventCreateWithFlags(&joined, cudaEventDisableTiming), op);
    check_cuda(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), op);
  }
};

// One for work that runs and one for work that is captured: torch keeps a cuBLAS workspace per
// stream, and a graph's replays must not share theirs with eager calls.
struct SideStreams {
  SideStream eager, captured;

  explicit SideStreams(int /*device*/) {}
};

}  // namespace

StreamPair::StreamPair(cudaStream_t first, int device, const char* op) : first_(first) {
  SideStreams& mine = PerThread<SideStreams>::get(device);
  SideStream& side = is_capturing(first, op) ? mine.captured : mine.eager;
  if (side.stream == nullptr) {
    side.make(op);
  }
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
