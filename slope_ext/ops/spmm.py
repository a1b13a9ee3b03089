# SPDX-License-Identifier: Apache-2.0
"""The sparse product and its input gradient: linear and input_grad."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from slope_ext import _backward_copy, reference
from slope_ext._check import Checker
from slope_ext._library import (
    COMPOSED,
    apply_of,
    once_differentiable,
    outlived_transform,
    refuse_forward_mode,
    register,
    register_autocast,
    register_gradient,
)
from slope_ext.ops.weight_grad import gradient_of, leaf_of
from slope_ext.reference import swiglu

Backend = Literal["auto", "native", "cusparselt", "reference"]
Activation = Literal["none", "relu", "swiglu"]

_LINEAR = torch.ops.slope.linear.default


def linear(
    x: Tensor,
    values: Tensor,
    bitmask: Tensor,
    bias: Tensor | None = None,
    bitmask_t: Tensor | None = None,
    values_t: Tensor | None = None,
    metadata: Tensor | None = None,
    metadata_t: Tensor | None = None,
    backend: Backend = "auto",
    activation: Activation = "none",
) -> Tensor:
    """Y = activation(X W^T + b) with W 2:4 sparse along ``in``.

    On CUDA with fp16 and bf16: by the own kernel where the GPU has capability 9.0 and out is a
    multiple of 8, in of 32; else through a cached cuSPARSELt plan (:mod:`slope_ext.plan_cache`)
    where both are multiples of 16. Other weights are decompressed first, with one warning.

    Backward (arXiv 2405.16325, equations 4 to 6): dX = dY W^{R,C} with the double-pruned weight,
    dW = dY^T X at the kept positions, in the shape of ``values``, db = column sums of dY.

    Args:
        x: fp16, bf16, fp32 or fp64 [..., in].
        values: [out, in/2], the dtype of ``x``, in a multiple of 8. Differentiable.
        bitmask: uint8 [out, in/8].
        bias: [out], the dtype of ``x``, or None. Differentiable.
        bitmask_t: uint8 [in, out/8]; needed if ``x`` requires grad (out a multiple of 8).
        values_t: [in, out/2] cache of the double-pruned values that backward refreshes when
            ``values`` changed; None computes them in every backward and keeps nothing.
        metadata: what :func:`slope_ext.ops.pack_metadata` makes of ``bitmask``, int32 for the own
            kernel or uint8 for cuSPARSELt; the caller keeps the two in step. uint8 is read in place
            where it lies right behind ``values`` in memory, as in what :func:`slope_ext.ops.pack`
            returns, and its storage goes on for 2048 bytes; else both are packed in every call.
        metadata_t: that of ``values_t`` and ``bitmask_t``; a cache, as ``values_t`` is.
        backend: on CUDA "native" (the own kernel) or "cusparselt", an error where that cannot be;
            "reference", as always on a CPU, a dense product of the decompressed weight; "auto", the
            one that ``metadata`` is for, else the first of them that takes the weight.
        activation: "none"; "relu", which costs the own kernel nothing; or "swiglu" (arXiv
            2002.05202), silu(gate) * up with the rows of W in turns, eight of the gate's, eight of
            the up-projection's (out a multiple of 16). "swiglu" is part of the product only where
            nobody wants a gradient; else it follows, so that backward has what it took. In the
            product silu(gate) of a gate below -41 is up to 2^-60 |gate| off.

    Returns:
        y: [..., out], contiguous; with "swiglu" [..., out/2].

    Raises:
        RuntimeError: an argument has the wrong dtype, shape or device; the message names it.
    """
    differentiable = (x, values, bias)
    afterwards = follows(activation, *differentiable)
    applied = "none" if afterwards else activation
    rest = (bias, bitmask_t, values_t, metadata, metadata_t, backend, applied)
    arguments = (x, values, bitmask, *rest)
    y: Tensor = call_directly(_LINEAR, _with_gradient, differentiable, arguments)
    return swiglu(y) if afterwards else y


def input_grad(
    dy: Tensor,
    values: Tensor,
    bitmask: Tensor,
    bitmask_t: Tensor,
    values_t: Tensor | None = None,
    metadata_t: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """dX = dY W^{R,C}: the input gradient of :func:`linear`.

    The result depends on ``values``, ``bitmask`` and ``bitmask_t`` alone. ``values_t`` and
    ``metadata_t`` are caches whose content never matters: they are overwritten when they are not
    known to be up to date.

    Args:
        dy: fp16, bf16, fp32 or fp64 [..., out].
        values: [out, in/2], the dtype of ``dy``, in and out multiples of 8.
        bitmask: uint8 [out, in/8].
        bitmask_t: uint8 [in, out/8].
        values_t: cache [in, out/2], the dtype of ``values``, or None.
        metadata_t: cache of what the product wants of ``bitmask_t``, or None.
        backend: as in :func:`linear`.

    Returns:
        dx: [..., in], contiguous.

    Raises:
        RuntimeError: an argument has the wrong dtype, shape or device; the message names it.
    """
    return torch.ops.slope.input_grad.default(  # type: ignore[no-any-return]
        dy, values, bitmask, bitmask_t, values_t, metadata_t, backend
    )


def _check_linear(
    x: Tensor,
    values: Tensor,
    bitmask: Tensor,
    bias: Tensor | None = None,
    bitmask_t: Tensor | None = None,
    values_t: Tensor | None = None,
    metadata: Tensor | None = None,
    metadata_t: Tensor | None = None,
    backend: str = "auto",
    activation: str = "none",
) -> None:
    rest = (bias, bitmask_t, values_t, metadata, metadata_t, backend, activation)
    Checker("linear").forward(x, values, bitmask, *rest)


def _fake_linear(
    x: Tensor,
    values: Tensor,
    bitmask: Tensor,
    bias: Tensor | None = None,
    bitmask_t: Tensor | None = None,
    values_t: Tensor | None = None,
    metadata: Tensor | None = None,
    metadata_t: Tensor | None = None,
    backend: str = "auto",
    activation: str = "none",
) -> Tensor:
    return x.new_empty(*x.shape[:-1], result_features(values, activation))


def _check_input_grad(
    dy: Tensor,
    values: Tensor,
    bitmask: Tensor,
    bitmask_t: Tensor,
    values_t: Tensor | None = None,
    metadata_t: Tensor | None = None,
    backend: str = "auto",
) -> None:
    Checker("input_grad").backward(dy, values, bitmask, bitmask_t, values_t, metadata_t, backend)


def _input_grad_on_cuda(
    dy: Tensor,
    values: Tensor,
    bitmask: Tensor,
    bitmask_t: Tensor,
    values_t: Tensor | None = None,
    metadata_t: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    values_t, metadata_t = _backward_copy.follow(
        values, bitmask, bitmask_t, values_t, metadata_t, backend
    )
    with torch._C._AutoDispatchBelowADInplaceOrView():
        return _LINEAR(  # type: ignore[no-any-return]
            dy, values_t, bitmask_t, None, None, None, metadata_t, None, backend
        )


def trusted_input_grad(dy: Tensor, *rest: Any) -> Tensor:
    """input_grad of arguments that a forward pass checked."""
    if composes(dy):
        return _input_grad_on_cuda(dy, *rest)
    return torch.ops.slope.input_grad.default(dy, *rest)  # type: ignore[no-any-return]


def composes(dy: Tensor) -> bool:
    """Whether a gradient may be made of compiled ops: eager, on CUDA, references not forced."""
    eager = not torch.compiler.is_compiling() and type(dy) is Tensor
    return dy.is_cuda and eager and "input_grad" in COMPOSED


def needs_grad(*inputs: Tensor | None) -> tuple[bool, ...]:
    """Which inputs want a gradient."""
    return tuple(tensor is not None and tensor.requires_grad for tensor in inputs)


def wants_grad(*inputs: Tensor | None) -> bool:
    """Whether a result of these would have a gradient."""
    return torch.is_grad_enabled() and any(needs_grad(*inputs))


def follows(activation: str, *inputs: Tensor | None) -> bool:
    """Whether an activation is applied after the op, since a gradient may be wanted."""
    if activation != "swiglu":
        return False
    # Under a transform tensors hide that they want one
    return torch._C._are_functorch_transforms_active() or wants_grad(*inputs)


def require_no_gradient_of(op: str, activation: str, needs: tuple[bool, ...]) -> None:
    """Raises in forward where backward lacks what the activation took."""
    if activation == "swiglu" and any(needs):
        raise RuntimeError(
            f"slope::{op}: activation must not be swiglu where a gradient is wanted; "
            f"slope_ext.ops.{op} applies it after the product then"
        )


def result_features(values: Tensor, activation: str) -> int:
    """Features of activation(x W^T)."""
    return values.shape[0] // 2 if activation == "swiglu" else values.shape[0]


def require_input_grad(
    op: str, x_needs_grad: bool, values: Tensor, bitmask_t: Tensor | None, backend: str
) -> None:
    """Raises in forward what would otherwise fail in backward."""
    if not x_needs_grad:
        return
    if bitmask_t is None:
        raise RuntimeError(f"slope::{op}: bitmask_t must be given when x requires grad, got None")
    rows, columns = values.shape[0], 2 * values.shape[1]
    if backend == "native" and values.is_cuda and (rows % 32 != 0 or columns % 8 != 0):
        raise RuntimeError(
            f"slope::{op}: values must be of a weight with out in multiples of 32 for the input "
            f"gradient with backend native, got out x in = {rows} x {columns}"
        )


def before_activation(dy: Tensor, activated: Tensor | None) -> Tensor:
    """The gradient of what a ReLU took, from that of its result; of None's, as it is."""
    return dy if activated is None else torch.ops.aten.threshold_backward(dy, activated, 0)


