# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

import oracle
from slope_ext import ops


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(8, 8), (16, 8), (192, 64), (40, 1016), (344, 128)])
def test_equals_transposed_double_pruned_weight(shape, dtype, device):
    weight = torch.randn(shape).to(dtype).to(device)
    bitmask = ops.prune_24(weight.abs())
    values = ops.compress(weight, bitmask)
    bitmask_t = ops.prune_transposed(values, bitmask)
    out = torch.full((shape[1], shape[0] // 2), float("nan"), dtype=dtype, device=device)
    assert ops.transpose_values(values, bitmask, bitmask_t, out) is None

    mask_rc = oracle.double_prune(weight, oracle.unbits(bitmask))
    expected = (weight.cpu() * mask_rc).t()
    assert torch.equal(ops.decompress(out, bitmask_t).cpu(), expected)


def test_marks_its_output_as_written(device):
    weight = torch.randn(16, 16, device=device)
    bitmask = ops.prune_24(weight.abs())
    values = ops.compress(weight, bitmask)
    bitmask_t = ops.prune_transposed(values, bitmask)
    out = torch.empty(16, 8, device=device)
    version = out._version
    ops.transpose_values(values, bitmask, bitmask_t, out)
    assert out._version > version


def test_mask_that_is_not_the_layers_own(device):
    """Static masks: a mask chosen from other values serves as it is."""
    weight, other = torch.randn(2, 32, 24, device=device)
    bitmask = ops.prune_24(weight.abs())
    bitmask_t = ops.prune_transposed(ops.compress(other, bitmask), bitmask)
    values = ops.compress(weight, bitmask)
    out = torch.empty(24, 16, device=device)
    ops.transpose_values(values, bitmask, bitmask_t, out)
    expected = weight.cpu() * oracle.unbits(bitmask) * oracle.unbits(bitmask_t).t()
    assert torch.equal(ops.decompress(out, bitmask_t).cpu(), expected.t())
