# SPDX-License-Identifier: Apache-2.0
"""adamw_ with backward copies over all linear weights of a transformer layer, against dense AdamW.

Limit: bytes that must move over the bandwidth of a large copy in the same run. Of a value of b
bytes: values 2b, gradient b, two moments of m bytes 4m, copy b and 1/2 of masks. Baselines, on the
dense twin with the same moments: the formula compiled by torch.compile; and torch.optim.AdamW's
fused kernel, which keeps moments in the dtype of the parameters.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import harness
from model_shapes import MODELS, Shape
from slope_ext import ops
from slope_ext._check import dtype_name

OPTIONS: dict[str, Any] = {
    "lr": 1e-3,
    "beta1": 0.9,
    "beta2": 0.95,
    "eps": 1e-8,
    "weight_decay": 0.1,
}
CASES = ["LLaMA-3-8B", "OPT-13B"]


def layer_shapes(model: str) -> list[Shape]:
    """Shapes of the linear layers of a transformer layer of a model."""
    return [shape for names, shape in MODELS[model].items() for _ in names.split(", ")]


def compiled_adamw(
    params: list[Tensor], grads: list[Tensor], firsts: list[Tensor], seconds: list[Tensor]
) -> None:
    """The formula of torch.optim.AdamW in fp32, for torch.compile."""
    correction1, correction2 = 1 - OPTIONS["beta1"] ** 10, 1 - OPTIONS["beta2"] ** 10
    for param, grad, first, second in zip(params, grads, firsts, seconds, strict=True):
        g = grad.float()
        m = torch.lerp(first.float(), g, 1 - OPTIONS["beta1"])
        v = OPTIONS["beta2"] * second.float() + (1 - OPTIONS["beta2"]) * g * g
        root = v.sqrt() / correction2**0.5 + OPTIONS["eps"]
        weight = param.float() * (1 - OPTIONS["lr"] * OPTIONS["weight_decay"])
        first.copy_(m)
        second.copy_(v)
        param.copy_(weight - OPTIONS["lr"] / correction1 * m / root)


def sparse_step(shapes: list[Shape], moments: torch.dtype) -> harness.Case:
    """adamw_ over weights of these shapes; one buffer set, since they exceed the L2 cache."""
    forms_of_all = [
        ops.prune_compress_transposed(torch.randn(*shape, device="cuda").bfloat16())
        for shape in shapes
    ]
    values, bitmasks, values_t, bitmasks_t = map(list, zip(*forms_of_all, strict=True))
    grads = [torch.randn_like(v) for v in values]
    firsts, seconds = ([torch.rand_like(v, dtype=moments) for v in values] for _ in range(2))
    steps = [torch.full((), 10.0, device="cuda") for _ in values]
    lists: Any = (values, grads, firsts, seconds, [], steps, bitmasks, bitmasks_t, values_t)
    return lambda _: ops.adamw_(*lists, **OPTIONS)


def dense_steps(shapes: list[Shape], moments: torch.dtype) -> dict[str, harness.Case]:
    """The baselines of these moments, each compiled already."""
    params = [torch.randn(*shape, device="cuda").bfloat16() for shape in shapes]
    grads = [torch.randn_like(p) for p in params]
    firsts, seconds = ([torch.rand_like(p, dtype=moments) for p in params] for _ in range(2))
    compiled = torch.compile(compiled_adamw)
    compiled(params, grads, firsts, seconds)
    steps: dict[str, harness.Case] = {
        "torch.compile, dense": lambda _: compiled(params, grads, firsts, seconds)
    }
    if moments == torch.bfloat16:
        counts = [torch.full((), 10.0, device="cuda") for _ in params]
        lists: Any = (params, grads, firsts, seconds, [], counts)
        options = OPTIONS | {"amsgrad": False, "maximize": False}
        steps["torch fused AdamW, dense"] = lambda _: torch._fused_adamw_(*lists, **options)
    return steps


@torch.no_grad()
def bench(run: harness.Run) -> Iterator[harness.Record]:
    """Records of every model and both types of moments."""
    for model in run.first(CASES, 1):
        shapes = layer_shapes(model)
        for moments in (torch.float32, torch.bfloat16):
            cases = {"ours": sparse_step(shapes, moments)} | dense_steps(shapes, moments)
            timings = harness.time_cases(cases, sets=1)
            values = sum(rows * columns for rows, columns in shapes) / 2
            moved = values * (2 * 2 + 2 + 4 * moments.itemsize + 2 + 0.5)
            yield from harness.baseline_records(
                timings,
                bench="adamw",
                case=f"{model};moments={dtype_name(moments)}",
                dtype=torch.bfloat16,
                tokens=0,
                limit=run.limit(moved),
            )


if __name__ == "__main__":
    harness.main("adamw", __doc__, bench)
