# SPDX-License-Identifier: Apache-2.0
"""Kernels in a row: each starts while the one before it ends, and must not read before it has."""

import pytest
import torch

from slope_ext import _packed, ops
from slope_ext._check import metadata_words

CUDA = torch.device("cuda")
OPTIONS = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}


def chain(weight, x, settle):
    """Ops of which each reads what the one before it wrote; ``settle`` is called between them."""
    rows, columns = weight.shape
    values, bitmask = ops.prune_compress(weight)
    settle()
    dense = ops.decompress(values, bitmask)
    settle()
    again = ops.compress(dense, bitmask)
    settle()
    bitmask_t = ops.prune_transposed(again, bitmask)
    settle()
    values_t = again.new_empty(columns, rows // 2)
    ops.transpose_values(again, bitmask, bitmask_t, values_t)
    settle()
    ops.double_prune_(again, bitmask, bitmask_t, values_t)
    results = [values, bitmask, dense, again, bitmask_t, values_t]
    if _packed._native_runs_here(0):
        metadata = torch.empty(metadata_words(rows, columns), dtype=torch.int32, device=CUDA)
        metadata_t = torch.empty(metadata_words(columns, rows), dtype=torch.int32, device=CUDA)
        settle()
        ops.pack_metadata(bitmask, metadata)
        settle()
        y = torch.ops.slope.linear(x, again, bitmask, metadata=metadata, backend="native")
        settle()
        ops.pack_metadata(bitmask_t, metadata_t)
        settle()
        dx = torch.ops.slope.linear(y, values_t, bitmask_t, metadata=metadata_t, backend="native")
        results += [metadata, y, metadata_t, dx]
    return results


def assert_same(ours, expected):
    for mine, theirs in zip(ours, expected, strict=True):
        assert torch.equal(mine.view(torch.uint8), theirs.view(torch.uint8))


# Grids that fill a part of the GPU, so that two are on it at once; and larger ones
SHAPES = [(64, 256), (1024, 1024), (1024, 4096), (4096, 4096), (5120, 1024)]


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("tokens", [8, 512])
def test_ops_in_a_row(shape, tokens):
    """Memory comes round with the values of other weights in it, which would be seen."""
    weights = [torch.randn(*shape, device=CUDA).bfloat16() for _ in range(4)]
    xs = [torch.randn(tokens, shape[1], device=CUDA).bfloat16() for _ in weights]
    expected = [
        chain(weight, x, torch.cuda.synchronize) for weight, x in zip(weights, xs, strict=True)
    ]
    for turn in range(40):
        i = turn % len(weights)
        torch.cuda.synchronize()
        assert_same(chain(weights[i], xs[i], lambda: None), expected[i])


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ops_in_a_row_captured(shape):
    weights = [torch.randn(*shape, device=CUDA).bfloat16() for _ in range(4)]
    x = torch.randn(64, shape[1], device=CUDA).bfloat16()
    expected = [chain(weight, x, torch.cuda.synchronize) for weight in weights]
    weight = weights[0].clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = chain(weight, x, lambda: None)
    for turn in range(40):
        i = turn % len(weights)
        weight.copy_(weights[i])
        graph.replay()
        assert_same(results, expected[i])


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(1024, 1024), (4096, 4096)], ids=str)
def test_optimizer_steps_in_a_row(shape):
    """adamw_ reads the moments and values that the adamw_ before it wrote, and its masks."""

    def run(settle):
        torch.manual_seed(0)
        weight = torch.randn(*shape, device=CUDA).bfloat16()
        grads = [torch.randn(shape[0], shape[1] // 2, device=CUDA).bfloat16() for _ in range(8)]
        values, bitmask, values_t, bitmask_t = ops.prune_compress_transposed(weight)
        first, second = (torch.zeros_like(values, dtype=torch.float32) for _ in range(2))
        state = [first], [second], [], [torch.ones((), device=CUDA)]
        sparse = [bitmask], [bitmask_t], [values_t]
        torch.cuda.synchronize()
        for grad in grads:
            ops.adamw_([values], [grad], *state, *sparse, **OPTIONS)
            settle()
            ops.double_prune_(values, bitmask, bitmask_t, values_t)
            settle()
        return [values, first, second, bitmask_t, values_t]

    assert_same(run(lambda: None), run(torch.cuda.synchronize))
