# SPDX-License-Identifier: Apache-2.0
import threading

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import oracle
import slope_ext as slope
from cases import WEIGHT_SHAPES, Calls, Operands
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


@pytest.mark.parametrize("shape", [(16, 24), (4104, 2056)])  # several chunks on a GPU
def test_operands_in_any_order(shape, device):
    """Columns first, leading dimensions that make no rows of one stride, or part of longer rows."""
    o = Operands(*shape, torch.float32, device)
    dy, x = o.randn(2, 4, shape[0]), o.randn(2, 4, shape[1])
    expected = ops.weight_grad(dy.flatten(0, 1), x.flatten(0, 1), o.bitmask)
    parts = [F.pad(t, (3, 5))[..., 3:-5] for t in (dy, x)]
    torch.testing.assert_close(ops.weight_grad(*parts, o.bitmask), expected)
    for order in (2, 0, 1), (1, 0, 2):
        back = [order.index(dim) for dim in range(3)]
        strided = [t.permute(order).contiguous().permute(back) for t in (dy, x)]
        torch.testing.assert_close(ops.weight_grad(*strided, o.bitmask), expected)


@pytest.mark.parametrize("strided", [False, True])
def test_operands_that_want_a_gradient(strided, device):
    """Under grad mode, as outside of backward; the result has no formula for one of its own."""
    o = Operands(16, 24, torch.float32, device)
    dy, x = o.randn(6, 16), o.randn(6, 24)
    if strided:
        dy, x = (t.t().contiguous().t() for t in (dy, x))
    expected = ops.weight_grad(dy, x, o.bitmask)
    grad = torch.zeros_like(expected)
    dy.requires_grad_(), x.requires_grad_()
    assert torch.equal(ops.weight_grad(dy, x, o.bitmask), expected)
    ops.weight_grad_add_(grad, dy, x, o.bitmask)
    assert torch.equal(grad, expected)
    assert not grad.requires_grad


# On a GPU with 132 multiprocessors and in bf16: one chunk, one of fewer waves than two, two of few
# rows, three, four unlike ones, nine of which the last has few rows; see csrc/ops/weight_grad.cpp.
CHUNKED_SHAPES = [(1000, 512), (5120, 5120), (200, 153600), (4104, 2056), (11008, 4096)]
CHUNKED_SHAPES += [(1032, 57352)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", CHUNKED_SHAPES)
def test_chunks_on_two_streams(shape, dtype):
    rows, columns = shape
    bitmask = ops.prune_24(torch.rand(shape, device="cuda"))
    dy = torch.randn(24, rows, device="cuda").to(dtype)
    x = torch.randn(24, columns, device="cuda").to(dtype)
    expected = ops.compress((dy.double().t() @ x.double()).float(), bitmask).to(dtype)
    for _ in range(3):
        torch.cuda._sleep(1_000_000)  # operands that are not there yet when the call returns
        late_dy, late_x = dy.clone(), x.clone()
        dw = ops.weight_grad(late_dy, late_x, bitmask)
        late_dy.fill_(float("nan"))  # reuse of memory as soon as the stream allows
        late_x.fill_(float("nan"))
        torch.testing.assert_close(dw, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(16, 24), (1000, 512), (4104, 2056)])
