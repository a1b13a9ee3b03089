# SPDX-License-Identifier: Apache-2.0
"""Argument checks of the ops: every message names op and argument."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

BACKENDS = ("auto", "native", "cusparselt", "reference")
ACTIVATIONS = ("none", "relu", "swiglu")
GATE_ROWS = 8  # of W, for "swiglu"; then as many of the up-projection
FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Checker:
    """Checks arguments of one op; raises RuntimeError ``slope::<op>: <argument> must ...``.

    What every call checks formats its message only to raise it: that takes longer than checking.
    """

    def __init__(self, op: str) -> None:
        self.op = op

    def fail(self, message: str) -> NoReturn:
        raise RuntimeError(f"slope::{self.op}: {message}")

    def require(self, condition: bool, message: str) -> None:
        if not condition:
            self.fail(message)

    def floating(self, name: str, tensor: Tensor) -> None:
        if tensor.dtype not in FLOAT_DTYPES:
            self.fail(
                f"{name} must be float16, bfloat16, float32 or float64, "
                f"got {dtype_name(tensor.dtype)}"
            )

    def matrix(self, name: str, tensor: Tensor) -> None:
        if tensor.dim() != 2:
            self.fail(f"{name} must have 2 dimensions, got shape {_shape(tensor)}")

    def same_dtype(self, name: str, tensor: Tensor, as_name: str, as_tensor: Tensor) -> None:
        if tensor.dtype != as_tensor.dtype:
            self.fail(
                f"{name} must have the dtype of {as_name} ({dtype_name(as_tensor.dtype)}), "
                f"got {dtype_name(tensor.dtype)}"
            )

    def same_device(self, name: str, tensor: Tensor, as_name: str, as_tensor: Tensor) -> None:
        if tensor.device != as_tensor.device:
            self.fail(
                f"{name} must be on the device of {as_name} ({as_tensor.device}), "
                f"got {tensor.device}"
            )

    def shape(self, name: str, tensor: Tensor, expected: tuple[int, ...], meaning: str) -> None:
        if tuple(tensor.shape) != expected:
            self.fail(f"{name} must be {meaning} = {list(expected)}, got {_shape(tensor)}")

    def columns(self, name: str, columns: int, axis: str) -> None:
        if columns % 8 != 0:
            self.fail(f"{name} must have {axis} a multiple of 8, got {axis} = {columns}")

    def bitmask(
        self, name: str, bitmask: Tensor, rows: int, columns: int, as_name: str, as_tensor: Tensor
    ) -> None:
        """uint8 [rows, columns / 8] beside ``as_tensor``, two bits set in every nibble.

        The bits themselves are read on the CPU only: on a GPU that would wait for the device.
        """
        self.bitmask_shape(name, bitmask, rows, columns, as_name, as_tensor)
        is_readable = type(bitmask) is Tensor and bitmask.device.type == "cpu"
        if is_readable and not has_two_of_four(bitmask):
            self.fail(f"{name} must have exactly two bits set of every four")

    def bitmask_shape(
        self, name: str, bitmask: Tensor, rows: int, columns: int, as_name: str, as_tensor: Tensor
    ) -> None:
        if bitmask.dtype != torch.uint8:
            self.fail(f"{name} must be uint8, got {dtype_name(bitmask.dtype)}")
        self.shape(name, bitmask, (rows, columns // 8), f"[{rows}, {columns}/8]")
        self.same_device(name, bitmask, as_name, as_tensor)

    def values(self, values: Tensor, bitmask: Tensor) -> tuple[int, int]:
        """Checks a compressed weight; returns (out, in)."""
        self.matrix("values", values)
        self.floating("values", values)
        rows, columns = values.shape[0], 2 * values.shape[1]
        self.columns("values", columns, "in")
        self.bitmask("bitmask", bitmask, rows, columns, "values", values)
        return rows, columns

    def transposed(self, values: Tensor, bitmask_t: Tensor | None, values_t: Tensor | None) -> None:
        """Checks the backward copy [in, out/2] of a weight whose values are [out, in/2]."""
        rows, columns = values.shape[0], 2 * values.shape[1]
        self.require(
            bitmask_t is not None or values_t is None, "values_t must come with bitmask_t, got None"
        )
        if bitmask_t is not None:
            self.columns("values", rows, "out")
            # Its bits are read where they are used, after a layer's mask was brought up to date.
            self.bitmask_shape("bitmask_t", bitmask_t, columns, rows, "values", values)
        if values_t is not None:
            self.same_dtype("values_t", values_t, "values", values)
            self.shape("values_t", values_t, (columns, rows // 2), "[in, out/2]")
            self.same_device("values_t", values_t, "values", values)
            self.require(values_t.is_contiguous(), "values_t must be contiguous")

    def metadata(
        self, name: str, metadata: Tensor | None, rows: int, columns: int, values: Tensor
    ) -> None:
        """Checks the metadata of a weight [rows, columns] beside ``values``."""
        if metadata is not None:
            if metadata.dtype not in (torch.uint8, torch.int32):
                self.fail(f"{name} must be uint8 or int32, got {dtype_name(metadata.dtype)}")
            words = metadata.dtype == torch.int32
            device = values.device
            size = metadata_words(rows, columns) if words else metadata_bytes(rows, columns, device)
            self.shape(name, metadata, (size,), "the metadata of the weight")
            self.same_device(name, metadata, "values", values)

    def core_multiples(self, name: str, rows: int, columns: int) -> None:
        if not fits_plan(rows, columns):
            self.fail(
                f"{name} must be of a weight with out and in in multiples of 16 for the sparse "
                f"tensor cores, got out x in = {rows} x {columns}"
            )

    def backend(self, backend: str) -> None:
        if backend not in BACKENDS:
            self.fail(f"backend must be one of {', '.join(BACKENDS)}, got {backend}")

    def activation(self, activation: str, rows: int) -> None:
        if activation not in ACTIVATIONS:
            self.fail(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation}")
        if activation == "swiglu" and rows % (2 * GATE_ROWS) != 0:
            self.fail(
                f"values must have out a multiple of {2 * GATE_ROWS} for activation swiglu, "
                f"got out = {rows}"
            )

    def tokens(self, name: str, x: Tensor, features: int, values: Tensor) -> None:
        """Checks an activation [..., features] that meets ``values``."""
        if x.dim() < 1:
            self.fail(f"{name} must have at least 1 dimension, got shape []")
        if x.shape[-1] != features:
            self.fail(f"{name} must have a last dimension of {features}, got shape {_shape(x)}")
        self.same_dtype(name, x, "values", values)
        self.same_device(name, x, "values", values)

    def forward(
        self,
        x: Tensor,
        values: Tensor,
        bitmask: Tensor,
        bias: Tensor | None,
        bitmask_t: Tensor | None,
        values_t: Tensor | None,
        metadata: Tensor | None,
        metadata_t: Tensor | None,
        backend: str,
        activation: str,
    ) -> None:
        """Checks a weight and what a product with it takes."""
        rows, columns = self.values(values, bitmask)
        self.activation(activation, rows)
        self.tokens("x", x, columns, values)
        self.bias(bias, values)
        self.transposed(values, bitmask_t, values_t)
        self.metadata("metadata", metadata, rows, columns, values)
        self.metadata("metadata_t", metadata_t, columns, rows, values)
        self.backend(backend)

    def backward(
        self,
        dy: Tensor,
        values: Tensor,
        bitmask: Tensor,
        bitmask_t: Tensor,
        values_t: Tensor | None,
        metadata_t: Tensor | None,
        backend: str,
    ) -> None:
        """Checks a weight and what its input gradient is made of."""
        rows, columns = self.values(values, bitmask)
        self.tokens("dy", dy, rows, values)
        self.transposed(values, bitmask_t, values_t)
        self.metadata("metadata_t", metadata_t, columns, rows, values)
        self.backend(backend)

    def bias(self, bias: Tensor | None, values: Tensor) -> None:
        if bias is not None:
            self.shape("bias", bias, (values.shape[0],), "[out]")
            self.same_dtype("bias", bias, "values", values)
            self.same_device("bias", bias, "values", values)


def is_half(dtype: torch.dtype) -> bool:
    """Whether the sparse tensor cores take weights of that dtype."""
    return dtype in (torch.float16, torch.bfloat16)


def fits_plan(rows: int, columns: int) -> bool:
    """Whether cuSPARSELt takes a weight [rows, columns]."""
    return rows % 16 == 0 and columns % 16 == 0


def fits_native(rows: int, columns: int) -> bool:
    """Whether the own product on sm_90 takes a weight [rows, columns]."""
    return rows % 8 == 0 and columns % 32 == 0


def metadata_words(rows: int, columns: int) -> int:
    """int32 elements of the metadata of a weight [rows, columns] for the own product on sm_90."""
    return -(-rows // 64) * -(-columns // 256) * 512


def metadata_bytes(rows: int, columns: int, device: torch.device) -> int:
    """Bytes of the metadata of a weight [rows, columns]: on CUDA whole tiles of the hardware."""
    if device.type == "cpu":
        return rows * columns // 8

    def up(size: int, multiple: int) -> int:
        return -(-size // multiple) * multiple

    return max(up(rows, 32) * up(columns, 64), up(rows, 64) * up(columns, 32)) // 8


def has_two_of_four(bitmask: Tensor) -> bool:
    """Whether every four bits of a uint8 tensor hold exactly two ones (waits for its device)."""
    # Counted in parallel: bits of pairs, then of nibbles; 0x22 = two and two.
    pairs = (bitmask & 0x55) + (bitmask >> 1 & 0x55)
    return bool(((pairs & 0x33) + (pairs >> 2 & 0x33) == 0x22).all())


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)


def dtype_name(dtype: torch.dtype) -> str:
    """As it is written after "torch."."""
    return str(dtype).removeprefix("torch.")
