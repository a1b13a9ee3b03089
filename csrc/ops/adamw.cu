// SPDX-License-Identifier: Apache-2.0
//
// adamw_, for each element, in fp32:
//
//   g  <- grad / grad_scale                          (-g to ascend)
//   m  <- m + (1 - beta1) (g - m)                    v <- beta2 v + (1 - beta2) g^2
//   w  <- (1 - lr decay) w - lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps)
//
// w is the master, where there is one, else the parameter, which is rounded once. 2:4 values are
// copied on the way: values_t = compress(decompress(values, bitmask)^T, bitmask_t).
//
// Many tensors go in one launch; kBatchTensors addresses fit its arguments. Blocks are dealt out in
// the order of the tensors, and look up theirs.
//
//   without copies  a block owns kFlatElements consecutive elements, a thread four at a time
//   with copies     a block owns a tile of common/tile.cuh: 128 rows x 256 bytes of values; it
//                   updates them by rows, a warp 256 bytes, and keeps them in shared memory for
//                   transpose_tile
//
// Traffic per value of b bytes: values 2b, gradient b, moments 16 (4b if of the type of the
// values), master 8; the copy b and 1/2 of masks. bf16 with fp32 moments: 24.5 with copy.
// Memory-bound.
#include <cmath>

#include "common/element.cuh"
#include "common/round_up.h"
#include "common/tile.cuh"
#include "ops/adamw.h"

namespace slope {
namespace {

constexpr int kBatchTensors = 32;
constexpr int kFlatThreads = 256;
constexpr int kVector = 4;  // elements of a thread at a time
constexpr int kFlatUnroll = 4;
constexpr int kFlatElements = kFlatThreads * kVector * kFlatUnroll;

struct Batch {
  float lr, decay, beta1_rest, beta2, beta2_rest, eps;  // rests: 1 - beta
  double log_beta1, log_beta2;
  bool maximize;
  const float *lr_tensor, *grad_scale, *found_inf;
  int count;
  int first_block[kBatchTensors];
  AdamWTensor tensors[kBatchTensors];
};
static_assert(sizeof(Batch) <= 4000, "arguments of a kernel have 4 KB");

// ---- elements ----------------------------------------------------------------------------

// Elements that are loaded and stored as one.
template <typename T, int kCount>
struct alignas(sizeof(T) * kCount) Pack {
  T at[kCount];
};

// ---- update ------------------------------------------------------------------------------

// What a step does to every element of a tensor.
struct Step {
  float decay, rate, beta1_rest, beta2, beta2_rest, root_correction, eps, grad_factor;
  bool skip;

  __device__ __forceinline__ Step(const Batch& batch, const AdamWTensor& tensor) {
    const float lr = batch.lr_tensor != nullptr ? *batch.lr_tensor : batch.lr;
    const float count = tensor.step != nullptr ? *tensor.step : tensor.host_step;
    // 1 - beta^t, exact to fp32 where beta is close to 1
    const float correction1 = -expm1f(static_cast<float>(count * batch.log_beta1));
    const float correction2 = -expm1f(static_cast<float>(count * batch.log_beta2));
    decay = 1.0f - lr * batch.decay;
    rate = lr / correction1;
    root_correction = rsqrtf(correction2);
    beta1_rest = batch.beta1_rest;
    beta2 = batch.beta2;
    beta2_rest = batch.beta2_rest;
    eps = batch.eps;
    grad_factor = batch.maximize ? -1.0f : 1.0f;
    if (batch.grad_scale != nullptr) {
      grad_factor /= *batch.grad_scale;
    }
    skip = batch.found_inf != nullptr && *batch.found_inf != 0.0f;
  }