def test_adding_gives_the_bits_of_add(shape, dtype, device):
    o = Operands(*shape, dtype, device)
    dy, x = o.randn(9, shape[0]), o.randn(9, shape[1])
    grad = o.randn(shape[0], shape[1] // 2)
    mask = oracle.unbits(o.bitmask).to(device)
    exact = (dy.double().t() @ x.double())[mask].view(grad.shape) + grad.double()
    plain = grad + (dy.t() @ x)[mask].view(grad.shape)
    expected = grad + ops.weight_grad(dy, x, o.bitmask)
    version = grad._version
    ops.weight_grad_add_(grad, dy, x, o.bitmask)
    assert torch.equal(grad, expected)
    assert_as_accurate(grad, plain, exact)
    assert grad._version > version
    ops.weight_grad_add_(grad, dy[:0], x[:0], o.bitmask)
    assert torch.equal(grad, expected)


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("threads", [False, True])
def test_accumulation_in_place_is_autograds(rank, hooked, threads, device):
    """The same gradients, by weight_grad_add_; but a weight with a hook misses none."""
    layers = [slope.SLoPeLinear(24, 16, device=device) for _ in range(2)]
    if rank:
        for layer in layers:
            layer.add_adapter(rank)
            torch.nn.init.normal_(layer.lora_B)
    layers[1].load_state_dict(layers[0].state_dict())
    seen = []
    if hooked:
        layers[1].weight.register_hook(seen.append)
    added = []
    for _ in range(3):
        x = torch.randn(5, 24, device=device)
        layers[0](x).square().sum().backward()
        own_thread = torch.autograd.set_multithreading_enabled(threads)
        with slope.accumulate_in_place(), own_thread, Calls() as calls:
            layers[1](x).square().sum().backward()
        added.append("weight_grad_add_" in calls.names)
    for param, other in zip(*(layer.parameters() for layer in layers), strict=True):
        assert torch.equal(param.grad, other.grad)
    assert added == [False, not hooked, not hooked]
    assert len(seen) == (3 if hooked else 0)
    with Calls() as calls:
        layers[1](x).sum().backward()
    assert "weight_grad" in calls.names


def test_accumulation_in_place_leaves_compiled_passes_to_autograd(device):
    layer = slope.SLoPeLinear(24, 16, device=device)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(5, 24, device=device)
    with slope.accumulate_in_place():
        for _ in range(2):
            compiled(x).sum().backward()
    twice = layer.weight.grad.clone()
    layer.weight.grad = None
    layer(x).sum().backward()
    torch.testing.assert_close(twice, 2 * layer.weight.grad)


@pytest.mark.parametrize("rank", [0, 4])
def test_accumulation_in_place_under_checkpoints(rank, device):
    layer = slope.SLoPeLinear(24, 16, device=device)
    if rank:
        layer.add_adapter(rank)
    x = torch.randn(5, 24, device=device, requires_grad=True)
    layer(x).sum().backward()
    once = layer.weight.grad.clone()
    with slope.accumulate_in_place(), Calls() as calls:
        checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert "weight_grad_add_" in calls.names
    assert torch.equal(layer.weight.grad, 2 * once)


def test_accumulation_in_place_leaves_alone_what_autograd_would():
    """torch.autograd.grad and backward(inputs=...) write no .grad but what they were asked for."""
    layer = slope.SLoPeLinear(24, 16)
    x = torch.randn(5, 24, requires_grad=True)
    layer(x).sum().backward()
    before = layer.weight.grad.clone()
    with slope.accumulate_in_place():
        (dw,) = torch.autograd.grad(layer(x).sum(), [layer.weight])
        torch.autograd.grad(layer(x).sum(), [x])
        layer(x).sum().backward(inputs=[layer.bias])
        assert torch.equal(layer.weight.grad, before)
        assert torch.equal(dw, before)
        layer(x).sum().backward(inputs=[layer.weight])
        assert torch.equal(layer.weight.grad, before + dw)
        seen = []
        layer.weight.register_post_accumulate_grad_hook(seen.append)
        layer(x).sum().backward()
        assert len(seen) == 1


@pytest.mark.gpu
def test_chunks_are_captured():
    rows, columns = 8192, 4096  # more than one chunk
    bitmask = ops.prune_24(torch.rand(rows, columns, device="cuda"))
    dy, x = (torch.randn(64, n, device="cuda", dtype=torch.bfloat16) for n in (rows, columns))
    ops.weight_grad(dy, x, bitmask)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        dw = ops.weight_grad(dy, x, bitmask)
    for _ in range(3):
        dy.copy_(torch.randn_like(dy))
        graph.replay()
        eager = ops.weight_grad(dy, x, bitmask)
        torch.testing.assert_close(dw, eager)


def test_accumulation_in_place_from_several_threads(device):
    """None of their sums is lost; on a GPU each thread has a stream."""
    layer = slope.SLoPeLinear(1024, 1024, bias=False, device=device)
    layer.prepare()
    x = torch.ones(4, 1024, device=device)
    layer.weight.grad = torch.zeros_like(layer.weight)

    def work():
        stream = torch.cuda.Stream() if device.type == "cuda" else None
        with torch.cuda.stream(stream):
            for _ in range(60):
                layer(x).sum().backward()
            if stream is not None:
                stream.synchronize()

    if device.type == "cuda":
        torch.cuda.synchronize()
    with slope.accumulate_in_place():
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert torch.equal(layer.weight.grad, torch.full_like(layer.weight, 4.0 * 60 * 4))


@pytest.mark.gpu
def test_accumulation_in_place_is_done_for_who_called_backward():
    """It runs on the stream of the forward pass, the caller goes on on another."""
    layer = slope.SLoPeLinear(64, 64, bias=False, device="cuda")
    layer.prepare()
    x = torch.ones(4, 64, device="cuda")
    layer.weight.grad = torch.zeros_like(layer.weight)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        y = layer(x)
        torch.cuda._sleep(200_000_000)  # clocks: 0.1 s before the backward pass
    with slope.accumulate_in_place():
        y.backward(torch.ones_like(y))
    assert not side.query()
    assert bool((layer.weight.grad == 4).all())
