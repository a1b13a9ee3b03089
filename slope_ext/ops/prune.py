# SPDX-License-Identifier: Apache-2.0
"""Mask choice, alone and together with what follows from the mask."""

from __future__ import annotations

import torch
from torch import Tensor

from slope_ext import reference
from slope_ext._check import Checker
from slope_ext._library import register, register_write


def prune_24(scores: Tensor) -> Tensor:
    """Keeps the two largest scores of each four along the last dimension.

    Pass ``weight.abs()`` for magnitude pruning. Ties keep the lower index; NaN counts as +inf, so
    exactly two of each four are kept whatever the scores are.

    Args:
        scores: fp16, bf16, fp32 or fp64 [rows, n], n a multiple of 8.

    Returns:
        bitmask: uint8 [rows, n/8]; bit j % 8 (lowest first) of byte j // 8 is set if column j is
        kept.

    Raises:
        RuntimeError: an argument has the wrong dtype or shape; the message names it.
    """
    return torch.ops.slope.prune_24.default(scores)  # type: ignore[no-any-return]


def prune_transposed(values: Tensor, bitmask: Tensor) -> Tensor:
    """Mask of the double-pruned weight W^{R,C}, transposed.

    Of the survivors of W, keeps the two of largest magnitude in each four along ``out`` (ties: the
    lower index). A group with fewer than two survivors is filled up with its lowest free positions,
    whose value is 0. Source: arXiv 2405.16325, section 3.1 ("double-pruned backward pass").

    Args:
        values: fp16, bf16, fp32 or fp64 [out, in/2], in and out multiples of 8.
        bitmask: uint8 [out, in/8].

    Returns:
        bitmask_t: uint8 [in, out/8], two bits of every four set along ``out``.

    Raises:
        RuntimeError: an argument has the wrong dtype, shape or device; the message names it.
    """
    return torch.ops.slope.prune_transposed.default(values, bitmask)  # type: ignore[no-any-return]


def prune_compress(dense: Tensor) -> tuple[Tensor, Tensor]:
    """Keeps the two largest magnitudes of each four and gathers them, in one pass.

    ``bitmask = prune_24(dense.abs())``, ``values = compress(dense, bitmask)``. Not differentiable.

    Args:
        dense: fp16, bf16, fp32 or fp64 [rows, n], n a multiple of 8.

    Returns:
        values: [rows, n/2], the dtype of ``dense``, bits unchanged.
        bitmask: uint8 [rows, n/8].

    Raises:
        RuntimeError: ``dense`` has the wrong dtype or shape.
    """
    return torch.ops.slope.prune_compress.default(dense)  # type: ignore[no-any-return]


def prune_compress_transposed(dense: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`prune_compress` and :func:`double_prune_` in one pass: all that training needs of W.

    Not differentiable.

    Args:
        dense: fp16, bf16, fp32 or fp64 [out, in], in and out multiples of 8.

    Returns:
        values: [out, in/2], the dtype of ``dense``, bits unchanged.
        bitmask: uint8 [out, in/8].
        values_t: [in, out/2], the dtype of ``dense``.
        bitmask_t: uint8 [in, out/8].

    Raises:
        RuntimeError: ``dense`` has the wrong dtype or shape.
    """
    return torch.ops.slope.prune_compress_transposed.default(  # type: ignore[no-any-return]
        dense
    )


def double_prune_(values: Tensor, bitmask: Tensor, bitmask_t: Tensor, values_t: Tensor) -> None:
    """Chooses the transposed mask and writes the transposed values, in one pass.

    ``bitmask_t = prune_transposed(values, bitmask)``, then ``values_t`` as
    :func:`transpose_values` writes it.

    Args:
        values: fp16, bf16, fp32 or fp64 [out, in/2], in and out multiples of 8.
        bitmask: uint8 [out, in/8].
        bitmask_t: uint8 [in, out/8], contiguous; overwritten.
        values_t: [in, out/2], the dtype of ``values``, contiguous; overwritten.

    Raises:
        RuntimeError: an argument has the wrong dtype, shape or device; the message names it and
            nothing is written.
    """
    torch.ops.slope.double_prune_.default(values, bitmask, bitmask_t, values_t)


def _check_prune_24(scores: Tensor) -> None:
    _check_dense(Checker("prune_24"), "scores", scores)


def _check_prune_compress(dense: Tensor) -> None:
    _check_dense(Checker("prune_compress"), "dense", dense)


def _check_prune_compress_transposed(dense: Tensor) -> None:
    check = Checker("prune_compress_transposed")
    _check_dense(check, "dense", dense)
    check.columns("dense", dense.shape[0], "out")


def _check_dense(check: Checker, name: str, dense: Tensor) -> None:
    check.matrix(name, dense)
    check.floating(name, dense)
    check.columns(name, dense.shape[1], "its last dimension")


def _check_prune_transposed(values: Tensor, bitmask: Tensor) -> None:
    check = Checker("prune_transposed")
    rows, _ = check.values(values, bitmask)
    check.columns("values", rows, "out")


def _check_double_prune(
    values: Tensor, bitmask: Tensor, bitmask_t: Tensor, values_t: Tensor
) -> None:
    check = Checker("double_prune_")
    check.values(values, bitmask)
    check.transposed(values, bitmask_t, values_t)
    check.require(bitmask_t.is_contiguous(), "bitmask_t must be contiguous")


def _fake_prune_compress(dense: Tensor) -> tuple[Tensor, Tensor]:
    rows, columns = dense.shape
    values = dense.new_empty(rows, columns // 2)
    return values, dense.new_empty(rows, columns // 8, dtype=torch.uint8)


register(
    "prune_24",
    check=_check_prune_24,
    reference=reference.prune_24,
    fake=lambda scores: scores.new_empty(scores.shape[0], scores.shape[1] // 8, dtype=torch.uint8),
)
register(
    "prune_transposed",
    check=_check_prune_transposed,
    reference=reference.prune_transposed,
    fake=lambda values, bitmask: bitmask.new_empty(2 * values.shape[1], values.shape[0] // 8),
)
register(
    "prune_compress",
    check=_check_prune_compress,
    reference=reference.prune_compress,
    fake=_fake_prune_compress,
)
register(
    "prune_compress_transposed",
    check=_check_prune_compress_transposed,
    reference=reference.prune_compress_transposed,
    fake=lambda dense: _fake_prune_compress(dense) + _fake_prune_compress(dense.t()),
)
register(
    "double_prune_",
    check=_check_double_prune,
    reference=reference.double_prune_,
    fake=lambda values, bitmask, bitmask_t, values_t: None,
)
register_write("double_prune_", "bitmask_t", "values_t")
