// SPDX-License-Identifier: Apache-2.0
//
// Launcher of the own sparse product for Hopper.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/activation.h"
#include "common/weight.h"
#include "ops/spmm_sm90_choice.h"

namespace slope {

// All matrices row-major and contiguous, of one 16-bit type, 16-byte aligned.
struct SpmmSm90Params {
  const void* x;            // [tokens, columns]
  const void* values;       // [rows, columns / 2]
  const void* metadata;     // words for wgmma.sp, see docs/layouts.md
  const void* tail_x;       // [tokens, rank], nullptr if rank is 0
  const void* tail_weight;  // [rows, rank], or transposed [rank, rows]; nullptr if rank is 0
  const void* bias;         // [rows] or nullptr; 2-byte aligned
  void* y;                  // [tokens, rows], with kSwiglu [tokens, rows / 2]
  int64_t tokens;           // 0 to 2^31 - 257
  int64_t rows;             // multiple of 8, with kSwiglu of 16
  int64_t columns;          // multiple of 32
  int64_t rank;             // multiple of 8, 0 for no tail
  int64_t first_rows;       // by `tile`, a multiple of 64; those beyond by `rest_tile`. 0: all rows
  FloatKind kind;           // kHalf or kBFloat16
  int32_t tile, rest_tile;  // indices below spmm_sm90_tile_count(); tile -1 chooses all three
  int32_t device;           // the current one
  Activation activation;
  int32_t tail_is_transposed;
};

// y <- activation(x W^T [+ tail_x tail_weight^T] [+ bias]), fp32 sums. cudaErrorNotSupported where
// the current device is not of compute capability 9.0 or the driver has no tensor maps.
cudaError_t launch_spmm_sm90(const SpmmSm90Params& params, cudaStream_t stream);

// Has first_rows, tile and rest_tile name what launch_spmm_sm90 would choose; looks at sizes alone.
cudaError_t choose_spmm_sm90(SpmmSm90Params& params);

// From now on launch_spmm_sm90 makes products of these sizes so, on any thread; of tokens up to the
// next multiple of 8. False where the device, which must be current, cannot.
bool tune_spmm_sm90(const SpmmSm90Tuned& tuned);

// It chooses by sm90_split() again, whatever the sizes, and asks the loader again.
void forget_tuned_spmm_sm90();

// Calls tune_spmm_sm90 for all that is tuned on a device: before the first product there and the
// first after forget_tuned_spmm_sm90, and, until it returned true, before others; on any thread, on
// several at once too, without a lock held.
void set_spmm_sm90_loader(SpmmSm90Loader loader);

// What the current device has room for, for sm90_split().
cudaError_t ask_spmm_sm90_room(Sm90Room& room);

// Whether the kernels run on a device: capability 9.0, and this library has code for sm_90a.
bool spmm_sm90_runs(int device);

int spmm_sm90_tile_count();

}  // namespace slope

// launch_spmm_sm90 for slope_ext/_spmm_sm90.py; `params` is a SpmmSm90Params, the result a
// cudaError_t.
extern "C" __attribute__((visibility("default"))) int slope_spmm_sm90(const void* params,
                                                                      void* stream);

// choose_spmm_sm90 and ask_spmm_sm90_room for the same; room: processors, then clusters of each
// tile.
extern "C" __attribute__((visibility("default"))) int slope_spmm_sm90_choose(void* params);
extern "C" __attribute__((visibility("default"))) int slope_spmm_sm90_room(void* room);
