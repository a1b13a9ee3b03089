# SPDX-License-Identifier: Apache-2.0
"""linear and input_grad against cuBLAS, torch's own 2:4 layer and the best algorithm of a sweep.

On the backend that "auto" takes of itself: the own product on Hopper, plans elsewhere, which are
tuned ahead, as training does it in its first steps. What a plan or a call costs the host is in
bench_host_overhead.py and bench_first_call.py.

linear_forward           F.linear with the dense weight; a SparseSemiStructuredTensor (algorithm 0);
                         torch._cslt_sparse_mm with what torch._cslt_sparse_mm_search found, in bf16
                         with 2048 tokens and more: elsewhere that search may end in an "illegal
                         instruction" (cuSPARSELt 0.8.0), which takes the process with it
linear_forward_vs_best_id  the fastest of the three best candidates of a sweep of cuSPARSELt's
                         algorithms by hand, each timed as the others are, without what a call of
                         the op adds (bar shapes only)
linear_forward_vs_halves by plans, against two layers of half the rows, one after the other: a wide
                         weight cut into squarer ones, as the paper proposes (bar shapes with out >
                         2 in only)
linear_backward_input    dY @ W with the dense weight (bar shapes only). In a captured call, as all
                         are here, input_grad transposes the values into the backward copy first
linear_tokens            a survey in fewer rounds, of every layer of the models in model_shapes.py
                         with 8 to 16384 tokens: F.linear, in bf16 the SparseSemiStructuredTensor
                         too (a call in fp16 keeps the host busy for 0.2 s)

All but the survey time the bar shapes with six token counts, and the other layers with 2048 and
8192 tokens; all in bf16 and fp16.

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
from slope_ext import _C, SLoPeLinear, plan_cache
from slope_ext.ops.spmm import Backend

DTYPES = [torch.bfloat16, torch.float16]
TOKENS = [2048, 8192, 8, 64, 512, 16384]
SURVEY_TOKENS = [2**i for i in range(3, 15)]
SURVEY_ROUNDS = 15
MOST = TOKENS[:2]  # of a quick run, of other shapes
BEST_IDS = 3
TORCH_LINEAR = "SparseSemiStructuredTensor"
TORCH_SEARCHED = "torch._cslt_sparse_mm, searched id"


def make_layers(
    shape: model_shapes.Shape, dtype: torch.dtype, count: int, backend: Backend = "auto"
) -> list[SLoPeLinear]:
    """Layers of one shape with random weights."""
    weights = (torch.randn(*shape, device="cuda").to(dtype) for _ in range(count))
    return [SLoPeLinear.from_dense(weight, backend=backend) for weight in weights]


def tune_plans(layer: SLoPeLinear, tokens: int, *, backward: bool = True) -> None:
    """Tunes what runs by plans; times of the own product would have "auto" choose anew."""
    if layer.weight_metadata is not None and layer.weight_metadata.dtype == torch.uint8:
        plan_cache.tune(layer, tokens, backward=backward)


def backward_operand(layer: SLoPeLinear) -> tuple[Tensor | None, ...]:
    """What slope::input_grad takes after dy: the weight with its masks, then the backward copy."""
    weight = (layer.weight, layer.weight_bitmask, layer.weight_t_bitmask)
    return (*weight, layer.weight_t, layer.weight_t_metadata)


def sparse_limit(
    shape: model_shapes.Shape, dtype: torch.dtype, tokens: int, run: harness.Run
) -> tuple[float, float]:
    """Bytes that a product with the sparse weight moves, and its limit in seconds."""
    out_features, in_features = shape
    moved = harness.product_bytes(shape, dtype, tokens)
    return moved, run.limit(moved, flops=out_features * in_features * tokens)


def forward_cases(
    layers: list[SLoPeLinear], dense: list[Tensor], xs: list[Tensor], *, with_torch: bool = True
) -> dict[str, harness.Case]:
    """Ours, cuBLAS and torch's 2:4 layer; each has a weight and an input per buffer set."""
    operands = [layer.operand() for layer in layers]
    cases: dict[str, harness.Case] = {
        "ours": lambda i: torch.ops.slope.linear(xs[i], *operands[i]),
        "F.linear": lambda i: F.linear(xs[i], dense[i]),
    }
    if not with_torch:
        return cases
    try:
        sparse = [torch.sparse.to_sparse_semi_structured(weight) for weight in dense]
    except RuntimeError as error:
        harness.say_left_out("torch's 2:4 products", error)
        return cases
    cases[TORCH_LINEAR] = lambda i: F.linear(xs[i], sparse[i])
    return cases


