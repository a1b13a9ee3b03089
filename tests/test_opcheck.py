# SPDX-License-Identifier: Apache-2.0
"""torch.library.opcheck of every op: schema, autograd registration, fake, AOT dispatch."""

import pytest
import torch
from torch.library import opcheck

from cases import Operands
from slope_ext import _library, ops
from slope_ext._check import metadata_bytes, metadata_words


def samples(device, dtype=torch.float32):
    """op name -> list of (args, kwargs)."""
    o = Operands(32, 64, dtype, device)
    x, dy = o.randn(2, 3, 64), o.randn(2, 3, 32)
    weight = (o.values, o.bitmask)
    copy = (o.bitmask_t, o.values_t)
    trained = (o.values.clone().requires_grad_(), o.bitmask)
    bias = o.bias.clone().requires_grad_()
    factors = tuple(t.clone().requires_grad_() for t in (o.lora_A, o.lora_B))
    x_grad = x.clone().requires_grad_()
    # A cache that input_grad finds out of date is written, which its schema leaves unsaid.
    fresh = torch.empty_like(o.values_t)
    torch.ops.slope.transpose_values(*weight, o.bitmask_t, fresh)

    # On CUDA what is packed is what the sparse tensor cores take.
    fp16 = dtype == torch.float32 and device != "cpu"
    packable = (o.values.half() if fp16 else o.values, o.bitmask)
    metadata = metadata_bytes(*o.dense.shape, torch.device(device))
    words = torch.zeros(metadata_words(*o.dense.shape), dtype=torch.int32, device=device)

    ops.pack_metadata(o.bitmask, words)
    own = {"metadata": words}  # that of the own kernel; on a CPU nobody reads it
    if dtype == torch.bfloat16:
        own["backend"] = "native"

    def adamw(sparse):
        zeros = [torch.zeros_like(o.values) for _ in range(3)]
        lists = [[o.bitmask], [o.bitmask_t], [fresh.clone()]] if sparse else [[], [], []]
        args = ([o.values.clone()], [zeros[0] + 1], [zeros[1]], [zeros[2]], [])
        options = {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1}
        return (*args, [torch.tensor(1.0)], *lists), options

    return {
        "prune_24": [((o.dense.abs(),), {})],
        "prune_transposed": [(weight, {})],
        "prune_compress": [((o.dense,), {})],
        "prune_compress_transposed": [((o.dense,), {})],
        "double_prune_": [((*weight, o.bitmask_t.clone(), torch.zeros_like(fresh)), {})],
        "compress": [
            ((o.dense, o.bitmask), {}),
            ((o.dense.clone().requires_grad_(), o.bitmask), {}),
        ],
        "decompress": [(weight, {}), (trained, {})],
        "transpose_values": [((*weight, o.bitmask_t, torch.zeros_like(fresh)), {})],
        "pack": [(packable, {})],
        "pack_metadata": [
            ((o.bitmask, ops.pack(*packable)[-metadata:].clone()), {}),
            ((o.bitmask, words), {}),
        ],
        "linear": [
            ((x, *weight), {}),
            ((x_grad, *trained, bias, o.bitmask_t), {}),
            ((x_grad, *trained, bias, o.bitmask_t, fresh), {}),
            ((x, *trained), {"bias": bias}),
            ((x_grad, *trained, bias, *copy[:1], fresh), {"activation": "relu"}),
            ((x, *weight, o.bias), {"activation": "swiglu"}),
            ((x, *weight, o.bias), own),
        ],
        "input_grad": [((dy, *weight, o.bitmask_t), {}), ((dy, *weight, o.bitmask_t, fresh), {})],
        "weight_grad": [((dy, x, o.bitmask), {})],
        "weight_grad_add_": [((torch.ones_like(o.values), dy, x, o.bitmask), {})],
        "linear_lowrank": [
            ((x, *weight, o.lora_A, o.lora_B), {}),
            ((x_grad, *trained, *factors, 0.5, bias, *copy[:1], fresh), {}),
            ((x_grad, *trained, *factors, 0.5, bias, *copy[:1]), {"activation": "relu"}),
            ((x, *weight, o.lora_A, o.lora_B), {"activation": "swiglu"}),
            ((x, *weight, o.lora_A, o.lora_B, 0.5), own),
        ],
        "input_grad_lowrank": [
            ((dy, *weight, o.bitmask_t, o.lora_A, o.lora_B, 0.5), {}),
            ((dy, *weight, o.bitmask_t, o.lora_A, o.lora_B, 1.0, fresh), {}),
        ],
        "adamw_": [adamw(sparse=False), adamw(sparse=True)],
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # bf16: sparse products
@pytest.mark.parametrize("name", _library.OPS)
def test_opcheck(name, dtype, device):
    for args, kwargs in samples(device, dtype)[name]:
        results = opcheck(getattr(torch.ops.slope, name).default, args, kwargs)
        assert set(results.values()) == {"SUCCESS"}


def test_every_op_has_a_sample():
    assert set(samples("cpu")) == set(_library.OPS)


@pytest.mark.parametrize("name", ["linear", "linear_lowrank", "compress", "decompress"])
def test_gradcheck(name):
    """Against finite differences, in fp64; linear through an undamaged transposed copy."""
    o = Operands(8, 8, torch.float64, "cpu", rank=2)
    # A weight that double pruning leaves whole: backward is then the exact gradient.
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[0::2, 0::2] = mask[1::2, 1::2] = True
    from slope_ext import ops, reference

    bitmask = reference.pack_bits(mask)
    values = ops.compress(o.randn(8, 8), bitmask).requires_grad_()
    bitmask_t = ops.prune_transposed(values.detach(), bitmask)
    x, bias = o.randn(3, 8).requires_grad_(), o.bias.requires_grad_()
    a, b = o.lora_A.requires_grad_(), o.lora_B.requires_grad_()
    function, inputs = {
        "linear": (lambda x, v, c: ops.linear(x, v, bitmask, c, bitmask_t), (x, values, bias)),
        "linear_lowrank": (
            lambda x, v, a, b, c: ops.linear_lowrank(x, v, bitmask, a, b, 0.5, c, bitmask_t),
            (x, values, a, b, bias),
        ),
        "compress": (lambda d: ops.compress(d, bitmask), (o.randn(8, 8).requires_grad_(),)),
        "decompress": (lambda v: ops.decompress(v, bitmask), (values,)),
    }[name]
    assert torch.autograd.gradcheck(function, inputs)
