# SPDX-License-Identifier: Apache-2.0
"""Which kernels of the own product for Hopper are taken: host arithmetic, no GPU needed."""

import random

import pytest

from slope_ext import _C

TILES = _C.SPMM_SM90_TILES
H200 = 132  # multiprocessors, as of an H100 SXM


def room(processors=H200, without=()):
    """Clusters that run at the same time; larger ones than pairs as an H200 says, in proportion."""
    most = {1: H200, 2: 66, 3: 39, 4: 28}
    return [
        0 if tile in without else most[tile[2] * tile[3]] * processors // H200 for tile in TILES
    ]


def choose(tokens, rows, columns, processors=H200, **options):
    clusters = room(processors, **options)
    tile, first_rows, rest = _C.spmm_sm90_choice(
        tokens, rows, columns, processors=processors, clusters=clusters
    )
    return TILES[tile], first_rows, TILES[rest]


@pytest.mark.parametrize(
    ("rows", "columns", "tokens", "tile"),
    [
        (9216, 9216, 8192, (256, 192, 2, 1)),
        (20480, 5120, 8192, (128, 256, 1, 1)),
        (5120, 20480, 8192, (128, 256, 2, 1)),
        (14336, 4096, 8192, (256, 176, 2, 1)),
        (4096, 14336, 8192, (256, 168, 2, 1)),
        (4096, 4096, 8192, (256, 168, 2, 1)),
        (9216, 9216, 2048, (256, 192, 2, 1)),
        (5120, 20480, 2048, (256, 160, 2, 1)),
        (4096, 4096, 2048, (128, 256, 1, 1)),
        (4096, 14336, 2048, (128, 256, 2, 1)),
        (14336, 4096, 2048, (128, 256, 1, 1)),
        (9216, 36864, 384, (256, 128, 2, 1)),
        (14336, 4096, 512, (128, 256, 4, 1)),
        (5120, 20480, 512, (128, 192, 2, 1)),
        (4096, 14336, 512, (128, 256, 1, 2)),
        (7168, 28672, 256, (128, 256, 1, 2)),
        (4096, 4096, 64, (128, 64, 1, 2)),
        (2048, 8192, 64, (128, 64, 1, 4)),
    ],
)
def test_one_kernel(rows, columns, tokens, tile):
    """What measures best, or within what the times err by."""
    assert choose(tokens, rows, columns)[:2] == (tile, 0)


@pytest.mark.parametrize(
    ("rows", "columns", "tokens", "choice"),
    [
        (14336, 4096, 640, ((256, 160, 2, 1), 8192, (256, 128, 2, 1))),
        (20480, 5120, 256, ((128, 256, 2, 1), 16896, (128, 128, 1, 2))),
        (36864, 9216, 256, ((128, 256, 2, 1), 33792, (128, 128, 1, 2))),
        (36864, 9216, 192, ((256, 192, 2, 1), 33792, (128, 128, 1, 2))),
        (9216, 36864, 640, ((256, 128, 2, 1), 6656, (128, 256, 1, 2))),
    ],
)
def test_two_kernels_where_a_last_round_would_be_mostly_empty(rows, columns, tokens, choice):
    assert choose(tokens, rows, columns) == choice


@pytest.mark.parametrize("processors", [132, 114, 78, 16])
def test_parts_are_of_this_product(processors):
    draw = random.Random(0)
    split = 0
    for _ in range(2000):
        rows, columns = 8 * draw.randint(1, 4000), 32 * draw.randint(1, 1200)
        tokens = draw.choice([draw.randint(1, 300), draw.randint(1, 20000)])
        tile, first_rows, _ = choose(tokens, rows, columns, processors)
        assert 0 <= first_rows < rows
        assert first_rows % (tile[0] * tile[2]) == 0
        assert tile[3] == 1 or first_rows == 0, "segments take one round"
        split += first_rows > 0
    assert split > 20


def candidates(tokens, rows, columns, factor):
    found = _C.spmm_sm90_candidates(
        tokens, rows, columns, processors=H200, clusters=room(), factor=factor
    )
    return [(TILES[tile], first_rows, TILES[rest]) for tile, first_rows, rest in found]


