# SPDX-License-Identifier: Apache-2.0
"""The ops that choose masks, against copy bandwidth and against what torch has.

Limit: bytes that must move over the copy bandwidth measured in the same run. Per dense element of b
bytes, read + written: prune_24 b + 1/8; prune_compress b + (b/2 + 1/8); prune_compress_transposed
b + 2 (b/2 + 1/8); prune_transposed (b/2 + 1/8) + 1/8; double_prune (b/2 + 1/8) + (b/2 + 1/8).

Baselines: torch.compile of the reference; and for the two that compress, as further records, the
packer of torch.sparse (torch._sparse_semi_structured_tile), which prunes and packs both ways
whichever is wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

import harness
from slope_ext import ops, reference

OPS: dict[str, Callable[..., Any]] = {
    "prune_24": ops.prune_24,
    "prune_compress": ops.prune_compress,
    "prune_compress_transposed": ops.prune_compress_transposed,
    "prune_transposed": ops.prune_transposed,
    "double_prune": ops.double_prune_,
}
# Compiled once for all shapes: the kernels are elementwise, so known sizes gain nothing.
COMPILED = {
    name: torch.compile(getattr(reference, name), dynamic=True)
    for name in ("prune_24", "prune_compress", "prune_transposed")
}


def bench_shape(
    rows: int, columns: int, dtype: torch.dtype, run: harness.Run
) -> list[harness.Record]:
    """Records of all ops on one weight [rows, columns]."""
    b = dtype.itemsize
    moved = {
        "prune_24": b + 1 / 8,
        "prune_compress": b + (b / 2 + 1 / 8),
        "prune_compress_transposed": b + 2 * (b / 2 + 1 / 8),
        "prune_transposed": (b / 2 + 1 / 8) + 1 / 8,
        "double_prune": 2 * (b / 2 + 1 / 8),
    }
    sets = harness.buffer_sets(int(rows * columns * min(moved.values())))
    weights = [torch.randn(rows, columns, device="cuda").to(dtype) for _ in range(sets)]
    operands: dict[str, list[tuple[torch.Tensor, ...]]] = {name: [] for name in OPS}
    for weight in weights:
        values, bitmask, values_t, bitmask_t = ops.prune_compress_transposed(weight)
        for name in ("prune_24", "prune_compress", "prune_compress_transposed"):
            operands[name].append((weight,))
        operands["prune_transposed"].append((values, bitmask))
        operands["double_prune"].append((values, bitmask, bitmask_t, values_t))

    cases: dict[str, harness.Case] = {
        "packer": lambda i: torch._sparse_semi_structured_tile(weights[i], "", False),
        "unfused": _case(_unfused, operands["double_prune"]),
    }
    for name, op in OPS.items():
        cases[name] = _case(op, operands[name])
    for name, compiled in COMPILED.items():
        cases[f"{name} compiled"] = _case(compiled, operands[name])
    timings = harness.time_cases(cases, sets)

    competitors = [(name, "torch.compile", f"{name} compiled") for name in COMPILED]
    competitors += [
        ("prune_compress", "torch tile packer", "packer"),
        ("prune_compress_transposed", "torch tile packer", "packer"),
        ("double_prune", "prune_transposed, transpose_values", "unfused"),
    ]
    return [
        harness.time_record(
            bench=name,
            case=f"{rows}x{columns}",
            dtype=dtype,
            tokens=0,
            ours=timings[name],
            baseline=baseline,
            theirs=timings[theirs],
            limit=run.limit(rows * columns * moved[name]),
        )
        for name, baseline, theirs in competitors
    ]


def _unfused(*operands: torch.Tensor) -> None:
    values, bitmask, _, values_t = operands
    ops.transpose_values(values, bitmask, ops.prune_transposed(values, bitmask), values_t)


def _case(op: Callable[..., Any], operands: Sequence[tuple[torch.Tensor, ...]]) -> harness.Case:
    return lambda i: op(*operands[i])


def bench(run: harness.Run) -> Iterator[harness.Record]:
    """Records of every shape."""
    for rows, columns in run.first(harness.WEIGHT_SHAPES, 3):
        for dtype in run.first([torch.bfloat16, torch.float16], 1):
            yield from bench_shape(rows, columns, dtype, run)


if __name__ == "__main__":
    harness.main("prune", __doc__, bench)
