# SPDX-License-Identifier: Apache-2.0
"""Dense to values and back: compress and decompress. Each is the other's gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from slope_ext import reference
from slope_ext._check import Checker
from slope_ext._library import refuse_forward_mode, register


def compress(dense: Tensor, bitmask: Tensor) -> Tensor:
    """Gathers the kept elements: row-major, ascending column, bits unchanged.

    Args:
        dense: fp16, bf16, fp32 (CPU: also fp64) [rows, n], n a multiple of 8.
        bitmask: uint8 [rows, n/8], exactly two bits set of every four.

    Returns:
        values: [rows, n/2], the dtype of ``dense``. Differentiable in ``dense``.

    Raises:
        RuntimeError: an argument has the wrong dtype, shape or device; the message names it.
    """
    refuse_forward_mode(torch.ops.slope.compress.default)
    return torch.ops.slope.compress.default(dense, bitmask)  # type: ignore[no-any-return]


def decompress(values: Tensor, bitmask: Tensor) -> Tensor:
    """Scatters values to their columns, +0 elsewhere; the inverse of :func:`compress`.

    Args:
        values: fp16, bf16, fp32 (CPU: also fp64) [rows, n/2], n a multiple of 8.
        bitmask: uint8 [rows, n/8], exactly two bits set of every four.

    Returns:
        dense: [rows, n], the dtype of ``values``. Differentiable in ``values``.

    Raises:
        RuntimeError: an argument has the wrong dtype, shape or device; the message names it.
    """
    refuse_forward_mode(torch.ops.slope.decompress.default)
    return torch.ops.slope.decompress.default(values, bitmask)  # type: ignore[no-any-return]


def _check_compress(dense: Tensor, bitmask: Tensor) -> None:
    check = Checker("compress")
    check.matrix("dense", dense)
    check.floating("dense", dense)
    check.columns("dense", dense.shape[1], "its last dimension")
    check.bitmask("bitmask", bitmask, dense.shape[0], dense.shape[1], "dense", dense)


def _check_decompress(values: Tensor, bitmask: Tensor) -> None:
    Checker("decompress").values(values, bitmask)


def _save_bitmask(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _compress_backward(ctx: Any, grad_values: Tensor) -> tuple[Tensor, None]:
    (bitmask,) = ctx.saved_tensors
    return decompress(grad_values, bitmask), None


def _decompress_backward(ctx: Any, grad_dense: Tensor) -> tuple[Tensor, None]:
    (bitmask,) = ctx.saved_tensors
    return compress(grad_dense, bitmask), None


register(
    "compress",
    check=_check_compress,
    reference=reference.compress,
    fake=lambda dense, bitmask: dense.new_empty(dense.shape[0], dense.shape[1] // 2),
)
register(
    "decompress",
    check=_check_decompress,
    reference=reference.decompress,
    fake=lambda values, bitmask: values.new_empty(values.shape[0], 2 * values.shape[1]),
)
torch.library.register_autograd("slope::compress", _compress_backward, setup_context=_save_bitmask)
torch.library.register_autograd(
    "slope::decompress", _decompress_backward, setup_context=_save_bitmask
)
