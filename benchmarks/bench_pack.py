# SPDX-License-Identifier: Apache-2.0
"""pack against a copy of what it writes and against torch._cslt_compress.

Limit: bytes that must move (per dense element of b bytes: values b/2 and mask 1/8 read, values b/2
and metadata 1/8 written) over the copy bandwidth measured in the same run. torch._cslt_compress
reads the dense weight instead.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

import harness
from slope_ext import ops

DTYPES = [torch.bfloat16, torch.float16]
TORCH = "torch._cslt_compress"


def bench_shape(
    rows: int, columns: int, dtype: torch.dtype, run: harness.Run
) -> list[harness.Record]:
    """Records of one weight [rows, columns]."""
    moved = rows * columns * (dtype.itemsize + 2 / 8)
    sets = harness.buffer_sets(int(moved))
    _, values, bitmasks = harness.compressed_weights(rows, columns, dtype, sets)
    dense = [ops.decompress(v, b) for v, b in zip(values, bitmasks, strict=True)]
    packed = [ops.pack(v, b) for v, b in zip(values, bitmasks, strict=True)]
    timings = harness.time_cases(
        {
            "ours": lambda i: ops.pack(values[i], bitmasks[i]),
            "copy": lambda i: packed[i].clone(),
            TORCH: lambda i: torch._cslt_compress(dense[i]),
        },
        sets,
        optional=(TORCH,),
    )
    return harness.baseline_records(
        timings,
        bench="pack",
        case=f"{rows}x{columns}",
        dtype=dtype,
        tokens=0,
        limit=run.limit(moved),
    )


@torch.no_grad()
def bench(run: harness.Run) -> Iterator[harness.Record]:
    """Records of every type and shape."""
    for dtype in run.first(DTYPES, 1):
        for rows, columns in run.first(harness.WEIGHT_SHAPES, 3):
            yield from bench_shape(rows, columns, dtype, run)


if __name__ == "__main__":
    harness.main("pack", __doc__, bench)
