# SPDX-License-Identifier: Apache-2.0
"""Mask choice: prune_24 and prune_transposed."""

from __future__ import annotations

import torch
from torch import Tensor

from slope_ext import reference
from slope_ext._check import Checker
from slope_ext._library import register


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


def _check_prune_24(scores: Tensor) -> None:
    check = Checker("prune_24")
    check.matrix("scores", scores)
    check.floating("scores", scores)
    check.columns("scores", scores.shape[1], "its last dimension")


def _check_prune_transposed(values: Tensor, bitmask: Tensor) -> None:
    check = Checker("prune_transposed")
    rows, _ = check.values(values, bitmask)
    check.columns("values", rows, "out")


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
