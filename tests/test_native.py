# SPDX-License-Identifier: Apache-2.0
"""The own sparse product for sm_90: its metadata, its results, and layers that run on it."""

import pytest
import torch
import torch.nn.functional as F

import oracle
import slope_ext as slope
from cases import Operands
from slope_ext import ops
from slope_ext._check import metadata_words

CUDA = torch.device("cuda")
HALF = [torch.bfloat16, torch.float16]
# Whole tiles; odd numbers of stages, of blocks of 64 rows, of groups of 8 rows; one stage.
SHAPES = [(256, 256), (64, 32), (1088, 96), (200, 1056), (8, 544), (320, 160), (4104, 288)]
WORD_SHAPES = [(64, 256), (64, 32), (8, 96), (136, 320), (200, 544)]


def random_bitmask(rows, columns, device="cpu"):
    return ops.prune_24(torch.randn(rows, columns)).to(device)


@pytest.mark.parametrize("shape", WORD_SHAPES)
def test_words_are_those_of_the_drawing(shape, device):
    """Word [b, q, l, s]: nibbles of groups 64q + 16s + 4t on, of row 64b + 16w + g and the row 8
    below, where l = 32w + 4g + t."""
    rows, columns = shape
    bitmask = random_bitmask(rows, columns, device)
    words = torch.empty(metadata_words(rows, columns), dtype=torch.int32, device=device)
    ops.pack_metadata(bitmask, words)
    kept = oracle.unbits(bitmask.cpu()).tolist()

    def nibble(row, group):
        if row >= rows or 4 * group >= columns:
            return 0x4
        first, last = (i for i in range(4) if kept[row][4 * group + i])
        return first | last << 2

    found = words.cpu().view(-1, -(-columns // 256), 128, 4).long() % (1 << 32)
    last_b, last_q = found.shape[0] - 1, found.shape[1] - 1
    places = [(0, 0, 0, 0), (0, 0, 127, 3), (0, last_q, 37, 2), (last_b, 0, 93, 1)]
    for b, q, lane, s in [*places, (last_b, last_q, 64, 0)]:
        row, group = 64 * b + 16 * (lane // 32) + lane % 32 // 4, 64 * q + 16 * s + 4 * (lane % 4)
        nibbles = [nibble(row + 8 * half, group + i) for half in range(2) for i in range(4)]
        assert found[b, q, lane, s] == sum(n << 4 * i for i, n in enumerate(nibbles))


def skip_unless_it_runs():
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("for GPUs of compute capability 9.0")


@pytest.mark.gpu
@pytest.mark.parametrize("shape", WORD_SHAPES)
def test_words_of_kernel_and_reference_are_the_same(shape):
    bitmask = random_bitmask(*shape)
    expected = torch.empty(metadata_words(*shape), dtype=torch.int32)
    ops.pack_metadata(bitmask, expected)
    words = torch.empty_like(expected, device=CUDA)
    ops.pack_metadata(bitmask.to(CUDA), words)
    assert torch.equal(words.cpu(), expected)


def assert_rounded(y, expected, sums):
    """At most half an ulp off the exact result, and what fp32 sums err by."""
    bound = 0.51 * torch.finfo(y.dtype).eps * expected.abs() + 2e-6 * sums + 1e-30
    off = (y.double() - expected).abs()
    assert bool((off <= bound).all()), (
        f"{float((off / bound).nan_to_num(1e9).max()):.3f} of the bound"
    )


def with_words(o):
    words = torch.empty(metadata_words(*o.dense.shape), dtype=torch.int32, device=CUDA)
    ops.pack_metadata(o.bitmask, words)
    return words


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("tokens", [1, 7, 64, 200, 513])
@pytest.mark.parametrize("shape", SHAPES)
def test_linear(shape, tokens, dtype):
    skip_unless_it_runs()
    o = Operands(*shape, dtype, CUDA)
    x = o.randn(tokens, shape[1])
    exact = F.linear(x.double(), o.dense.double(), o.bias.double())
    sums = F.linear(x.double().abs(), o.dense.double().abs(), o.bias.double().abs())
    words = with_words(o)
    for metadata in (words, None):
        y = ops.linear(x, o.values, o.bitmask, o.bias, metadata=metadata, backend="native")
        assert_rounded(y, exact, sums)
    without = ops.linear(x, o.values, o.bitmask, metadata=words)
    assert_rounded(without, exact - o.bias.double(), sums)


@pytest.mark.gpu
@pytest.mark.parametrize("rank", [1, 8, 12, 33, 64, 144, 256])
def test_linear_lowrank(rank):
    skip_unless_it_runs()
    o = Operands(320, 544, torch.bfloat16, CUDA)
    x, a, b = o.randn(77, 544), o.randn(rank, 544) / 24, o.randn(320, rank)
    y, t = torch.ops.slope.linear_lowrank(
        x, o.values, o.bitmask, a, b, 0.5, o.bias, backend="native"
    )
    assert torch.equal(t, F.linear(x, a))
    scaled = (0.5 * t).double()
    exact = F.linear(x.double(), o.dense.double(), o.bias.double()) + F.linear(scaled, b.double())
    sums = F.linear(x.double().abs(), o.dense.double().abs(), o.bias.double().abs())
    assert_rounded(y, exact, sums + F.linear(scaled.abs(), b.double().abs()))


@pytest.mark.gpu
def test_results_are_the_same_bits_every_time():
    skip_unless_it_runs()
    o = Operands(1280, 2048, torch.bfloat16, CUDA)
    x, words = o.randn(3000, 2048), with_words(o)
    first = ops.linear(x, o.values, o.bitmask, o.bias, metadata=words)
    for _ in range(5):
        assert torch.equal(ops.linear(x, o.values, o.bitmask, o.bias, metadata=words), first)


@pytest.mark.gpu
def test_nan_and_infinity_reach_what_keeps_their_column():
    """Other tokens never; other features of the token neither, unlike in a dense product, whose
    zeros times NaN are NaN."""
    skip_unless_it_runs()
    o = Operands(192, 256, torch.float16, CUDA, bias=False)
    x = o.randn(40, 256)
    x[3, 17], x[21, 200] = float("nan"), float("inf")
    y = ops.linear(x, o.values, o.bitmask, backend="native")
    kept = oracle.unbits(o.bitmask.cpu()).to(CUDA)
    assert torch.equal(y[3].isnan(), kept[:, 17])
    assert torch.equal(~y[21].isfinite(), kept[:, 200])
    others = [i for i in range(40) if i not in (3, 21)]
    assert y[others].isfinite().all()


@pytest.mark.gpu
def test_strided_and_unaligned_operands():
    skip_unless_it_runs()
    o = Operands(64, 96, torch.bfloat16, CUDA)
    block = o.randn(9, 200)
    x = block[:, 3:99]
    expected = ops.linear(x.contiguous(), o.values, o.bitmask, o.bias, backend="native")
    assert torch.equal(ops.linear(x, o.values, o.bitmask, o.bias, backend="native"), expected)
    flat = o.randn(9 * 96 + 1)[1:].copy_(x.reshape(-1))
    unaligned = ops.linear(flat.view(9, 96), o.values, o.bitmask, o.bias, backend="native")
    assert torch.equal(unaligned, expected)
    three = ops.linear(x.reshape(3, 3, 96), o.values, o.bitmask, o.bias, backend="native")
    assert torch.equal(three.view(9, 64), expected)
    assert ops.linear(x[:0], o.values, o.bitmask, o.bias, backend="native").shape == (0, 64)


@pytest.mark.gpu
def test_what_the_kernel_does_not_take_is_an_error():
    skip_unless_it_runs()
    o = Operands(64, 48, torch.bfloat16, CUDA)
    with pytest.raises(RuntimeError, match=r"slope::linear: values must be .* multiples of 32"):
        ops.linear(o.randn(8, 48), o.values, o.bitmask, backend="native")
    words = torch.empty(7, dtype=torch.int32, device=CUDA)
    with pytest.raises(RuntimeError, match="slope::linear: metadata must be contiguous int32"):
        ops.linear(o.randn(8, 48), o.values, o.bitmask, metadata=words)


# ---- layers --------------------------------------------------------------------------------------


def twins(out, in_, **options):
    """A layer on the own product and the same on the CPU in fp64."""
    torch.manual_seed(1)
    layer = slope.SLoPeLinear(in_, out, device=CUDA, dtype=torch.bfloat16, **options)
    reference = slope.SLoPeLinear(in_, out, dtype=torch.float64)
    reference.load_state_dict({k: v.cpu() for k, v in layer.state_dict().items()})
    return layer, reference


@pytest.mark.gpu
@pytest.mark.parametrize("backward_copy", ["cached", "recompute"])
@pytest.mark.parametrize("adapter", [False, True])
def test_layer_trains_on_it(adapter, backward_copy):
    skip_unless_it_runs()
    layer, reference = twins(128, 192, backward_copy=backward_copy)
    if adapter:
        layer.add_adapter(16, scale=0.5)
        torch.nn.init.normal_(layer.lora_B, std=0.1)
        reference.load_state_dict({k: v.cpu() for k, v in layer.state_dict().items()})
    assert layer.weight_metadata.dtype == torch.int32
    address = layer.weight.data_ptr()
    x = torch.randn(50, 192, device=CUDA, dtype=torch.bfloat16, requires_grad=True)
    other_x = x.detach().cpu().double().requires_grad_()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(2):
        dy = torch.randn(50, 128, device=CUDA, dtype=torch.bfloat16)
        x.grad = other_x.grad = None
        layer(x).backward(dy)
        reference.load_state_dict({k: v.cpu() for k, v in layer.state_dict().items()})
        reference.set_transposed_mask(layer.transposed_mask.cpu())
        reference.zero_grad()
        y = reference(other_x)
        y.backward(dy.cpu().double())
        pairs = [(layer(x), y), (x.grad, other_x.grad)]
        pairs += [(layer.weight.grad, reference.weight.grad)]
        if adapter:
            pairs += [(layer.lora_A.grad, reference.lora_A.grad)]
        for ours, theirs in pairs:
            error = (ours.cpu().double() - theirs).norm() / theirs.norm()
            assert error < 1e-2
        optimizer.step()
        optimizer.zero_grad()
    assert layer.weight.data_ptr() == address, "nothing moves for this product"


@pytest.mark.gpu
def test_metadata_follows_the_mask():
    skip_unless_it_runs()
    layer, _ = twins(64, 64)
    x = torch.randn(16, 64, device=CUDA, dtype=torch.bfloat16)
    layer.weight_bitmask.copy_(layer.weight_bitmask.flip(0))
    torch.testing.assert_close(
        layer(x), F.linear(x, layer.dense_weight(), layer.bias), rtol=2e-2, atol=2e-2
    )


@pytest.mark.gpu
def test_captured_step_replays():
    skip_unless_it_runs()
    layer, _ = twins(128, 256)
    x = torch.randn(64, 256, device=CUDA, dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn(64, 128, device=CUDA, dtype=torch.bfloat16)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            torch.autograd.grad(layer(x), (x, layer.weight), dy)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
        dx, dw = torch.autograd.grad(y, (x, layer.weight), dy)
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
        layer.weight.mul_(-0.5)
    graph.replay()
    expected = layer(x)
    torch.testing.assert_close(y, expected, rtol=0, atol=0)
    for captured, eager in zip(
        (dx, dw), torch.autograd.grad(expected, (x, layer.weight), dy), strict=True
    ):
        torch.testing.assert_close(captured, eager, rtol=0, atol=0)
