# SPDX-License-Identifier: Apache-2.0
"""The own sparse product for sm_90: its metadata, its results, and layers that run on it."""

import copy
import random

import pytest
import torch
import torch.nn.functional as F

import oracle
import slope_ext as slope
from cases import Operands
from slope_ext import _C, _packed, ops, plan_cache
from slope_ext._check import metadata_words
from slope_ext._spmm_sm90 import TILES, Choice, chosen, room, spmm_sm90

CUDA = torch.device("cuda")
HALF = [torch.bfloat16, torch.float16]
# Whole tiles; odd numbers of stages, of blocks of 64 rows, of groups of 8 rows; one stage.
SHAPES = [(256, 256), (64, 32), (1088, 96), (200, 1056), (8, 544), (320, 160), (4104, 288)]
SHAPES += [(1000, 2048)]  # few tiles of many columns: in segments
SEGMENTED = [i for i, tile in enumerate(TILES) if tile[3] > 1]
RANKS = [1, 8, 12, 33, 64, 144, 256]
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
    if not _packed._native_runs_here(0):
        pytest.skip("for GPUs of compute capability 9.0 and builds for sm_90a")


@pytest.mark.gpu
@pytest.mark.parametrize("shape", WORD_SHAPES)
def test_words_of_kernel_and_reference_are_the_same(shape):
    bitmask = random_bitmask(*shape)
    expected = torch.empty(metadata_words(*shape), dtype=torch.int32)
    ops.pack_metadata(bitmask, expected)
    words = torch.empty_like(expected, device=CUDA)
    ops.pack_metadata(bitmask.to(CUDA), words)
    assert torch.equal(words.cpu(), expected)


@pytest.mark.gpu
def test_words_of_more_columns_than_a_grid_has_blocks_along_y():
    blocks = 65536 + 1
    bitmask = torch.full((8, 32 * blocks), 0x33, dtype=torch.uint8, device=CUDA)
    bitmask[:, -32:] = ops.prune_24(torch.rand(8, 256, device=CUDA))
    words = torch.empty(metadata_words(8, 256 * blocks), dtype=torch.int32, device=CUDA)
    ops.pack_metadata(bitmask, words)
    for part, mask in ((words[:512], bitmask[:, :32]), (words[-512:], bitmask[:, -32:])):
        expected = torch.empty(512, dtype=torch.int32, device=CUDA)
        ops.pack_metadata(mask.contiguous(), expected)
        assert torch.equal(part, expected)


def assert_rounded(y, expected, sums):
    """At most half an ulp off the exact result, and what fp32 sums err by."""
    info = torch.finfo(y.dtype)  # below its normal numbers, fp16 has the ulp of the least of them
    bound = 0.51 * info.eps * expected.abs().clamp_min(info.tiny) + 2e-6 * sums + 1e-30
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
@pytest.mark.parametrize("tokens", [4097, 16384])
def test_many_tokens(tokens):
    skip_unless_it_runs()
    o = Operands(328, 288, torch.bfloat16, CUDA)
    x = o.randn(tokens, 288)
    y = ops.linear(x, o.values, o.bitmask, o.bias, metadata=with_words(o), backend="native")
    exact = F.linear(x.double(), o.dense.double(), o.bias.double())
    assert_rounded(y, exact, F.linear(x.double().abs(), o.dense.double().abs()) + o.bias.abs())


GUARD = 1024  # elements on both sides


def between(rows, columns, dtype, fill):
    """[rows, columns] amid ``fill``, and all of it."""
    whole = torch.full((rows * columns + 2 * GUARD,), fill, dtype=dtype, device=CUDA)
    return whole[GUARD:-GUARD].view(rows, columns), whole


def activate(activation, exact, sums):
    """activation(exact), and what its errors are relative to where those of ``exact`` are to
    ``sums``."""
    if activation == "none":
        return exact, sums
    if activation == "relu":
        return exact.relu(), sums
    gate, up, gate_sums, up_sums = (
        part for tensor in (exact, sums) for part in tensor.unflatten(-1, (-1, 2, 8)).unbind(-2)
    )
    silu = F.silu(gate)
    off = 1.1 * gate_sums * up.abs() + silu.abs() * up_sums + (silu * up).abs()
    return (silu * up).flatten(-2), off.flatten(-2)


def tile_name(tile):
    return "{}x{}_c{}_k{}".format(*TILES[tile])