  __device__ __forceinline__ void operator()(float& w, float grad, float& m, float& v) const {
    // Roundings are spelled out, so that both kernels give the same bits
    const float g = __fmul_rn(grad, grad_factor);
    m = fmaf(beta1_rest, __fsub_rn(g, m), m);
    v = fmaf(__fmul_rn(beta2_rest, g), g, __fmul_rn(beta2, v));
    const float root = fmaf(sqrtf(v), root_correction, eps);
    w = fmaf(-rate, __fdiv_rn(m, root), __fmul_rn(decay, w));
  }
};

// kCount elements in registers, from load to store.
template <FloatKind kKind, typename Moment, bool kMaster, int kCount>
struct Elements {
  using Element = typename ElementOf<kKind>::Type;
  Pack<Element, kCount> param, grad;
  Pack<Moment, kCount> exp_avg, exp_avg_sq;
  Pack<float, kMaster ? kCount : 1> master;

  __device__ __forceinline__ void load(const AdamWTensor& tensor, int64_t first) {
    param = *reinterpret_cast<const Pack<Element, kCount>*>(
        static_cast<const Element*>(tensor.param) + first);
    grad = *reinterpret_cast<const Pack<Element, kCount>*>(
        static_cast<const Element*>(tensor.grad) + first);
    exp_avg = *reinterpret_cast<const Pack<Moment, kCount>*>(
        static_cast<const Moment*>(tensor.exp_avg) + first);
    exp_avg_sq = *reinterpret_cast<const Pack<Moment, kCount>*>(
        static_cast<const Moment*>(tensor.exp_avg_sq) + first);
    if constexpr (kMaster) {
      master = *reinterpret_cast<const Pack<float, kCount>*>(tensor.master + first);
    }
  }

  __device__ __forceinline__ void update(const Step& step) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      float w = kMaster ? master.at[i % (kMaster ? kCount : 1)] : to_float(param.at[i]);
      float m = to_float(exp_avg.at[i]), v = to_float(exp_avg_sq.at[i]);
      step(w, to_float(grad.at[i]), m, v);
      assign(exp_avg.at[i], m);
      assign(exp_avg_sq.at[i], v);
      assign(param.at[i], w);
      if constexpr (kMaster) {
        master.at[i] = w;
      }
    }
  }

  __device__ __forceinline__ void store(const AdamWTensor& tensor, int64_t first) const {
    *reinterpret_cast<Pack<Element, kCount>*>(static_cast<Element*>(tensor.param) + first) = param;
    *reinterpret_cast<Pack<Moment, kCount>*>(static_cast<Moment*>(tensor.exp_avg) + first) =
        exp_avg;
    *reinterpret_cast<Pack<Moment, kCount>*>(static_cast<Moment*>(tensor.exp_avg_sq) + first) =
        exp_avg_sq;
    if constexpr (kMaster) {
      *reinterpret_cast<Pack<float, kCount>*>(tensor.master + first) = master;
    }
  }
};

