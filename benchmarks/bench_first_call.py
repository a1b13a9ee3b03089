# SPDX-License-Identifier: Apache-2.0
"""The first call of a new shape: what making a plan costs, and what tuning it costs.

Wall time from an idle GPU until it is idle again, of calls with token counts that were never used
before, around the one that the case names; median and interquartile range over them. Libraries are
warm: the same weight was multiplied with other token counts first, by both. ``plan`` makes a plan
with the default algorithm (policy "off"), ``tune`` sweeps the algorithms first (policy
"on_first_use"; the table is forgotten between calls, since these counts share an entry). Baseline:
F.linear with the dense weight and the same token counts, also for the first time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

import harness
from model_shapes import BAR_SHAPES, Shape
from slope_ext import SLoPeLinear, plan_cache

TOKENS = [64, 8192]
CALLS = 12
WARM_CALLS = 3
STEP = 16  # between token counts


def first_calls(linear: Callable[[Tensor], Tensor], xs: list[Tensor]) -> harness.Timing:
    """One call for each input, the first of its shape; the first WARM_CALLS are not counted."""
    seconds = []
    for x in xs:
        plan_cache.table_path().unlink(missing_ok=True)
        plan_cache.forget_tables()
        seconds.append(harness.wall_time(lambda x=x: linear(x)))  # type: ignore[misc]
    return harness.timing_of(seconds[WARM_CALLS:])


def bench_shape(shape: Shape, tokens: int) -> Iterator[harness.Record]:
    """Records of one weight [out, in] in bf16."""
    dense = torch.randn(*shape, device="cuda").bfloat16()
    layer = SLoPeLinear.from_dense(dense)
    counts = range(tokens, tokens + 2 * CALLS * STEP, STEP)
    xs = [torch.randn(count, shape[1], device="cuda").bfloat16() for count in counts]
    cases: list[tuple[str, plan_cache.Policy, list[Tensor]]] = [
        ("plan", "off", xs[:CALLS]),
        ("tune", "on_first_use", xs[CALLS:]),
    ]
    for case, policy, inputs in cases:
        plan_cache.set_policy(policy)
        yield harness.time_record(
            bench="first_call",
            case=f"{shape[0]}x{shape[1]};{case}",
            dtype=dense.dtype,
            tokens=tokens,
            ours=first_calls(layer, inputs),
            baseline="F.linear",
            theirs=first_calls(lambda x: F.linear(x, dense), inputs),
        )


@torch.no_grad()
def bench(run: harness.Run) -> Iterator[harness.Record]:
    """Records of two bar shapes, or one in a quick run."""
    for shape in run.first(BAR_SHAPES[:2], 1):
        for tokens in TOKENS:
            yield from bench_shape(shape, tokens)


if __name__ == "__main__":
    harness.main("first_call", __doc__, bench)
