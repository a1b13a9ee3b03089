# SPDX-License-Identifier: Apache-2.0
"""The optimizer step over compressed weights: adamw_."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from slope_ext import reference
from slope_ext._check import Checker, is_half
from slope_ext._library import register, register_write


def adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    masters: Sequence[Tensor],
    steps: Sequence[Tensor],
    bitmasks: Sequence[Tensor] = (),
    bitmasks_t: Sequence[Tensor] = (),
    values_t: Sequence[Tensor] = (),
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool = False,
    grad_scale: Tensor | None = None,
    lr_tensor: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """One AdamW step of many parameters, in place; for 2:4 weights the backward copies follow.

    The update is torch.optim.AdamW's: decoupled weight decay, eps added after bias correction. On
    CUDA one pass over memory, with no host synchronisation; tensors that are not contiguous are
    copied out and back.

    Args:
        params: n tensors, any shape, one floating dtype and device: values or dense parameters.
        grads: n tensors, shapes and dtype of ``params``.
        exp_avgs, exp_avg_sqs: n tensors each, shapes of ``params``, one dtype (fp32 or that of
            ``params``). The arithmetic runs in fp32, or fp64 for fp64 parameters.
        masters: n fp32 tensors, or empty; for fp16 and bf16 parameters with fp32 moments. Where
            given they are updated and ``params`` become their rounded copies.
        steps: n fp32 scalars on the CPU or the device of ``params``, already counting this step (1
            in the first).
        bitmasks, bitmasks_t, values_t: n tensors each, or empty. Where given, ``params`` are 2:4
            values and ``values_t`` is refreshed as by :func:`slope_ext.ops.transpose_values`.
        lr, beta1, beta2, eps, weight_decay, maximize: as in torch.optim.AdamW.
        grad_scale: fp32 scalar that gradients are divided by, or None.
        lr_tensor: fp32 scalar that stands for ``lr``, or None. A CUDA graph's replays read it, as
            they do steps on the GPU; ``lr`` and steps on the CPU stay what they were.
        found_inf: fp32 scalar, or None. Unless it is 0 nothing is updated but the copies.

    Raises:
        RuntimeError: a list has the wrong length or a tensor the wrong dtype, shape or device; the
            message names it and nothing is modified.
    """
    torch.ops.slope.adamw_.default(
        list(params),
        list(grads),
        list(exp_avgs),
        list(exp_avg_sqs),
        list(masters),
        list(steps),
        list(bitmasks),
        list(bitmasks_t),
        list(values_t),
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        maximize=maximize,
        grad_scale=grad_scale,
        lr_tensor=lr_tensor,
        found_inf=found_inf,
    )


def _check(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    masters: list[Tensor],
    steps: list[Tensor],
    bitmasks: list[Tensor],
    bitmasks_t: list[Tensor],
    values_t: list[Tensor],
    **options: Any,
) -> None:
    check = Checker("adamw_")
    count = len(params)
    check.require(count > 0, "params must not be empty")
    lists = {"grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs, "steps": steps}
    if masters:
        lists["masters"] = masters
    if bitmasks or bitmasks_t or values_t:
        lists |= {"bitmasks": bitmasks, "bitmasks_t": bitmasks_t, "values_t": values_t}
    for name, tensors in lists.items():
        check.require(len(tensors) == count, f"{name} must have {count} items, got {len(tensors)}")

    check.floating("params[0]", params[0])
    state_dtype = exp_avgs[0].dtype
    check.require(
        state_dtype in (torch.float32, params[0].dtype),
        f"exp_avgs must be float32 or of the dtype of params, got {state_dtype}",
    )
    check.require(
        not masters or (state_dtype == torch.float32 and is_half(params[0].dtype)),
        "masters must be empty unless params are of 16 bits and exp_avgs float32",
    )
    for i, param in enumerate(params):
        check.same_dtype(f"params[{i}]", param, "params[0]", params[0])
        check.same_device(f"params[{i}]", param, "params[0]", params[0])
        check.same_dtype(f"grads[{i}]", grads[i], "params", param)
        states = {"exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
        if masters:
            states["masters"] = masters
        for name, tensors in states.items():
            check.same_dtype(f"{name}[{i}]", tensors[i], "exp_avgs[0]", exp_avgs[0])
        for name, tensors in ({"grads": grads} | states).items():
            check.shape(
                f"{name}[{i}]", tensors[i], tuple(param.shape), "the shape of its parameter"
            )
            check.same_device(f"{name}[{i}]", tensors[i], "params", param)
        check.shape(f"steps[{i}]", steps[i], (), "a scalar")
        check.require(
            steps[i].dtype == torch.float32, f"steps[{i}] must be float32, got {steps[i].dtype}"
        )
        check.require(
            steps[i].device.type == "cpu" or steps[i].device == param.device,
            f"steps[{i}] must be on the CPU or on the device of params, got {steps[i].device}",
        )
        if values_t:
            _check_sparse(check, i, param, bitmasks[i], bitmasks_t[i], values_t[i])

    for name in ("grad_scale", "lr_tensor", "found_inf"):
        scalar = options.get(name)
        if scalar is not None:
            check.require(
                scalar.numel() == 1 and scalar.dtype == torch.float32,
                f"{name} must be a float32 scalar",
            )
            check.same_device(name, scalar, "params", params[0])
    for name in ("beta1", "beta2"):
        check.require(0 <= options[name] < 1, f"{name} must be in [0, 1), got {options[name]}")
    for name in ("lr", "eps", "weight_decay"):
        check.require(options[name] >= 0, f"{name} must not be negative, got {options[name]}")


def _check_sparse(
    check: Checker, i: int, values: Tensor, bitmask: Tensor, bitmask_t: Tensor, values_t: Tensor
) -> None:
    check.matrix(f"params[{i}]", values)
    rows, columns = values.shape[0], 2 * values.shape[1]
    check.columns(f"params[{i}]", columns, "in")
    check.columns(f"params[{i}]", rows, "out")
    check.bitmask(f"bitmasks[{i}]", bitmask, rows, columns, "params", values)
    check.bitmask(f"bitmasks_t[{i}]", bitmask_t, columns, rows, "params", values)
    check.shape(f"values_t[{i}]", values_t, (columns, rows // 2), "[in, out/2]")
    check.same_dtype(f"values_t[{i}]", values_t, "params", values)
    check.same_device(f"values_t[{i}]", values_t, "params", values)
    check.require(values_t.is_contiguous(), f"values_t[{i}] must be contiguous")


register(
    "adamw_",
    check=_check,
    reference=reference.adamw_,
    fake=lambda *_, **__: None,
)
register_write("adamw_", "params", "exp_avgs", "exp_avg_sqs", "masters", "values_t")
