// SPDX-License-Identifier: Apache-2.0
//
// Every operator of slope_ext, on one screen. Implementations register themselves: CUDA kernels at
// the foot of csrc/ops/<family>.cpp, references, fakes and gradients in slope_ext/ops/<family>.py.
//
// Shapes: W is [out, in]; values [out, in/2]; bitmask uint8 [out, in/8] (1 = kept);
//         values_t [in, out/2] and bitmask_t uint8 [in, out/8] are the double-pruned W transposed;
//         metadata, metadata_t: what the sparse tensor cores want of a bitmask; int32 for the own
//         kernel, uint8 for cuSPARSELt, which reads a weight in place if it lies right behind
//         values.
#include "common/torch_stable.h"

STABLE_TORCH_LIBRARY(slope, m) {
  // prune: which two of four; the forms of a weight that follow from that
  m.def("prune_24(Tensor scores) -> Tensor");
  m.def("prune_transposed(Tensor values, Tensor bitmask) -> Tensor");
  m.def("prune_compress(Tensor dense) -> (Tensor values, Tensor bitmask)");
  m.def(
      "prune_compress_transposed(Tensor dense) "
      "-> (Tensor values, Tensor bitmask, Tensor values_t, Tensor bitmask_t)");
  m.def(
      "double_prune_(Tensor values, Tensor bitmask, Tensor(a!) bitmask_t, Tensor(b!) values_t) "
      "-> ()");

  // compress: dense <-> values
  m.def("compress(Tensor dense, Tensor bitmask) -> Tensor");
  m.def("decompress(Tensor values, Tensor bitmask) -> Tensor");

  // transpose: values of W -> values of the double-pruned W, transposed
  m.def("transpose_values(Tensor values, Tensor bitmask, Tensor bitmask_t, Tensor(a!) out) -> ()");

  // pack: the operand as the matrix product reads it, [values | metadata]
  m.def("pack(Tensor values, Tensor bitmask) -> Tensor");
  m.def("pack_metadata(Tensor bitmask, Tensor(a!) metadata) -> ()");

  // spmm: Y = activation(X W^T + b), and its input gradient
  m.def(
      "linear(Tensor x, Tensor values, Tensor bitmask, Tensor? bias=None, "
      "Tensor? bitmask_t=None, Tensor? values_t=None, Tensor? metadata=None, "
      "Tensor? metadata_t=None, str backend=\"auto\", str activation=\"none\") -> Tensor");
  m.def(
      "input_grad(Tensor dy, Tensor values, Tensor bitmask, Tensor bitmask_t, "
      "Tensor? values_t=None, Tensor? metadata_t=None, str backend=\"auto\") -> Tensor");

  // weight_grad: dW = dY^T X at the kept positions
  m.def("weight_grad(Tensor dy, Tensor x, Tensor bitmask) -> Tensor");
  m.def("weight_grad_add_(Tensor(a!) grad, Tensor dy, Tensor x, Tensor bitmask) -> ()");

  // lowrank: Y = activation(X W^T + T B^T + b) with T = scale X A^T, and its input gradient
  m.def(
      "linear_lowrank(Tensor x, Tensor values, Tensor bitmask, Tensor lora_A, Tensor lora_B, "
      "float scale=1.0, Tensor? bias=None, Tensor? bitmask_t=None, Tensor? values_t=None, "
      "Tensor? metadata=None, Tensor? metadata_t=None, str backend=\"auto\", "
      "str activation=\"none\") -> (Tensor y, Tensor t)");
  m.def(
      "input_grad_lowrank(Tensor dy, Tensor values, Tensor bitmask, Tensor bitmask_t, "
      "Tensor lora_A, Tensor lora_B, float scale=1.0, Tensor? values_t=None, "
      "Tensor? metadata_t=None, str backend=\"auto\") -> (Tensor dx, Tensor dt)");

  // adamw: one step of many parameters, the backward copies included
  m.def(
      "adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, "
      "Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] masters, Tensor[] steps, Tensor[] bitmasks, "
      "Tensor[] bitmasks_t, Tensor(e!)[] values_t, *, float lr, float beta1, float beta2, "
      "float eps, float weight_decay, bool maximize=False, Tensor? grad_scale=None, "
      "Tensor? lr_tensor=None, Tensor? found_inf=None) -> ()");
}