def test_candidates_are_the_choice_and_what_may_be_as_fast():
    draw = random.Random(0)
    for _ in range(200):
        rows, columns = 8 * draw.randint(1, 4000), 32 * draw.randint(1, 1200)
        tokens = draw.choice([draw.randint(1, 300), draw.randint(1, 20000)])
        near, more = (candidates(tokens, rows, columns, factor) for factor in (1.0, 1.1))
        assert near[0] == more[0] == choose(tokens, rows, columns)
        assert set(near) <= set(more)
        assert len(set(more)) == len(more)
        for tile, first_rows, _ in more:
            assert 0 <= first_rows < rows
            assert first_rows % (tile[0] * tile[2]) == 0
    pair = ((256, 192, 2, 1), 12288, (128, 256, 2, 1))  # 4 % sooner in bursts, 2 % by the model
    found = candidates(2048, 14336, 4096, 1.04)
    assert found[0] == ((128, 256, 1, 1), 0, TILES[0])
    assert found[1] == pair


def test_tiles_that_a_device_has_no_room_for_are_not_taken():
    segments = [tile for tile in TILES if tile[3] > 1]
    assert choose(512, 4096, 14336)[0] in segments
    assert choose(512, 4096, 14336, without=segments)[0] not in segments
    tile, first_rows, rest = choose(256, 20480, 5120)
    assert first_rows > 0
    assert rest in segments
    tile, first_rows, rest = choose(256, 20480, 5120, without=segments)
    assert first_rows > 0
    assert tile not in segments
    assert rest not in segments


def cut(tile, tokens, rows, columns):
    index = TILES.index(tile)
    return _C.spmm_sm90_cut(index, tokens, rows, columns, processors=H200, clusters=room())


@pytest.mark.parametrize(
    ("tile", "tokens", "rows", "columns", "starts_early"),
    [
        ((128, 256, 1, 1), 8192, 20480, 5120, False),  # would scatter after a refresh
        ((128, 256, 1, 1), 2048, 4096, 4096, False),
        ((128, 128, 1, 1), 384, 5120, 20480, False),
        ((128, 256, 2, 1), 8192, 20480, 5120, True),  # clusters stay together
        ((256, 192, 2, 1), 8192, 9216, 9216, True),
        ((128, 256, 1, 1), 2048, 4096, 1024, True),  # ends before it matters
        ((128, 256, 1, 1), 2048, 4096, 3456, True),  # in 49.6 us
        ((128, 256, 1, 1), 2048, 4096, 3520, False),  # in 50.5 us
        ((128, 64, 1, 1), 64, 14336, 4096, True),
        ((128, 128, 1, 1), 128, 28672, 8192, True),  # all blocks read the same X
        ((128, 256, 1, 2), 512, 4096, 4096, True),  # 128 of 132 multiprocessors
        ((128, 128, 1, 1), 512, 2560, 2560, False),  # 80 would crowd
        ((128, 128, 1, 1), 256, 2560, 2560, True),  # 40 find idle ones
    ],
)
def test_products_start_early_where_it_does_no_harm(tile, tokens, rows, columns, starts_early):
    assert cut(tile, tokens, rows, columns)[0] is starts_early


def test_only_crowding_adds_the_late_start_to_the_time():
    """Where blocks would scatter, products measure as long started late as early."""
    tile = (128, 256, 1, 1)
    early, round_ = cut(tile, 1024, 4096, 4096)
    assert early
    assert cut(tile, 1024, 2560, 4096) == (False, pytest.approx(round_ + 1.4)), "80 blocks crowd"
    late, rounds = cut(tile, 2048, 4096, 4096)
    assert not late
    assert rounds == pytest.approx(2 * round_ + 2.0), "and what a further tile adds"


def test_a_tile_index_out_of_range_is_refused():
    for index in (-1, len(TILES)):
        with pytest.raises(IndexError, match="spmm_sm90_cut: tile"):
            _C.spmm_sm90_cut(index, 8, 64, 64, processors=H200, clusters=room())
