# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import oracle
from cases import TILE_SHAPES, assert_same_bits, bits_of
from slope_ext import ops, reference

# Eight columns a row, so that a byte is written out; only the first group varies.
REST = [4.0, 3.0, 2.0, 1.0]
LITERAL = [
    ([1.0, 2.0, 3.0, 4.0], [0, 0, 1, 1]),
    ([4.0, 3.0, 2.0, 1.0], [1, 1, 0, 0]),
    ([1.0, 4.0, 2.0, 3.0], [0, 1, 0, 1]),
    ([1.0, 1.0, 1.0, 1.0], [1, 1, 0, 0]),  # ties: lower index
    ([0.0, 1.0, 1.0, 1.0], [0, 1, 1, 0]),
    ([2.0, 1.0, 1.0, 1.0], [1, 1, 0, 0]),
    ([-0.0, 0.0, -0.0, 0.0], [1, 1, 0, 0]),  # -0 ties with 0
    ([-1.0, -2.0, -3.0, -4.0], [1, 1, 0, 0]),  # scores are signed
    ([0.0, 0.0, 0.0, 5.0], [1, 0, 0, 1]),
    ([float("nan"), 1.0, 2.0, float("nan")], [1, 0, 0, 1]),
    ([float("nan"), float("nan"), float("nan"), 9.0], [1, 1, 0, 0]),
    ([1.0, 2.0, float("-inf"), float("inf")], [0, 1, 0, 1]),
]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(("group", "kept"), LITERAL)
def test_prune_24_literal(group, kept, dtype, device):
    if dtype == torch.float64 and device.type == "cuda":
        pytest.skip("float64 is for the CPU")
    scores = torch.tensor([group + REST], dtype=dtype, device=device)
    bitmask = ops.prune_24(scores)
    assert oracle.unbits(bitmask).int().tolist() == [[*kept, 1, 1, 0, 0]]


@pytest.mark.parametrize("shape", [(1, 8), (3, 24), (192, 576), (5, 4096), (0, 16), (7, 0)])
def test_prune_24_matches_oracle(shape, device):
    scores = torch.randn(shape, device=device)
    bitmask = ops.prune_24(scores)
    assert bitmask.shape == (shape[0], shape[1] // 8)
    assert bitmask.dtype == torch.uint8
    assert torch.equal(bitmask.cpu(), oracle.bits(oracle.keep_two_of_four(scores)))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([-2.0, -0.0, 0.0, 1.0, 2.0]), min_size=16, max_size=16))
def test_prune_24_property_with_many_ties(scores):
    scores = torch.tensor(scores).view(2, 8)
    assert torch.equal(ops.prune_24(scores), oracle.bits(oracle.keep_two_of_four(scores)))


def test_prune_24_takes_strided_scores(device):
    scores = torch.randn(16, 40, device=device)
    expected = ops.prune_24(scores.t().contiguous()[:, :16])
    assert torch.equal(ops.prune_24(scores.t()[:, :16]), expected)
    row = torch.randn(1, 16, device=device)
    assert torch.equal(ops.prune_24(row.expand(4, 16)), ops.prune_24(row).expand(4, 2))


# One column of four rows: kept (row-wise) or not, and its magnitude.
K, D = True, False
DOUBLE = [
    # survivors, weights, rows kept for W^T, rows that hold a value
    ([K, K, K, K], [1.0, -4.0, 2.0, 3.0], [1, 3], [1, 3]),
    ([K, K, K, D], [3.0, 1.0, -2.0, 9.0], [0, 2], [0, 2]),
    ([D, K, D, K], [9.0, 1.0, 9.0, 2.0], [1, 3], [1, 3]),
    ([K, K, K, K], [1.0, 1.0, -1.0, 1.0], [0, 1], [0, 1]),  # ties: lower index
    ([D, D, K, D], [9.0, 9.0, 1.0, 9.0], [0, 2], [2]),  # one survivor: lowest free position
    ([K, D, D, D], [1.0, 9.0, 9.0, 9.0], [0, 1], [0]),
    ([D, D, D, D], [9.0, 9.0, 9.0, 9.0], [0, 1], []),  # none: the two lowest
    ([K, K, D, D], [0.0, -0.0, 9.0, 9.0], [0, 1], [0, 1]),  # kept zeros survive
    ([D, K, D, D], [9.0, 0.0, 9.0, 9.0], [0, 1], [1]),
]