def check_tile(tile, row_tiles, rests, rank, activation, columns=288, token_tiles=2, **options):
    """``token_tiles`` whole tiles and each rest of tokens; of rows not quite ``row_tiles``."""
    tile_rows, tile_tokens = TILES[tile][:2]
    rows = row_tiles * tile_rows - (32 if activation == "swiglu" else 24)
    counts = [token_tiles * tile_tokens + rest for rest in rests]
    check_product(Choice(tile), rows, counts, rank, activation, columns, **options)


def check_product(choice, rows, counts, rank, activation, columns, transposed=False):
    """In bf16, the last count in fp16 too; operands amid NaN, the result amid a sentinel."""
    skip_unless_it_runs()
    nan, sentinel = float("nan"), 12288.0
    features = rows // 2 if activation == "swiglu" else rows
    operands = {dtype: Operands(rows, columns, dtype, CUDA) for dtype in HALF}
    words = {dtype: with_words(o) for dtype, o in operands.items()}
    cases = [*((torch.bfloat16, tokens) for tokens in counts), (torch.float16, counts[-1])]
    for dtype, tokens in cases:
        o = operands[dtype]
        tensors = [between(tokens, columns, dtype, nan), between(tokens, rank, dtype, nan)]
        tensors += [between(rows, rank, dtype, nan), between(tokens, features, dtype, sentinel)]
        (x, _), (left, _), (right, _), (y, whole) = tensors
        for tensor in (x, left, right):
            tensor.copy_(torch.randn_like(tensor))
        y.fill_(nan)
        if transposed:
            whole_right = torch.full((rank * rows + 2 * GUARD,), nan, dtype=dtype, device=CUDA)
            right = whole_right[GUARD:-GUARD].view(rank, rows).t().copy_(right)
        tail = (left, right) if rank else None
        options = {"tail": tail, "bias": o.bias, "activation": activation, "choice": choice}
        spmm_sm90(x, o.values, words[dtype], y, **options)
        factors = [(x, o.dense), (left, right)] if rank else [(x, o.dense)]
        exact = sum(F.linear(a.double(), b.double()) for a, b in factors) + o.bias.double()
        sums = sum(F.linear(a.double().abs(), b.double().abs()) for a, b in factors)
        assert_rounded(y, *activate(activation, exact, sums + o.bias.double().abs()))
        assert bool((whole[:GUARD] == sentinel).all())
        assert bool((whole[-GUARD:] == sentinel).all())


@pytest.mark.gpu
@pytest.mark.parametrize("tile", range(len(TILES)), ids=tile_name)
@pytest.mark.parametrize("row_tiles", [1, 3, 70], ids=["one", "three", "many_rows_of_tiles"])
@pytest.mark.parametrize(
    ("rank", "activation"), [(0, "none"), (40, "none"), (40, "relu"), (0, "swiglu"), (40, "swiglu")]
)
def test_every_tile_with_every_rest(tile, row_tiles, rank, activation):
    """Tokens that leave one, two or three chunks of 64 of the last tile; blocks with several
    tiles."""
    check_tile(tile, row_tiles, (1, 64, 65, 100, 128, 130, 0), rank, activation)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "tile",
    [TILES.index(t) for t in ((256, 168, 2, 1), (128, 256, 2, 1), (128, 192, 2, 1))],
    ids=tile_name,
)
@pytest.mark.parametrize("columns", [32, 256, 512, 544, 1024])
def test_blocks_with_several_tiles(tile, columns):
    """Three and more; 256 columns, whose metadata comes together, once to four times."""
    check_tile(tile, 70, (65,), 40, "none", columns, token_tiles=6)


@pytest.mark.gpu
@pytest.mark.parametrize("tile", range(len(TILES)), ids=tile_name)
@pytest.mark.parametrize("activation", ["none", "swiglu"])
def test_fewer_tokens_than_a_tile_has(tile, activation):
    tokens = (1, 7, 8, 9, 63, 65, 100, TILES[tile][1] - 8, TILES[tile][1] - 1)
    check_tile(tile, 3, tokens, 40, activation, columns=544, token_tiles=0)


@pytest.mark.gpu
@pytest.mark.parametrize("tile", range(len(TILES)), ids=tile_name)
@pytest.mark.parametrize("rank", [8, 40, 64, 136])
@pytest.mark.parametrize("rest", [0, 8, 56, 120, 128])
def test_transposed_tail(tile, rank, rest):
    """A factor as backward has it, [rank, out]; a tile may have no rows, or end within 64."""
    rows = TILES[tile][0] + rest
    check_product(Choice(tile), rows, (1, 70, 300), rank, "none", 288, transposed=True)


