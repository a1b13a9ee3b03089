# SPDX-License-Identifier: Apache-2.0
"""The sparse operand as the matrix product reads it: pack."""

from __future__ import annotations

import torch
from torch import Tensor

from slope_ext import reference
from slope_ext._check import Checker
from slope_ext._library import register


def pack(values: Tensor, bitmask: Tensor) -> Tensor:
    """Bytes of the values, row-major, followed by the metadata that the product wants.

    The reference writes the identity layout, in which the metadata is the bitmask itself.

    Args:
        values: fp16, bf16, fp32 or fp64 [out, in/2], in a multiple of 8.
        bitmask: uint8 [out, in/8].

    Returns:
        packed: uint8 [bytes of values + out * in / 8].

    Raises:
        RuntimeError: an argument has the wrong dtype, shape or device; the message names it.
    """
    return torch.ops.slope.pack.default(values, bitmask)  # type: ignore[no-any-return]


def _check(values: Tensor, bitmask: Tensor) -> None:
    Checker("pack").values(values, bitmask)


register(
    "pack",
    check=_check,
    reference=reference.pack,
    fake=lambda values, bitmask: bitmask.new_empty(
        values.numel() * values.element_size() + bitmask.numel()
    ),
)
