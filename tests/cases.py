# SPDX-License-Identifier: Apache-2.0
"""Operands that the tests of several op families start from."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from slope_ext import ops

# (out, in): square, up, down, k/v projection, 2.69 and 3.5 to 1 (no whole number of square tiles).
WEIGHT_SHAPES = [(64, 64), (256, 64), (64, 256), (16, 64), (344, 128), (224, 64)]
# Around the tiles of the CUDA kernels, 128 rows by 256 or 128 columns: less, one, a bit more, many;
# rows of values and masks that start at multiples of 16, 8 and 4, 2, 1 bytes.
TILE_SHAPES = [
    (8, 8), (128, 64), (136, 72), (120, 32), (128, 256), (256, 256), (264, 264), (1024, 264),
    (264, 1000), (520, 272), (4096, 4096),
]  # fmt: skip
LEADING = [(1,), (7,), (8,), (2, 3), (2, 2, 5), (0,), ()]


class Operands:
    """A 2:4 weight in every form that an op may want."""

    def __init__(self, rows, columns, dtype, device, *, bias=True, rank=4):
        def randn(*shape):
            return torch.randn(*shape, dtype=torch.float64).to(dtype).to(device)

        dense = randn(rows, columns) / columns**0.5
        self.bitmask = ops.prune_24(torch.rand(rows, columns, device=device))
        self.values = ops.compress(dense, self.bitmask)
        self.bitmask_t = ops.prune_transposed(self.values, self.bitmask)
        self.values_t = torch.full((columns, rows // 2), float("nan"), dtype=dtype, device=device)
        self.bias = randn(rows) if bias else None
        self.lora_A, self.lora_B = randn(rank, columns) / columns**0.5, randn(rows, rank)
        self.dense = ops.decompress(self.values, self.bitmask)
        self.randn = randn


class Calls(TorchDispatchMode):
    """Names of the ops of the project that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "slope":
            self.names.append(func._schema.name.removeprefix("slope::"))
        return func(*args, **(kwargs or {}))


def assert_same_bits(tensors, expected):
    for tensor, other in zip(tensors, expected, strict=True):
        assert tensor.dtype == other.dtype
        assert torch.equal(bits_of(tensor), bits_of(other))


def bits_of(tensor):
    """The bits, so that NaN equals itself and -0 differs from 0."""
    return tensor.view(
        {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize]
    )
