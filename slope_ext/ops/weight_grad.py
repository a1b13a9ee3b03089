# SPDX-License-Identifier: Apache-2.0
"""The weight gradient in compressed form: weight_grad."""

from __future__ import annotations

import torch
from torch import Tensor

from slope_ext import reference
from slope_ext._check import Checker
from slope_ext._library import register


def weight_grad(dy: Tensor, x: Tensor, bitmask: Tensor) -> Tensor:
    """dW = dY^T X at the kept positions (arXiv 2405.16325, equation 5).

    Args:
        dy: fp16, bf16, fp32 or fp64 [..., out].
        x: [..., in], the dtype and leading dimensions of ``dy``, in a multiple of 8.
        bitmask: uint8 [out, in/8].

    Returns:
        [out, in/2], in the order of the values.

    Raises:
        RuntimeError: an argument has the wrong dtype, shape or device; the message names it.
    """
    return torch.ops.slope.weight_grad.default(dy, x, bitmask)  # type: ignore[no-any-return]


def _check(dy: Tensor, x: Tensor, bitmask: Tensor) -> None:
    check = Checker("weight_grad")
    check.floating("dy", dy)
    check.same_dtype("x", x, "dy", dy)
    check.same_device("x", x, "dy", dy)
    check.require(dy.dim() >= 1, "dy must have at least 1 dimension, got shape []")
    check.require(
        x.dim() == dy.dim() and x.shape[:-1] == dy.shape[:-1],
        f"x must have the leading dimensions of dy, {list(dy.shape[:-1])}, got {list(x.shape)}",
    )
    check.columns("x", x.shape[-1], "in")
    check.bitmask("bitmask", bitmask, dy.shape[-1], x.shape[-1], "dy", dy)


register(
    "weight_grad",
    check=_check,
    reference=reference.weight_grad,
    fake=lambda dy, x, bitmask: dy.new_empty(dy.shape[-1], x.shape[-1] // 2),
)
