# SPDX-License-Identifier: Apache-2.0
"""weight_grad against the dense product dY^T X alone, and followed by a compression.

The first baseline shows what the compressed gradient costs on top of cuBLAS (target: a ratio of
0.97 or more), the second what one gains over the plain two steps. The bar shapes in both types and
with several token counts, all other weights of the models in bf16 with 8192.

Limit: the longer of the bytes that must move (dY, X, bitmask, values) over the copy bandwidth, and
2 * out * in * tokens FLOP over the rate of an 8192^3 dense bf16 product; both are measured in the
same run.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

import harness
from model_shapes import BAR_SHAPES, Shape, users
from slope_ext import ops

DTYPES = [torch.bfloat16, torch.float16]
TOKENS = [2048, 8192, 16384]


def bench_shape(
    shape: Shape, dtype: torch.dtype, tokens: int, run: harness.Run
) -> list[harness.Record]:
    """Records of one weight [out, in]."""
    out_features, in_features = shape
    moved = harness.product_bytes(shape, dtype, tokens)
    sets = harness.buffer_sets(int(moved))
    dys = [torch.randn(tokens, out_features, device="cuda").to(dtype) for _ in range(sets)]
    xs = [torch.randn(tokens, in_features, device="cuda").to(dtype) for _ in range(sets)]
    bitmasks = [
        ops.prune_24(torch.rand(out_features, in_features, device="cuda")) for _ in range(sets)
    ]
    timings = harness.time_cases(
        {
            "ours": lambda i: ops.weight_grad(dys[i], xs[i], bitmasks[i]),
            "dense dY^T X": lambda i: dys[i].t() @ xs[i],
            "dense dY^T X, compress": lambda i: ops.compress(dys[i].t() @ xs[i], bitmasks[i]),
        },
        sets,
    )
    return harness.baseline_records(
        timings,
        bench="weight_grad",
        case=f"{out_features}x{in_features}",
        dtype=dtype,
        tokens=tokens,
        limit=run.limit(moved, flops=2 * out_features * in_features * tokens),
    )


@torch.no_grad()
def bench(run: harness.Run) -> Iterator[harness.Record]:
    """Records of every type, shape and token count."""
    cases = [
        (shape, dtype, tokens)
        for dtype in run.first(DTYPES, 1)
        for shape in BAR_SHAPES
        for tokens in run.first(TOKENS, 2)
    ]
    if not run.quick:
        cases += [(shape, torch.bfloat16, 8192) for shape in users() if shape not in BAR_SHAPES]
    for shape, dtype, tokens in run.own(cases):
        yield from bench_shape(shape, dtype, tokens, run)


if __name__ == "__main__":
    harness.main("weight_grad", __doc__, bench, parts=True)
