# SPDX-License-Identifier: Apache-2.0
"""Sparse plus low-rank in one op: linear_lowrank."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from slope_ext import _backward_copy, reference
from slope_ext._check import Checker
from slope_ext._library import register, register_autocast
from slope_ext.ops.spmm import (
    Backend,
    call_directly,
    composes,
    needs_grad,
    require_input_grad,
    rows_of,
    trusted_input_grad,
)
from slope_ext.ops.weight_grad import weight_grad


def linear_lowrank(
    x: Tensor,
    values: Tensor,
    bitmask: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scale: float = 1.0,
    bias: Tensor | None = None,
    bitmask_t: Tensor | None = None,
    values_t: Tensor | None = None,
    metadata: Tensor | None = None,
    metadata_t: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Y = X W^T + scale (X A^T) B^T + b (arXiv 2405.16325, equation 11).

    Backward: that of :func:`slope_ext.ops.linear`, and with T = X A^T
    dB = scale dY^T T, dA = scale (dY B)^T X, dX += scale (dY B) A.

    Args:
        x: fp16, bf16, fp32 or fp64 [..., in].
        values: [out, in/2], the dtype of ``x``, in a multiple of 8. Differentiable.
        bitmask: uint8 [out, in/8].
        lora_A: [rank, in], the dtype of ``x``. Differentiable.
        lora_B: [out, rank], the dtype of ``x``. Differentiable.
        scale: factor of the low-rank term.
        bias, bitmask_t, values_t, metadata, metadata_t, backend: as in
            :func:`slope_ext.ops.linear`.

    Returns:
        y: [..., out], contiguous.

    Raises:
        RuntimeError: an argument has the wrong dtype, shape or device; the message names it.
    """
    rest = (lora_A, lora_B, scale, bias, bitmask_t, values_t, metadata, metadata_t, backend)
    y, _ = call_directly(
        torch.ops.slope.linear_lowrank.default,
        _LinearLowrank,
        (x, values, lora_A, lora_B, bias),
        (x, values, bitmask, *rest),
    )
    return y  # type: ignore[no-any-return]


def _check(
    x: Tensor,
    values: Tensor,
    bitmask: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scale: float = 1.0,
    bias: Tensor | None = None,
    bitmask_t: Tensor | None = None,
    values_t: Tensor | None = None,
    metadata: Tensor | None = None,
    metadata_t: Tensor | None = None,
    backend: str = "auto",
) -> None:
    check = Checker("linear_lowrank")
    rows, columns = check.values(values, bitmask)
    check.tokens("x", x, columns, values)
    for name, factor in (("lora_A", lora_A), ("lora_B", lora_B)):
        check.matrix(name, factor)
        check.same_dtype(name, factor, "values", values)
        check.same_device(name, factor, "values", values)
    check.shape("lora_A", lora_A, (lora_A.shape[0], columns), "[rank, in]")
    check.shape("lora_B", lora_B, (rows, lora_A.shape[0]), "[out, rank]")
    check.bias(bias, values)
    check.transposed(values, bitmask_t, values_t)
    check.metadata("metadata", metadata, rows, columns, values)
    check.metadata("metadata_t", metadata_t, columns, rows, values)
    check.backend(backend)


def _fake(x: Tensor, values: Tensor, bitmask: Tensor, lora_A: Tensor, *_: Any, **__: Any) -> Any:
    leading = x.shape[:-1]
    return x.new_empty(*leading, values.shape[0]), x.new_empty(*leading, lora_A.shape[0])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    (
        x,
        values,
        bitmask,
        lora_A,
        lora_B,
        scale,
        bias,
        bitmask_t,
        values_t,
        _,
        metadata_t,
        backend,
    ) = inputs
    t = output[1]
    ctx.needs = needs_grad(x, values, lora_A, lora_B, bias)
    x_needs, *_ = ctx.needs
    require_input_grad("linear_lowrank", x_needs, values, bitmask_t, backend)
    ctx.mark_non_differentiable(t)
    ctx.set_materialize_grads(False)
    ctx.scale, ctx.backend = scale, backend
    ctx.save_for_backward(x, values, bitmask, lora_A, lora_B, t, bitmask_t, values_t, metadata_t)


def _input_grad_on_cuda(
    dy: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scale: float,
    values: Tensor,
    bitmask: Tensor,
    bitmask_t: Tensor,
    values_t: Tensor | None,
    metadata_t: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """dX = dY W^{R,C} + scale (dY B) A in the one product, and dY B [..., rank]."""
    values_t, metadata_t = _backward_copy.follow(
        values, bitmask, bitmask_t, values_t, metadata_t, backend
    )
    adapter = (lora_B.t(), lora_A.t())  # those of the transposed layer
    rest = (scale, None, None, None, metadata_t, None, backend)
    with torch._C._AutoDispatchBelowAutograd():
        dx, dt = torch.ops.slope.linear_lowrank.default(dy, values_t, bitmask_t, *adapter, *rest)
    return dx, dt


@once_differentiable
def _backward(ctx: Any, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 12
    x, values, bitmask, lora_A, lora_B, t, bitmask_t, values_t, metadata_t = ctx.saved_tensors
    x_needs, values_need, a_needs, b_needs, bias_needs = ctx.needs
    flat_dy = rows_of(dy)

    weight = (values, bitmask, bitmask_t, values_t, metadata_t, ctx.backend)
    if x_needs and composes(dy):
        dx, dt = _input_grad_on_cuda(dy, lora_A, lora_B, ctx.scale, *weight)
        dt = ctx.scale * rows_of(dt)
    else:
        dt = ctx.scale * (flat_dy @ lora_B)  # [tokens, rank]
        dx = None
        if x_needs:
            dx = trusted_input_grad(dy, *weight)
            dx = dx + (dt @ lora_A).view(dx.shape)
    dw = weight_grad(dy, x, bitmask) if values_need else None
    da = dt.t() @ rows_of(x) if a_needs else None
    db = ctx.scale * (flat_dy.t() @ rows_of(t)) if b_needs else None
    dbias = flat_dy.sum(0) if bias_needs else None
    return dx, dw, None, da, db, None, dbias, None, None, None, None, None


class _LinearLowrank(torch.autograd.Function):
    """slope::linear_lowrank for eager mode, see call_directly."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            y, t = torch.ops.slope.linear_lowrank.default(*arguments)
        _setup_context(ctx, arguments, (y, t))
        return y, t

    backward = staticmethod(_backward)  # type: ignore[assignment]


register("linear_lowrank", check=_check, reference=reference.linear_lowrank, fake=_fake)
torch.library.register_autograd("slope::linear_lowrank", _backward, setup_context=_setup_context)
register_autocast("linear_lowrank")
