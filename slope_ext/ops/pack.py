# SPDX-License-Identifier: Apache-2.0
"""The sparse operand as the matrix product reads it: pack and pack_metadata."""

from __future__ import annotations

import torch
from torch import Tensor

from slope_ext import reference
from slope_ext._check import Checker, fits_native, is_half, metadata_bytes
from slope_ext._library import register, register_write


def pack(values: Tensor, bitmask: Tensor) -> Tensor:
    """Bytes of the values, row-major, followed by the metadata that the product wants.

    On CUDA that is cuSPARSELt's compressed operand (docs/layouts.md). The CPU's reference writes
    the identity layout, in which the metadata is the bitmask itself.

    Args:
        values: [out, in/2]; fp16 or bf16, out and in multiples of 16, on CUDA; on the CPU also
            fp32 and fp64, in a multiple of 8.
        bitmask: uint8 [out, in/8].

    Returns:
        packed: uint8 [bytes of values + bytes of metadata]; on CUDA a view of a storage that goes
            on for what the library's kernels read beyond it.

    Raises:
        RuntimeError: an argument has the wrong dtype, shape or device; the message names it.
    """
    return torch.ops.slope.pack.default(values, bitmask)  # type: ignore[no-any-return]


def pack_metadata(bitmask: Tensor, metadata: Tensor) -> None:
    """Writes the metadata of a mask alone; the values need no packing then.

    Args:
        bitmask: uint8 [out, in/8]; on CUDA out and in multiples of 16, for int32 metadata of 8 and
            of 32 (on any device).
        metadata: uint8 [bytes of metadata] or, for the own product on sm_90, int32 [words]; both in
            docs/layouts.md. Contiguous, from a multiple of 16 bytes; overwritten.

    Raises:
        RuntimeError: an argument has the wrong dtype, shape or device; the message names it and
            ``metadata`` is untouched.
    """
    torch.ops.slope.pack_metadata.default(bitmask, metadata)


def _check(values: Tensor, bitmask: Tensor) -> None:
    check = Checker("pack")
    rows, columns = check.values(values, bitmask)
    if values.is_cuda:
        check.require(
            is_half(values.dtype),
            "values must be float16 or bfloat16 for the sparse tensor cores",
        )
        check.core_multiples("values", rows, columns)


def _check_metadata(bitmask: Tensor, metadata: Tensor) -> None:
    check = Checker("pack_metadata")
    check.matrix("bitmask", bitmask)
    rows, columns = bitmask.shape[0], 8 * bitmask.shape[1]
    check.bitmask("bitmask", bitmask, rows, columns, "bitmask", bitmask)
    if metadata.dtype == torch.int32:
        check.require(
            fits_native(rows, columns),
            "bitmask must be of a weight with out in multiples of 8 and in in multiples of 32 for "
            f"int32 metadata, got out x in = {rows} x {columns}",
        )
    elif bitmask.is_cuda:
        check.core_multiples("bitmask", rows, columns)
    check.metadata("metadata", metadata, rows, columns, bitmask)
    check.require(metadata.is_contiguous(), "metadata must be contiguous")


def _fake(values: Tensor, bitmask: Tensor) -> Tensor:
    rows, columns = values.shape[0], 2 * values.shape[1]
    metadata = metadata_bytes(rows, columns, values.device)
    return bitmask.new_empty(values.numel() * values.element_size() + metadata)


register("pack", check=_check, reference=reference.pack, fake=_fake)
register(
    "pack_metadata",
    check=_check_metadata,
    reference=reference.pack_metadata,
    fake=lambda bitmask, metadata: None,
)
register_write("pack_metadata", "metadata")
