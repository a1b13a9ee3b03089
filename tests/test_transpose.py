# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

import oracle
from cases import TILE_SHAPES, Operands
from slope_ext import ops, reference


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


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", TILE_SHAPES)
def test_cuda_kernel_equals_reference_bits(shape, dtype):
    integer = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    limits = torch.iinfo(integer)
    patterns = torch.randint(limits.min, limits.max, shape, device="cuda", dtype=integer)
    bitmask, other = (reference.prune_24(torch.rand(shape, device="cuda")) for _ in range(2))
    values = ops.compress(patterns.view(dtype), bitmask)
    # A mask of other values: survivors, fill-ups and both.
    bitmask_t = reference.prune_transposed(ops.compress(patterns.view(dtype), other), other)
    block = torch.full((shape[1] * shape[0] // 2 + 8,), 7, dtype=integer, device="cuda")
    out = block[4:-4].view(shape[1], shape[0] // 2)  # starts at a multiple of 8 bytes only
    ops.transpose_values(values, bitmask, bitmask_t, out.view(dtype))
    expected = torch.empty(out.shape, dtype=dtype, device="cuda")
    reference.transpose_values(values, bitmask, bitmask_t, expected)
    assert torch.equal(out, expected.view(integer))
    assert (block[:4] == 7).all()
    assert (block[-4:] == 7).all()


@pytest.mark.gpu
def test_misaligned_output_is_refused():
    o = Operands(16, 24, torch.bfloat16, torch.device("cuda"))
    out = torch.empty(24 * 8 + 1, dtype=torch.bfloat16, device="cuda")[1:].view(24, 8)
    with pytest.raises(RuntimeError, match="slope::transpose_values: out must start at a multiple"):
        ops.transpose_values(o.values, o.bitmask, o.bitmask_t, out)