def searched_case(dense: list[Tensor], xs: list[Tensor]) -> dict[str, harness.Case]:
    """torch's product with the algorithm that its search finds; {} where that may crash."""
    if xs[0].dtype != torch.bfloat16 or xs[0].shape[0] < min(MOST):
        return {}
    try:
        packed = [torch._cslt_compress(weight) for weight in dense]
        searched = torch._cslt_sparse_mm_search(packed[0], xs[0].t(), transpose_result=True)
    except RuntimeError as error:
        harness.say_left_out(TORCH_SEARCHED, error)
        return {}
    return {
        TORCH_SEARCHED: lambda i: torch._cslt_sparse_mm(
            packed[i], xs[i].t(), alg_id=searched, transpose_result=True
        )
    }


def hand_swept_cases(dense: list[Tensor], xs: list[Tensor]) -> dict[str, harness.Case]:
    """The best algorithms of a sweep, each as a bare launch of its plan with 2:4 weights."""
    layers = [SLoPeLinear.from_dense(weight, backend="cusparselt") for weight in dense]
    tokens, out_features = xs[0].shape[0], layers[0].out_features
    y = xs[0].new_empty(tokens, out_features)
    problem = _C.SpmmProblem(
        rows=out_features,
        columns=layers[0].in_features,
        tokens=tokens,
        device=0,
        bfloat16=xs[0].dtype == torch.bfloat16,
    )
    cases: dict[str, harness.Case] = {}
    for candidate in plan_cache.sweep(layers[0], tokens)[:BEST_IDS]:
        algorithm = (candidate.algorithm, candidate.split_k, candidate.split_k_mode)
        plan = _C.SpmmPlan(problem, _C.SpmmAlgorithm(*algorithm))
        workspace = torch.empty(max(1, plan.workspace_bytes), dtype=torch.uint8, device="cuda")

        def run(i: int, plan: Any = plan, workspace: Tensor = workspace) -> Tensor:
            plan.run(
                layers[i].weight.data_ptr(),
                xs[i].data_ptr(),
                0,
                y.data_ptr(),
                workspace.data_ptr(),
                torch.cuda.current_stream().cuda_stream,
            )
            return y

        cases[f"id {candidate.algorithm}, split_k {candidate.split_k}"] = run
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
    tune_plans(layers[0], tokens, backward=False)
    cases = forward_cases(layers, dense, xs) | searched_case(dense, xs)
    by_hand = hand_swept_cases(dense, xs) if shape in BAR_SHAPES else {}
    timings = harness.time_cases(cases | by_hand, sets, optional=(TORCH_LINEAR, TORCH_SEARCHED))
    best_ids = {name: timings.pop(name) for name in by_hand}
    common: dict[str, Any] = {
        "case": f"{shape[0]}x{shape[1]}",
        "dtype": dtype,
        "tokens": tokens,
        "limit": limit,
    }
    yield from harness.baseline_records(timings, bench="linear_forward", **common)
    if best_ids:
        best = min(best_ids, key=lambda name: best_ids[name].median)
        yield from harness.baseline_records(
            {"ours": timings["ours"], best: best_ids[best]},
            bench="linear_forward_vs_best_id",
            **common,
        )


def bench_survey(
    shape: model_shapes.Shape, dtype: torch.dtype, run: harness.Run
) -> Iterator[harness.Record]:
    """Records of linear_tokens."""
    limits = {tokens: sparse_limit(shape, dtype, tokens, run) for tokens in SURVEY_TOKENS}
    sets = {tokens: harness.buffer_sets(int(moved)) for tokens, (moved, _) in limits.items()}
    layers = make_layers(shape, dtype, max(sets.values()))
    dense = [layer.dense_weight().detach() for layer in layers]
    for tokens, (_, limit) in limits.items():
        xs = [torch.randn(tokens, shape[1], device="cuda").to(dtype) for _ in range(sets[tokens])]
        tune_plans(layers[0], tokens, backward=False)
        operands = (layers[: len(xs)], dense[: len(xs)], xs)
        cases = forward_cases(*operands, with_torch=dtype == torch.bfloat16)
        timings = harness.time_cases(cases, len(xs), SURVEY_ROUNDS, optional=(TORCH_LINEAR,))
        yield from harness.baseline_records(
            timings,
            bench="linear_tokens",
            case=f"{shape[0]}x{shape[1]}",
            dtype=dtype,
            tokens=tokens,
            limit=limit,
        )


