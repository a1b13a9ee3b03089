// SPDX-License-Identifier: Apache-2.0
//
// The only door to torch. A .cpp includes this; a .cu or .cuh never does.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <vector>

// Raises what a call of torch's C interface failed with; torch renamed its own macro.
#ifdef STABLE_TORCH_ERROR_CODE_CHECK
#define SLOPE_TORCH_CHECK STABLE_TORCH_ERROR_CODE_CHECK
#else
#define SLOPE_TORCH_CHECK TORCH_ERROR_CODE_CHECK
#endif

namespace slope {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Raises RuntimeError with exactly the given text, e.g.
//   check(ok, "slope::compress: bitmask must be uint8, got ", name)
template <typename... Parts>
void check(bool condition, const Parts&... parts) {
  if (condition) [[likely]] {
    return;
  }
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// Prints as [2, 3]; formats only when a message is built.
struct ShapeOf {
  const Tensor& tensor;

  friend std::ostream& operator<<(std::ostream& out, const ShapeOf& shape) {
    out << "[";
    for (int64_t dim = 0; dim < shape.tensor.dim(); ++dim) {
      out << (dim == 0 ? "" : ", ") << shape.tensor.size(dim);
    }
    return out << "]";
  }
};

// Calls an op that returns one tensor through torch's dispatcher: call_op("aten::mm", "out", a, b,
// c).
template <typename... Arguments>
Tensor call_op(const char* name, const char* overload, const Arguments&... arguments) {
  std::array<StableIValue, sizeof...(Arguments)> stack{torch::stable::detail::from(arguments)...};
  SLOPE_TORCH_CHECK(torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// While one lives, torch's ops record no gradient, and write to leaves that require one.
class NoGradGuard {
 public:
  NoGradGuard() { aoti_torch_grad_mode_set_enabled(false); }
  ~NoGradGuard() { aoti_torch_grad_mode_set_enabled(before_); }
  NoGradGuard(const NoGradGuard&) = delete;
  NoGradGuard& operator=(const NoGradGuard&) = delete;

 private:
  const bool before_ = aoti_torch_grad_mode_is_enabled();
};

// An uninitialised contiguous tensor beside `like`; faster than new_empty, which the dispatcher
// looks up by name.
inline Tensor empty_like_device(const Tensor& like, const std::vector<int64_t>& shape,
                                ScalarType dtype) {
  std::vector<int64_t> strides(shape.size());
  int64_t stride = 1;
  for (size_t dim = shape.size(); dim-- > 0;) {
    strides[dim] = stride;
    stride *= shape[dim];
  }
  int32_t device_type = 0;
  SLOPE_TORCH_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle handle = nullptr;
  SLOPE_TORCH_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(shape.size()), shape.data(), strides.data(),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), device_type,
      like.get_device(), &handle));
  return Tensor(handle);
}

// A matrix in the storage of `tensor`, from `offset` elements behind its start on; several times as
// fast as narrow, transpose and reshape, each of which goes through the dispatcher.
inline Tensor matrix_in(const Tensor& tensor, std::array<int64_t, 2> sizes,
                        std::array<int64_t, 2> strides, int64_t offset = 0) {
  AtenTensorHandle handle = nullptr;
  SLOPE_TORCH_CHECK(aoti_torch__reinterpret_tensor(tensor.get(), 2, sizes.data(), strides.data(),
                                                   offset, &handle));
  return Tensor(handle);
}

// [..., features] -> [tokens, features].
inline Tensor flat(const Tensor& tensor, int64_t tokens, int64_t features) {
  return tensor.is_contiguous() ? matrix_in(tensor, {tokens, features}, {features, 1})
                                : torch::stable::reshape(tensor, {tokens, features});
}

// A contiguous tensor whose data starts at a multiple of 16 bytes: itself, or a copy.
inline Tensor contiguous_16b(const Tensor& tensor) {
  Tensor result = tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
  const auto address = reinterpret_cast<uintptr_t>(result.const_data_ptr());
  return address % 16 == 0 ? result : torch::stable::clone(result);
}

}  // namespace slope
