// SPDX-License-Identifier: Apache-2.0
//
// adamw_ on CUDA: checks, launch.
#include "ops/adamw.h"

#include <optional>
#include <vector>

#include "common/check_operands.h"
#include "common/cuda_check.h"
#include "common/torch_stable.h"

namespace slope {
namespace {

constexpr const char* kOp = "adamw_";
using Tensors = std::vector<Tensor>;
using OptionalTensor = std::optional<Tensor>;

// ---- checks ------------------------------------------------------------------------------

// "name[i]" of an error.
struct Item {
  const char* name;
  size_t index;

  friend std::ostream& operator<<(std::ostream& out, const Item& item) {
    return out << item.name << "[" << item.index << "]";
  }
};

void check_count(const char* name, const Tensors& tensors, size_t count) {
  check(tensors.size() == count, "slope::", kOp, ": ", name, " must have ", count, " items, got ",
        tensors.size());
}

bool same_shape(const Tensor& a, const Tensor& b) {
  bool same = a.dim() == b.dim();
  for (int64_t dim = 0; same && dim < a.dim(); ++dim) {
    same = a.size(dim) == b.size(dim);
  }
  return same;
}

// `tensor` must be on the device of `param`, of its shape and of `dtype`, which is that of
// `dtype_of`.
void check_beside(const Item& item, const Tensor& tensor, const Tensor& param, ScalarType dtype,
                  const char* dtype_of) {
  check(tensor.is_cuda() && tensor.get_device() == param.get_device(), "slope::", kOp, ": ", item,
        " must be on the same device as params");
  check(tensor.scalar_type() == dtype, "slope::", kOp, ": ", item, " must have the dtype of ",
        dtype_of);
  check(same_shape(tensor, param), "slope::", kOp, ": ", item,
        " must have the shape of its parameter, ", ShapeOf{param}, ", got ", ShapeOf{tensor});
}

void check_scalar(const char* name, const OptionalTensor& scalar, const Tensor& param) {
  if (scalar) {
    check(scalar->is_cuda() && scalar->get_device() == param.get_device() &&
              scalar->scalar_type() == ScalarType::Float && scalar->numel() == 1,
          "slope::", kOp, ": ", name, " must be a float32 scalar on the device of params");
  }
}

void check_step(const Item& item, const Tensor& step, const Tensor& param) {
  check(step.scalar_type() == ScalarType::Float && step.dim() == 0 &&
            (!step.is_cuda() || step.get_device() == param.get_device()),
        "slope::", kOp, ": ", item,
        " must be a float32 scalar on the CPU or on the device of params");
}

void check_copy(size_t i, const Tensor& values, const Tensor& bitmask, const Tensor& bitmask_t,
                const Tensor& values_t) {
  check(values.dim() == 2, "slope::", kOp, ": params[", i, "] must have 2 dimensions, got ",
        values.dim());
  const int64_t rows = values.size(0);
  const int64_t columns = values.size(1) * (kGroup / kKept);
  check_columns(kOp, "params", "in", columns);
  check_transposable(kOp, "params", rows);
  check_bitmask(kOp, "bitmasks", bitmask, rows, columns, "params", values);
  check_bitmask(kOp, "bitmasks_t", bitmask_t, columns, rows, "params", values);
  check_values_t(kOp, "values_t", values_t, values);
  check_written(kOp, "values_t", values_t, 8);
}

// ---- operands ----------------------------------------------------------------------------

// A tensor as the kernels take it: itself, or a contiguous copy that goes back afterwards.
class Operand {
 public:
  Operand(const Tensor& tensor, bool aligned)
      : tensor_(tensor),
        flat_(aligned                  ? contiguous_16b(tensor)
              : tensor.is_contiguous() ? tensor
                                       : torch::stable::contiguous(tensor)) {}

  void* data() const { return flat_.mutable_data_ptr(); }
  void write_back() const {
    if (flat_.const_data_ptr() != tensor_.const_data_ptr()) {
      call_op("aten::copy_", "", tensor_, flat_, false);
    }
  }

