# SPDX-License-Identifier: Apache-2.0
"""What a weight's product wants beside the values: who multiplies, and where the metadata lies.

The own product (sm_90) reads values wherever they lie and int32 metadata of its own. cuSPARSELt's
reads both in place, the metadata right behind the values:

    one allocation   | values, row-major, 2 bytes each | metadata |
    two tensors        values [rows, columns/2]          metadata uint8

Behind the metadata the allocation goes on for some bytes, which kernels of cuSPARSELt may read and
never use. Values and metadata have a storage each, so that saving, copying or stamping the values
concerns their bytes alone; the metadata's has those bytes too. Whichever tensor lives longer keeps
the allocation.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import torch
from torch import Tensor

from slope_ext import _C, _library, _tuned_table
from slope_ext._check import (
    dtype_name,
    fits_native,
    fits_plan,
    is_half,
    metadata_bytes,
    metadata_words,
)


class _Bytes:
    """Bytes [start, start + size) of a CUDA tensor, for torch.as_tensor; keeps the tensor alive."""

    def __init__(self, owner: Tensor, start: int, size: int) -> None:
        self.owner = owner
        self.__cuda_array_interface__: dict[str, Any] = {
            "data": (owner.data_ptr() + start, False),
            "shape": (size,),
            "typestr": "|u1",
            "version": 3,
        }


def native_takes(rows: int, columns: int, dtype: torch.dtype, backend: str) -> bool:
    """Whether the own product takes a weight [rows, columns] of a layer, on a GPU that runs it."""
    fits = is_half(dtype) and fits_native(rows, columns) and rows * columns > 0
    return fits and backend in ("auto", "native")


def backend_of(
    rows: int,
    columns: int,
    dtype: torch.dtype,
    device: torch.device,
    backend: str,
    prefers_plans: bool = False,
) -> Literal["native", "cusparselt"] | None:
    """What multiplies by a weight [rows, columns] of a layer with that backend; None: cuBLAS.

    The own product where it takes the weight, unless a plan does too and is preferred.
    """
    taken = native_takes(rows, columns, dtype, backend)
    native = device.type == "cuda" and taken and _native_runs_here(device.index or 0)
    if native and not (prefers_plans and backend == "auto"):
        return "native"
    if backend in ("auto", "cusparselt") and is_packable(rows, columns, dtype, device):
        return "cusparselt"
    return "native" if native else None


def tuned_for_plans(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the tuned table has plans as the faster for a weight [rows, columns]."""
    if not is_packable(rows, columns, dtype, device):
        return False
    table = _tuned_table.of_device(device.index or 0)
    return table.prefers_plans(rows, columns, dtype_name(dtype))


@functools.cache
def _native_runs_here(device: int) -> bool:
    """Whether there are compiled ops with code for sm_90a, and a GPU that runs it."""
    if "linear" not in _library.CUDA_KERNELS or _library.FORCE_REFERENCE:
        return False
    return _C.native_runs(device)


def empty_words(rows: int, columns: int, device: torch.device) -> Tensor:
    """Uninitialised metadata of a weight [rows, columns] for the own product."""
    with torch.inference_mode(False):
        return torch.empty(metadata_words(rows, columns), dtype=torch.int32, device=device)


def is_packable(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a cuSPARSELt plan on ``device`` takes a weight [rows, columns]."""
    return (
        device.type == "cuda"
        and is_half(dtype)
        and fits_plan(rows, columns)
        and rows * columns > 0
        and _products_run_here(device.index or 0)
    )


@functools.cache
def _products_run_here(device: int) -> bool:
    """Whether there are compiled ops, a cuSPARSELt that they can use, and sparse tensor cores."""
    if "pack" not in _library.CUDA_KERNELS or _library.FORCE_REFERENCE:
        return False
    try:
        _C.cusparselt_version()
    except RuntimeError:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def empty(
    rows: int, columns: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Uninitialised values [rows, columns/2] and their metadata; they must be packable."""
    value_bytes = rows * columns // 2 * dtype.itemsize
    size = metadata_bytes(rows, columns, device)
    with torch.inference_mode(False):
        buffer = torch.empty(
            value_bytes + size + _C.OVERREAD_BYTES, dtype=torch.uint8, device=device
        )
        values = torch.as_tensor(_Bytes(buffer, 0, value_bytes), device=buffer.device)
        behind = torch.as_tensor(
            _Bytes(buffer, value_bytes, size + _C.OVERREAD_BYTES), device=buffer.device
        )
        return values.view(dtype).view(rows, columns // 2), behind[:size]


def is_packed(values: Tensor, metadata: Tensor) -> bool:
    """Whether ``metadata`` lies right behind ``values``, with room behind it."""
    value_bytes = values.numel() * values.element_size()
    end = metadata.storage_offset() + metadata.numel()
    return (
        values.data_ptr() + value_bytes == metadata.data_ptr()
        and values.is_contiguous()
        and end + _C.OVERREAD_BYTES <= metadata.untyped_storage().nbytes()
    )


def fits(values: Tensor, metadata: Tensor | None, kind: str | None) -> bool:
    """Whether metadata is of the form that a kind of product (backend_of) wants beside values."""
    if metadata is None or kind is None:
        return metadata is None and kind is None
    if kind == "native":
        return metadata.dtype == torch.int32 and metadata.device == values.device
    return metadata.dtype == torch.uint8 and is_packed(values, metadata)
