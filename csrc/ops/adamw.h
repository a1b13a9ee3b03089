// SPDX-License-Identifier: Apache-2.0
//
// Launcher of adamw_.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/weight.h"

namespace slope {

// One parameter. Everything contiguous; param, exp_avg, ... have `elements` each.
struct AdamWTensor {
  void* param;
  const void* grad;
  void* exp_avg;
  void* exp_avg_sq;
  float* master;      // if AdamWOptions::masters
  const float* step;  // on the device, or nullptr: host_step counts
  float host_step;    // this step included, 1 in the first
  // If AdamWOptions::copies: param is the values of a weight [rows, columns], which these follow.
  // Rows and columns multiples of 8. Alignment: param, grad and values_t 8 bytes (fp32: 16 but
  // values_t), moments and masters four elements, bitmasks 4.
  const uint8_t* bitmask;
  uint8_t* bitmask_t;
  void* values_t;
  int64_t rows, columns;
  int64_t elements;
};

struct AdamWOptions {
  double lr, beta1, beta2, eps, weight_decay;
  bool maximize;
  const float* lr_tensor;   // on the device, instead of lr; or nullptr
  const float* grad_scale;  // on the device: gradients are divided by it; or nullptr
  const float* found_inf;   // on the device: not 0: only the copies are written; or nullptr
  FloatKind kind;           // of param, grad and values_t
  bool half_moments;        // exp_avg and exp_avg_sq of that kind too, else fp32
  bool masters;             // 16-bit kinds with fp32 moments only
  bool copies;
};

// One AdamW step of `count` parameters, in as few launches as their addresses need.
cudaError_t launch_adamw(const AdamWTensor* tensors, int64_t count, const AdamWOptions& options,
                         cudaStream_t stream);

}  // namespace slope
