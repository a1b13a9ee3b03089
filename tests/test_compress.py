# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

import oracle
from slope_ext import ops

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
# Whole blocks, tails of every kind: an odd multiple of 8 elements, one unit, several blocks.
SHAPES = [(1, 8), (1, 16), (3, 8), (5, 24), (192, 576), (33, 1000), (257, 4096), (0, 8), (4, 0)]


def weight_and_bitmask(shape, dtype, device):
    weight = torch.randn(shape).to(dtype).to(device)
    mask = oracle.keep_two_of_four(torch.rand(shape))
    return weight, mask, oracle.bits(mask).to(device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_compress_gathers_kept_elements(shape, dtype, device):
    weight, mask, bitmask = weight_and_bitmask(shape, dtype, device)
    values = ops.compress(weight, bitmask)
    expected = weight.cpu()[mask].view(shape[0], shape[1] // 2)
    assert torch.equal(values.cpu(), expected)
    assert values.is_contiguous()
    assert values.device == weight.device


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_decompress_scatters_and_zeroes(shape, dtype, device):
    weight, mask, bitmask = weight_and_bitmask(shape, dtype, device)
    # The caching allocator hands this block out again: what decompress leaves unwritten is NaN.
    torch.full(shape, float("nan"), dtype=dtype, device=device)
    dense = ops.decompress(ops.compress(weight, bitmask), bitmask)
    assert torch.equal(dense.cpu(), weight.cpu() * mask)
    assert not torch.signbit(dense.cpu()[~mask]).any()
    assert dense.is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES)
def test_elements_move_as_bits(dtype, device):
    """-0, infinities, subnormals and NaN payloads pass unchanged."""
    integer = torch.int16 if dtype.itemsize == 2 else torch.int32
    patterns = torch.randint(
        -(2 ** (8 * dtype.itemsize - 1)), 2 ** (8 * dtype.itemsize - 1), (64, 64)
    )
    weight = patterns.to(integer).view(dtype).to(device)
    mask = oracle.keep_two_of_four(torch.rand(64, 64))
    bitmask = oracle.bits(mask).to(device)
    values = ops.compress(weight, bitmask)
    expected = patterns.to(integer)[mask].view(64, 32)
    assert torch.equal(values.view(integer).cpu(), expected)
    dense = ops.decompress(values, bitmask)
    assert torch.equal(dense.view(integer).cpu(), patterns.to(integer) * mask)


def test_every_nibble_pair(device):
    """All 36 valid bytes, on the smallest weight that holds them."""
    valid = [n for n in range(16) if bin(n).count("1") == 2]
    table = [low | high << 4 for low in valid for high in valid]
    bitmask = torch.tensor(table, dtype=torch.uint8).view(-1, 1).to(device)
    weight = torch.arange(8.0).repeat(36, 1).to(device)
    values = ops.compress(weight, bitmask)
    expected = [[j for j in range(8) if byte >> j & 1] for byte in table]
    assert values.int().tolist() == expected


def test_layout_example():
    """The drawing in docs/layouts.md and csrc/common/sparse24.h."""
    bitmask = torch.tensor([[0x3A]], dtype=torch.uint8)
    weight = torch.tensor([[1.0, 2, 3, 4, 5, 6, 7, 8]])
    assert ops.compress(weight, bitmask).tolist() == [[2, 4, 5, 6]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_expanded_and_misaligned_inputs(dtype, device):
    weight = torch.randn(48, 80).to(dtype).to(device)
    bitmask = oracle.bits(oracle.keep_two_of_four(torch.rand(80, 48))).to(device)
    expected = ops.compress(weight.t().contiguous(), bitmask)
    assert torch.equal(ops.compress(weight.t(), bitmask), expected)

    row = weight[:1, :8]
    repeated = bitmask[:16, :1].contiguous()
    assert torch.equal(
        ops.compress(row.expand(16, 8), repeated), ops.compress(row.repeat(16, 1), repeated)
    )

    # Contiguous, but its data starts at one element past a 16-byte boundary.
    storage = torch.randn(1 + 16 * 24).to(dtype).to(device)
    shifted = storage[1:].view(16, 24)
    mask_storage = torch.empty(1 + 16 * 3, dtype=torch.uint8, device=device)
    shifted_mask = mask_storage[1:].view(16, 3)
    shifted_mask.copy_(oracle.bits(oracle.keep_two_of_four(torch.rand(16, 24))))
    values = ops.compress(shifted, shifted_mask)
    assert torch.equal(values, ops.compress(shifted.clone(), shifted_mask.clone()))
    dense = ops.decompress(values, shifted_mask)
    assert torch.equal(dense.cpu(), shifted.cpu() * oracle.unbits(shifted_mask))


def test_gradients_are_each_other(device):
    weight, mask, bitmask = weight_and_bitmask((24, 32), torch.float32, device)
    weight.requires_grad_()
    values = ops.compress(weight, bitmask)
    grad_values = torch.randn_like(values)
    values.backward(grad_values)
    assert torch.equal(weight.grad, ops.decompress(grad_values, bitmask))

    values = values.detach().requires_grad_()
    grad_dense = torch.randn_like(weight)
    ops.decompress(values, bitmask).backward(grad_dense)
    assert torch.equal(values.grad.cpu(), grad_dense.cpu()[mask].view(24, 16))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_kernels_equal_reference_bits(dtype):
    from slope_ext import _library, reference

    assert {"compress", "decompress"} <= set(_library.CUDA_KERNELS)
    for shape in [(8192, 8192), (1000, 1016), (1, 8)]:
        weight, _, bitmask = weight_and_bitmask(shape, dtype, "cuda")
        values = ops.compress(weight, bitmask)
        assert torch.equal(values, reference.compress(weight, bitmask))
        assert torch.equal(ops.decompress(values, bitmask), reference.decompress(values, bitmask))


@pytest.mark.gpu
def test_cuda_kernels_write_nothing_outside():
    """The neighbours of an output carved from one block keep their sentinel."""
    for elements in (8, 24, 16 * 1024 + 8):
        weight, _, bitmask = weight_and_bitmask((1, elements), torch.bfloat16, "cuda")
        torch.cuda.empty_cache()
        block = torch.full((1 << 20,), 42.0, dtype=torch.bfloat16, device="cuda")
        del block
        values = ops.compress(weight, bitmask)
        tail = torch.empty(0, dtype=torch.bfloat16, device="cuda").set_(
            values.untyped_storage(), 0, (values.untyped_storage().nbytes() // 2,)
        )[values.numel() :]
        assert torch.equal(values.cpu(), ops.compress(weight.cpu(), bitmask.cpu()))
        assert (tail == 42.0).all() or tail.numel() == 0


@pytest.mark.gpu
def test_cuda_kernels_follow_stream_and_graph():
    weight, _, bitmask = weight_and_bitmask((512, 512), torch.bfloat16, "cuda")
    expected = ops.compress(weight, bitmask)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        on_stream = ops.compress(weight, bitmask)
    stream.synchronize()
    assert torch.equal(on_stream, expected)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.decompress(ops.compress(weight, bitmask), bitmask)
    weight.neg_()
    graph.replay()
    assert torch.equal(captured, ops.decompress(ops.compress(weight, bitmask), bitmask))
