# SPDX-License-Identifier: Apache-2.0
"""Two GPUs in one process."""

import threading

import pytest
import torch
import torch.nn.functional as F

import slope_ext as slope
from slope_ext import _packed, ops

pytestmark = pytest.mark.gpu
DEVICES = ["cuda:0", "cuda:1"]


@pytest.fixture(autouse=True)
def _two_gpus():
    if torch.cuda.device_count() < 2:
        pytest.skip("for two GPUs")


def layer_on(device, backend, weight):
    layer = slope.SLoPeLinear.from_dense(weight.to(device).requires_grad_(), backend=backend)
    layer.add_adapter(8)
    with torch.no_grad():
        layer.lora_A.fill_(0.125)
        layer.lora_B.fill_(0.25)
    return layer


@pytest.mark.parametrize("backend", ["native", "cusparselt"])
def test_layers_of_two_devices(backend):
    """Each in a thread of its own and in turns, whatever the current device is."""
    weight = torch.randn(256, 512).bfloat16()
    if _packed.backend_of(256, 512, weight.dtype, torch.device("cuda:0"), backend) != backend:
        pytest.skip(f"{backend} is not for this GPU")
    xs = [torch.randn(tokens, 512).bfloat16() for tokens in (1, 64, 300)]
    layers = [layer_on(device, backend, weight) for device in DEVICES]
    results, errors = {}, []

    def work(number, current):
        try:
            run(number, current)
        except Exception as error:
            errors.append(error)

    def run(number, current):
        layer, device = layers[number], DEVICES[number]
        with torch.cuda.device(current):
            for i, x in enumerate(xs):
                leaf = x.to(device).requires_grad_()
                y = layer(leaf)
                grads = torch.autograd.grad(y, (leaf, layer.weight), torch.ones_like(y))
                results[number, current, i] = [t.cpu() for t in (y, *grads)]

    for current in range(2):
        threads = [threading.Thread(target=work, args=(n, current)) for n in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not errors
    assert len(results) == 4 * len(xs)
    for (_, _, i), found in results.items():
        for ours, theirs in zip(found, results[0, 0, i], strict=True):
            assert torch.equal(ours, theirs)
    dense = layers[0].dense_weight().detach().double().cpu()
    y = F.linear(xs[2].double(), dense) + 8 * 0.25 * 0.125 * xs[2].double().sum(1, keepdim=True)
    torch.testing.assert_close(results[1, 0, 2][0].double(), y, rtol=0.02, atol=0.1)


def test_ops_run_where_their_operands_are():
    weight = torch.randn(136, 72)
    values, bitmask, values_t, bitmask_t = ops.prune_compress_transposed(weight)
    with torch.cuda.device(0):
        moved = weight.to("cuda:1")
        found = ops.prune_compress_transposed(moved)
    for ours, theirs in zip(found, (values, bitmask, values_t, bitmask_t), strict=True):
        assert ours.device == moved.device
        assert torch.equal(ours.cpu(), theirs)