def weight_and_input_grad(
    values_t: Tensor | None, make_dw: Callable[[], Any], make_dx: Callable[[], Any]
) -> tuple[Any, Any]:
    """dW and dX, in the order that needs less memory: a step needs most where backward starts.

    dW has buffers besides; dX has, without a cache, the double-pruned weight that it derives.
    """
    if values_t is not None:
        dw = make_dw()
        return dw, make_dx()
    dx = make_dx()
    return make_dw(), dx


def rows_of(tensor: Tensor) -> Tensor:
    """[..., features] -> [tokens, features]."""
    return tensor.reshape(-1, tensor.shape[-1])


def call_directly(
    op: Any,
    with_gradient: Callable[..., Any],
    differentiable: tuple[Tensor | None, ...],
    arguments: tuple[Any, ...],
) -> Any:
    """``op(*arguments)``, in eager mode without the Python kernel that stands before it.

    ``with_gradient`` is the same op with the same gradient, of which that of the activation is a
    node of its own; whatever traces, casts or wraps tensors gets the op itself.
    """
    x = differentiable[0]
    assert x is not None
    refuse_forward_mode(op)
    if (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or type(x) is not Tensor
        or x.is_meta
        or torch._C._is_any_autocast_enabled()
        or any(map(outlived_transform, differentiable))
    ):
        return op(*arguments)
    if wants_grad(*differentiable):
        if any(map(outlived_transform, arguments)):  # what backward would get
            return op(*arguments)
        return with_gradient(*arguments)
    with torch._C._AutoDispatchBelowADInplaceOrView():
        return op(*arguments)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, bitmask, bias, bitmask_t, values_t, _, metadata_t, ctx.backend, activation = inputs
    ctx.needs = needs_grad(x, values, bias)
    require_no_gradient_of("linear", activation, ctx.needs)
    x_needs, values_need, _ = ctx.needs
    require_input_grad("linear", x_needs, values, bitmask_t, ctx.backend)
    ctx.leaf = leaf_of(values)
    ctx.save_for_backward(
        x if values_need else None,
        values,
        bitmask,
        bitmask_t,
        values_t,
        metadata_t,
        output if activation == "relu" else None,
    )


