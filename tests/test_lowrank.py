# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
import torch.nn.functional as F

import oracle
from cases import LEADING, Operands
from slope_ext import ops
from slope_ext.testing import assert_as_accurate


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rank", [1, 8, 20])
@pytest.mark.parametrize("scale", [1.0, -0.25])
def test_equals_sparse_plus_low_rank(dtype, rank, scale, device):
    o = Operands(64, 96, dtype, device, rank=rank)
    x = o.randn(33, 96)
    y = ops.linear_lowrank(x, o.values, o.bitmask, o.lora_A, o.lora_B, scale, o.bias)

    def formula(x, w, a, b, bias):
        return F.linear(x, w, bias) + scale * F.linear(F.linear(x, a), b)

    operands = (x, o.dense, o.lora_A, o.lora_B, o.bias)
    assert_as_accurate(y, formula(*operands), formula(*(t.double() for t in operands)))


def test_values_beyond_fp16_survive_in_bf16(device):
    """An adapter path that goes through fp16 would overflow at 65504."""
    o = Operands(16, 24, torch.bfloat16, device, rank=4)
    x = torch.full((2, 24), 3e4, dtype=torch.bfloat16, device=device)
    y = ops.linear_lowrank(x, o.values, o.bitmask, o.lora_A.abs() + 1, o.lora_B.abs() + 1)
    assert y.isfinite().all()
    assert (y > 65504).all()


def test_first_call_is_right(device):
    """No warm-up, no tuning that accumulates into the output."""
    o = Operands(40, 48, torch.float32, device, rank=3)
    x = o.randn(11, 48)
    arguments = (x, o.values, o.bitmask, o.lora_A, o.lora_B, 1.0, o.bias)
    first, second = (ops.linear_lowrank(*arguments) for _ in range(2))
    assert torch.equal(first, second)


def test_scale_keeps_its_precision(device):
    """A factor rounded to bf16 would be 0.26 % too large, in Y and in dX."""
    o = Operands(64, 96, torch.bfloat16, device, rank=8)
    o.values.zero_()
    factors = (o.lora_A.abs(), o.lora_B.abs())
    x, dy = o.randn(512, 96).abs(), o.randn(512, 64).abs()
    y = ops.linear_lowrank(x, o.values, o.bitmask, *factors, 0.3)
    dx, _ = ops.input_grad_lowrank(dy, o.values, o.bitmask, o.bitmask_t, *factors, 0.3)
    a, b = (factor.double() for factor in factors)
    for result, exact in ((y, x.double() @ a.t() @ b.t()), (dx, dy.double() @ b @ a)):
        assert (result.double() / (0.3 * exact)).mean().item() == pytest.approx(1, abs=5e-4)


@pytest.mark.parametrize("leading", LEADING)
def test_gradients_equal_the_dense_masked_oracle(leading, device):
    dtype = torch.float64 if device.type == "cpu" else torch.float32
    o = Operands(32, 24, dtype, device, rank=5)
    x = o.randn(*leading, 24).requires_grad_()
    leaves = [t.requires_grad_() for t in (o.values, o.lora_A, o.lora_B, o.bias)]
    y = ops.linear_lowrank(
        x, o.values, o.bitmask, o.lora_A, o.lora_B, 0.5, o.bias, o.bitmask_t, o.values_t
    )
    dy = o.randn(*y.shape)
    y.backward(dy)

    mask = oracle.unbits(o.bitmask).to(device)
    mask_rc = oracle.double_prune(o.dense, mask).to(device)
    twin = [t.detach().clone().requires_grad_() for t in (x, o.dense, o.lora_A, o.lora_B, o.bias)]
    z = oracle.Product.apply(twin[0], twin[1], mask, mask_rc, twin[4])
    z = z + 0.5 * F.linear(F.linear(twin[0], twin[2]), twin[3])
    z.backward(dy)

    torch.testing.assert_close(y, z)
    torch.testing.assert_close(x.grad, twin[0].grad)
    torch.testing.assert_close(o.values.grad, twin[1].grad[mask].view(32, 12))
    for leaf, twin_leaf in zip(leaves[1:], twin[2:], strict=True):
        torch.testing.assert_close(leaf.grad, twin_leaf.grad)


