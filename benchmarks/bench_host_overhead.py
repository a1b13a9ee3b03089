# SPDX-License-Identifier: Apache-2.0
"""Host time of warm calls: how long the Python thread is busy with one, the GPU never the bound.

op             torch.ops.slope.linear with the layer's operand, forward only
plan op        the same with the operand of a layer that runs by a cuSPARSELt plan
kernel         the op without its kernel for the Autograd key, which stands before it and is
               Python; F.linear keeps its own
function       slope_ext.ops.linear, which leaves that out where nobody wants a gradient
layer          SLoPeLinear.forward
layer;backward forward, and backward into x and the weight

The forward ones under inference_mode, no_grad or grad, as the case says. Baselines: the same
through F.linear with the dense weight; and, without gradients, torch's own 2:4 product and layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F

import harness
from slope_ext import SLoPeLinear, ops, plan_cache

SIZE = 1024
TOKENS = 64
MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "grad": torch.enable_grad,
}


def bench_dtype(dtype: torch.dtype) -> Iterator[harness.Record]:
    """Records of one type."""
    dense = torch.randn(SIZE, SIZE, device="cuda").to(dtype).requires_grad_()
    layer = SLoPeLinear.from_dense(dense)
    by_plan = SLoPeLinear.from_dense(dense, backend="cusparselt")
    plan_cache.tune(by_plan, tokens=[TOKENS])
    operand, plan_operand = layer.operand(), by_plan.operand()
    x = torch.randn(TOKENS, SIZE, device="cuda").to(dtype)
    dy = torch.randn_like(x)
    two_of_four = layer.dense_weight().detach()
    packed = torch._cslt_compress(two_of_four)
    semi_structured = torch.sparse.to_sparse_semi_structured(two_of_four)

    def record(
        case: str, ours: harness.Timing, baseline: str, theirs: harness.Timing
    ) -> harness.Record:
        return harness.time_record(
            bench="host_overhead",
            case=f"{SIZE}x{SIZE};{case}",
            dtype=dtype,
            tokens=TOKENS,
            ours=ours,
            baseline=baseline,
            theirs=theirs,
        )

    for mode, context in MODES.items():
        with context():
            op = harness.host_time(lambda: torch.ops.slope.linear(x, *operand))
            plan_op = harness.host_time(lambda: torch.ops.slope.linear(x, *plan_operand))
            function = harness.host_time(lambda: ops.linear(x, *operand))
            whole = harness.host_time(lambda: layer(x))
            linear = harness.host_time(lambda: F.linear(x, dense))
        ops_baselines, layer_baselines = {"F.linear": linear}, {"F.linear": linear}
        if mode == "no_grad":  # torch's cost the host most of a millisecond: smaller batches
            with torch.no_grad(), torch._C._AutoDispatchBelowADInplaceOrView():
                kernel = harness.host_time(lambda: torch.ops.slope.linear(x, *operand))
            yield record(f"kernel;{mode}", kernel, "F.linear", linear)
            with torch.no_grad():
                mm = harness.host_time(lambda: torch._cslt_sparse_mm(packed, x.t()), 20, 20)
                theirs = harness.host_time(lambda: F.linear(x, semi_structured), 20, 20)
            ops_baselines["torch._cslt_sparse_mm"] = mm
            layer_baselines["SparseSemiStructuredTensor"] = theirs
        for name, timing in ops_baselines.items():
            yield record(f"op;{mode}", op, name, timing)
        yield record(f"plan op;{mode}", plan_op, "F.linear", linear)
        yield record(f"function;{mode}", function, "F.linear", linear)
        for name, timing in layer_baselines.items():
            yield record(f"layer;{mode}", whole, name, timing)

    inputs = x.clone().requires_grad_()

    def step(forward: Callable[[torch.Tensor], torch.Tensor], weight: torch.Tensor) -> None:
        torch.autograd.grad(forward(inputs), (inputs, weight), dy)

    yield record(
        "layer;backward",
        harness.host_time(lambda: step(layer, layer.weight)),
        "F.linear",
        harness.host_time(lambda: step(lambda x: F.linear(x, dense), dense)),
    )


def bench(run: harness.Run) -> Iterator[harness.Record]:
    """Records of both types."""
    for dtype in run.first([torch.bfloat16, torch.float16], 1):
        yield from bench_dtype(dtype)


if __name__ == "__main__":
    harness.main("host_overhead", __doc__, bench)
