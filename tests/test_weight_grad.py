# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

import oracle
from cases import WEIGHT_SHAPES, Operands
from slope_ext import ops
from slope_ext.testing import assert_as_accurate


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", WEIGHT_SHAPES)
def test_is_the_dense_gradient_at_kept_positions(shape, dtype, device):
    o = Operands(*shape, dtype, device)
    dy, x = o.randn(50, shape[0]), o.randn(50, shape[1])
    mask = oracle.unbits(o.bitmask).to(device)

    def kept(dense):
        return dense[mask].view(shape[0], shape[1] // 2)

    dw = ops.weight_grad(dy, x, o.bitmask)
    assert_as_accurate(dw, kept(dy.t() @ x), kept(dy.double().t() @ x.double()))
    assert dw.is_contiguous()


def test_sums_over_all_leading_dimensions(device):
    o = Operands(16, 24, torch.float32, device)
    dy, x = o.randn(2, 3, 4, 16), o.randn(2, 3, 4, 24)
    flat = ops.weight_grad(dy.view(24, 16), x.view(24, 24), o.bitmask)
    torch.testing.assert_close(ops.weight_grad(dy, x, o.bitmask), flat)


def test_no_tokens_give_zeros(device):
    o = Operands(16, 24, torch.float32, device)
    dw = ops.weight_grad(o.randn(0, 16), o.randn(0, 24), o.bitmask)
    assert torch.equal(dw, torch.zeros(16, 12, device=device))


def test_expanded_gradient(device):
    o = Operands(16, 24, torch.float32, device)
    dy, x = o.randn(1, 16).expand(6, 16), o.randn(6, 24)
    torch.testing.assert_close(
        ops.weight_grad(dy, x, o.bitmask), ops.weight_grad(dy.contiguous(), x, o.bitmask)
    )
