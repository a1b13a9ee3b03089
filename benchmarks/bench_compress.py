# SPDX-License-Identifier: Apache-2.0
"""compress and decompress against copy bandwidth and against the best that plain torch does.

Limit: bytes that must move (dense b + values b/2 + bitmask 1/8 per element of b bytes) over the
copy bandwidth measured in the same run. Baseline: a CUDA-graphed torch.gather / zero + scatter with
precomputed int64 indices, i.e. without the cost of making them.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

import harness
from slope_ext import ops, reference

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def bench_shape(
    rows: int, columns: int, dtype: torch.dtype, run: harness.Run
) -> list[harness.Record]:
    """Records of compress and decompress of one weight [rows, columns]."""
    moved = rows * columns * (1.5 * dtype.itemsize + 1 / 8)
    sets = harness.buffer_sets(int(moved))
    weights, values, bitmasks = harness.compressed_weights(rows, columns, dtype, sets)
    index = reference._kept_columns(bitmasks[0])
    out = torch.empty_like(values[0])
    dense = torch.empty_like(weights[0])

    def scatter(i: int) -> Tensor:
        return dense.zero_().scatter_(-1, index, values[i])

    timings = harness.time_cases(
        {
            "compress": lambda i: ops.compress(weights[i], bitmasks[i]),
            "decompress": lambda i: ops.decompress(values[i], bitmasks[i]),
            "gather": lambda i: torch.gather(weights[i], -1, index, out=out),
            "scatter": scatter,
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
            baseline=baseline,
            theirs=timings[baseline.removeprefix("torch.")],
            limit=run.limit(moved),
        )
        for bench, baseline in (("compress", "torch.gather"), ("decompress", "torch.scatter"))
    ]


def bench(run: harness.Run) -> Iterator[harness.Record]:
    """Records of every type and shape."""
    for dtype in run.first(DTYPES, 1):
        for rows, columns in run.first(harness.WEIGHT_SHAPES, 3):
            yield from bench_shape(rows, columns, dtype, run)


if __name__ == "__main__":
    harness.main("compress", __doc__, bench)
