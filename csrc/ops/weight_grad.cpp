// SPDX-License-Identifier: Apache-2.0
//
// weight_grad and weight_grad_add_ on CUDA: dW = dY^T X at the kept positions, alone or added to
// what is there.
//
// A dense product makes some rows of dW, compress reads them: one chunk of rows after the other, on
// two streams in turn, each with a buffer of its own.
//
//   stream 1   product 0 | compress 0 | product 2 ...
//   stream 2             product 1         | compress 1 | product 3 ...
//
// So a product starts in the idle end of the one before, and compressing runs beside products. No
// dense dW is left behind.
#include <algorithm>
#include <array>

#include "common/check_operands.h"
#include "common/cuda_check.h"
#include "common/round_up.h"
#include "common/side_stream.h"
#include "ops/compress.h"
#include "ops/spmm.h"

// CPU builds of torch lack this symbol. Weak, so that one library file loads on both kinds.
extern "C" __attribute__((weak)) decltype(aoti_torch_cuda_mm_out) aoti_torch_cuda_mm_out;

namespace slope {
namespace {

constexpr int64_t kTileRows = 128;  // of the dense product; its columns below
constexpr int64_t kTileColumns = 256;
constexpr int64_t kChunkBytes = 28 << 20;  // of dense dW, at most, but no less than a tile's rows
constexpr int64_t kLeastBytes = 16 << 20;  // below, one chunk: nothing to gain from overlap

// How many chunks the rows of dW make. Each is a product of its own, in waves of a tile for each
// multiprocessor, and how well cuBLAS fills the last wave makes up to a quarter of its time
// (docs/performance.md). Of the counts that make alike chunks it is the one with the fewest waves
// in all; where there is none, the fewest chunks, as alike as can be. One, if that has fewer waves
// yet and takes no more memory than two.
int64_t chunk_count(int64_t rows, int64_t columns, int64_t row_bytes, int processors) {
  if (rows * row_bytes < kLeastBytes) {
    return 1;
  }
  const int64_t tiles = ceil_div(rows, kTileRows);
  const auto waves = [&](int64_t rows_of_tiles) {
    return ceil_div(rows_of_tiles * ceil_div(columns, kTileColumns), int64_t{processors});
  };
  const auto waves_of = [&](int64_t chunks) {
    const int64_t larger = tiles % chunks;
    return (chunks - larger) * waves(tiles / chunks) + larger * waves(tiles / chunks + 1);
  };
  const int64_t most = std::max<int64_t>(1, kChunkBytes / (kTileRows * row_bytes));
  const int64_t fewest = std::max<int64_t>(2, ceil_div(tiles, most));
  int64_t best = 0;
  for (int64_t chunks = fewest; chunks <= 2 * fewest; ++chunks) {
    if (tiles % chunks == 0 && (best == 0 || waves_of(chunks) < waves_of(best))) {
      best = chunks;
    }
  }
  if (best == 0) {
    best = std::min(fewest, tiles);
  }
  const bool whole_fits = rows * row_bytes <= 2 * kChunkBytes;
  return whole_fits && waves_of(1) < waves_of(best) ? 1 : best;
}

// Where a gradient goes.
struct Target {
  const char* op;
  const Tensor& values;
  bool add;  // to what is there
};

// Rows [row, row + count) of the target <- dY^T X there, by way of `buffer`, on torch's current
// stream.
void make_rows(const Target& target, const Tensor& dy, const Tensor& x, const Tensor& bitmask,
               const Tensor& buffer, int64_t row, int64_t count, cudaStream_t stream) {
  const int64_t columns = x.size(1);
  const Tensor dy_rows =
      matrix_in(dy, {count, dy.size(0)}, {dy.stride(1), dy.stride(0)}, row * dy.stride(1));
  const Tensor dense = matrix_in(buffer, {count, columns}, {columns, 1});
  SLOPE_TORCH_CHECK(aoti_torch_cuda_mm_out(dense.get(), dy_rows.get(), x.get()));

  const auto element_bytes = static_cast<int64_t>(dy.element_size());
  auto* const values_bytes = static_cast<uint8_t*>(target.values.mutable_data_ptr());
  const CompressParams params{
      .dense = dense.mutable_data_ptr(),
      .values = values_bytes + row * (columns / 2) * element_bytes,
      .bitmask = static_cast<const uint8_t*>(bitmask.const_data_ptr()) + row * (columns / 8),
      .elements = count * columns,
      .element_bytes = static_cast<int>(element_bytes),
  };
  check_cuda(target.add ? launch_compress_add(params, kind_of(dy), stream)
                        : launch_compress(params, stream),
             target.op);
}

void check_operands(const char* op, const Tensor& dy, const Tensor& x, const Tensor& bitmask) {
  check_floating(op, "dy", dy);
  check(dy.dim() >= 1, "slope::", op, ": dy must have at least 1 dimension, got shape []");
  check(x.is_cuda() && x.get_device() == dy.get_device(), "slope::", op,
        ": x must be on the same device as dy");
  check(x.scalar_type() == dy.scalar_type(), "slope::", op, ": x must have the dtype of dy");
  bool same_leading = x.dim() == dy.dim();
  for (int64_t dim = 0; same_leading && dim < dy.dim() - 1; ++dim) {
    same_leading = x.size(dim) == dy.size(dim);
  }
  check(same_leading, "slope::", op, ": x must have the leading dimensions of dy ", ShapeOf{dy},
        ", got ", ShapeOf{x});
  const int64_t rows = dy.size(dy.dim() - 1);
  const int64_t columns = x.size(x.dim() - 1);
  check_columns(op, "x", "in", columns);
  check_bitmask(op, "bitmask", bitmask, rows, columns, "dy", dy);
}

// The target <- dY^T X; neither is empty. The current device is that of dy.
void write_gradient(const Target& target, const Tensor& dy, const Tensor& x,
                    const Tensor& bitmask) {
  check(&aoti_torch_cuda_mm_out != nullptr, "slope::", target.op,
        ": this build of torch has no aoti_torch_cuda_mm_out");
  const int64_t rows = dy.size(dy.dim() - 1);
  const int64_t columns = x.size(x.dim() - 1);
  const int64_t tokens = dy.numel() / rows;
  const Tensor flat_dy = flat(dy, tokens, rows);
  const Tensor flat_x = flat(x, tokens, columns);
  const Tensor mask = contiguous_16b(bitmask);
  const int64_t row_bytes = columns * static_cast<int64_t>(dy.element_size());
  const cudaStream_t stream = current_stream(dy, target.op);

  int processors = 0;
  check_cuda(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, dy.get_device()),
             target.op);
  const int64_t chunks = chunk_count(rows, columns, row_bytes, processors);
  if (chunks == 1) {
    const Tensor buffer = torch::stable::new_empty(dy, {rows, columns});
    make_rows(target, flat_dy, flat_x, mask, buffer, 0, rows, stream);
    return;
  }
  const int64_t tiles = ceil_div(rows, kTileRows);
  const int64_t most = ceil_div(tiles, chunks) * kTileRows;
  const std::array buffers{torch::stable::new_empty(dy, {most, columns}),
                           torch::stable::new_empty(dy, {most, columns})};
  const StreamPair streams(stream, dy.get_device(), target.op);
  int64_t row = 0;
  for (int64_t i = 0; i < chunks; ++i) {
    const cudaStream_t mine = i % 2 == 0 ? streams.first() : streams.second();
    const int64_t its_tiles = tiles / chunks + (i < tiles % chunks ? 1 : 0);
    const int64_t count = std::min(its_tiles * kTileRows, rows - row);
    const StreamGuard on_mine(mine, dy.get_device());
    make_rows(target, flat_dy, flat_x, mask, buffers[i % 2], row, count, mine);
    row += count;
  }
}

// ---- ops -----------------------------------------------------------------------------------

Tensor weight_grad(const Tensor& dy, const Tensor& x, const Tensor& bitmask) {
  constexpr const char* kOp = "weight_grad";
  check_operands(kOp, dy, x, bitmask);
  const torch::stable::accelerator::DeviceGuard guard(dy.get_device());
  const int64_t rows = dy.size(dy.dim() - 1);
  Tensor values = torch::stable::new_empty(dy, {rows, x.size(x.dim() - 1) / 2});
  if (values.numel() == 0 || dy.numel() == 0) {
    return torch::stable::zero_(values);
  }
  write_gradient({kOp, values, false}, dy, x, bitmask);
  return values;
}

void weight_grad_add_(const Tensor& grad, const Tensor& dy, const Tensor& x,
                      const Tensor& bitmask) {
  constexpr const char* kOp = "weight_grad_add_";
  check_operands(kOp, dy, x, bitmask);
  const int64_t rows = dy.size(dy.dim() - 1);
  const int64_t columns = x.size(x.dim() - 1);
  check(grad.is_cuda() && grad.get_device() == dy.get_device(), "slope::", kOp,
        ": grad must be on the same device as dy");
  check(grad.scalar_type() == dy.scalar_type(), "slope::", kOp, ": grad must have the dtype of dy");
  check(grad.dim() == 2 && grad.size(0) == rows && grad.size(1) == columns / 2, "slope::", kOp,
        ": grad must be [out, in/2] = [", rows, ", ", columns / 2, "], got ", ShapeOf{grad});
  check_written(kOp, "grad", grad, 16);
  if (grad.numel() > 0 && dy.numel() > 0) {
    const torch::stable::accelerator::DeviceGuard guard(dy.get_device());
    write_gradient({kOp, grad, true}, dy, x, bitmask);
  }
}

}  // namespace
}  // namespace slope

STABLE_TORCH_LIBRARY_IMPL(slope, CUDA, m) {
  m.impl("weight_grad", TORCH_BOX(&slope::weight_grad));
  m.impl("weight_grad_add_", TORCH_BOX(&slope::weight_grad_add_));
}