@pytest.mark.parametrize(("survives", "column", "kept", "valued"), DOUBLE)
def test_prune_transposed_literal(survives, column, kept, valued, device):
    # Column 0 of 8 is the case; in each row its partners make the row 2:4.
    mask = torch.zeros(8, 8, dtype=torch.bool)
    weight = torch.zeros(8, 8)
    for row in range(8):
        keeps_first = row < 4 and survives[row]
        mask[row, [0, 3] if keeps_first else [2, 3]] = True
        mask[row, [4, 5]] = True
    weight[:4, 0] = torch.tensor(column)
    bitmask = oracle.bits(mask).to(device)
    values = ops.compress(weight.to(device), bitmask)
    bitmask_t = ops.prune_transposed(values, bitmask)
    first_column = oracle.unbits(bitmask_t)[0, :4]
    assert first_column.nonzero().flatten().tolist() == kept

    out = torch.full((8, 4), float("nan"), device=device)
    ops.transpose_values(values, bitmask, bitmask_t, out)
    transposed = ops.decompress(out, bitmask_t)[0, :4].cpu()
    expected = torch.zeros(4)
    expected[valued] = torch.tensor(column)[valued]
    assert torch.equal(transposed, expected)


@pytest.mark.parametrize("shape", [(8, 8), (192, 64), (24, 96), (64, 24)])
def test_prune_transposed_matches_oracle(shape, device):
    weight = torch.randn(shape, device=device)
    bitmask = ops.prune_24(weight.abs())
    values = ops.compress(weight, bitmask)
    bitmask_t = ops.prune_transposed(values, bitmask)
    kept_t = oracle.unbits(bitmask_t)
    assert (kept_t.view(shape[1], -1, 4).sum(-1) == 2).all()
    survivors = oracle.unbits(bitmask)
    assert torch.equal(kept_t.t() & survivors, oracle.double_prune(weight, survivors))


def test_double_pruning_loses_a_sixteenth_and_a_half():
    """Lemma of the paper: 9.375 % of a random W become extra zeros (not of the survivors)."""
    weight = torch.randn(1024, 1024)
    bitmask = ops.prune_24(weight.abs())
    bitmask_t = ops.prune_transposed(ops.compress(weight, bitmask), bitmask)
    kept = oracle.unbits(bitmask_t).t() & oracle.unbits(bitmask)
    assert 0.5 - kept.double().mean().item() == pytest.approx(0.09375, abs=0.002)


# ---- several forms of a weight at once -----------------------------------------------------------

# Magnitudes decide, bits move: a group, what is kept of it.
MAGNITUDES = [
    ([1.0, -4.0, 2.0, -3.0], [0, 1, 0, 1]),
    ([-1.0, 1.0, -1.0, 1.0], [1, 1, 0, 0]),  # ties: lower index
    ([-0.0, 0.0, 0.0, 5.0], [1, 0, 0, 1]),
    ([0.0, -0.0, -0.0, -0.0], [1, 1, 0, 0]),
    ([1.0, float("-inf"), 2.0, float("inf")], [0, 1, 0, 1]),
    ([9.0, float("-inf"), float("nan"), float("inf")], [0, 1, 1, 0]),  # NaN ties with infinity
]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(("group", "kept"), MAGNITUDES)
def test_prune_compress_literal(group, kept, dtype, device):
    if dtype == torch.float64 and device.type == "cuda":
        pytest.skip("float64 is for the CPU")
    dense = torch.tensor([group + REST] * 8, dtype=dtype, device=device)
    both = ops.prune_compress(dense)
    expected = [value for value, keep in zip(group, kept, strict=True) if keep] + REST[:2]
    for values, bitmask in (both, ops.prune_compress_transposed(dense)[:2]):
        assert oracle.unbits(bitmask).int().tolist() == [[*kept, 1, 1, 0, 0]] * 8
        assert torch.equal(bits_of(values[0]).cpu(), bits_of(torch.tensor(expected, dtype=dtype)))


def test_prune_compress_transposed_literal(device):
    """4 x 4: what each column keeps of the rows' survivors; a fill-up holds 0."""
    block = torch.tensor(
        [
            [9.0, -8.0, 1.0, 0.0],  # keeps 0 1
            [5.0, 1.0, -7.0, 2.0],  # keeps 0 2
            [6.0, 0.0, 3.0, 1.0],  # keeps 0 2
            [1.0, 2.0, 3.0, -4.0],  # keeps 2 3
        ]
    )
    values, bitmask, values_t, bitmask_t = ops.prune_compress_transposed(
        torch.cat([torch.cat([block, block], 1)] * 2).to(device)
    )
    assert values[:4, :2].tolist() == [[9, -8], [5, -7], [6, 3], [3, -4]]
    assert bitmask[:4, 0].tolist() == [0x33, 0x55, 0x55, 0xCC]
    # columns: 9 5 6 . -> 9 6; -8 and the first free; -7 3 3 -> -7 and the first 3; -4 and a free
    assert bitmask_t[:4, 0].tolist() == [0x55, 0x33, 0x66, 0x99]
    assert values_t[:4, :2].tolist() == [[9, 6], [-8, 0], [-7, 3], [0, -4]]


def test_prune_compress_takes_strided_and_empty(device):
    dense = torch.randn(40, 16, device=device).t()
    for op in (ops.prune_compress, ops.prune_compress_transposed):
        for strided, contiguous in zip(op(dense), op(dense.contiguous()), strict=True):
            assert torch.equal(strided, contiguous)
        shapes = [tuple(t.shape) for t in op(dense[:, :0])]
        assert shapes == [(16, 0), (16, 0), (0, 8), (0, 2)][: len(shapes)]