@pytest.mark.gpu
@pytest.mark.parametrize("tile", range(len(TILES)), ids=tile_name)
@pytest.mark.parametrize("activation", ["none", "swiglu"])
def test_transposed_tail_of_blocks_with_several_tiles(tile, activation):
    check_tile(tile, 70, (65,), 40, activation, transposed=True)


@pytest.mark.gpu
def test_a_tail_that_is_neither_is_refused():
    o = Operands(64, 64, torch.bfloat16, CUDA)
    tail = o.randn(8, 16), o.randn(64, 32)[:, ::2]
    with pytest.raises(ValueError, match="or its transpose must be contiguous"):
        spmm_sm90(o.randn(8, 64), o.values, with_words(o), o.randn(8, 64), tail=tail)


@pytest.mark.gpu
def test_backward_reads_lora_a_as_it_lies():
    """And copies it where TMA could not."""
    skip_unless_it_runs()
    o = Operands(256, 8192, torch.bfloat16, CUDA, rank=256)
    masks = o.bitmask, o.bitmask_t
    ops.transpose_values(o.values, *masks, o.values_t)
    dy, where = o.randn(8, 256), {"values_t": o.values_t, "backend": "native"}

    def grown_by(lora_a):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        dx, _ = ops.input_grad_lowrank(dy, o.values, *masks, lora_a, o.lora_B, **where)
        return dx, torch.cuda.max_memory_allocated() - before

    grown_by(o.lora_A)  # what libraries allocate once
    expected, grown = grown_by(o.lora_A)
    assert grown < o.lora_A.nbytes
    wide = F.pad(o.lora_A, (0, 8))[:, :-8]
    unaligned = F.pad(o.lora_A.flatten(), (1, 0))[1:].view_as(o.lora_A)
    for lora_a in (wide, unaligned):
        dx, grown = grown_by(lora_a)
        assert grown >= o.lora_A.nbytes
        torch.testing.assert_close(dx, expected)


@pytest.mark.gpu
def test_transposed_tail_of_a_product_in_two_parts():
    choice = Choice(TILES.index((128, 256, 2, 1)), 512, TILES.index((128, 128, 1, 4)))
    check_product(choice, 1000, (130, 400), 72, "relu", 544, transposed=True)


@pytest.mark.gpu
@pytest.mark.parametrize("tile", SEGMENTED, ids=tile_name)
@pytest.mark.parametrize("columns", [32, 256, 512, 768, 1184, 2048])
def test_segments_of_any_length(tile, columns):
    """Some without a column, some of which one ends with W."""
    check_tile(tile, 2, (1, 63, 64, 100, 0), 24, "none", columns)


@pytest.mark.gpu
@pytest.mark.parametrize("tile", SEGMENTED, ids=tile_name)
def test_segments_add_up_in_one_order(tile):
    skip_unless_it_runs()
    o = Operands(1024, 4096, torch.float16, CUDA)  # bf16 would hide most other orders
    words, x = with_words(o), o.randn(40, 4096)
    empty = torch.empty(20, 40, 1024, dtype=torch.float16, device=CUDA)
    runs = [spmm_sm90(x, o.values, words, y, choice=Choice(tile)) for y in empty]
    assert all(torch.equal(run, runs[0]) for run in runs)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("first", "rest"),
    [
        ((128, 256, 2, 1), (128, 128, 1, 4)),
        ((256, 168, 2, 1), (128, 192, 1, 2)),
        ((128, 64, 1, 1), (128, 64, 1, 1)),
        ((128, 128, 1, 2), (256, 192, 2, 1)),
        ((128, 256, 4, 1), (128, 256, 4, 1)),
        ((128, 256, 1, 1), (128, 256, 1, 1)),
    ],
)
@pytest.mark.parametrize("first_rows", [64, 512, 1088])
@pytest.mark.parametrize(
    ("rank", "activation"), [(0, "none"), (40, "relu"), (40, "swiglu")], ids=str
)
def test_a_product_in_two_parts(first, rest, first_rows, rank, activation):
    choice = Choice(TILES.index(first), first_rows, TILES.index(rest))
    for rows in (first_rows + 16, first_rows + 592):
        check_product(choice, rows, (1, 65, 130, 400), rank, activation, 544)


