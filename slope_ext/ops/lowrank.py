# SPDX-License-Identifier: Apache-2.0
"""Sparse plus low-rank in one op, and its input gradient: linear_lowrank, input_grad_lowrank."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from slope_ext import _backward_copy, reference
from slope_ext._check import Checker
from slope_ext._library import (
    apply_of,
    once_differentiable,
    register,
    register_autocast,
    register_gradient,
)
from slope_ext.ops.spmm import (
    Activation,
    Backend,
    before_activation,
    call_directly,
    composes,
    follows,
    needs_grad,
    require_input_grad,
    require_no_gradient_of,
    result_features,
    rows_of,
    weight_and_input_grad,
    with_activation_gradient,
)
from slope_ext.ops.weight_grad import gradient_of, leaf_of
from slope_ext.reference import swiglu


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
    activation: Activation = "none",
) -> Tensor:
    """Y = activation(X W^T + scale (X A^T) B^T + b) (arXiv 2405.16325, equation 11).

    Backward: that of :func:`slope_ext.ops.linear`, and with T = scale X A^T and dT = scale dY B
    dB = dY^T T, dA = dT^T X, dX += dT A.

    Args:
        x: fp16, bf16, fp32 or fp64 [..., in].
        values: [out, in/2], the dtype of ``x``, in a multiple of 8. Differentiable.
        bitmask: uint8 [out, in/8].
        lora_A: [rank, in], the dtype of ``x``. Differentiable.
        lora_B: [out, rank], the dtype of ``x``. Differentiable.
        scale: factor of the low-rank term.
        bias, bitmask_t, values_t, metadata, metadata_t, backend, activation: as in
            :func:`slope_ext.ops.linear`.

    Returns:
        y: [..., out], contiguous; with "swiglu" [..., out/2].

    Raises:
        RuntimeError: an argument has the wrong dtype, shape or device; the message names it.
    """
    differentiable = (x, values, lora_A, lora_B, bias)
    afterwards = follows(activation, *differentiable)
    applied = "none" if afterwards else activation
    rest = (bias, bitmask_t, values_t, metadata, metadata_t, backend, applied)
    y, _ = call_directly(
        torch.ops.slope.linear_lowrank.default,
        _with_gradient,
        differentiable,
        (x, values, bitmask, lora_A, lora_B, scale, *rest),
    )
    return swiglu(y) if afterwards else y


def input_grad_lowrank(
    dy: Tensor,
    values: Tensor,
    bitmask: Tensor,
    bitmask_t: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scale: float = 1.0,
    values_t: Tensor | None = None,
    metadata_t: Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """dX = dY W^{R,C} + dT A with dT = scale dY B, in one product on CUDA.

    Args:
        dy: [..., out].
        values, bitmask, bitmask_t, values_t, metadata_t, backend: as in
            :func:`slope_ext.ops.input_grad`.
        lora_A, lora_B, scale: as in :func:`linear_lowrank`.

    Returns:
        dx: [..., in]; and dt [..., rank], which dA = dT^T X is made of.

    Raises:
        RuntimeError: an argument has the wrong dtype, shape or device; the message names it.
    """
    return torch.ops.slope.input_grad_lowrank.default(  # type: ignore[no-any-return]
        dy, values, bitmask, bitmask_t, lora_A, lora_B, scale, values_t, metadata_t, backend
    )


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
    activation: str = "none",
) -> None:
    check = Checker("linear_lowrank")
    rest = (bias, bitmask_t, values_t, metadata, metadata_t, backend, activation)
    check.forward(x, values, bitmask, *rest)
    _check_factors(check, lora_A, lora_B, values)


def _check_input_grad(
    dy: Tensor,
    values: Tensor,
    bitmask: Tensor,
    bitmask_t: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scale: float = 1.0,
    values_t: Tensor | None = None,
    metadata_t: Tensor | None = None,
    backend: str = "auto",
) -> None:
    check = Checker("input_grad_lowrank")
    check.backward(dy, values, bitmask, bitmask_t, values_t, metadata_t, backend)
    _check_factors(check, lora_A, lora_B, values)


def _check_factors(check: Checker, lora_A: Tensor, lora_B: Tensor, values: Tensor) -> None:
    rows, columns = values.shape[0], 2 * values.shape[1]
    for name, factor in (("lora_A", lora_A), ("lora_B", lora_B)):
        check.matrix(name, factor)
        check.same_dtype(name, factor, "values", values)
        check.same_device(name, factor, "values", values)
    check.shape("lora_A", lora_A, (lora_A.shape[0], columns), "[rank, in]")
    check.shape("lora_B", lora_B, (rows, lora_A.shape[0]), "[out, rank]")


def _fake_input_grad(
    dy: Tensor,
    values: Tensor,
    bitmask: Tensor,
    bitmask_t: Tensor,
    lora_A: Tensor,
    *_: Any,
    **__: Any,
) -> tuple[Tensor, Tensor]:
    leading = dy.shape[:-1]
    return dy.new_empty(*leading, 2 * values.shape[1]), dy.new_empty(*leading, lora_A.shape[0])


def _fake(
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
    activation: str = "none",
) -> tuple[Tensor, Tensor]:
    leading = x.shape[:-1]
    features = result_features(values, activation)
    return x.new_empty(*leading, features), x.new_empty(*leading, lora_A.shape[0])


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
        activation,
    ) = inputs
    y, t = output
    ctx.needs = needs_grad(x, values, lora_A, lora_B, bias)
    require_no_gradient_of("linear_lowrank", activation, ctx.needs)
    x_needs, values_need, a_needs, b_needs, _ = ctx.needs
    require_input_grad("linear_lowrank", x_needs, values, bitmask_t, backend)
    ctx.mark_non_differentiable(t)
    ctx.set_materialize_grads(False)
    ctx.scale, ctx.backend, ctx.leaf = scale, backend, leaf_of(values)
    activated = y if activation == "relu" else None
    weight = (values, bitmask, bitmask_t, values_t, metadata_t)
    ctx.save_for_backward(
        x if values_need or a_needs else None,
        *weight,
        lora_A,
        lora_B,
        t if b_needs else None,
        activated,
    )


def _input_grad_on_cuda(
    dy: Tensor,
    values: Tensor,
    bitmask: Tensor,
    bitmask_t: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scale: float = 1.0,
    values_t: Tensor | None = None,
    metadata_t: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    values_t, metadata_t = _backward_copy.follow(
        values, bitmask, bitmask_t, values_t, metadata_t, backend
    )
    adapter = (lora_B.t(), lora_A.t())  # those of the transposed layer
    rest = (scale, None, None, None, metadata_t, None, backend)
    with torch._C._AutoDispatchBelowADInplaceOrView():
        dx, dt = torch.ops.slope.linear_lowrank.default(dy, values_t, bitmask_t, *adapter, *rest)
    return dx, dt


def _trusted_input_grad(dy: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """input_grad_lowrank of arguments that a forward pass checked."""
    if composes(dy):
        return _input_grad_on_cuda(dy, *rest)
    return torch.ops.slope.input_grad_lowrank.default(dy, *rest)  # type: ignore[no-any-return]


@once_differentiable
def _backward(ctx: Any, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 13
    x, values, bitmask, bitmask_t, values_t, metadata_t, *rest = ctx.saved_tensors
    lora_A, lora_B, t, activated = rest
    x_needs, values_need, a_needs, b_needs, bias_needs = ctx.needs
    dy = before_activation(dy, activated)
    flat_dy = rows_of(dy)

    def make_dw() -> Tensor | None:
        return gradient_of(ctx.leaf, dy, x, bitmask) if values_need else None

    def make_dx_and_dt() -> tuple[Tensor | None, Tensor | None]:
        if not x_needs:
            return None, reference.scaled_product(dy, lora_B, ctx.scale) if a_needs else None
        weight = (values, bitmask, bitmask_t, lora_A, lora_B)
        return _trusted_input_grad(dy, *weight, ctx.scale, values_t, metadata_t, ctx.backend)

    dw, (dx, dt) = weight_and_input_grad(values_t, make_dw, make_dx_and_dt)
    da = rows_of(dt).t() @ rows_of(x) if a_needs and dt is not None else None
    db = flat_dy.t() @ rows_of(t) if b_needs else None
    dbias = flat_dy.sum(0) if bias_needs else None
    return dx, dw, None, da, db, None, dbias, None, None, None, None, None, None


def _forward(ctx: Any, arguments: tuple[Any, ...], differentiated: str) -> tuple[Tensor, Tensor]:
    """The op; ``differentiated`` is the activation whose gradient is part of the backward pass."""
    with torch._C._AutoDispatchBelowADInplaceOrView():
        y, t = torch.ops.slope.linear_lowrank.default(*arguments)
    _setup_context(ctx, (*arguments[:-1], differentiated), (y, t))
    return y, t


class _LinearLowrank(torch.autograd.Function):
    """slope::linear_lowrank for eager mode but for its activation's gradient, see call_directly."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        return _forward(ctx, arguments, "none")

    backward = staticmethod(_backward)


class _WholeLinearLowrank(torch.autograd.Function):
    """slope::linear_lowrank with the gradient of its activation, for code that is traced."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        return _forward(ctx, arguments, arguments[-1])

    backward = staticmethod(_backward)


_apply_linear_lowrank = apply_of(_LinearLowrank)


def _with_gradient(*arguments: Any) -> tuple[Tensor, Tensor]:
    y, t = _apply_linear_lowrank(*arguments)
    return with_activation_gradient(y, arguments[-1]), t


register("linear_lowrank", check=_check, reference=reference.linear_lowrank, fake=_fake)
register(
    "input_grad_lowrank",
    check=_check_input_grad,
    reference=reference.input_grad_lowrank,
    fake=_fake_input_grad,
    cuda=_input_grad_on_cuda,
)
register_gradient(
    "linear_lowrank", ("x", "values", "lora_A", "lora_B", "bias"), _WholeLinearLowrank.apply
)
register_autocast("linear_lowrank")