// Index of the tensor that a block works on.
__device__ __forceinline__ int tensor_of(const Batch& batch, int block) {
  int low = 0, high = batch.count - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (batch.first_block[middle] <= block) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

__device__ __forceinline__ bool is_aligned(const void* pointer, int bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

// ---- kernel without copies -----------------------------------------------------------------

template <FloatKind kKind, typename Moment, bool kMaster>
__global__ void __launch_bounds__(kFlatThreads) adamw_kernel(const __grid_constant__ Batch batch) {
  using Vector = Elements<kKind, Moment, kMaster, kVector>;
  const int index = tensor_of(batch, blockIdx.x);
  const AdamWTensor& tensor = batch.tensors[index];
  wait_for_previous_kernel();
  let_next_kernel_start();
  const Step step(batch, tensor);
  if (step.skip) {
    return;
  }
  const int64_t first =
      int64_t{static_cast<int>(blockIdx.x) - batch.first_block[index]} * kFlatElements;
  constexpr int kBytes = kVector * kBytesOf<kKind>;
  constexpr int kMomentBytes = kVector * static_cast<int>(sizeof(Moment));
  const bool vectors =
      first + kFlatElements <= tensor.elements && is_aligned(tensor.param, kBytes) &&
      is_aligned(tensor.grad, kBytes) && is_aligned(tensor.exp_avg, kMomentBytes) &&
      is_aligned(tensor.exp_avg_sq, kMomentBytes) && (!kMaster || is_aligned(tensor.master, 16));
  if (vectors) {
    Vector elements[kFlatUnroll];
#pragma unroll
    for (int i = 0; i < kFlatUnroll; ++i) {
      elements[i].load(tensor, first + (i * kFlatThreads + threadIdx.x) * kVector);
    }
#pragma unroll
    for (int i = 0; i < kFlatUnroll; ++i) {
      elements[i].update(step);
      elements[i].store(tensor, first + (i * kFlatThreads + threadIdx.x) * kVector);
    }
  } else {
    const int64_t end = min(first + kFlatElements, tensor.elements);
    for (int64_t i = first + threadIdx.x; i < end; i += kFlatThreads) {
      Elements<kKind, Moment, kMaster, 1> element;
      element.load(tensor, i);
      element.update(step);
      element.store(tensor, i);
    }
  }
}

// ---- kernel with copies --------------------------------------------------------------------

// Updates the tile's values, in memory and on their way to shared memory.
template <FloatKind kKind, typename Moment, bool kMaster>
__device__ __forceinline__ void update_tile(Tile<kBytesOf<kKind>>& tile, const AdamWTensor& tensor,
                                            const TileView& view, const Step& step) {
  constexpr int kUnitBytes = 8;
  constexpr int kUnitValues = kUnitBytes / kBytesOf<kKind>;
  constexpr int kRowUnits = kTileRowBytes / kUnitBytes;
  constexpr int kPass = kTileThreads / kRowUnits;  // rows
  constexpr int kUnroll = 2;
  using Vector = Elements<kKind, Moment, kMaster, kUnitValues>;
  const int unit = threadIdx.x % kRowUnits;
  const int row0 = threadIdx.x / kRowUnits;
  const bool inside = unit * kUnitValues * (kGroup / kKept) < view.columns_left;
  const int64_t row_values = tensor.columns / (kGroup / kKept);
  int64_t first =
      (view.row0 + row0) * row_values + view.column0 / (kGroup / kKept) + unit * kUnitValues;

#pragma unroll 1
  for (int row = row0; row < kTileRows; row += kUnroll * kPass) {
    Vector elements[kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      if (inside && row + i * kPass < view.rows_left) {
        elements[i].load(tensor, first + i * kPass * row_values);
      }
    }
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      const int own_row = row + i * kPass;
      if (inside && own_row < view.rows_left) {
        if (!step.skip) {
          elements[i].update(step);
          elements[i].store(tensor, first + i * kPass * row_values);
        }
      } else {
        elements[i].param = {};
      }
      *reinterpret_cast<decltype(elements[i].param)*>(tile.chunk(own_row, unit / 2) +
                                                      unit % 2 * kUnitBytes) = elements[i].param;
    }
    first += kUnroll * kPass * row_values;
  }
}

template <FloatKind kKind, typename Moment, bool kMaster>
__global__ void __launch_bounds__(kTileThreads, kTileBlocksPerSm)
    adamw_copy_kernel(const __grid_constant__ Batch batch) {
  using T = Tile<kBytesOf<kKind>>;
  extern __shared__ uint4 shared[];
  T& tile = *reinterpret_cast<T*>(shared);

  // Place
  const int index = tensor_of(batch, blockIdx.x);
  const AdamWTensor& tensor = batch.tensors[index];
  const WeightParams weight{
      .values_t = tensor.values_t,
      .bitmask_t = tensor.bitmask_t,
      .rows = tensor.rows,
      .columns = tensor.columns,
      .kind = kKind,
  };
  const int tile_columns = static_cast<int>((tensor.columns + T::kColumns - 1) / T::kColumns);
  const int block = static_cast<int>(blockIdx.x) - batch.first_block[index];
  const int64_t row0 = int64_t{block / tile_columns} * kTileRows;
  const int64_t column0 = int64_t{block % tile_columns} * T::kColumns;
  const TileView view{row0, column0, clamp_to_int(tensor.rows - row0),
                      clamp_to_int(tensor.columns - column0)};

  wait_for_previous_kernel();
  let_next_kernel_start();

  // Masks, values
  load_mask(tile, tensor.bitmask, tensor.columns, view);
  load_mask_t(tile, tensor.bitmask_t, tensor.rows, view);
  update_tile<kKind, Moment, kMaster>(tile, tensor, view, Step(batch, tensor));
  const WarpSelectors selectors;
  wait_for_copies();
  __syncthreads();

  transpose_tile<kKind, false, true>(tile, weight, view, selectors);
}

// ---- launcher ----------------------------------------------------------------------------

template <int kElementBytes>
int64_t blocks_of(const AdamWTensor& tensor, bool copies) {
  if (!copies) {
    return ceil_div(tensor.elements, kFlatElements);
  }
  constexpr int kColumns = Tile<kElementBytes>::kColumns;
  return ceil_div(tensor.rows, kTileRows) * ceil_div(tensor.columns, kColumns);
}

template <FloatKind kKind, typename Moment, bool kMaster>
cudaError_t launch(const AdamWTensor* tensors, int64_t count, const AdamWOptions& options,
                   cudaStream_t stream) {
  Batch batch{
      .lr = static_cast<float>(options.lr),
      .decay = static_cast<float>(options.weight_decay),
      .beta1_rest = static_cast<float>(1 - options.beta1),
      .beta2 = static_cast<float>(options.beta2),
      .beta2_rest = static_cast<float>(1 - options.beta2),
      .eps = static_cast<float>(options.eps),
      .log_beta1 = std::log(options.beta1),
      .log_beta2 = std::log(options.beta2),
      .maximize = options.maximize,
      .lr_tensor = options.lr_tensor,
      .grad_scale = options.grad_scale,
      .found_inf = options.found_inf,
  };
  constexpr int64_t kMaxBlocks = 1 << 30;
  int64_t index = 0;
  while (index < count) {
    int64_t blocks = 0;
    batch.count = 0;
    while (index < count && batch.count < kBatchTensors) {
      const int64_t more = blocks_of<kBytesOf<kKind>>(tensors[index], options.copies);
      if (more > kMaxBlocks) {
        return cudaErrorInvalidValue;
      }
      if (blocks + more > kMaxBlocks) {
        break;
      }
      if (more > 0) {
        batch.tensors[batch.count] = tensors[index];
        batch.first_block[batch.count++] = static_cast<int>(blocks);
        blocks += more;
      }
      ++index;
    }
    if (blocks == 0) {
      continue;
    }
    const auto grid = static_cast<unsigned>(blocks);
    constexpr int kShared = sizeof(Tile<kBytesOf<kKind>>);
    const cudaError_t status =
        options.copies ? launch_kernel<&adamw_copy_kernel<kKind, Moment, kMaster>, kShared>(
                             {grid, kTileThreads}, stream, batch)
                       : launch_kernel<&adamw_kernel<kKind, Moment, kMaster>>({grid, kFlatThreads},
                                                                              stream, batch);
    if (status != cudaSuccess) {
      return status;
    }
  }
  return cudaSuccess;
}

template <FloatKind kKind>
cudaError_t launch_half(const AdamWTensor* tensors, int64_t count, const AdamWOptions& options,
                        cudaStream_t stream) {
  if (options.half_moments) {
    return launch<kKind, typename ElementOf<kKind>::Type, false>(tensors, count, options, stream);
  }
  return options.masters ? launch<kKind, float, true>(tensors, count, options, stream)
                         : launch<kKind, float, false>(tensors, count, options, stream);
}

}  // namespace

cudaError_t launch_adamw(const AdamWTensor* tensors, int64_t count, const AdamWOptions& options,
                         cudaStream_t stream) {
  switch (options.kind) {
    case FloatKind::kHalf:
      return launch_half<FloatKind::kHalf>(tensors, count, options, stream);
    case FloatKind::kBFloat16:
      return launch_half<FloatKind::kBFloat16>(tensors, count, options, stream);
    case FloatKind::kFloat:
      return launch<FloatKind::kFloat, float, false>(tensors, count, options, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace slope