def test_frozen_base_with_trained_adapter(device):
    """Fine-tuning: only A and B get gradients; X needs none and so no transposed mask."""
    o = Operands(32, 24, torch.float32, device, rank=5)
    a, b = o.lora_A.requires_grad_(), o.lora_B.requires_grad_()
    ops.linear_lowrank(o.randn(3, 24), o.values, o.bitmask, a, b).sum().backward()
    assert a.grad is not None
    assert b.grad is not None
    assert o.values.grad is None


@pytest.mark.parametrize("wanted", ["x", "values", "lora_A", "lora_B"])
def test_backward_keeps_x_and_t_only_where_it_needs_them(wanted, device):
    o = Operands(32, 24, torch.float32, device, rank=5)
    x = o.randn(3, 24)
    factors = {"x": x, "values": o.values, "lora_A": o.lora_A, "lora_B": o.lora_B}
    factors[wanted].requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = ops.linear_lowrank(x, o.values, o.bitmask, o.lora_A, o.lora_B, bitmask_t=o.bitmask_t)
    assert any(t.data_ptr() == x.data_ptr() for t in saved) == (wanted in ("values", "lora_A"))
    assert any(t.shape == (3, 5) for t in saved) == (wanted == "lora_B")
    y.sum().backward()
    assert factors[wanted].grad is not None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scale", [1.0, -0.25])
def test_input_grad_lowrank(dtype, scale, device):
    o = Operands(64, 96, dtype, device, rank=20)
    dy = o.randn(2, 5, 64)
    dx, dt = ops.input_grad_lowrank(dy, o.values, o.bitmask, o.bitmask_t, o.lora_A, o.lora_B, scale)
    pruned = o.dense * oracle.double_prune(o.dense, oracle.unbits(o.bitmask)).to(device)

    def formula(dy, w, a, b):
        return dy @ w + scale * (dy @ b) @ a

    operands = (dy, pruned, o.lora_A, o.lora_B)
    assert_as_accurate(dx, formula(*operands), formula(*(t.double() for t in operands)))
    exact = scale * (dy.double() @ o.lora_B.double())
    assert_as_accurate(dt, scale * (dy @ o.lora_B), exact)


@pytest.mark.parametrize("x_needs_grad", [True, False])
def test_sums_are_scaled_before_they_are_rounded(x_needs_grad, device):
    """scale X A^T and scale dY B fit into fp16 where X A^T and dY B do not."""
    o = Operands(32, 32, torch.float16, device, rank=8)
    a, b = (torch.full_like(factor, 100.0).requires_grad_() for factor in (o.lora_A, o.lora_B))
    x = torch.full((2, 32), 50.0, dtype=torch.float16, device=device)
    x.requires_grad_(x_needs_grad)
    weight = (torch.zeros_like(o.values), o.bitmask, a, b, 1e-3)
    y = ops.linear_lowrank(x, *weight, bitmask_t=o.bitmask_t)
    assert (x.detach() @ a.detach().t()).isinf().all()
    y.backward(torch.full_like(y, 50.0))
    for factor in (a, b):  # T and dT are 160
        torch.testing.assert_close(factor.grad, torch.full_like(factor, 2 * 160.0 * 50))


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_a_weight_of_no_columns_gives_zeros(scale, device):
    def empty(*shape, dtype=torch.float32):
        return torch.ones(*shape, dtype=dtype, device=device)

    x, values, bitmask = empty(5, 0), empty(8, 0), empty(8, 0, dtype=torch.uint8)
    y, t = torch.ops.slope.linear_lowrank(x, values, bitmask, empty(3, 0), empty(8, 3), scale)
    assert torch.equal(t, torch.zeros(5, 3, device=device))
    assert torch.equal(y, torch.zeros(5, 8, device=device))


def test_a_small_scale_keeps_fp16_gradients_finite(device):
    """scale (dY B)^T X may fit where (dY B)^T X does not."""
    o = Operands(16, 24, torch.float16, device, rank=4)
    a, b = o.lora_A.requires_grad_(), torch.full_like(o.lora_B, 8.0).requires_grad_()
    x = torch.full((64, 24), 16.0, dtype=torch.float16, device=device)
    ops.linear_lowrank(x, o.values, o.bitmask, a, b, 0.01).sum().backward()
    assert a.grad.isfinite().all()
    torch.testing.assert_close(
        a.grad, torch.full_like(a.grad, 0.01 * 128 * 16 * 64), rtol=0.01, atol=0
    )
