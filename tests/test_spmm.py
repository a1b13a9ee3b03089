# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
import torch.nn.functional as F

import oracle
from cases import LEADING, WEIGHT_SHAPES, Operands
from slope_ext import _freshness, ops
from slope_ext.testing import assert_as_accurate

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def mask_rc(o):
    return oracle.double_prune(o.dense, oracle.unbits(o.bitmask)).to(o.dense.device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", WEIGHT_SHAPES)
@pytest.mark.parametrize("bias", [True, False])
def test_linear(shape, dtype, bias, device):
    o = Operands(*shape, dtype, device, bias=bias)
    x = o.randn(33, shape[1])
    y = ops.linear(x, o.values, o.bitmask, o.bias)
    exact = F.linear(x.double(), o.dense.double(), None if o.bias is None else o.bias.double())
    assert_as_accurate(y, F.linear(x, o.dense, o.bias), exact)
    assert y.is_contiguous()


@pytest.mark.parametrize("leading", LEADING)
def test_any_leading_dimensions(leading, device):
    o = Operands(16, 24, torch.float32, device)
    x = o.randn(*leading, 24)
    y = ops.linear(x, o.values, o.bitmask, o.bias)
    torch.testing.assert_close(y, F.linear(x, o.dense, o.bias))
    dx = ops.input_grad(y, o.values, o.bitmask, o.bitmask_t)
    assert dx.shape == x.shape
    torch.testing.assert_close(dx, y @ (o.dense * mask_rc(o)))


@pytest.mark.parametrize("tokens", [1, 7, 8, 4097])
def test_odd_token_counts(tokens, device):
    o = Operands(64, 32, torch.bfloat16, device)
    x = o.randn(tokens, 32)
    exact = F.linear(x.double(), o.dense.double(), o.bias.double())
    assert_as_accurate(
        ops.linear(x, o.values, o.bitmask, o.bias), F.linear(x, o.dense, o.bias), exact
    )


def test_strided_and_expanded_inputs(device):
    o = Operands(16, 24, torch.float32, device)
    wide = o.randn(24, 10)
    torch.testing.assert_close(
        ops.linear(wide.t(), o.values, o.bitmask), F.linear(wide.t(), o.dense)
    )
    row = o.randn(1, 24).expand(5, 24)
    torch.testing.assert_close(ops.linear(row, o.values, o.bitmask), F.linear(row, o.dense))


def test_nan_and_infinity_reach_the_outputs_they_belong_to(device):
    o = Operands(16, 24, torch.float32, device, bias=False)
    x = o.randn(3, 24)
    x[1, 5] = float("nan")
    y = ops.linear(x, o.values, o.bitmask)
    assert torch.equal(y.isnan(), F.linear(x, o.dense).isnan())
    assert not y[0].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", WEIGHT_SHAPES)
def test_input_grad(shape, dtype, device):
    o = Operands(*shape, dtype, device)
    dy = o.randn(33, shape[0])
    weight = o.dense * mask_rc(o)
    for values_t in (None, o.values_t):
        dx = ops.input_grad(dy, o.values, o.bitmask, o.bitmask_t, values_t)
        assert_as_accurate(dx, dy @ weight, dy.double() @ weight.double())


class TestCacheOfTransposedValues:
    """input_grad depends on values and masks alone, whatever is in its cache."""

    def operands(self, device):
        o = Operands(32, 24, torch.float32, device)
        o.dy = o.randn(5, 32)
        return o

    def assert_right(self, o):
        expected = o.dy @ (
            ops.decompress(o.values, o.bitmask) * oracle.unbits(o.bitmask_t).t().to(o.dy.device)
        )
        dx = ops.input_grad(o.dy, o.values, o.bitmask, o.bitmask_t, o.values_t)
        torch.testing.assert_close(dx, expected)

    @pytest.mark.parametrize(
        "change",
        [
            lambda o: o.values.mul_(2),
            lambda o: o.values.copy_(torch.randn_like(o.values)),
            lambda o: o.values.__setitem__(0, 7.0),
            lambda o: setattr(o.values, "data", torch.randn_like(o.values)),
            lambda o: setattr(o, "values", torch.randn_like(o.values)),
            lambda o: o.values_t.fill_(float("nan")),
            lambda o: setattr(o, "values_t", torch.full_like(o.values_t, 3.0)),
            lambda o: o.bitmask_t.copy_(o.bitmask_t.flip(0)),
            lambda o: o.bitmask.copy_(o.bitmask.flip(0)),
        ],
        ids=[
            "in place", "copy_", "setitem", ".data rebound", "other tensor", "cache overwritten",
            "other cache", "bitmask_t", "bitmask",
        ],
    )  # fmt: skip
    def test_follows(self, change, device):
        o = self.operands(device)
        self.assert_right(o)
        change(o)
        self.assert_right(o)

    def test_rebinding_data_twice_to_the_same_address(self, device):
        """A freed storage's address must not pass for the storage."""
        o = self.operands(device)
        self.assert_right(o)
        for _ in range(8):
            o.values.data = o.values.data * -2
            o.values.data = o.values.data / 2
            self.assert_right(o)

    def test_is_not_refreshed_without_need(self, device):
        o = self.operands(device)
        self.assert_right(o)
        version = o.values_t._version
        self.assert_right(o)
        assert o.values_t._version == version

    def test_in_inference_mode_is_always_refreshed(self, device):
        o = self.operands(device)
        with torch.inference_mode():
            o.values = o.values.clone()
            self.assert_right(o)
            o.values.mul_(2)
            self.assert_right(o)

    def test_mask_without_an_owner_is_taken_as_it_is(self, device):
        o = self.operands(device)
        mine = o.bitmask_t.clone()
        o.bitmask.copy_(o.bitmask.flip(0))
        self.assert_right(o)
        assert torch.equal(o.bitmask_t, mine)
        assert not _freshness.is_followed(o.bitmask_t)


@pytest.mark.parametrize("shape", WEIGHT_SHAPES)
@pytest.mark.parametrize("leading", [(9,), (2, 5)])
def test_gradients_equal_the_dense_masked_oracle(shape, leading, device):
    o = Operands(*shape, torch.float64 if device.type == "cpu" else torch.float32, device)
    x = o.randn(*leading, shape[1]).requires_grad_()
    values, bias = o.values.requires_grad_(), o.bias.requires_grad_()
    y = ops.linear(x, values, o.bitmask, bias, o.bitmask_t, o.values_t)
    dy = o.randn(*y.shape).transpose(0, -1).contiguous().transpose(0, -1)  # strided
    y.backward(dy)

    twin_x = x.detach().clone().requires_grad_()
    weight = o.dense.detach().clone().requires_grad_()
    twin_bias = bias.detach().clone().requires_grad_()
    mask = oracle.unbits(o.bitmask).to(device)
    twin_y = oracle.Product.apply(twin_x, weight, mask, mask_rc(o), twin_bias)
    twin_y.backward(dy)

    torch.testing.assert_close(y, twin_y)
    torch.testing.assert_close(x.grad, twin_x.grad)
    torch.testing.assert_close(values.grad, weight.grad[mask].view_as(values))
    torch.testing.assert_close(bias.grad, twin_bias.grad)


def test_only_what_needs_a_gradient_is_computed_and_saved(device):
    o = Operands(16, 24, torch.float32, device)
    x = o.randn(4, 24).requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = ops.linear(x, o.values, o.bitmask, o.bias, o.bitmask_t, o.values_t)
    assert not any(t.data_ptr() == x.data_ptr() for t in saved)
    y.sum().backward()
    assert o.values.grad is None

    values = o.values.requires_grad_()
    ops.linear(x.detach(), values, o.bitmask).sum().backward()  # no bitmask_t: dX is not wanted
    assert values.grad is not None


def test_weight_changed_between_forward_and_backward_raises(device):
    o = Operands(16, 24, torch.float32, device)
    values = o.values.requires_grad_()
    y = ops.linear(o.randn(4, 24), values, o.bitmask)
    with torch.no_grad():
        values.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_gradients_of_keyword_arguments(device):
    o = Operands(16, 24, torch.float32, device)
    x, bias = o.randn(4, 24).requires_grad_(), o.bias.requires_grad_()
    y = torch.ops.slope.linear(x, o.values, bitmask=o.bitmask, bias=bias, bitmask_t=o.bitmask_t)
    y.sum().backward()
    torch.testing.assert_close(bias.grad, torch.full_like(bias, 4.0))
    assert x.grad is not None


def test_double_backward_raises(device):
    o = Operands(16, 24, torch.float32, device)
    x = o.randn(4, 24).requires_grad_()
    y = ops.linear(x, o.values, o.bitmask, None, o.bitmask_t)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16])
