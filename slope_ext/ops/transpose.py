# SPDX-License-Identifier: Apache-2.0
"""Refresh of the backward copy: transpose_values."""

from __future__ import annotations

import torch
from torch import Tensor

from slope_ext import reference
from slope_ext._check import Checker
from slope_ext._library import register, register_write


def transpose_values(values: Tensor, bitmask: Tensor, bitmask_t: Tensor, out: Tensor) -> None:
    """Writes the values of W^{R,C}, transposed, into ``out``; both masks stay as they are.

    ``out = compress(decompress(values, bitmask).T, bitmask_t)``: a position that bitmask_t keeps
    and bitmask does not becomes 0.

    Args:
        values: fp16, bf16, fp32 or fp64 [out, in/2], in and out multiples of 8.
        bitmask: uint8 [out, in/8].
        bitmask_t: uint8 [in, out/8], from :func:`prune_transposed`.
        out: [in, out/2], the dtype of ``values``, contiguous; overwritten.

    Raises:
        RuntimeError: an argument has the wrong dtype, shape or device; the message names it and
            ``out`` is untouched.
    """
    torch.ops.slope.transpose_values.default(values, bitmask, bitmask_t, out)


def _check(values: Tensor, bitmask: Tensor, bitmask_t: Tensor, out: Tensor) -> None:
    check = Checker("transpose_values")
    rows, columns = check.values(values, bitmask)
    check.columns("values", rows, "out")
    check.bitmask("bitmask_t", bitmask_t, columns, rows, "values", values)
    check.shape("out", out, (columns, rows // 2), "[in, out/2]")
    check.same_dtype("out", out, "values", values)
    check.same_device("out", out, "values", values)
    check.require(out.is_contiguous(), "out must be contiguous")


register(
    "transpose_values",
    check=_check,
    reference=reference.transpose_values,
    fake=lambda values, bitmask, bitmask_t, out: None,
)
register_write("transpose_values", "out")