def test_double_prune_marks_its_outputs_as_written(device):
    values, bitmask, values_t, bitmask_t = ops.prune_compress_transposed(
        torch.randn(16, 16, device=device)
    )
    versions = values_t._version, bitmask_t._version
    ops.double_prune_(values, bitmask, bitmask_t=bitmask_t, values_t=values_t)
    assert values_t._version > versions[0]
    assert bitmask_t._version > versions[1]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.data())
def test_forms_of_a_weight_match_oracle(data):
    """Shapes and values at will: many ties, zeros of both signs, infinities."""
    rows, columns = (8 * data.draw(st.integers(1, 5)) for _ in range(2))
    seed = data.draw(st.integers(0, 2**16))
    palette = data.draw(
        st.lists(
            st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, -3.5, 1e-7, float("inf")]),
            min_size=2,
            max_size=6,
        )
    )
    choice = torch.randint(
        len(palette), (rows, columns), generator=torch.Generator().manual_seed(seed)
    )
    dtype = data.draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32]))
    dense = torch.tensor(palette, dtype=dtype)[choice]

    values, bitmask, values_t, bitmask_t = ops.prune_compress_transposed(dense)
    mask = oracle.keep_two_of_four(dense.abs())
    assert torch.equal(bitmask, oracle.bits(mask))
    assert torch.equal(values.flatten(), dense[mask])
    mask_t = oracle.unbits(bitmask_t)
    assert (mask_t.view(columns, -1, 4).sum(-1) == 2).all()
    twice = oracle.double_prune(dense, mask)
    assert torch.equal(mask_t.t() & mask, twice)
    expected = torch.where(twice, dense, torch.zeros((), dtype=dtype)).t()
    assert torch.equal(bits_of(values_t.flatten()), bits_of(expected[mask_t]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", TILE_SHAPES[:-1])
def test_one_pass_equals_many(shape, dtype, device):
    check_forms(awkward(shape, dtype, device), ops)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", TILE_SHAPES)
def test_cuda_kernels_equal_reference_bits(shape, dtype):
    weight = awkward(shape, dtype, "cuda")
    assert torch.equal(ops.prune_24(weight), reference.prune_24(weight))
    bitmask = reference.prune_24(torch.rand(shape, device="cuda"))
    values = ops.compress(weight, bitmask)
    expected = reference.prune_transposed(values, bitmask)
    assert torch.equal(ops.prune_transposed(values, bitmask), expected)
    check_forms(weight, reference)


@pytest.mark.gpu
def test_misaligned_outputs_are_refused():
    values, bitmask, values_t, bitmask_t = ops.prune_compress_transposed(
        torch.randn(16, 24, device="cuda").bfloat16()
    )
    shifted = torch.empty(49, dtype=torch.uint8, device="cuda")[1:].view(24, 2)
    with pytest.raises(RuntimeError, match="slope::double_prune_: bitmask_t must start at a mult"):
        ops.double_prune_(values, bitmask, shifted, values_t)
    shifted = torch.empty(193, dtype=torch.bfloat16, device="cuda")[1:].view(24, 8)
    with pytest.raises(RuntimeError, match="slope::double_prune_: values_t must start at a mult"):
        ops.double_prune_(values, bitmask, bitmask_t, shifted)


def awkward(shape, dtype, device):
    """Many ties, zeros of both signs, infinities, NaN and subnormal numbers among them."""
    weight = (torch.randn(shape, device=device) * 4).round().to(dtype)
    for value in (0.0, -0.0, float("inf"), float("-inf"), float("nan")):
        weight[torch.rand(shape, device=device) < 0.03] = value
    tiny = torch.randn(shape, device=device).to(dtype) * torch.finfo(dtype).smallest_normal
    return torch.where(torch.rand(shape, device=device) < 0.2, tiny, weight)


def check_forms(weight, by):
    """The ops of several outputs equal, bit for bit, a composition of the single ones of ``by``."""
    bitmask = by.prune_24(weight.abs())
    values = by.compress(weight, bitmask)
    bitmask_t = by.prune_transposed(values, bitmask)
    values_t = torch.full_like(values, 7).view(weight.shape[1], -1)
    by.transpose_values(values, bitmask, bitmask_t, values_t)
    forms = (values, bitmask, values_t, bitmask_t)
    assert_same_bits(ops.prune_compress(weight), forms[:2])
    assert_same_bits(ops.prune_compress_transposed(weight), forms)

    written_t, written_mask_t = torch.full_like(values_t, 7), torch.full_like(bitmask_t, 7)
    ops.double_prune_(values, bitmask, written_mask_t, written_t)
    assert_same_bits((written_t, written_mask_t), forms[2:])
