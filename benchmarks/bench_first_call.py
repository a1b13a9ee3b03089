# SPDX-License-Identifier: Apache-2.0
"""The first call of a new shape: by "auto", by a plan that is made, by a plan that is tuned.

Wall time from an idle GPU until it is idle again, of calls with token counts that were never used
before, around the one that the case names; median and interquartile range over them. Libraries are
warm: the same weight was multiplied with other token counts first, by both. Baseline: F.linear with
the dense weight and the same token counts, also for the first time.

auto   what a layer does by itself: on Hopper the own product, which makes nothing ready, elsewhere
       as ``plan``
plan   a plan of cuSPARSELt is made, with the default algorithm (policy "off")
tune   the algorithms are swept first (policy "on_first_use"; the table is forgotten between calls,
       since these counts share an entry)
all    plan_cache.tune of a layer of backend "auto" first: on Hopper the own product's kernels, then
       the algorithms and the own product beside each other
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

import harness
from model_shapes import BAR_SHAPES, Shape
from slope_ext import SLoPeLinear, plan_cache
from slope_ext.ops.spmm import Backend

TOKENS = [64, 8192]
LARGEST = (36864, 9216), 16384  # of the models in model_shapes.py
CALLS = 12  # of a case, of those that tune all a third
STEP = 16  # between token counts
ALL = "all"


def first_calls(linear: Callable[[Tensor], Tensor], xs: list[Tensor]) -> harness.Timing:
    """One call for each input, the first of its shape; the first quarter is not counted."""
    seconds = []
    for x in xs:
        plan_cache.table_path().unlink(missing_ok=True)
        plan_cache.forget_tables()
        seconds.append(harness.wall_time(lambda x=x: linear(x)))  # type: ignore[misc]
    return harness.timing_of(seconds[len(xs) // 4 :])


def bench_shape(
    shape: Shape, tokens: int, dtype: torch.dtype = torch.bfloat16
) -> Iterator[harness.Record]:
    """Records of one weight [out, in]."""
    dense = torch.randn(*shape, device="cuda").to(dtype)
    cases: list[tuple[str, Backend, plan_cache.Policy, int]] = [
        ("auto", "auto", "off", CALLS),
        ("plan", "cusparselt", "off", CALLS),
        ("tune", "cusparselt", "on_first_use", CALLS),
        (ALL, "auto", "off", CALLS // 3),
    ]
    counts = range(tokens, tokens + sum(calls for *_, calls in cases) * STEP, STEP)
    xs = [torch.randn(count, shape[1], device="cuda").to(dtype) for count in counts]
    left = iter(xs)
    for case, backend, policy, calls in cases:
        layer = SLoPeLinear.from_dense(dense, backend=backend)
        inputs = list(itertools.islice(left, calls))
        plan_cache.set_policy(policy)

        def linear(x: Tensor, case: str = case, layer: SLoPeLinear = layer) -> Tensor:
            if case == ALL:
                plan_cache.tune(layer, x.shape[0], backward=False)
            return layer(x)  # type: ignore[no-any-return]

        yield harness.time_record(
            bench="first_call",
            case=f"{shape[0]}x{shape[1]};{case}",
            dtype=dense.dtype,
            tokens=tokens,
            ours=first_calls(linear, inputs),
            baseline="F.linear",
            theirs=first_calls(lambda x: F.linear(x, dense), inputs),
        )


@torch.no_grad()
def bench(run: harness.Run) -> Iterator[harness.Record]:
    """Records of two bar shapes, the largest product and fp16; of one shape in a quick run."""
    for shape in run.first(BAR_SHAPES[:2], 1):
        for tokens in TOKENS:
            yield from bench_shape(shape, tokens)
    if not run.quick:
        yield from bench_shape(*LARGEST)
        yield from bench_shape(BAR_SHAPES[0], TOKENS[0], torch.float16)


if __name__ == "__main__":
    harness.main("first_call", __doc__, bench)
