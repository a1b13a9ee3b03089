# SPDX-License-Identifier: Apache-2.0
"""Typed functions over ``torch.ops.slope``; one module per op family."""

from slope_ext.ops.adamw import adamw_
from slope_ext.ops.compress import compress, decompress
from slope_ext.ops.lowrank import input_grad_lowrank, linear_lowrank
from slope_ext.ops.pack import pack, pack_metadata
from slope_ext.ops.prune import (
    double_prune_,
    prune_24,
    prune_compress,
    prune_compress_transposed,
    prune_transposed,
)
from slope_ext.ops.spmm import input_grad, linear
from slope_ext.ops.transpose import transpose_values
from slope_ext.ops.weight_grad import weight_grad, weight_grad_add_

__all__ = [
    "adamw_",
    "compress",
    "decompress",
    "double_prune_",
    "input_grad",
    "input_grad_lowrank",
    "linear",
    "linear_lowrank",
    "pack",
    "pack_metadata",
    "prune_24",
    "prune_compress",
    "prune_compress_transposed",
    "prune_transposed",
    "transpose_values",
    "weight_grad",
    "weight_grad_add_",
]