def bench_halves(
    shape: model_shapes.Shape, dtype: torch.dtype, tokens: int, run: harness.Run
) -> list[harness.Record]:
    """Record of linear_forward_vs_halves."""
    out_features, in_features = shape
    moved, limit = sparse_limit(shape, dtype, tokens, run)
    sets = harness.buffer_sets(int(moved))
    half = (out_features // 2, in_features)
    whole = make_layers(shape, dtype, sets, "cusparselt")
    halves = [make_layers(half, dtype, 2, "cusparselt") for _ in range(sets)]
    xs = [torch.randn(tokens, in_features, device="cuda").to(dtype) for _ in range(sets)]
    for layer in (whole[0], halves[0][0]):
        plan_cache.tune(layer, tokens=[tokens], backward=False)
    timings = harness.time_cases(
        {
            "ours": lambda i: torch.ops.slope.linear(xs[i], *whole[i].operand()),
            "two halves of the rows": lambda i: [
                torch.ops.slope.linear(xs[i], *layer.operand()) for layer in halves[i]
            ],
        },
        sets,
    )
    return harness.baseline_records(
        timings,
        bench="linear_forward_vs_halves",
        case=f"{out_features}x{in_features}",
        dtype=dtype,
        tokens=tokens,
        limit=limit,
    )


def bench_input_grad(
    shape: model_shapes.Shape, dtype: torch.dtype, tokens: int, run: harness.Run
) -> list[harness.Record]:
    """Record of linear_backward_input."""
    moved, limit = sparse_limit(shape, dtype, tokens, run)
    sets = harness.buffer_sets(int(moved))
    layers = make_layers(shape, dtype, sets)
    dense = [layer.dense_weight().detach() for layer in layers]
    dys = [torch.randn(tokens, shape[0], device="cuda").to(dtype) for _ in range(sets)]
    tune_plans(layers[0], tokens)
    operands = [backward_operand(layer) for layer in layers]
    timings = harness.time_cases(
        {
            "ours": lambda i: torch.ops.slope.input_grad(dys[i], *operands[i]),
            "dense dY @ W": lambda i: dys[i] @ dense[i],
        },
        sets,
    )
    return harness.baseline_records(
        timings,
        bench="linear_backward_input",
        case=f"{shape[0]}x{shape[1]}",
        dtype=dtype,
        tokens=tokens,
        limit=limit,
    )


@torch.no_grad()
def bench(run: harness.Run) -> Iterator[harness.Record]:
    """Records of the bar shapes, of the other layers, and the survey of all."""
    cases = [
        (shape, dtype, tokens)
        for dtype in run.first(DTYPES, 1)
        for shape in BAR_SHAPES
        for tokens in run.first(TOKENS, 2)
    ]
    shapes = list(model_shapes.users())
    if not run.quick:
        others = [shape for shape in shapes if shape not in BAR_SHAPES]
        cases += [(shape, dtype, tokens) for shape in others for dtype in DTYPES for tokens in MOST]
    for shape, dtype, tokens in run.own(cases):
        yield from bench_forward(shape, dtype, tokens, run)
        if shape in BAR_SHAPES:
            yield from bench_input_grad(shape, dtype, tokens, run)
            if shape[0] > 2 * shape[1]:
                yield from bench_halves(shape, dtype, tokens, run)
    survey = (("survey", shape, dtype) for shape in run.first(shapes, 1) for dtype in DTYPES)
    for _, shape, dtype in run.own(survey):
        yield from bench_survey(shape, dtype, run)


if __name__ == "__main__":
    harness.main("spmm", __doc__, bench, parts=True)
