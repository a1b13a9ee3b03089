# SPDX-License-Identifier: Apache-2.0
"""linear and input_grad against cuBLAS, torch's own 2:4 layer and the best algorithm of a sweep.

Plans are tuned ahead, as training does it in its first steps; what a plan or a call costs the host
is in bench_host_overhead.py and bench_first_call.py.

linear_forward           F.linear with the dense weight; a SparseSemiStructuredTensor (algorithm 0);
                         torch._cslt_sparse_mm with what torch._cslt_sparse_mm_search found
linear_forward_vs_best_id  the fastest correct candidate of plan_cache.sweep, as the sweep timed it
                         before the others (bar shapes only; the sweep reports no spread)
linear_backward_input    dY @ W with the dense weight (bar shapes only)

A full run times the bar shapes with every token count and type, and the other layers of the models
in model_shapes.py with 8, 2048 and 8192 tokens in bf16.

Limit: the longer of the bytes that must move (values, metadata, X, Y) over the copy bandwidth, and
out * in * tokens FLOP, half of the dense product's, over the rate of an 8192^3 dense bf16 product;
both are measured in the same run.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import harness
import model_shapes
from model_shapes import BAR_SHAPES
from slope_ext import SLoPeLinear, plan_cache

DTYPES = [torch.bfloat16, torch.float16]
TOKENS = [8, 2048, 8192, 64, 512, 16384]  # a quick run takes the first three, as other layers do
TORCH_LINEAR = "SparseSemiStructuredTensor"
TORCH_SEARCHED = "torch._cslt_sparse_mm, searched id"
# Positional arguments of slope::linear after x, as SLoPeLinear.operand() returns them.
OPERAND = ("values", "bitmask", "bias", "bitmask_t", "values_t", "metadata", "metadata_t")


def make_layers(shape: model_shapes.Shape, dtype: torch.dtype, count: int) -> list[SLoPeLinear]:
    """Layers of one shape with random weights."""
    return [
        SLoPeLinear.from_dense(torch.randn(*shape, device="cuda").to(dtype)) for _ in range(count)
    ]


def sparse_limit(
    shape: model_shapes.Shape, dtype: torch.dtype, tokens: int, run: harness.Run
) -> tuple[float, float]:
    """Bytes that a product with the sparse weight moves, and its limit in seconds."""
    out_features, in_features = shape
    weight = out_features * in_features * (dtype.itemsize / 2 + 1 / 8)
    moved = weight + tokens * (out_features + in_features) * dtype.itemsize
    return moved, run.limit(moved, flops=out_features * in_features * tokens)


def forward_cases(
    layers: list[SLoPeLinear], dense: list[Tensor], xs: list[Tensor]
) -> dict[str, harness.Case]:
    """Ours and every baseline; each has a weight and an input per buffer set."""
    operands = [layer.operand() for layer in layers]
    cases: dict[str, harness.Case] = {
        "ours": lambda i: torch.ops.slope.linear(xs[i], *operands[i]),
        "F.linear": lambda i: F.linear(xs[i], dense[i]),
    }
    try:
        sparse = [torch.sparse.to_sparse_semi_structured(weight) for weight in dense]
        packed = [torch._cslt_compress(weight) for weight in dense]
        searched = torch._cslt_sparse_mm_search(packed[0], xs[0].t(), transpose_result=True)
    except RuntimeError as error:
        print(f"left out: torch's 2:4 products ({str(error).splitlines()[0]})")
        return cases
    cases[TORCH_LINEAR] = lambda i: F.linear(xs[i], sparse[i])
    cases[TORCH_SEARCHED] = lambda i: torch._cslt_sparse_mm(
        packed[i], xs[i].t(), alg_id=searched, transpose_result=True
    )
    return cases


def bench_forward(
    shape: model_shapes.Shape, dtype: torch.dtype, tokens: int, run: harness.Run
) -> Iterator[harness.Record]:
    """Records of linear_forward, and for a bar shape of linear_forward_vs_best_id."""
    moved, limit = sparse_limit(shape, dtype, tokens, run)
    sets = harness.buffer_sets(int(moved))
    layers = make_layers(shape, dtype, sets)
    dense = [layer.dense_weight().detach() for layer in layers]
    xs = [torch.randn(tokens, shape[1], device="cuda").to(dtype) for _ in range(sets)]
    swept = plan_cache.sweep(layers[0], tokens) if shape in BAR_SHAPES else []
    plan_cache.tune(layers[0], tokens=[tokens])
    timings = harness.time_cases(
        forward_cases(layers, dense, xs), sets, optional=(TORCH_LINEAR, TORCH_SEARCHED)
    )
    common: dict[str, Any] = {
        "case": f"{shape[0]}x{shape[1]}",
        "dtype": dtype,
        "tokens": tokens,
        "ours": timings.pop("ours"),
        "limit": limit,
    }
    for baseline, theirs in timings.items():
        yield harness.time_record(
            bench="linear_forward", baseline=baseline, theirs=theirs, **common
        )
    if right := [candidate for candidate in swept if candidate.ok]:
        best = min(right, key=lambda candidate: candidate.seconds)
        yield harness.time_record(
            bench="linear_forward_vs_best_id",
            baseline=f"sweep, id {best.algorithm} split_k {best.split_k}",
            theirs=harness.Timing(best.seconds, 0.0),
            **common,
        )


def bench_input_grad(
    shape: model_shapes.Shape, dtype: torch.dtype, tokens: int, run: harness.Run
) -> harness.Record:
    """Record of linear_backward_input; the backward copies are up to date, as within a step."""
    moved, limit = sparse_limit(shape, dtype, tokens, run)
    sets = harness.buffer_sets(int(moved))
    layers = make_layers(shape, dtype, sets)
    dense = [layer.dense_weight().detach() for layer in layers]
    dys = [torch.randn(tokens, shape[0], device="cuda").to(dtype) for _ in range(sets)]
    plan_cache.tune(layers[0], tokens=[tokens])
    names = [argument.name for argument in torch.ops.slope.input_grad.default._schema.arguments]
    arguments = []
    for layer in layers:
        operand = dict(zip(OPERAND, layer.operand(), strict=True))
        arguments.append({name: operand[name] for name in names if name in operand})
    timings = harness.time_cases(
        {
            "ours": lambda i: torch.ops.slope.input_grad(dys[i], **arguments[i]),
            "dense": lambda i: dys[i] @ dense[i],
        },
        sets,
    )
    return harness.time_record(
        bench="linear_backward_input",
        case=f"{shape[0]}x{shape[1]}",
        dtype=dtype,
        tokens=tokens,
        ours=timings["ours"],
        baseline="dense dY @ W",
        theirs=timings["dense"],
        limit=limit,
    )


@torch.no_grad()
def bench(run: harness.Run) -> Iterator[harness.Record]:
    """Records of the bar shapes, then of the other layers."""
    for dtype in run.first(DTYPES, 1):
        for shape in run.first(BAR_SHAPES, 3):
            for tokens in sorted(run.first(TOKENS, 3)):
                yield from bench_forward(shape, dtype, tokens, run)
                yield bench_input_grad(shape, dtype, tokens, run)
    if not run.quick:
        for shape in model_shapes.users():
            if shape not in BAR_SHAPES:
                for tokens in TOKENS[:3]:
                    yield from bench_forward(shape, torch.bfloat16, tokens, run)


if __name__ == "__main__":
    harness.main("spmm", __doc__, bench)
