# SPDX-License-Identifier: Apache-2.0
"""The own Hopper product against the best cuSPARSELt plan and cuBLAS; what a low-rank tail adds.

spmm_native     linear on the own kernel, tuned ahead, after a rest (burst) and in 50 ms of work
                (sustained); F.linear with the dense weight; linear on the plan of the fastest
                algorithm of a sweep, which the baseline names. In bf16 and fp16
spmm_native_fused
                the own kernel with a bias; with a low-rank tail, T = X A^T given; with ReLU,
                in the kernel and as a pass after it; with the pass that adds a residual, of which
                an epilogue could save all but reading that; with bias and ReLU; all against the own
                kernel alone. Tails of rank 64 and 256 with few tokens too.
                Gate and up-projection of LLaMA-3-8B's MLP with SwiGLU in the kernel; their product
                alone; two products and a pass of SwiGLU that torch.compile makes, 2:4 and dense.
                Its q-, k- and v-projection as one product; as three, 2:4 and dense
linear_lowrank  linear_lowrank on the own kernel, rank 64 or 1.56 % of in; the same on a plan, whose
                epilogue adds the dense low-rank product; a plan, and the own kernel, with
                addmm_ of the low-rank product after it; the own kernel without an adapter
linear_lowrank_scaled
                linear_lowrank on the own kernel with a scale that is not 1, against one that is
input_grad_lowrank
                the same of backward, dT = dY B included; input_grad, and addmm_ of the low-rank
                product after it; input_grad alone
lowrank_products
                what an adapter adds beside those: T = X A^T and, for backward, dT = dY B,
                dA = dT^T X and dB = dY^T T, each a dense product that reads X or dY once, against
                a copy of as many bytes; T and dA of three layers at once that take the same X,
                against one by one
spmm_native_two_kernels
                products of the models' layers whose rows of W go to two kernels, against the
                fastest of one kernel, whichever tile it has

Limit: as in bench_spmm.py, the low-rank products included.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import harness
from bench_spmm import MOST, backward_operand, make_layers, sparse_limit
from model_shapes import BAR_SHAPES, Shape, adapter_rank, users
from slope_ext import SLoPeLinear, plan_cache
from slope_ext._spmm_sm90 import TILES, Choice, candidates, spmm_sm90

TOKENS = [*MOST, 8, 64, 128, 512, 1024, 16384]
TAIL_TOKENS = [8, 64, 512]
TAIL_RANKS = [64, 256]
REGIMES = {"burst": harness.BURST, "sustained": harness.SUSTAINED}


def lowrank(
    xs: list[Tensor], operands: list[Any], a: Tensor, b: Tensor, scale: float = 1.0
) -> harness.Case:
    """linear_lowrank of buffer set i, with one adapter for all."""

    def case(i: int) -> Any:
        values, bitmask, *rest = operands[i]
        return torch.ops.slope.linear_lowrank(xs[i], values, bitmask, a, b, scale, *rest)

    return case


def own_product(layers: list[SLoPeLinear], xs: list[Tensor], **options: Any) -> harness.Case:
    """The own kernel alone on buffer set i; options as spmm_sm90 takes them."""

    def case(i: int) -> Tensor:
        layer, y = layers[i], xs[i].new_empty(len(xs[i]), layers[i].out_features)
        assert layer.weight_metadata is not None
        return spmm_sm90(xs[i], layer.weight, layer.weight_metadata, y, **options)

    return case


def unfused(xs: list[Tensor], operands: list[Any], a: Tensor, b: Tensor) -> harness.Case:
    """The product of buffer set i, to which the low-rank product is added."""

    def case(i: int) -> Tensor:
        y: Tensor = torch.ops.slope.linear(xs[i], *operands[i])
        return y.addmm_(F.linear(xs[i], a), b.t())

    return case


def backward_cases(
    dys: list[Tensor], layers: list[SLoPeLinear], a: Tensor, b: Tensor
) -> dict[str, harness.Case]:
    """input_grad_lowrank of buffer set i, and what it stands for."""

    operands = [backward_operand(layer) for layer in layers]

    def fused(i: int) -> Any:
        weight, copy = operands[i][:3], operands[i][3:]
        return torch.ops.slope.input_grad_lowrank(dys[i], *weight, a, b, 1.0, *copy)

    def alone(i: int) -> Tensor:
        dx: Tensor = torch.ops.slope.input_grad(dys[i], *operands[i])
        return dx

    return {
        "ours": fused,
        "input_grad, then addmm_": lambda i: alone(i).addmm_(dys[i] @ b, a),
        "input_grad": alone,
    }


def bench_lowrank_products(
    shape: Shape, tokens: int, a: Tensor, b: Tensor, run: harness.Run
) -> Iterator[harness.Record]:
    """Records of the products with an adapter's factors."""
    rank = len(a)
    sets = harness.buffer_sets(tokens * min(shape) * a.dtype.itemsize)
    xs, dys = (
        [torch.randn(tokens, features, device="cuda").to(a.dtype) for _ in range(sets)]
        for features in (shape[1], shape[0])
    )
    t = torch.randn(tokens, rank, device="cuda").to(a.dtype)
    thrice_a, thrice_t = a.repeat(3, 1), t.repeat(1, 3)

    def copy(sources: list[Tensor]) -> harness.Case:
        targets = [torch.empty_like(source[: tokens // 2]) for source in sources]
        return lambda i: targets[i].copy_(sources[i][: tokens // 2])

    timings = harness.time_cases(
        {
            "T": lambda i: F.linear(xs[i], a),
            "dA": lambda i: t.t() @ xs[i],
            "dT": lambda i: dys[i] @ b,
            "dB": lambda i: dys[i].t() @ t,
            "copy of X": copy(xs),
            "copy of dY": copy(dys),
            "T of three layers": lambda i: F.linear(xs[i], thrice_a),
            "dA of three layers": lambda i: thrice_t.t() @ xs[i],
            "three times T": lambda i: [F.linear(xs[i], a) for _ in range(3)],
            "three times dA": lambda i: [t.t() @ xs[i] for _ in range(3)],
        },
        sets,
    )
    of_x, of_dy = "copy of X", "copy of dY"  # as many bytes, half of them read
    for name, baseline, layers, features in (
        ("T", of_x, 1, shape[1]),
        ("dA", of_x, 1, shape[1]),
        ("dT", of_dy, 1, shape[0]),
        ("dB", of_dy, 1, shape[0]),
        ("T of three layers", "three times T", 3, shape[1]),
        ("dA of three layers", "three times dA", 3, shape[1]),
    ):
        ranks = layers * rank
        moved = (tokens * (features + ranks) + ranks * features) * a.dtype.itemsize
        yield harness.time_record(
            bench="lowrank_products",
            case=f"{shape[0]}x{shape[1]};r={rank};{name}",
            dtype=a.dtype,
            tokens=tokens,
            limit=run.limit(moved, flops=2 * tokens * features * ranks),
            ours=timings[name],
            baseline=baseline,
            theirs=timings[baseline],
        )


def bench_shape(
    shape: Shape, dtype: torch.dtype, tokens: int, run: harness.Run
) -> Iterator[harness.Record]:
    """Records of one shape."""
    moved, limit = sparse_limit(shape, dtype, tokens, run)
    sets = harness.buffer_sets(int(moved))
    own = make_layers(shape, dtype, sets, "native")
    dense = [layer.dense_weight().detach() for layer in own]
    by_plan = [SLoPeLinear.from_dense(weight, backend="cusparselt") for weight in dense]
    xs = [torch.randn(tokens, shape[1], device="cuda").to(dtype) for _ in range(sets)]
    (best,) = plan_cache.tune(by_plan[0], tokens=[tokens], backward=False, again=True)
    best_plan = f"best cuSPARSELt plan, id {best.id}, split_k {best.split_k}"
    plan_cache.tune(own[0], tokens=[tokens])

    def records(
        timings: dict[str, harness.Timing], bench: str, note: str = "", flops: float = 0.0
    ) -> list[harness.Record]:
        return harness.baseline_records(
            timings,
            bench=bench,
            case=f"{shape[0]}x{shape[1]}{note}",
            dtype=dtype,
            tokens=tokens,
            limit=limit + flops / run.matmul_rate,
        )

    # ---- the product ----
    operands = {name: [layer.operand() for layer in layers]
                for name, layers in (("own", own), ("plan", by_plan))}  # fmt: skip
    cases: dict[str, harness.Case] = {
        "ours": lambda i: torch.ops.slope.linear(xs[i], *operands["own"][i]),
        "F.linear": lambda i: F.linear(xs[i], dense[i]),
        best_plan: lambda i: torch.ops.slope.linear(xs[i], *operands["plan"][i]),
    }
    for name, regime in REGIMES.items():
        # Bars of 1 to 3 % hang on the short ones
        rounds = 60 if 512 <= tokens <= 2048 else 20
        timings = harness.time_cases(cases, sets, rounds=rounds, regime=regime)
        yield from records(timings, "spmm_native", f";{name}")
    if tokens not in MOST:
        return

    # ---- what is fused, T given ----
    ranks = sorted({64, adapter_rank(shape[1])})
    bias = torch.randn(shape[0], device="cuda").to(dtype)
    t = {rank: torch.randn(tokens, rank, device="cuda").to(dtype) for rank in ranks}
    b = {rank: torch.randn(shape[0], rank, device="cuda").to(dtype) for rank in ranks}

    product = own_product(own, xs)
    residuals = [torch.randn(tokens, shape[0], device="cuda").to(dtype) for _ in range(sets)]
    timings = harness.time_cases(
        {
            "plain": product,
            "bias": own_product(own, xs, bias=bias),
            "relu": own_product(own, xs, activation="relu"),
            "bias, relu": own_product(own, xs, bias=bias, activation="relu"),
            "relu pass": lambda i: product(i).relu_(),
            "residual pass": lambda i: product(i).add_(residuals[i]),
        }
        | {f"r={rank}": own_product(own, xs, tail=(t[rank], b[rank])) for rank in ranks},
        sets,
    )
    notes = ("bias", "relu", "bias, relu", "relu pass", "residual pass")
    for note, rank in (*((note, 0) for note in notes), *((f"r={rank}", rank) for rank in ranks)):
        pair = {"ours": timings[note], "without": timings["plain"]}
        yield from records(pair, "spmm_native_fused", f";{note}", 2 * rank * shape[0] * tokens)

    # ---- low-rank layers ----
    dys = [torch.randn(tokens, shape[0], device="cuda").to(dtype) for _ in range(sets)]
    for rank in ranks:
        a = torch.randn(rank, shape[1], device="cuda").to(dtype) / shape[1] ** 0.5
        timings = harness.time_cases(
            {
                "ours": lowrank(xs, operands["own"], a, b[rank]),
                "plan with beta = 1": lowrank(xs, operands["plan"], a, b[rank]),
                "plan, then addmm_": unfused(xs, operands["plan"], a, b[rank]),
                "own, then addmm_": unfused(xs, operands["own"], a, b[rank]),
                "without adapter": cases["ours"],
                "scaled": lowrank(xs, operands["own"], a, b[rank], scale=0.3),
            },
            sets,
        )
        flops = 2 * rank * sum(shape) * tokens
        pair = {"ours": timings.pop("scaled"), "scale 1": timings["ours"]}
        yield from records(pair, "linear_lowrank_scaled", f";r={rank}", flops)
        yield from records(timings, "linear_lowrank", f";r={rank}", flops)

        timings = harness.time_cases(backward_cases(dys, own, a, b[rank]), sets)
        yield from records(timings, "input_grad_lowrank", f";r={rank}", flops)
        yield from bench_lowrank_products(shape, tokens, a, b[rank], run)


def bench_tails(shape: Shape, tokens: int, run: harness.Run) -> Iterator[harness.Record]:
    """Records of spmm_native_fused: low-rank tails where a product may be in segments."""
    dtype = torch.bfloat16
    moved, limit = sparse_limit(shape, dtype, tokens, run)
    sets = harness.buffer_sets(int(moved))
    layers = make_layers(shape, dtype, sets, "native")
    xs = [torch.randn(tokens, shape[1], device="cuda").to(dtype) for _ in range(sets)]
    cases = {"plain": own_product(layers, xs)}
    for rank in TAIL_RANKS:
        t, b = (torch.randn(rows, rank, device="cuda").to(dtype) for rows in (tokens, shape[0]))
        cases[f"r={rank}"] = own_product(layers, xs, tail=(t, b))
    timings = harness.time_cases(cases, sets)
    for rank in TAIL_RANKS:
        yield from harness.baseline_records(
            {"ours": timings[f"r={rank}"], "without": timings["plain"]},
            bench="spmm_native_fused",
            case=f"{shape[0]}x{shape[1]};r={rank}",
            dtype=dtype,
            tokens=tokens,
            limit=limit + 2 * rank * shape[0] * tokens / run.matmul_rate,
        )


# ---- layers in one -------------------------------------------------------------------------------


def one_and_several(
    rows: tuple[int, ...], columns: int, dtype: torch.dtype, sets: int
) -> tuple[list[SLoPeLinear], list[list[SLoPeLinear]], list[tuple[Tensor, ...]]]:
    """For each buffer set: a layer of all rows, layers of these each, and their dense weights."""
    shape = (sum(rows), columns)
    weights = [torch.randn(*shape, device="cuda").to(dtype) for _ in range(sets)]
    dense = [weight.split(rows) for weight in weights]
    one = [SLoPeLinear.from_dense(weight, backend="native") for weight in weights]
    several = [
        [SLoPeLinear.from_dense(part, backend="native") for part in parts] for parts in dense
    ]
    return one, several, dense


# ---- SwiGLU --------------------------------------------------------------------------------------

SWIGLU_SHAPE = (28672, 4096)
SWIGLU_TOKENS = [512, 2048, 8192]


def bench_swiglu(tokens: int, run: harness.Run) -> Iterator[harness.Record]:
    """Records of gate and up-projection together."""
    dtype, (rows, columns) = torch.bfloat16, SWIGLU_SHAPE
    moved, _ = sparse_limit(SWIGLU_SHAPE, dtype, tokens, run)
    saved = tokens * rows // 2 * dtype.itemsize  # of two results, one is written
    limit = run.limit(moved - saved, flops=tokens * rows * columns)
    sets = harness.buffer_sets(int(moved))
    both, apart, dense = one_and_several((rows // 2, rows // 2), columns, dtype, sets)
    xs = [torch.randn(tokens, columns, device="cuda").to(dtype) for _ in range(sets)]
    gated = torch.compile(lambda gate, up: F.silu(gate) * up, dynamic=False)

    def fused(i: int) -> Tensor:
        weight, bitmask, *rest, _ = both[i].operand()
        y: Tensor = torch.ops.slope.linear(xs[i], weight, bitmask, *rest, "swiglu")
        return y

    timings = harness.time_cases(
        {
            "ours": fused,
            "without": lambda i: torch.ops.slope.linear(xs[i], *both[i].operand()),
            "two products, torch.compile": lambda i: gated(*(half(xs[i]) for half in apart[i])),
            "dense, torch.compile": lambda i: gated(*(F.linear(xs[i], half) for half in dense[i])),
        },
        sets,
    )
    yield from harness.baseline_records(
        timings,
        bench="spmm_native_fused",
        case=f"{rows}x{columns};swiglu",
        dtype=dtype,
        tokens=tokens,
        limit=limit,
    )


# ---- q, k, v -------------------------------------------------------------------------------------

QKV_ROWS, QKV_COLUMNS = (4096, 1024, 1024), 4096
QKV_TOKENS = [8, 64, 512, 2048, 8192]


def bench_qkv(tokens: int, run: harness.Run) -> Iterator[harness.Record]:
    """Records of q-, k- and v-projection as one product."""
    dtype, shape = torch.bfloat16, (sum(QKV_ROWS), QKV_COLUMNS)
    moved, limit = sparse_limit(shape, dtype, tokens, run)
    sets = harness.buffer_sets(int(moved))
    joint, apart, dense = one_and_several(QKV_ROWS, QKV_COLUMNS, dtype, sets)
    xs = [torch.randn(tokens, QKV_COLUMNS, device="cuda").to(dtype) for _ in range(sets)]
    timings = harness.time_cases(
        {
            "ours": lambda i: joint[i](xs[i]),
            "three products": lambda i: [layer(xs[i]) for layer in apart[i]],
            "dense, three products": lambda i: [F.linear(xs[i], rows) for rows in dense[i]],
        },
        sets,
    )
    yield from harness.baseline_records(
        timings,
        bench="spmm_native_fused",
        case=f"{shape[0]}x{shape[1]};qkv",
        dtype=dtype,
        tokens=tokens,
        limit=limit,
    )


# ---- two kernels ---------------------------------------------------------------------------------

SPLIT_TOKENS = [8, 64, 256, 512, 640, 1024, 2048, 8192]


def bench_two_kernels(shape: Shape, tokens: int, run: harness.Run) -> Iterator[harness.Record]:
    """Records of one product, if it is made by two kernels here where nothing is tuned."""
    untuned = candidates(tokens, *shape, factor=1.0)[0]
    if untuned.first_rows == 0:
        return
    dtype = torch.bfloat16
    moved, limit = sparse_limit(shape, dtype, tokens, run)
    sets = harness.buffer_sets(int(moved))
    layers = make_layers(shape, dtype, sets, "native")
    xs = [torch.randn(tokens, shape[1], device="cuda").to(dtype) for _ in range(sets)]

    def by(choice: Choice) -> harness.Case:
        return own_product(layers, xs, choice=choice)

    one = {str(tile): by(Choice(index)) for index, tile in enumerate(TILES)}
    at_first = harness.time_cases(one, sets, rounds=harness.MIN_ROUNDS)
    likely = sorted(one, key=lambda tile: at_first[tile].median)[:3]
    for name, regime in REGIMES.items():
        cases = {"ours": by(untuned)} | {tile: one[tile] for tile in likely}
        timings = harness.time_cases(cases, sets, rounds=15, regime=regime)
        fastest = min((timings[tile] for tile in likely), key=lambda timing: timing.median)
        yield from harness.baseline_records(
            {"ours": timings["ours"], "fastest of one kernel": fastest},
            bench="spmm_native_two_kernels",
            case=f"{shape[0]}x{shape[1]};{name}",
            dtype=dtype,
            tokens=tokens,
            limit=limit,
        )


@torch.no_grad()
def bench(run: harness.Run) -> Iterator[harness.Record]:
    """Records of the bar shapes."""
    cases = [
        (shape, dtype, tokens)
        for dtype in run.first([torch.bfloat16, torch.float16], 1)
        for shape in BAR_SHAPES
        for tokens in run.first(TOKENS, 3)
    ]
    for shape, dtype, tokens in run.own(cases):
        yield from bench_shape(shape, dtype, tokens, run)
    tails = (("tails", shape, tokens) for shape in BAR_SHAPES for tokens in TAIL_TOKENS)
    for _, shape, tokens in run.own([] if run.quick else tails):
        yield from bench_tails(shape, tokens, run)
    for _, tokens in run.own(("swiglu", tokens) for tokens in SWIGLU_TOKENS):
        yield from bench_swiglu(tokens, run)
    for _, tokens in run.own(("qkv", tokens) for tokens in QKV_TOKENS):
        yield from bench_qkv(tokens, run)
    split = (("two kernels", shape, tokens) for shape in users() for tokens in SPLIT_TOKENS)
    for _, shape, tokens in run.own([] if run.quick else split):
        yield from bench_two_kernels(shape, tokens, run)


if __name__ == "__main__":
    harness.main("spmm_native", __doc__, bench, parts=True)