@pytest.mark.gpu
@pytest.mark.parametrize("tile", range(len(TILES)), ids=tile_name)
@pytest.mark.parametrize("transposed", [False, True])
def test_rank_256(tile, transposed):
    """Eight stages of a tail; most rings have fewer."""
    check_tile(tile, 3, (56,), 256, "none", token_tiles=1, transposed=transposed)


def check_again(choice, rows, tokens, rank, activation, columns):
    """The same bits again; and what a token of NaN gives is NaN, all else the same bits still.

    But for the token that shares a reciprocal with it in SwiGLU, which may round otherwise.
    """
    skip_unless_it_runs()
    o = Operands(rows, columns, torch.bfloat16, CUDA)
    words, x = with_words(o), o.randn(tokens, columns)
    tail = (o.randn(tokens, rank), o.randn(rows, rank)) if rank else None
    features = rows // 2 if activation == "swiglu" else rows
    first, again, with_nan = torch.empty(3, tokens, features, dtype=x.dtype, device=CUDA)
    options = {"tail": tail, "bias": o.bias, "activation": activation, "choice": choice}
    for y in (first, again):
        spmm_sm90(x, o.values, words, y, **options)
    assert torch.equal(first, again)
    spoiled = tokens // 2
    x[spoiled] = float("nan")
    spmm_sm90(x, o.values, words, with_nan, **options)
    assert bool(with_nan[spoiled].isnan().all())
    others = torch.arange(tokens, device=CUDA) != spoiled
    if activation == "swiglu":
        torch.testing.assert_close(with_nan[spoiled ^ 1], first[spoiled ^ 1], rtol=8e-3, atol=0)
        others[spoiled ^ 1] = False
    assert torch.equal(with_nan[others], first[others])


@pytest.mark.gpu
@pytest.mark.parametrize("tile", range(len(TILES)), ids=tile_name)
@pytest.mark.parametrize(("rank", "activation"), [(0, "none"), (40, "relu"), (136, "swiglu")])
def test_bits_stay_and_nan_stays_in_its_token(tile, rank, activation):
    tile_rows, tile_tokens = TILES[tile][:2]
    check_again(Choice(tile), 3 * tile_rows - 32, tile_tokens + 9, rank, activation, 1184)


@pytest.mark.gpu
@pytest.mark.parametrize(("rank", "activation"), [(0, "none"), (40, "relu"), (136, "swiglu")])
def test_bits_stay_and_nan_stays_in_its_token_of_a_product_in_two_parts(rank, activation):
    parts = TILES.index((256, 168, 2, 1)), 512, TILES.index((128, 192, 1, 2))
    check_again(Choice(*parts), 1120, 400, rank, activation, 1184)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(8, 20480, 5120), (256, 20480, 5120)])
def test_large_products_are_split_where_a_round_would_be_empty(shape):
    skip_unless_it_runs()
    tokens, rows, columns = shape
    choice = chosen(*shape)
    if torch.cuda.get_device_properties(0).multi_processor_count == 132:
        assert 0 < choice.first_rows < rows
    check_product(choice, rows, [tokens], 16, "none", columns)
    assert chosen(8, 4096, 1024).first_rows == 0
    assert chosen(64, 72, 64).first_rows == 0


@pytest.mark.gpu
def test_the_op_chooses_as_the_python_module_says():
    """test_choice.py looks at that one."""
    skip_unless_it_runs()
    draw, here = random.Random(0), room()
    assert here["processors"] == torch.cuda.get_device_properties(0).multi_processor_count
    for _ in range(300):
        rows, columns = 8 * draw.randint(1, 4000), 32 * draw.randint(1, 900)
        tokens = draw.choice([draw.randint(1, 300), draw.randint(1, 20000)])
        assert chosen(tokens, rows, columns) == Choice(
            *_C.spmm_sm90_choice(tokens, rows, columns, **here)
        )


@pytest.mark.gpu
def test_parts_that_cannot_be_are_refused():
    skip_unless_it_runs()
    o = Operands(256, 64, torch.bfloat16, CUDA)
    words, x, y = with_words(o), o.randn(8, 64), o.randn(8, 256)
    for choice in (Choice(0, 65), Choice(0, 320), Choice(0, -64), Choice(0, 64, len(TILES))):
        before = y.clone()
        with pytest.raises(RuntimeError, match="CUDA error 1"):
            spmm_sm90(x, o.values, words, y, choice=choice)
        assert torch.equal(y, before)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF)