def test_autocast(dtype, parameters, device):
    """Computes in the active autocast dtype; gradients arrive in the parameters' dtype."""
    if device.type == "cpu" and dtype == torch.float16 and parameters == torch.bfloat16:
        parameters = torch.float32
    o = Operands(16, 24, parameters, device)
    x = o.randn(4, 24).float().requires_grad_()
    values = o.values.requires_grad_()
    with torch.autocast(device.type, dtype):
        y = ops.linear(x, values, o.bitmask, o.bias, o.bitmask_t, o.values_t)
        z = ops.linear(y.new_ones(1, 24), values, o.bitmask)
    assert y.dtype == z.dtype == dtype
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32
    assert values.grad.dtype == parameters
    with torch.autocast(device.type, dtype):
        plain = F.linear(x, o.dense, o.bias)
    torch.testing.assert_close(y, plain, rtol=2e-2, atol=2e-2)


def test_autocast_leaves_float64_alone():
    o = Operands(16, 24, torch.float64, "cpu")
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.linear(o.randn(4, 24), o.values, o.bitmask).dtype == torch.float64


@pytest.mark.gpu
def test_cuda_graph_replays_follow_the_weight():
    """Captured forward and backward use the weight as it is at each replay."""
    o = Operands(64, 32, torch.float32, torch.device("cuda"))
    x = o.randn(16, 32).requires_grad_()
    values = o.values.requires_grad_()

    def step():
        x.grad = values.grad = None
        ops.linear(x, values, o.bitmask, None, o.bitmask_t, o.values_t).sum().backward()

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for factor in (1.0, 2.0, -3.0):
        with torch.no_grad():
            values.mul_(factor)
        graph.replay()
        weight = ops.decompress(values, o.bitmask) * oracle.unbits(o.bitmask_t).t().cuda()
        torch.testing.assert_close(x.grad, torch.ones(16, 64, device="cuda") @ weight.detach())