 private:
  Tensor tensor_, flat_;
};

const float* pointer(const OptionalTensor& scalar) {
  return scalar ? static_cast<const float*>(scalar->const_data_ptr()) : nullptr;
}

// ---- op ----------------------------------------------------------------------------------

void adamw_(const Tensors& params, const Tensors& grads, const Tensors& exp_avgs,
            const Tensors& exp_avg_sqs, const Tensors& masters, const Tensors& steps,
            const Tensors& bitmasks, const Tensors& bitmasks_t, const Tensors& values_t, double lr,
            double beta1, double beta2, double eps, double weight_decay, bool maximize,
            const OptionalTensor& grad_scale, const OptionalTensor& lr_tensor,
            const OptionalTensor& found_inf) {
  const size_t count = params.size();
  check(count > 0, "slope::", kOp, ": params must not be empty");
  const bool has_masters = !masters.empty();
  const bool copies = !bitmasks.empty() || !bitmasks_t.empty() || !values_t.empty();
  check_count("grads", grads, count);
  check_count("exp_avgs", exp_avgs, count);
  check_count("exp_avg_sqs", exp_avg_sqs, count);
  check_count("steps", steps, count);
  check_count("masters", masters, has_masters ? count : 0);
  check_count("bitmasks", bitmasks, copies ? count : 0);
  check_count("bitmasks_t", bitmasks_t, copies ? count : 0);
  check_count("values_t", values_t, copies ? count : 0);

  const Tensor& first = params[0];
  check(first.is_cuda(), "slope::", kOp,
        ": params[0] must be on the device of the other arguments, a CUDA device");
  check_floating(kOp, "params[0]", first);
  const ScalarType dtype = first.scalar_type();
  const ScalarType moments = exp_avgs[0].scalar_type();
  check(moments == ScalarType::Float || moments == dtype, "slope::", kOp,
        ": exp_avgs must be float32 or of the dtype of params");
  check(!has_masters || moments != dtype, "slope::", kOp,
        ": masters must be empty unless params are of 16 bits and exp_avgs float32");
  for (size_t i = 0; i < count; ++i) {
    check_beside({"params", i}, params[i], params[i], dtype, "params[0]");
    check(params[i].get_device() == first.get_device(), "slope::", kOp, ": ", Item{"params", i},
          " must be on the same device as params[0]");
    check_beside({"grads", i}, grads[i], params[i], dtype, "params");
    check_beside({"exp_avgs", i}, exp_avgs[i], params[i], moments, "exp_avgs[0]");
    check_beside({"exp_avg_sqs", i}, exp_avg_sqs[i], params[i], moments, "exp_avgs[0]");
    if (has_masters) {
      check_beside({"masters", i}, masters[i], params[i], moments, "exp_avgs[0]");
    }
    check_step({"steps", i}, steps[i], params[i]);
    if (copies) {
      check_copy(i, params[i], bitmasks[i], bitmasks_t[i], values_t[i]);
    }
  }
  check_scalar("grad_scale", grad_scale, first);
  check_scalar("lr_tensor", lr_tensor, first);
  check_scalar("found_inf", found_inf, first);
  check(beta1 >= 0 && beta1 < 1, "slope::", kOp, ": beta1 must be in [0, 1), got ", beta1);
  check(beta2 >= 0 && beta2 < 1, "slope::", kOp, ": beta2 must be in [0, 1), got ", beta2);
  check(lr >= 0, "slope::", kOp, ": lr must not be negative, got ", lr);
  check(eps >= 0, "slope::", kOp, ": eps must not be negative, got ", eps);
  check(weight_decay >= 0, "slope::", kOp, ": weight_decay must not be negative, got ",
        weight_decay);

  const torch::stable::accelerator::DeviceGuard guard(first.get_device());
  const NoGradGuard no_grad;  // params may be leaves
  std::vector<Operand> written;
  Tensors read;
  written.reserve(count * 4);
  read.reserve(count * 3);
  const auto write_to = [&](const Tensor& tensor) {
    return written.emplace_back(tensor, copies).data();
  };
  const auto read_from = [&](const Tensor& tensor) {
    return read.emplace_back(contiguous_16b(tensor)).data_ptr();
  };
  const auto gradient = [&](const Tensor& grad) {
    return copies ? read_from(grad) : read.emplace_back(torch::stable::contiguous(grad)).data_ptr();
  };
  std::vector<AdamWTensor> tensors;
  tensors.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    const bool counts_here = !steps[i].is_cuda();
    const auto* const step = static_cast<const float*>(steps[i].const_data_ptr());
    tensors.push_back({
        .param = write_to(params[i]),
        .grad = gradient(grads[i]),
        .exp_avg = write_to(exp_avgs[i]),
        .exp_avg_sq = write_to(exp_avg_sqs[i]),
        .master = has_masters ? static_cast<float*>(write_to(masters[i])) : nullptr,
        .step = counts_here ? nullptr : step,
        .host_step = counts_here ? *step : 0.0f,
        .bitmask = copies ? static_cast<uint8_t*>(read_from(bitmasks[i])) : nullptr,
        .bitmask_t = copies ? static_cast<uint8_t*>(read_from(bitmasks_t[i])) : nullptr,
        .values_t = copies ? values_t[i].mutable_data_ptr() : nullptr,
        .rows = copies ? params[i].size(0) : 0,
        .columns = copies ? params[i].size(1) * (kGroup / kKept) : 0,
        .elements = params[i].numel(),
    });
  }
  const AdamWOptions options{
      .lr = lr,
      .beta1 = beta1,
      .beta2 = beta2,
      .eps = eps,
      .weight_decay = weight_decay,
      .maximize = maximize,
      .lr_tensor = pointer(lr_tensor),
      .grad_scale = pointer(grad_scale),
      .found_inf = pointer(found_inf),
      .kind = kind_of(first),
      .half_moments = moments != ScalarType::Float,
      .masters = has_masters,
      .copies = copies,
  };
  check_cuda(launch_adamw(tensors.data(), static_cast<int64_t>(count), options,
                          current_stream(first, kOp)),
             kOp);
  for (const Operand& operand : written) {
    operand.write_back();
  }
}

}  // namespace
}  // namespace slope

STABLE_TORCH_LIBRARY_IMPL(slope, CUDA, m) { m.impl("adamw_", TORCH_BOX(&slope::adamw_)); }
