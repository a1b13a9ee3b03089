# SPDX-License-Identifier: Apache-2.0
"""The op adamw_; slope_ext.optim.AdamW around it is tested in test_optim.py."""

import pytest
import torch

from cases import Operands
from slope_ext import ops

OPTIONS = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}


def state(params, dtype):
    zeros = [torch.zeros_like(p, dtype=dtype) for p in params]
    return zeros, [z.clone() for z in zeros], [torch.tensor(0.0) for _ in params]


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("grad_scale", [None, 64.0])
def test_equals_torch_adamw(maximize, grad_scale, device):
    params = [torch.randn(24, 16, device=device), torch.randn(7, device=device)]
    twins = [p.clone().requires_grad_() for p in params]
    torch_options = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    reference = torch.optim.AdamW(twins, **torch_options, maximize=maximize)
    exp_avgs, exp_avg_sqs, steps = state(params, torch.float32)
    for _ in range(10):
        grads = [torch.randn_like(p) for p in params]
        for twin, grad in zip(twins, grads, strict=True):
            twin.grad = grad.clone()
        reference.step()
        for step in steps:
            step += 1
        factor = grad_scale or 1.0
        ops.adamw_(
            params, [g * factor for g in grads], exp_avgs, exp_avg_sqs, [], steps,
            **OPTIONS, maximize=maximize,
            grad_scale=None if grad_scale is None else torch.tensor(grad_scale, device=device),
        )  # fmt: skip
    for param, twin in zip(params, twins, strict=True):
        torch.testing.assert_close(param, twin.detach(), rtol=1e-5, atol=1e-6)


def test_masters_carry_what_bf16_rounds_away(device):
    param = torch.ones(64, 8, dtype=torch.bfloat16, device=device)
    master = param.float()
    exp_avgs, exp_avg_sqs, steps = state([param], torch.float32)
    for _ in range(100):
        steps[0] += 1
        ops.adamw_(
            [param], [torch.ones_like(param)], exp_avgs, exp_avg_sqs, [master], steps,
            **OPTIONS | {"lr": 1e-4, "weight_decay": 0.0},
        )  # fmt: skip
    torch.testing.assert_close(master, torch.full_like(master, 1 - 1e-2), rtol=0, atol=1e-4)
    assert torch.equal(param, master.bfloat16())
    assert (param < 1).all()


def test_writes_the_backward_copy(device):
    o = Operands(32, 24, torch.float32, device)
    exp_avgs, exp_avg_sqs, steps = state([o.values], torch.float32)
    steps[0] += 1
    version = o.values._version
    ops.adamw_(
        [o.values], [torch.randn_like(o.values)], exp_avgs, exp_avg_sqs, [], steps,
        [o.bitmask], [o.bitmask_t], [o.values_t], **OPTIONS,
    )  # fmt: skip
    assert o.values._version > version
    expected = torch.empty_like(o.values_t)
    ops.transpose_values(o.values, o.bitmask, o.bitmask_t, expected)
    assert torch.equal(o.values_t, expected)
