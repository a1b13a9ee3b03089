# SPDX-License-Identifier: Apache-2.0
"""The own sparse product through its C symbol, every choice open: for tests, benchmarks, tuning."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from slope_ext import _C, _library
from slope_ext._check import ACTIVATIONS
from slope_ext.ops.spmm import Activation

# rows of W, tokens, blocks of a cluster, segments of W's columns
TILES = _C.SPMM_SM90_TILES


class _Params(ctypes.Structure):
    """SpmmSm90Params of csrc/ops/spmm_sm90.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "values", "metadata", "tail_x", "tail_weight")),
        *((name, ctypes.c_void_p) for name in ("bias", "y")),
        *((name, ctypes.c_int64) for name in ("tokens", "rows", "columns", "rank", "first_rows")),
        *((name, ctypes.c_int32) for name in ("kind", "tile", "rest_tile", "device", "activation")),
        ("tail_is_transposed", ctypes.c_int32),
    ]


class _Room(ctypes.Structure):
    """Sm90Room of csrc/ops/spmm_sm90_choice.h."""

    _fields_ = [("processors", ctypes.c_int), ("clusters", ctypes.c_int * len(TILES))]


@functools.cache
def _library_file() -> ctypes.CDLL:
    library = ctypes.CDLL(str(_library._LIBRARY_FILE))
    library.slope_spmm_sm90.argtypes = [ctypes.POINTER(_Params), ctypes.c_void_p]
    library.slope_spmm_sm90_choose.argtypes = [ctypes.POINTER(_Params)]
    library.slope_spmm_sm90_room.argtypes = [ctypes.POINTER(_Room)]
    return library


@dataclass(frozen=True)
class Choice:
    """Which kernels make a product: rows of W below ``first_rows`` by a tile, the rest by another.

    Tiles are indices into TILES; -1: what the op would choose. ``first_rows`` is a multiple of 64,
    or 0 where ``tile`` makes all rows.
    """

    tile: int = -1
    first_rows: int = 0
    rest_tile: int = 0


THE_OPS = Choice()


def spmm_sm90(x: Tensor, values: Tensor, words: Tensor, y: Tensor, **options: Any) -> Tensor:
    """y <- activation(x W^T [+ tail[0] tail[1]^T] [+ bias]); returns y. As :func:`launcher`."""
    launcher(x, values, words, y, **options)()
    return y


def launcher(
    x: Tensor,
    values: Tensor,
    words: Tensor,
    y: Tensor,
    *,
    tail: tuple[Tensor, Tensor] | None = None,
    bias: Tensor | None = None,
    activation: Activation = "none",
    choice: Choice = THE_OPS,
) -> Callable[[], None]:
    """What launches the product on the stream that is current now, while its operands live.

    Their device is to be the current one, now and then. All are contiguous, of one 16-bit dtype;
    but of ``tail[1]`` it may be the transpose that is contiguous.

    Args:
        x: [tokens, in].
        values: [out, in/2].
        words: int32 metadata of W.
        y: [tokens, out], with "swiglu" [tokens, out/2]; overwritten.
        tail: [tokens, rank] and [out, rank], rank a multiple of 8.
        bias: [out].
        activation: as in :func:`slope_ext.ops.linear`.
        choice: the kernels.

    Raises:
        ValueError: ``tail[1]`` is neither; another device is current.
        RuntimeError: when called, if the launch failed.
    """
    tail_x, tail_weight = tail or (None, None)
    transposed = False
    if tail_weight is not None and not tail_weight.is_contiguous():
        transposed = tail_weight.t().is_contiguous()
        if not transposed:
            raise ValueError("spmm_sm90: tail[1] or its transpose must be contiguous")
    if torch.cuda.current_device() != x.device.index:
        raise ValueError(f"spmm_sm90: x is on {x.device}, which must be the current device")
    tensors = (x, values, words, tail_x, tail_weight, bias, y)
    rank = 0 if tail_x is None else tail_x.shape[1]
    sizes = (x.shape[0], values.shape[0], 2 * values.shape[1], rank, choice.first_rows)
    kind = int(x.dtype == torch.bfloat16)
    tiles = (choice.tile, choice.rest_tile)
    applied = ACTIVATIONS.index(activation)
    addresses = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
    params = _Params(*addresses, *sizes, kind, *tiles, x.device.index, applied, transposed)
    symbol = _library_file().slope_spmm_sm90
    stream = torch.cuda.current_stream(x.device).cuda_stream

    def launch() -> None:
        _require_success(symbol(ctypes.byref(params), stream))

    return launch


def chosen(
    tokens: int, rows: int, columns: int, *, dtype: torch.dtype = torch.bfloat16, device: int = 0
) -> Choice:
    """What the op would choose for X [tokens, columns] and W [rows, columns].

    Raises:
        RuntimeError: the device does not run the product, or a size is out of range.
    """
    kind = int(dtype == torch.bfloat16)
    params = _Params(tokens=tokens, rows=rows, columns=columns, kind=kind, tile=-1, device=device)
    with torch.cuda.device(device):
        _require_success(_library_file().slope_spmm_sm90_choose(ctypes.byref(params)))
    return Choice(params.tile, params.first_rows, params.rest_tile)


def candidates(
    tokens: int, rows: int, columns: int, *, factor: float, device: int = 0
) -> list[Choice]:
    """What the op would choose if nothing were tuned, then what may be as fast, for a tuner.

    That is what takes less than ``factor`` times as long by the model of times.

    Raises:
        RuntimeError: the device does not run the product.
    """
    found = _C.spmm_sm90_candidates(tokens, rows, columns, factor=factor, **room(device))
    return [Choice(*choice) for choice in found]


def room(device: int = 0) -> dict[str, Any]:
    """``processors`` and ``clusters`` of a device for :func:`slope_ext._C.spmm_sm90_choice`.

    Raises:
        RuntimeError: the device does not run the product.
    """
    found = _Room()
    with torch.cuda.device(device):
        _require_success(_library_file().slope_spmm_sm90_room(ctypes.byref(found)))
    return {"processors": found.processors, "clusters": list(found.clusters)}


def _require_success(status: int) -> None:
    if status != 0:
        raise RuntimeError(f"spmm_sm90: CUDA error {status}")
