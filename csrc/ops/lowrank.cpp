// SPDX-License-Identifier: Apache-2.0
//
// linear_lowrank on CUDA: Y = X W^T + T B^T + b with T = scale X A^T.
//
// T is a dense product. The own kernel multiplies T B^T on the sums of the sparse product; a plan
// adds to a dense T B^T in its epilogue, so that Y is written twice and read once.
#include "common/check_operands.h"
#include "common/cuda_check.h"
#include "common/round_up.h"
#include "ops/spmm.h"

// CPU builds of torch lack this symbol. Weak, so that one library file loads on both kinds.
extern "C" __attribute__((weak)) decltype(aoti_torch_cuda_addmm_out) aoti_torch_cuda_addmm_out;

namespace slope {
namespace {

// scale X A^T [..., rank]. The product's fp32 sums are scaled and then rounded, once.
Tensor scaled_linear(const char* op, const Tensor& x, const Tensor& lora_A, double scale) {
  const int64_t rank = lora_A.size(0), columns = lora_A.size(1);
  if (scale == 1.0 || columns == 0) {  // of no columns it makes zeros, in any shape
    const OptionalTensor none;
    return call_op("aten::linear", "", x, lora_A, none);
  }
  check(&aoti_torch_cuda_addmm_out != nullptr, "slope::", op,
        ": this build of torch has no aoti_torch_cuda_addmm_out");
  const int64_t tokens = x.numel() / columns;
  const Tensor t = empty_like_device(x, shape_with(x, rank), x.scalar_type());
  const Tensor rows = matrix_in(t, {tokens, rank}, {rank, 1});
  const Tensor columns_of_A = torch::stable::transpose(lora_A, 0, 1);
  SLOPE_TORCH_CHECK(aoti_torch_cuda_addmm_out(rows.get(), rows.get(),
                                              flat(x, tokens, columns).get(), columns_of_A.get(),
                                              /*beta=*/0.0, /*alpha=*/scale));
  return t;
}

// Columns of zeros up to a multiple of 8, which the tail of the own kernel wants.
Tensor pad_rank(const Tensor& factor) {
  const int64_t rank = factor.size(factor.dim() - 1);
  const int64_t padded = round_up(rank, 8);
  return padded == rank ? factor : torch::stable::pad(factor, {0, padded - rank});
}

void check_factor(const char* op, const char* name, const Tensor& factor, const Tensor& values) {
  check_like_values(op, name, factor, values);
  check(factor.dim() == 2, "slope::", op, ": ", name, " must have 2 dimensions, got shape ",
        ShapeOf{factor});
}

std::tuple<Tensor, Tensor> linear_lowrank(
    const Tensor& x, const Tensor& values, const Tensor& bitmask, const Tensor& lora_A,
    const Tensor& lora_B, double scale, const OptionalTensor& bias, const OptionalTensor& bitmask_t,
    const OptionalTensor& values_t, const OptionalTensor& metadata,
    const OptionalTensor& metadata_t, const std::string& backend, const std::string& activation) {
  constexpr const char* kOp = "linear_lowrank";
  const SparseWeight weight{values, bitmask, bitmask_t, values_t, metadata, metadata_t};
  check_linear(kOp, x, weight, bias);
  const Activation applied = activation_of(kOp, activation, weight);
  check_factor(kOp, "lora_A", lora_A, values);
  check_factor(kOp, "lora_B", lora_B, values);
  const int64_t rank = lora_A.size(0);
  check(lora_A.size(1) == values.size(1) * 2, "slope::", kOp, ": lora_A must be [rank, in] = [",
        rank, ", ", values.size(1) * 2, "], got ", ShapeOf{lora_A});
  check(lora_B.size(0) == values.size(0) && lora_B.size(1) == rank, "slope::", kOp,
        ": lora_B must be [out, rank] = [", values.size(0), ", ", rank, "], got ", ShapeOf{lora_B});
  const torch::stable::accelerator::DeviceGuard guard(values.get_device());

  const OptionalTensor none;
  const Tensor t = scaled_linear(kOp, x, lora_A, scale);
  switch (choose_backend(kOp, x, weight, backend)) {
    case Backend::kNative:
      if (rank == 0) {
        return {native_linear(kOp, x, weight, bias, none, none, applied), t};
      }
      return {native_linear(kOp, x, weight, bias, pad_rank(t), pad_rank(lora_B), applied), t};
    case Backend::kPlan: {
      const Tensor low_rank = call_op("aten::linear", "", t, lora_B, none);
      return {activated(plan_linear(kOp, x, weight, bias, contiguous_16b(low_rank)), applied), t};
    }
    case Backend::kDense:
      break;
  }
  const Tensor low_rank = call_op("aten::linear", "", t, lora_B, none);
  const Tensor y = torch::stable::subtract(dense_linear(x, weight, bias), low_rank, -1.0);
  return {activated(y, applied), t};
}

}  // namespace
}  // namespace slope

STABLE_TORCH_LIBRARY_IMPL(slope, CUDA, m) {
  m.impl("linear_lowrank", TORCH_BOX(&slope::linear_lowrank));
}