def test_swiglu_of_extreme_gates(dtype):
    """Large gates of either sign; infinities and NaN reach their own token alone."""
    skip_unless_it_runs()
    o = Operands(16, 32, dtype, CUDA, bias=False)
    scores = torch.ones(16, 32, device=CUDA)
    scores[8:, 2::4] = scores[8:, 3::4] = 2
    values, bitmask = torch.zeros_like(o.values), ops.prune_24(scores)
    values[0, 0] = values[8, 0] = 1  # gate 0 is x[0], its partner x[2]
    gates = [0.0, 1.0, -1.0, 20.0, -20.0, -41.0, -60.0, -100.0, -3e4, 3e4, 88.0, -88.0]
    specials = [float("nan"), float("inf"), float("-inf")]
    gates = torch.tensor([*gates, *specials, *gates], device=CUDA).to(dtype)
    x = torch.zeros(len(gates), 32, dtype=dtype, device=CUDA)
    x[:, 0], x[:, 2] = gates, 2
    y = ops.linear(x, values, bitmask, activation="swiglu", backend="native")
    assert bool((y[:, 1:] == 0).logical_or(~gates.isfinite()[:, None]).all())
    finite = gates.isfinite()
    exact = 2 * F.silu(gates.double())
    torch.testing.assert_close(
        y[finite, 0].double(), exact[finite], rtol=torch.finfo(dtype).eps, atol=1e-7
    )
    assert bool(y[~finite, 0].isfinite().logical_not().all())
    assert float(y[gates == float("inf"), 0]) == float("inf")
    if dtype == torch.bfloat16:  # gate * up is beyond fp32
        x[0, 0], x[0, 2] = -20, 1e38
        large = ops.linear(x[:1], values, bitmask, activation="swiglu", backend="native")[0, 0]
        assert float(large) == pytest.approx(1e38 * float(F.silu(torch.tensor(-20.0))), rel=0.01)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("rank", RANKS)
def test_linear_lowrank(rank, dtype):
    skip_unless_it_runs()
    o = Operands(320, 544, dtype, CUDA)
    x, a, b = o.randn(77, 544), o.randn(rank, 544) / 24, o.randn(320, rank)
    y, t = torch.ops.slope.linear_lowrank(
        x, o.values, o.bitmask, a, b, 0.5, o.bias, backend="native"
    )
    torch.testing.assert_close(t, 0.5 * F.linear(x, a))
    t = t.double()
    exact = F.linear(x.double(), o.dense.double(), o.bias.double()) + F.linear(t, b.double())
    sums = F.linear(x.double().abs(), o.dense.double().abs(), o.bias.double().abs())
    assert_rounded(y, exact, sums + F.linear(t.abs(), b.double().abs()))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("rank", RANKS)
def test_input_grad_lowrank(rank, dtype):
    skip_unless_it_runs()
    o = Operands(320, 544, dtype, CUDA)
    ops.transpose_values(o.values, o.bitmask, o.bitmask_t, o.values_t)
    dy, a, b = o.randn(77, 320), o.randn(rank, 544), o.randn(320, rank) / 18
    dx, dt = ops.input_grad_lowrank(
        dy, o.values, o.bitmask, o.bitmask_t, a, b, 0.5, o.values_t, backend="native"
    )
    torch.testing.assert_close(dt, 0.5 * (dy @ b))
    factors = [(dy.double(), ops.decompress(o.values_t, o.bitmask_t).double())]
    factors += [(dt.double(), a.double().t())]
    exact = sum(F.linear(*pair) for pair in factors)
    assert_rounded(dx, exact, sum(F.linear(*(f.abs() for f in pair)) for pair in factors))


@pytest.mark.gpu
def test_results_are_the_same_bits_every_time():
    skip_unless_it_runs()
    o = Operands(1280, 2048, torch.bfloat16, CUDA)
    x, words = o.randn(3000, 2048), with_words(o)
    first = ops.linear(x, o.values, o.bitmask, o.bias, metadata=words)
    for _ in range(5):
        assert torch.equal(ops.linear(x, o.values, o.bitmask, o.bias, metadata=words), first)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF)