@once_differentiable
def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, values, bitmask, bitmask_t, values_t, metadata_t, activated = ctx.saved_tensors
    x_needs, values_need, bias_needs = ctx.needs
    dy = before_activation(dy, activated)

    def make_dw() -> Tensor | None:
        return gradient_of(ctx.leaf, dy, x, bitmask) if values_need else None

    def make_dx() -> Tensor | None:
        weight = (values, bitmask, bitmask_t, values_t, metadata_t)
        return trusted_input_grad(dy, *weight, ctx.backend) if x_needs else None

    dw, dx = weight_and_input_grad(values_t, make_dw, make_dx)
    dbias = rows_of(dy).sum(0) if bias_needs else None
    return dx, dw, None, dbias, None, None, None, None, None, None


def _forward(ctx: Any, arguments: tuple[Any, ...], differentiated: str) -> Tensor:
    """The op; ``differentiated`` is the activation whose gradient is part of the backward pass."""
    # A setup_context method would have torch inspect signatures in every call.
    with torch._C._AutoDispatchBelowADInplaceOrView():
        y: Tensor = _LINEAR(*arguments)
    _setup_context(ctx, (*arguments[:-1], differentiated), y)
    return y


class _Linear(torch.autograd.Function):
    """slope::linear for eager mode but for the gradient of its activation, see call_directly."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        return _forward(ctx, arguments, "none")

    backward = staticmethod(_backward)


class _WholeLinear(torch.autograd.Function):
    """slope::linear with the gradient of its activation, for code that is traced.

    It saves the very tensor that it returns, so that autograd sees writes to it.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        return _forward(ctx, arguments, arguments[-1])

    backward = staticmethod(_backward)


class _ReLUGradient(torch.autograd.Function):
    """Identity in forward; backward is that of the ReLU whose result this takes.

    A node of its own, so that dY is gone when the product's gradients are made.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        ctx.save_for_backward(y)
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return before_activation(dy, *ctx.saved_tensors)


_apply_relu_gradient = apply_of(_ReLUGradient)


def with_activation_gradient(y: Tensor, activation: str) -> Tensor:
    """What an autograd.Function gave that left out the gradient of the activation, with it."""
    return _apply_relu_gradient(y) if activation == "relu" else y


_apply_linear = apply_of(_Linear)


def _with_gradient(*arguments: Any) -> Tensor:
    y = _apply_linear(*arguments)
    return with_activation_gradient(y, arguments[-1])


register(
    "linear",
    check=_check_linear,
    reference=reference.linear,
    fake=_fake_linear,
)
register(
    "input_grad",
    check=_check_input_grad,
    reference=reference.input_grad,
    fake=lambda dy, values, *_, **__: dy.new_empty(*dy.shape[:-1], 2 * values.shape[1]),
    cuda=_input_grad_on_cuda,
)
register_gradient("linear", ("x", "values", "bias"), _WholeLinear.apply)
register_autocast("linear")
