# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from slope_ext import ops


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_values_come_first(dtype, device):
    """On every device the packed operand starts with the values, row-major, so that it can be
    the storage of the Parameter."""
    weight = torch.randn(64, 96).to(dtype).to(device)
    bitmask = ops.prune_24(weight.abs())
    values = ops.compress(weight, bitmask)
    packed = ops.pack(values, bitmask)
    assert packed.dtype == torch.uint8
    assert packed.dim() == 1
    head = packed[: values.numel() * values.element_size()]
    assert torch.equal(head.view(dtype).view_as(values), values)


def test_identity_layout_on_the_cpu():
    weight = torch.randn(8, 16)
    bitmask = ops.prune_24(weight.abs())
    values = ops.compress(weight, bitmask)
    packed = ops.pack(values, bitmask)
    assert packed.numel() == 8 * 8 * 4 + 8 * 2
    assert torch.equal(packed[-16:].view(8, 2), bitmask)


def test_strided_values_are_packed_row_major():
    values = torch.randn(16, 8).t()
    bitmask = ops.prune_24(torch.rand(8, 32))
    assert torch.equal(ops.pack(values, bitmask), ops.pack(values.contiguous(), bitmask))