def test_nan_and_infinity_reach_what_keeps_their_column(dtype):
    """Other tokens never; other features of the token neither, unlike in a dense product, whose
    zeros times NaN are NaN."""
    skip_unless_it_runs()
    o = Operands(192, 256, dtype, CUDA, bias=False)
    x = o.randn(40, 256)
    x[3, 17], x[21, 200] = float("nan"), float("inf")
    y = ops.linear(x, o.values, o.bitmask, backend="native")
    kept = oracle.unbits(o.bitmask.cpu()).to(CUDA)
    assert torch.equal(y[3].isnan(), kept[:, 17])
    assert torch.equal(~y[21].isfinite(), kept[:, 200])
    others = [i for i in range(40) if i not in (3, 21)]
    assert y[others].isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF)
def test_nan_of_a_tail_and_of_a_bias(dtype):
    """A token's in the tail reaches all of the token; a feature's, all of the feature."""
    skip_unless_it_runs()
    o = Operands(192, 256, dtype, CUDA)
    words, y = with_words(o), o.randn(40, 192)
    x, left, right = o.randn(40, 256), o.randn(40, 16), o.randn(192, 16)
    left[7, 3], right[100, 5], o.bias[50] = float("nan"), float("nan"), float("nan")
    spmm_sm90(x, o.values, words, y, tail=(left, right), bias=o.bias)
    expected = torch.zeros(40, 192, dtype=torch.bool, device=CUDA)
    expected[7], expected[:, 100], expected[:, 50] = True, True, True
    assert torch.equal(y.isnan(), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF)
def test_nan_and_infinity_of_a_transposed_tail(dtype):
    """lora_A's in backward reach their column of dX, dY's all of their token."""
    skip_unless_it_runs()
    o = Operands(192, 256, dtype, CUDA)
    ops.transpose_values(o.values, o.bitmask, o.bitmask_t, o.values_t)
    dy, a, b = o.randn(40, 192), o.randn(16, 256), o.randn(192, 16)
    a[3, 40], a[5, 200], b[17, 2] = float("nan"), float("inf"), float("nan")
    weight = (o.values, o.bitmask, o.bitmask_t)
    dx, dt = ops.input_grad_lowrank(dy, *weight, a, b, 1.0, o.values_t, backend="native")
    assert dt[:, 2].isnan().all()
    assert dx.isnan().all(), "by way of dT"
    b[17, 2] = 1.0
    dx, _ = ops.input_grad_lowrank(dy, *weight, a, b, 1.0, o.values_t, backend="native")
    assert dx[:, 40].isnan().all()
    assert not dx[:, 200].isfinite().any()
    others = [column for column in range(256) if column not in (40, 200)]
    assert dx[:, others].isfinite().all()


@pytest.mark.gpu
def test_sums_that_fp16_does_not_hold_are_infinite():
    skip_unless_it_runs()
    o = Operands(64, 256, torch.float16, CUDA)
    o.values.fill_(8.0)
    x = torch.full((9, 256), 600.0, dtype=torch.float16, device=CUDA)
    x[4] = 4.0
    y = ops.linear(x, o.values, o.bitmask, backend="native")
    assert torch.equal(y[4], torch.full_like(y[4], 128 * 8.0 * 4.0))
    assert (y[[i for i in range(9) if i != 4]] == float("inf")).all()


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


@pytest.mark.gpu
def test_gradient_that_the_kernel_cannot_make_is_refused_in_forward():
    skip_unless_it_runs()
    o = Operands(48, 64, torch.bfloat16, CUDA)
    x = o.randn(8, 64).requires_grad_()
    with pytest.raises(RuntimeError, match=r"slope::linear: values must be .* multiples of 32 for"):
        ops.linear(x, o.values, o.bitmask, bitmask_t=o.bitmask_t, backend="native")
    ops.linear(x.detach(), o.values, o.bitmask, backend="native")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["native", "cusparselt"])
