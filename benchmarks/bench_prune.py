# SPDX-License-Identifier: Apache-2.0
"""prune_24 and prune_transposed against copy bandwidth and against torch.compile of the reference.

Limit: bytes that must move over the copy bandwidth measured in the same run. Per dense element of b
bytes: prune_24 reads b and writes 1/8; prune_transposed reads b/2 + 1/8 and writes 1/8.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

import harness
from slope_ext import ops, reference


def bench_shape(
    rows: int, columns: int, dtype: torch.dtype, run: harness.Run
) -> list[harness.Record]:
    """Records of both ops on one weight [rows, columns]."""
    moved = {
        "prune_24": rows * columns * (dtype.itemsize + 1 / 8),
        "prune_transposed": rows * columns * (dtype.itemsize / 2 + 2 / 8),
    }
    sets = harness.buffer_sets(int(moved["prune_transposed"]))
    weights = [torch.randn(rows, columns, device="cuda").to(dtype) for _ in range(sets)]
    bitmasks = [ops.prune_24(weight) for weight in weights]
    values = [ops.compress(w, b) for w, b in zip(weights, bitmasks, strict=True)]
    compiled_24 = torch.compile(reference.prune_24)
    compiled_transposed = torch.compile(reference.prune_transposed)
    timings = harness.time_cases(
        {
            "prune_24": lambda i: ops.prune_24(weights[i]),
            "prune_transposed": lambda i: ops.prune_transposed(values[i], bitmasks[i]),
            "prune_24 compiled": lambda i: compiled_24(weights[i]),
            "prune_transposed compiled": lambda i: compiled_transposed(values[i], bitmasks[i]),
        },
        sets,
    )
    return [
        harness.time_record(
            bench=bench,
            case=f"{rows}x{columns}",
            dtype=dtype,
            tokens=0,
            ours=timings[bench],
            baseline="torch.compile",
            theirs=timings[f"{bench} compiled"],
            limit=run.limit(moved[bench]),
        )
        for bench in moved
    ]


def bench(run: harness.Run) -> Iterator[harness.Record]:
    """Records of every shape, in bf16."""
    for rows, columns in run.first(harness.WEIGHT_SHAPES, 3):
        yield from bench_shape(rows, columns, torch.bfloat16, run)


if __name__ == "__main__":
    harness.main("prune", __doc__, bench)
