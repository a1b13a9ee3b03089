# SPDX-License-Identifier: Apache-2.0
import ctypes

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import oracle
from cases import Operands
from slope_ext import _C, _library, _packed, ops
from slope_ext._check import metadata_bytes

HALF = [torch.float16, torch.bfloat16]
# Whole tiles of the hardware, and what the library pads.
PACKED_SHAPES = [
    (64, 32), (64, 64), (256, 256), (192, 576), (1088, 96), (16, 16), (80, 48), (144, 2064),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_values_come_first(dtype, device):
    """On every device the packed operand starts with the values, row-major, so that it can be
    the storage of the Parameter."""
    if device.type == "cuda" and dtype == torch.float32:
        pytest.skip("no sparse tensor cores for fp32")
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


def test_strided_values_are_packed_row_major(device):
    dtype = torch.float32 if device.type == "cpu" else torch.float16
    values = torch.randn(32, 16, device=device).to(dtype).t()
    bitmask = ops.prune_24(torch.rand(16, 64, device=device))
    assert torch.equal(ops.pack(values, bitmask), ops.pack(values.contiguous(), bitmask))


def test_metadata_alone_is_that_of_the_packed_operand(device):
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    o = Operands(128, 96, dtype, device)
    metadata = torch.zeros(metadata_bytes(128, 96, device), dtype=torch.uint8, device=device)
    version = metadata._version
    ops.pack_metadata(o.bitmask, metadata)
    assert torch.equal(metadata, ops.pack(o.values, o.bitmask)[-metadata.numel() :])
    assert metadata._version > version


def sm90_place(r, g, rows, columns):
    """Where the layout of sm_90 (docs/layouts.md) has group g of row r, in nibbles."""
    return (
        (r >> 6) * 16 * columns
        + (g >> 3) * 512
        + ((r >> 4) & 3) * 128
        + (r & 7) * 16
        + ((g >> 1) & 1) * 8
        + (g & 1) * 4
        + ((g >> 2) & 1) * 2
        + ((r >> 3) & 1)
    )


def sm80_place(r, g, rows, columns):
    """The same of sm_80."""
    return (
        ((g >> 4) * (rows >> 7) + (r >> 7)) * 2048
        + ((g >> 3) & 1) * 1024
        + ((r >> 5) & 3) * 256
        + (r & 7) * 32
        + ((r >> 4) & 1) * 16
        + ((g >> 2) & 1) * 8
        + ((r >> 3) & 1) * 4
        + (g & 3)
    )


def metadata_of(mask, place):
    """Nibble i0 | i1 << 2 of every group at its place."""
    rows, columns = mask.shape
    metadata = np.zeros(rows * columns // 4, dtype=np.uint8)
    for r in range(rows):
        for g in range(columns // 4):
            i0, i1 = np.flatnonzero(mask[r, 4 * g : 4 * g + 4].numpy())
            metadata[place(r, g, rows, columns)] = i0 | i1 << 2
    return torch.from_numpy(metadata[0::2] | metadata[1::2] << 4)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(64, 32), (128, 160), (192, 576)])
def test_metadata_of_sm90_is_as_drawn(shape):
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("the layout of sm_90")
    o = Operands(*shape, torch.bfloat16, torch.device("cuda"))
    packed = ops.pack(o.values, o.bitmask)
    expected = metadata_of(oracle.unbits(o.bitmask), sm90_place)
    metadata = packed[o.values.numel() * 2 :].cpu()
    assert torch.equal(metadata[: expected.numel()], expected)
    assert not metadata[expected.numel() :].any()


class PackMetadataParams(ctypes.Structure):
    """That of csrc/ops/pack.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("bitmask", "metadata")),
        *((name, ctypes.c_int64) for name in ("rows", "columns")),
        ("layout", ctypes.c_int),
    ]


@pytest.mark.gpu
@pytest.mark.parametrize("offset", [0, 4])  # of the bitmask, in bytes: loads of 16 or of 4
@pytest.mark.parametrize("shape", [(128, 128), (256, 384)])
@pytest.mark.parametrize("layout", [sm80_place, sm90_place])
def test_own_writer_has_both_layouts_as_drawn(layout, shape, offset):
    """On any GPU: a layout is an order of bytes."""
    bitmask = ops.prune_24(torch.rand(shape, device="cuda"))
    room = torch.empty(offset + bitmask.numel(), dtype=torch.uint8, device="cuda")
    source = room[offset:]
    source.copy_(bitmask.view(-1))
    metadata = torch.zeros_like(bitmask).view(-1)
    params = PackMetadataParams(
        source.data_ptr(), metadata.data_ptr(), *shape, layout is sm90_place
    )
    library = ctypes.CDLL(str(_library._LIBRARY_FILE))
    stream = torch.cuda.current_stream().cuda_stream
    assert library.slope_pack_metadata(ctypes.byref(params), ctypes.c_void_p(stream)) == 0
    assert torch.equal(metadata.cpu(), metadata_of(oracle.unbits(bitmask), layout))


@pytest.mark.gpu
def test_own_writer_agrees_with_the_library_here():
    """The self-test at first use passed on this device; the library would be a hundred times
    slower."""
    o = Operands(256, 256, torch.bfloat16, torch.device("cuda"))
    ops.pack(o.values, o.bitmask)
    assert _C.metadata_writer(0) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("shape", PACKED_SHAPES)
def test_packed_operand_multiplies(shape, dtype):
    o = Operands(*shape, dtype, torch.device("cuda"))
    x = o.randn(24, shape[1])
    y = ops.linear(x, o.values, o.bitmask, o.bias, backend="cusparselt")
    torch.testing.assert_close(y, F.linear(x, o.dense, o.bias), rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(64, 32), (192, 96), (80, 48), (320, 288), (1088, 1056)])
def test_packed_operand_multiplies_by_every_algorithm(shape):
    """Rows and columns that no tile divides, one token octet and more than one tile of them; for
    compute-sanitizer as well, which sees what is read beyond the operands."""
    rows, columns = shape
    cuda = torch.device("cuda")
    o = Operands(rows, columns, torch.bfloat16, cuda)
    packed = ops.pack(o.values, o.bitmask)
    stream = torch.cuda.current_stream().cuda_stream
    right = 0
    for tokens in (8, 264):
        x = o.randn(tokens, columns)
        expected = F.linear(x, o.dense)
        problem = _C.SpmmProblem(rows=rows, columns=columns, tokens=tokens, device=0, bfloat16=True)
        count = _C.SpmmPlan(problem, _C.SpmmAlgorithm()).algorithm_count
        splits = ((-1, 0),) if torch.cuda.get_device_capability()[0] == 9 else ()
        for algorithm in range(count):
            for split in ((1, 0), *splits):
                try:
                    plan = _C.SpmmPlan(problem, _C.SpmmAlgorithm(algorithm, *split))
                except RuntimeError:  # refused
                    continue
                workspace = torch.empty(
                    max(1, plan.workspace_bytes), dtype=torch.uint8, device=cuda
                )
                y = torch.full_like(expected, float("nan"))
                pointers = (packed, x, None, y, workspace)
                plan.run(*(0 if t is None else t.data_ptr() for t in pointers), stream)
                torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2 * columns**0.5)
                right += 1
    assert right > 10


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(80, 48), (320, 288), (1088, 1056), (192, 96), (16, 32)])
def test_packed_bytes_are_the_weights_alone(shape):
    """Not what was in the memory before."""
    o = Operands(*shape, torch.bfloat16, torch.device("cuda"))
    packed = []
    for junk in (0, 0xFF, 0xA5):
        torch.cuda.empty_cache()
        stale = [
            torch.full((1 << size,), junk, dtype=torch.uint8, device="cuda")
            for size in range(9, 25)
        ]
        del stale
        packed.append(ops.pack(o.values, o.bitmask))
    assert all(torch.equal(other, packed[0]) for other in packed)


@pytest.mark.gpu
def test_operand_in_place_is_what_pack_makes():
    o = Operands(192, 96, torch.bfloat16, torch.device("cuda"))
    values, metadata = _packed.empty(192, 96, torch.bfloat16, o.values.device)
    values.copy_(o.values)
    ops.pack_metadata(o.bitmask, metadata)
    assert _packed.is_packed(values, metadata)
    packed = ops.pack(o.values, o.bitmask)
    assert torch.equal(packed, torch.cat([values.view(torch.uint8).flatten(), metadata]))
    for behind in (metadata, packed):  # kernels may read so far
        room = behind.untyped_storage().nbytes() - behind.numel()
        assert room == _C.OVERREAD_BYTES
    # Each has a storage of its own, so that saving the values saves no metadata.
    assert values.untyped_storage().nbytes() == values.numel() * 2
    # Either keeps the memory of both.
    del values
    torch.cuda.empty_cache()
    assert torch.equal(metadata, packed[-metadata.numel() :])


@pytest.mark.gpu
def test_what_the_tensor_cores_do_not_take_is_an_error():
    o = Operands(24, 32, torch.bfloat16, torch.device("cuda"))
    with pytest.raises(
        RuntimeError, match="slope::pack: values must be of a weight with out and in"
    ):
        ops.pack(o.values, o.bitmask)
    with pytest.raises(RuntimeError, match="slope::pack: values must be float16 or bfloat16"):
        ops.pack(o.values.float(), o.bitmask)
    with pytest.raises(RuntimeError, match="slope::pack_metadata: bitmask must be of a weight"):
        ops.pack_metadata(o.bitmask, o.bitmask.flatten())