def test_metadata_of_the_other_kind_is_only_slower(backend):
    skip_unless_it_runs()
    o = Operands(64, 96, torch.bfloat16, CUDA)
    x = o.randn(16, 96)
    packed = ops.pack(o.values, o.bitmask)
    metadata = packed[o.values.nbytes :] if backend == "native" else with_words(o)
    y = ops.linear(x, o.values, o.bitmask, o.bias, metadata=metadata, backend=backend)
    torch.testing.assert_close(y, F.linear(x, o.dense, o.bias), rtol=2e-2, atol=2e-2)


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
@pytest.mark.parametrize("rank", [0, 16])
def test_captured_step_replays(rank):
    skip_unless_it_runs()
    layer, _ = twins(128, 256)
    if rank:
        layer.add_adapter(rank, scale=0.5)
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    x = torch.randn(64, 256, device=CUDA, dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn(64, 128, device=CUDA, dtype=torch.bfloat16)
    leaves = (x, layer.weight, *((layer.lora_A, layer.lora_B) if rank else ()))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            torch.autograd.grad(layer(x), leaves, dy)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
        gradients = torch.autograd.grad(y, leaves, dy)
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
        layer.weight.mul_(-0.5)
    graph.replay()
    expected = layer(x)
    torch.testing.assert_close(y, expected, rtol=0, atol=0)
    for captured, eager in zip(gradients, torch.autograd.grad(expected, leaves, dy), strict=True):
        torch.testing.assert_close(captured, eager, rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("activation", ["none", "relu", "swiglu"])
@pytest.mark.parametrize(
    "tile", [(128, 256, 1, 1), (128, 256, 2, 1), (256, 192, 2, 1), (128, 256, 1, 2)], ids=str
)
def test_captured_products_of_several_rounds(tile, activation):
    """After the kernel that refreshes what they read, which lets them start early."""
    skip_unless_it_runs()
    rows, tokens = (4096, 512) if tile[3] > 1 else (4096, 2048)
    o = Operands(1024, rows, torch.bfloat16, CUDA, bias=False)
    transposed = Operands(rows, 1024, torch.bfloat16, CUDA, bias=False)
    transposed.bitmask.copy_(o.bitmask_t)
    words = with_words(transposed)
    x, y = o.randn(tokens, 1024), o.randn(tokens, rows // (1 + (activation == "swiglu")))
    options = {"activation": activation, "choice": Choice(TILES.index(tile))}
    fresh = torch.empty_like(o.values_t)

    def step():
        ops.transpose_values(o.values, o.bitmask, o.bitmask_t, fresh)
        spmm_sm90(x, fresh, words, y, **options)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    o.values.mul_(-0.5)
    graph.replay()
    captured = y.clone()
    step()
    assert torch.equal(captured, y)
    assert captured.isfinite().all()


@pytest.mark.gpu
def test_copies_and_moves():
    skip_unless_it_runs()
    layer, _ = twins(64, 96)
    x = torch.randn(16, 96, device=CUDA, dtype=torch.bfloat16)
    expected = layer(x)
    twin = copy.deepcopy(layer)
    with torch.inference_mode():
        assert torch.equal(twin(x), expected)
    twin(x.requires_grad_()).sum().backward()
    moved = copy.deepcopy(layer).cpu().cuda()
    assert moved.weight_metadata.dtype == torch.int32
    assert torch.equal(moved(x), expected)
    half = copy.deepcopy(layer).half()
    torch.testing.assert_close(half(x.half()), expected.half(), rtol=2e-2, atol=2e-2)
    single = copy.deepcopy(layer).float()
    assert single.weight_metadata is None
    with torch.autocast("cuda", torch.bfloat16):
        assert torch.equal(single(x.float()), expected)


@pytest.mark.gpu
def test_what_may_run_by_plans_is_tuned():
    skip_unless_it_runs()
    layer, _ = twins(64, 96, backend="native")
    assert plan_cache.tune(layer, tokens=[16]) == []
    with pytest.raises(ValueError, match="sweep: layer must be one SLoPeLinear"):
        plan_cache.sweep(layer, 16)
    mixed, _ = twins(48, 64)  # its input gradient has in = 48
    assert mixed.weight_metadata.dtype == torch.int32
    assert mixed.weight_t_metadata.dtype == torch.uint8
    timed = {(e.rows, e.columns): e.native_seconds for e in plan_cache.tune(mixed, tokens=[16])}
    assert timed.keys() == {(48, 64), (64, 48)}
    assert timed[48, 64] > 0
    assert timed[64, 48] is None
    x = torch.randn(16, 64, device=CUDA, dtype=torch.bfloat16, requires_grad=True)
    mixed(x).backward(torch.ones(16, 48, device=CUDA, dtype=torch.bfloat16))
    torch.testing.assert_close(
        x.grad, mixed.backward_weight().sum(0).expand(16, 64), rtol=2e-2, atol=2e-2
    )
