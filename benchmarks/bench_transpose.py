# SPDX-License-Identifier: Apache-2.0
"""transpose_values against copy bandwidth, a copy of as many bytes and a gather from the dense.

Limit: bytes that must move (per dense element of b bytes: values b/2 and both masks 1/8 each read,
values b/2 written) over the bandwidth of a large copy in the same run. Baselines: a copy that
moves as many bytes, which is what a kernel of that length can reach; torch.gather from a transposed
view of the dense weight with precomputed int64 indices, without the cost of making either.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

import harness
from slope_ext import ops, reference

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def bench_shape(
    rows: int, columns: int, dtype: torch.dtype, run: harness.Run
) -> list[harness.Record]:
    """Record of one weight [rows, columns]."""
    moved = rows * columns * (dtype.itemsize + 2 / 8)
    sets = harness.buffer_sets(int(moved))
    weights, values, bitmasks = harness.compressed_weights(rows, columns, dtype, sets)
    bitmasks_t = [ops.prune_transposed(v, b) for v, b in zip(values, bitmasks, strict=True)]
    outs = [torch.empty(columns, rows // 2, dtype=dtype, device="cuda") for _ in range(sets)]
    copied = [
        torch.randint(256, (2, int(moved) // 2), dtype=torch.uint8, device="cuda") for _ in outs
    ]
    index = reference._kept_columns(bitmasks_t[0])
    timings = harness.time_cases(
        {
            "ours": lambda i: ops.transpose_values(values[i], bitmasks[i], bitmasks_t[i], outs[i]),
            "copy of as many bytes": lambda i: copied[i][0].copy_(copied[i][1]),
            "torch.gather": lambda i: torch.gather(weights[i].t(), -1, index, out=outs[i]),
        },
        sets,
    )
    return harness.baseline_records(
        timings,
        bench="transpose_values",
        case=f"{rows}x{columns}",
        dtype=dtype,
        tokens=0,
        limit=run.limit(moved),
    )


def bench(run: harness.Run) -> Iterator[harness.Record]:
    """Records of every type and shape."""
    for dtype in run.first(DTYPES, 1):
        for rows, columns in run.first(harness.WEIGHT_SHAPES, 3):
            yield from bench_shape(rows, columns, dtype, run)


if __name__ == "__main__":
    harness.main("transpose", __doc__, bench)
