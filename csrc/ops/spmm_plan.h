// SPDX-License-Identifier: Apache-2.0
//
// Cached cuSPARSELt plans of Y = X W^T [+ Y] [+ bias] for a 2:4 weight W.
//
// To the library the product is D = A B with the sparse operand first, and every matrix is read and
// written as torch holds it, without a transposed copy:
//
//   A = W    [rows, columns]    row-major, 2:4, packed        rows = out, columns = in
//   B = X^T  [columns, tokens]  column-major, i.e. X row-major
//   D = Y^T  [rows, tokens]     column-major, i.e. Y row-major
//
// A plan belongs to one thread and one device. Making one costs about a hundred runs.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <memory>

#include "common/cusparselt.h"
#include "ops/spmm_sm90_choice.h"

namespace slope {

// What a plan is made for. Plain data: it also crosses to the Python module.
struct SpmmProblem {
  int64_t rows;        // multiple of 16
  int64_t columns;     // multiple of 16
  int64_t tokens;      // multiple of 8
  int32_t device;      // CUDA ordinal
  int32_t bfloat16;    // 1: bf16, 0: fp16
  int32_t bias;        // 1: D += bias[row]
  int32_t accumulate;  // 1: D += what D held

  bool operator==(const SpmmProblem&) const = default;
};

// How the library is to do it. 0, 1, 0 is its default.
struct SpmmAlgorithm {
  int32_t id = 0;
  int32_t split_k = 1;       // -1: segments of K, where the library offers it
  int32_t split_k_mode = 0;  // cusparseLtSplitKMode_t, 0 leaves it alone

  bool operator==(const SpmmAlgorithm&) const = default;
};

// The library's kernels load metadata by tiles of their own, and so read beyond the end of an
// operand whose columns are no multiple of such a tile (64 rows x 256 columns is the largest
// known). No result depends on it, but memory must be there: in the storage of the metadata.
constexpr int64_t kOverreadBytes = 64 * 256 / 8;

struct SpmmOperands {
  const void* packed;  // [values | metadata], 16-byte aligned, as are all
  const void* x;
  const void* bias;  // nullptr unless problem.bias
  void* y;
  void* workspace;
};

class SpmmPlan {
 public:
  // Raises RuntimeError where the library refuses the problem or the algorithm.
  SpmmPlan(const cusparselt::Handle& handle, const SpmmProblem& problem,
           const SpmmAlgorithm& algorithm);
  ~SpmmPlan();
  SpmmPlan(const SpmmPlan&) = delete;
  SpmmPlan& operator=(const SpmmPlan&) = delete;

  void run(const SpmmOperands& operands, cudaStream_t stream);
  size_t workspace_bytes() const { return workspace_bytes_; }
  int32_t algorithm_count() const;  // ids are 0 .. count - 1
  const SpmmAlgorithm& algorithm() const { return algorithm_; }

 private:
  struct Unmade {};
  SpmmPlan(Unmade, const cusparselt::Handle& handle, const SpmmProblem& problem,
           const SpmmAlgorithm& algorithm);
  void set_bias(const void* bias);

  const cusparselt::Handle& handle_;
  const SpmmProblem problem_;
  const SpmmAlgorithm algorithm_;
  cusparselt::MatDescriptor a_, b_, d_;
  cusparselt::MatmulDescriptor matmul_;
  cusparselt::AlgSelection selection_;
  cusparselt::Plan plan_;
  size_t workspace_bytes_ = 0;
  int initialised_ = 0;  // structs to destroy, in the order of their making
};

// This thread's handle for the current device, whose ordinal is `device`.
const cusparselt::Handle& spmm_handle(int32_t device);

// This thread's plan for a problem, from its cache or made now. The device must be current. On a
// miss the chooser says which algorithm; where the library refuses that one its default is taken.
std::shared_ptr<SpmmPlan> spmm_plan(const SpmmProblem& problem, cudaStream_t stream);

// ---- for the Python module -----------------------------------------------------------------

// Says which algorithm a new plan takes; called without a lock held, on any thread. `capturing`: a
// CUDA graph is being captured, so nothing may be timed.
using SpmmChooser = SpmmAlgorithm (*)(const SpmmProblem& problem, bool capturing);

struct SpmmCacheInfo {
  int64_t plans, capacity, hits, misses, evictions;
};

struct SpmmCacheEntry {
  SpmmProblem problem;
  SpmmAlgorithm algorithm;
  int64_t workspace_bytes;
};

// The functions that slope_ext._C calls. Both libraries may hold a C++ runtime of their own, so no
// exception crosses: functions that can fail write a message to `error` and return nullptr or
// false.
struct SpmmCacheApi {
  static constexpr size_t kErrorBytes = 1024;

  void (*set_chooser)(SpmmChooser chooser);
  SpmmCacheInfo (*info)();
  int64_t (*entries)(SpmmCacheEntry* out, int64_t room);  // returns how many there are
  void (*set_capacity)(int64_t plans);                    // of each thread and device; at least 1
  void (*clear)();
  bool (*version)(int32_t (&version)[3], char* error);
  int (*driver_version)();             // as CUDA counts, e.g. 13000; 0 without a driver
  int (*metadata_writer)(int device);  // ops/pack_metadata.h
  bool (*native_runs)(int device);     // ops/spmm_sm90.h, as the next three
  bool (*native_tuned)(const SpmmSm90Tuned& tuned);
  void (*native_forget)();
  void (*native_set_loader)(SpmmSm90Loader loader);
  // A plan outside of the cache, for a tuner.
  SpmmPlan* (*make)(const SpmmProblem& problem, const SpmmAlgorithm& algorithm, char* error);
  bool (*run)(SpmmPlan* plan, const SpmmOperands& operands, cudaStream_t stream, char* error);
  int64_t (*workspace_bytes)(const SpmmPlan* plan);
  bool (*algorithm_count)(const SpmmPlan* plan, int32_t& count, char* error);
  void (*free)(SpmmPlan* plan);
};

}  // namespace slope

extern "C" __attribute__((visibility("default"))) const slope::SpmmCacheApi* slope_spmm_cache_api();
