# SPDX-License-Identifier: Apache-2.0
"""Activation checkpointing: the same gradients, and products that are not computed twice."""

import functools

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import slope_ext as slope
from cases import Calls


def gradients(block, x, run):
    block.zero_grad()
    x.grad = None
    with Calls() as calls:
        run(block, x).square().sum().backward()
    return [x.grad, *(p.grad for p in block.parameters())], calls.names


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("activation", ["none", "relu", "swiglu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_selective_checkpointing_keeps_products(rank, activation, dtype, device):
    options = {"device": device, "dtype": dtype}
    out = 128 if activation == "swiglu" else 64
    block = nn.Sequential(
        slope.SLoPeLinear(32, out, activation=activation, **options),
        nn.GELU(),
        slope.SLoPeLinear(64, 32, **options),
    )
    for layer in (block[0], block[2]):
        if rank:
            layer.add_adapter(rank)
            nn.init.normal_(layer.lora_B)
    name = "linear_lowrank" if rank else "linear"
    x = torch.randn(5, 32, requires_grad=True, **options)
    selective = functools.partial(create_selective_checkpoint_contexts, slope.sac_save_list())
    plain, calls = gradients(block, x, lambda f, x: f(x))
    forward_calls = calls.count(name)
    everything, all_again = gradients(block, x, functools.partial(checkpoint, use_reentrant=False))
    kept, kept_calls = gradients(
        block, x, functools.partial(checkpoint, use_reentrant=False, context_fn=selective)
    )
    assert all_again.count(name) == forward_calls + 2
    assert kept_calls.count(name) == forward_calls
    for found in (everything, kept):
        for tensor, expected in zip(found, plain, strict=True):
            assert torch.equal(tensor, expected)
