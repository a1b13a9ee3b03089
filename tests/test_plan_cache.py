# SPDX-License-Identifier: Apache-2.0
"""Plans and the tuned table: what a product on CUDA runs by."""

import errno
import hashlib
import json
import math
import multiprocessing
import os
import subprocess
import sys
import threading
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import slope_ext as slope
from cases import Operands
from slope_ext import _C, _freshness, _tuned_table, _tuner, ops, plan_cache
from slope_ext._spmm_sm90 import TILES, Choice, chosen
from slope_ext._tuned_table import Candidate, Entry, Kernels, Key, Sweep, Table

SHIPPED = _tuned_table.SHIPPED  # the package's own; tests see another folder
ENVIRONMENT = "sm_90 | cuSPARSELt 0.8.0 | GPU A | driver 13000"
RELATIVE = "sm_90 | cuSPARSELt 0.8.0 | GPU B | driver 12080"
STRANGER = "sm_80 | cuSPARSELt 0.8.0 | GPU C | driver 13000"
GPU = f"sm_90 | GPU A | 132 multiprocessors | kernels {_tuned_table.KERNELS}"


def entry(rows=64, columns=64, tokens=8, dtype="bfloat16", **changes):
    values = {"id": 3, "split_k": 1, "split_k_mode": 0, "seconds": 1e-5, "default_seconds": 2e-5}
    values |= {"native_version": _tuned_table.KERNELS}
    return Entry(rows, columns, tokens, dtype, **(values | changes))


ONE = ((64, *TILES[0]),)
SPLIT = ((512, 256, 192, 2, 1), (128, 128, 64, 1, 2))  # two kernels for 640 rows


def kernels(rows=64, columns=64, tokens=8, dtype="bfloat16", **changes):
    values = {"kernels": ONE, "seconds": 1e-5, "usual_seconds": 2e-5}
    return Kernels(rows, columns, tokens, dtype, **(values | changes))


# ---- table: no GPU needed ------------------------------------------------------------------------


class Problem:
    def __init__(self, rows, columns, tokens, bfloat16=True):
        self.rows, self.columns, self.tokens, self.bfloat16 = rows, columns, tokens, bfloat16


@pytest.mark.parametrize(
    ("tokens", "bucket"), [(8, 8), (16, 16), (24, 32), (4096, 4096), (4104, 8192)]
)
def test_token_counts_share_an_entry_up_to_the_next_power_of_two(tokens, bucket):
    assert _tuned_table.key_of(Problem(32, 64, tokens)) == Key(32, 64, bucket, "bfloat16")


def test_the_fastest_right_candidate_wins():
    candidates = [
        Candidate(0, 1, 0, 3e-5, True),
        Candidate(7, 1, 0, 1e-5, False),
        Candidate(5, -1, 0, 2e-5, True),
    ]
    made = _tuned_table.entry_of(Problem(32, 64, 16), Sweep(candidates, 4e-5))
    assert (made.id, made.split_k, made.seconds, made.default_seconds) == (5, -1, 2e-5, 3e-5)
    assert made.native_seconds == 4e-5
    assert _tuned_table.entry_of(Problem(32, 64, 16), Sweep(candidates[1:2], 4e-5)) is None


def test_lookup_is_exact_then_related_then_nearest():
    by_environment = {
        ENVIRONMENT: [entry(id=1)],
        RELATIVE: [
            entry(tokens=4096, id=2),
            entry(4096, 4096, 4096, id=4),
            entry(4096, 4096, 64, split_k=-1, id=5),
            entry(4096, 4096, 512, id=7),
        ],
        STRANGER: [entry(128, 128, 8, id=6)],
    }
    table = Table(ENVIRONMENT, GPU, by_environment)
    assert table.exact(Key(64, 64, 8, "bfloat16")).id == 1
    assert table.exact(Key(64, 64, 4096, "bfloat16")) is None
    assert table.nearest(Key(64, 64, 4096, "bfloat16")).id == 2
    assert table.nearest(Key(128, 128, 8, "bfloat16")).id == 1, "not from another capability"
    assert table.nearest(Key(4096, 4096, 64, "bfloat16")).id == 5, "tuned for this very shape"
    assert table.nearest(Key(4096, 4096, 128, "bfloat16")).id == 7, "a split is not taken over"
    assert table.nearest(Key(4096, 4096, 32, "bfloat16")) is None, "too far"
    assert table.nearest(Key(64, 64, 8, "float16")) is None


def test_plans_are_preferred_where_both_were_timed_and_they_are_the_faster():
    def faster(*entries, own=()):
        by_environment = {RELATIVE: list(entries), ENVIRONMENT: list(own)}
        table = Table(ENVIRONMENT, GPU, by_environment)
        return table.prefers_plans(64, 64, "bfloat16")

    slow, fast = entry(native_seconds=9e-6), entry(native_seconds=2e-5)
    assert not faster()
    assert not faster(entry()), "no time of the own product"
    assert not faster(slow)
    assert faster(fast)
    assert faster(entry(native_seconds=math.inf)), "a wrong product never wins"
    assert faster(fast, entry(tokens=4096, seconds=1e-3, native_seconds=6e-4)), "the mean of both"
    assert not faster(fast, entry(tokens=4096, seconds=1e-3, native_seconds=4e-4))
    assert faster(fast, entry(128, 64, native_seconds=1e-9)), "another weight"
    assert not faster(fast, own=[slow]), "this GPU's own time counts"
    old = entry(native_seconds=2e-5, native_version=_tuned_table.KERNELS - 1)
    assert not faster(old), "of other kernels than today's"
    assert faster(fast, own=[old])
    assert not faster(entry(native_seconds=1.01e-5)), "not clearly"
    table = Table(ENVIRONMENT, GPU, {RELATIVE: [fast], STRANGER: [slow]})
    table.add(entry(id=5))  # a sweep on first use
    assert table.prefers_plans(64, 64, "bfloat16")


def test_file_round_trip_merges(tmp_path):
    path = tmp_path / "folder" / "tuned.json"
    _tuned_table.save(path, {ENVIRONMENT: [entry(id=1), entry(tokens=16, id=2)]})
    _tuned_table.save(path, {ENVIRONMENT: [entry(id=9)]})
    _tuned_table.save(path, {RELATIVE: [entry(id=4)]})
    found = _tuned_table.load(path)
    assert {e.tokens: e.id for e in found[ENVIRONMENT]} == {8: 9, 16: 2}
    assert [e.id for e in found[RELATIVE]] == [4]


def test_a_time_of_the_own_product_is_not_lost(tmp_path):
    path = tmp_path / "tuned.json"
    time = {"native_seconds": 2e-5, "native_kernels": ONE}
    _tuned_table.save(path, {ENVIRONMENT: [entry(id=1, **time)]})
    _tuned_table.save(path, {ENVIRONMENT: [entry(id=9)]})
    assert _tuned_table.load(path) == {ENVIRONMENT: [entry(id=9, **time)]}
    old = {"native_seconds": 1e-5, "native_version": _tuned_table.KERNELS - 1}
    _tuned_table.save(path, {ENVIRONMENT: [entry(id=8, **old)]})
    assert _tuned_table.load(path) == {ENVIRONMENT: [entry(id=8, **time)]}, "of today's kernels"
    _tuned_table.save(path, {ENVIRONMENT: [entry(id=9, native_seconds=math.inf)]})
    assert _tuned_table.load(path)[ENVIRONMENT][0].native_seconds == math.inf


def test_a_time_of_the_own_product_goes_with_times_of_other_token_counts(tmp_path):
    path = tmp_path / "tuned.json"
    _tuned_table.save(path, {ENVIRONMENT: [entry(tokens=1024, native_seconds=2e-5)]})
    _tuned_table.save(path, {ENVIRONMENT: [entry(tokens=1024, native_tokens=520)]})
    assert _tuned_table.load(path)[ENVIRONMENT][0].native_seconds is None


def test_a_time_of_the_own_product_is_outdated_by_other_kernels():
    table = Table(ENVIRONMENT, GPU, {GPU: [kernels(tokens=40), kernels(tokens=64, kernels=())]})
    for tokens, its_kernels, outdated in (
        (40, (), True), (40, ONE, False), (64, (), False), (64, ONE, True), (48, (), False),
    ):  # fmt: skip
        timed = entry(tokens=64, native_tokens=tokens, native_kernels=its_kernels)
        assert table.is_outdated(timed) == outdated
    assert not table.is_outdated(entry(tokens=64, native_tokens=0)), "of as many as it is for"
    assert table.is_outdated(entry(native_version=0)), "of other kernels, whichever it took"
    table.add(kernels(tokens=64))
    assert table.is_outdated(entry(tokens=64, native_tokens=0))


def test_kernels_are_of_a_gpu_whatever_its_driver_and_library(tmp_path):
    path = tmp_path / "tuned.json"
    untuned, tuned = kernels(640, kernels=()), kernels(640, kernels=SPLIT)
    _tuned_table.save(path, {ENVIRONMENT: [entry()], GPU: [untuned, kernels(tokens=24)]})
    _tuned_table.save(path, {GPU: [tuned]})
    found = _tuned_table.load(path)
    assert found == {ENVIRONMENT: [entry()], GPU: [tuned, kernels(tokens=24)]}
    assert Table(ENVIRONMENT, GPU.replace("132", "66"), found).kernels() == []
    other = ENVIRONMENT.replace("0.8.0", "0.9.1").replace("13000", "13010")
    table = Table(other, GPU, found)
    assert len(table.kernels()) == 2
    assert table.kernels_of(Key(640, 64, 8, "bfloat16")).kernels == SPLIT
    assert table.kernels_of(Key(64, 64, 16, "bfloat16")) is None, "of other token counts"
    assert table.environment_for(kernels()) == GPU
    assert table.environment_for(entry()) == other
    table.add(kernels(tokens=16))
    assert table.kernels_of(Key(64, 64, 16, "bfloat16")).kernels == ONE
    assert table.nearest(Key(64, 64, 16, "bfloat16")) is None, "no entry of plans"
    table.drop(kernels(tokens=16))
    assert table.kernels_of(Key(64, 64, 16, "bfloat16")) is None


def test_kernels_name_tiles_that_there_are():
    assert kernels().choice() == (0, 0, 0)
    assert kernels(640, kernels=SPLIT).choice() == (
        TILES.index((256, 192, 2, 1)), 512, TILES.index((128, 64, 1, 2)),
    )  # fmt: skip
    halves = ((320, 256, 192, 2, 1), (320, 128, 64, 1, 2))
    assert kernels(640, kernels=halves).choice() is None, "the first is no whole clusters of tiles"
    assert kernels(kernels=()).choice() == (-1, 0, 0), "as untuned"
    assert kernels(kernels=((64, 31, 7, 1, 1),)).choice() is None, "of another version"


@pytest.mark.parametrize("number", [1, 2])
def test_a_table_of_a_format_before_is_read(tmp_path, number):
    path = tmp_path / "tuned.json"
    old = {name: value for name, value in asdict(entry()).items() if "native_" not in name}
    path.write_text(json.dumps({"format": number, "environments": {ENVIRONMENT: [old]}}))
    _tuned_table.save(path, {GPU: [kernels()]})
    assert json.loads(path.read_text())["format"] == 3
    assert _tuned_table.load(path) == {ENVIRONMENT: [entry(native_version=1)], GPU: [kernels()]}


USUAL, OTHER, THIRD, FOURTH = map(Choice, range(4))


@pytest.mark.parametrize(
    ("times", "left"),
    [
        ({USUAL: (1.0,), OTHER: (0.993,)}, []),
        ({USUAL: (1.0,), OTHER: (0.98,), THIRD: (0.97,)}, [THIRD, OTHER]),
        ({USUAL: (1.0, 5.0), OTHER: (0.95, 5.01)}, [OTHER]),
        ({USUAL: (1.0, 5.0), OTHER: (0.99, 5.0)}, []),
        ({USUAL: (1.0, 5.0), OTHER: (0.90, 5.05), THIRD: (0.95, 5.01)}, [THIRD]),
        ({USUAL: (1.0, 5.0), OTHER: (1.02, 4.0)}, []),
        ({USUAL: (1.0, 5.0)}, []),
    ],
)
def test_kernels_are_left_where_clearly_sooner_and_never_later(times, left):
    assert _tuner._sooner(times, USUAL, _tuner._AGAIN) == left


@pytest.mark.parametrize(
    ("first", "second", "again", "best"),
    [
        ((1.0, 0.998, 0.998, 0.998), None, None, USUAL),
        ((1.0, 0.996, 1.0, 1.0), (1.0, 0.99), [OTHER], OTHER),
        ((1.0, 0.90, 1.0, 1.0), (1.0, 0.995), [OTHER], USUAL),  # by chance
        ((1.0, 0.98, 0.97, 0.96), (1.0, 0.99, 0.98), [FOURTH, THIRD], THIRD),
        ((1.0, 0.98, 0.99, 0.97), (1.0, 1.1, 0.995), [FOURTH, OTHER], USUAL),
    ],
)
def test_the_soonest_kernels_are_timed_again(first, second, again, best):
    choices, rounds = [USUAL, OTHER, THIRD, FOURTH], []

    def time(timed, round_):
        rounds.append((timed, round_))
        seconds = first if len(rounds) == 1 else second
        return {choice: (value,) for choice, value in zip(timed, seconds, strict=True)}

    found, times = _tuner._elected(choices, time)
    assert found == best
    assert rounds[0] == (choices, _tuner._LIKELY)
    assert rounds[1:] == ([] if again is None else [([USUAL, *again], _tuner._AGAIN)])
    assert times == {c: (t,) for c, t in zip(rounds[-1][0], second or first, strict=True)}


def test_kernels_as_the_table_has_them():
    assert _tuner._kernels_of(Choice(3), 64) == ((64, *TILES[3]),)
    split = Choice(TILES.index((256, 192, 2, 1)), 512, TILES.index((128, 64, 1, 2)))
    assert _tuner._kernels_of(split, 640) == SPLIT


def test_no_home_is_no_error(monkeypatch):
    for name in ("SLOPE_EXT_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as without a passwd entry
    path = _tuned_table.user_path()
    assert _tuned_table.load_all(path) == {}
    with pytest.warns(UserWarning, match="not kept"):
        _tuned_table.save(path, {ENVIRONMENT: [entry()]})


NO_TABLES = [
    "", "{", "[]", '{"format": 0, "environments": {}}', '{"format": 1}',
    '{"format": 1, "environments": {"a": [{"rows": 1}]}}',
    *(
        json.dumps({"format": 1, "environments": {"a": [asdict(entry()) | change]}})
        for change in (
            {"native_seconds": 0}, {"seconds": "x"}, {"seconds": 10**400}, {"rows": [64]},
            {"dtype": {}}, {"tokens": "x"}, {"rows": 0}, {"tokens": -8}, {"seconds": "1.0"},
            {"tokens": 10**400}, {"native_seconds": True}, {"native_seconds": math.nan},
            {"default_seconds": None}, {"native_tokens": 16}, {"native_tokens": 8.0},
            {"native_kernels": 3}, {"native_kernels": [["x"]]}, {"native_kernels": [[1]]},
            {"native_kernels": [[32, 256, 192, 2, 1]]}, {"native_version": "1"},
            {"tokens": 16, "native_tokens": 13}, {"id": 2**31}, {"split_k": -(2**31) - 1},
        )
    ),
    *(
        json.dumps({"format": 3, "environments": {"a": [asdict(kernels()) | change]}})
        for change in (
            {"kernels": [[64, 256, 192, 2]]}, {"kernels": [[32, 256, 192, 2, 1]]}, {"tokens": 9},
            {"columns": 48}, {"rows": 60}, {"dtype": "float8_e4m3fn"},
            {"kernels": [[64, 0, 192, 2, 1]]}, {"kernels": [[64.0, 256, 192, 2, 1]]},
            {"kernels": [[32, 1, 1, 1, 1], [16, 1, 1, 1, 1], [16, 1, 1, 1, 1]]}, {"kernels": 3},
            {"kernels": [3]}, {"usual_seconds": 0}, {"seconds": "x"}, {"tokens": 0}, {"id": 3},
        )
    ),
    "[" * 200_000,
]  # fmt: skip
LATER_TABLE = '{"format": 4, "tables": []}'


@pytest.mark.parametrize("text", NO_TABLES)
def test_what_is_no_table_is_put_aside_by_a_writer(tmp_path, text):
    path = tmp_path / "tuned.json"
    path.write_text(text)
    with pytest.warns(UserWarning, match="is no table of slope_ext"):
        assert _tuned_table.load(path) == {}
    assert path.read_text() == text, "a reader holds no lock and moves nothing"
    with pytest.warns(UserWarning, match="moved to"):
        _tuned_table.save(path, {ENVIRONMENT: [entry()]})
    assert _tuned_table.load(path) == {ENVIRONMENT: [entry()]}
    assert path.with_suffix(".corrupt").read_text() == text


def test_a_later_format_is_left_alone(tmp_path):
    path = tmp_path / "tuned.json"
    path.write_text(LATER_TABLE)
    with pytest.warns(UserWarning, match="of a later version"):
        assert _tuned_table.load(path) == {}
    with pytest.warns(UserWarning, match=r"not kept.*of a later version"):
        _tuned_table.save(path, {ENVIRONMENT: [entry()]})
    assert path.read_text() == LATER_TABLE


def _write_many(path, first):
    for tokens in range(first + 1, first + 21):
        _tuned_table.save(path, {ENVIRONMENT: [entry(tokens=tokens)]})


def test_concurrent_writers_lose_nothing(tmp_path):
    path = tmp_path / "tuned.json"
    context = multiprocessing.get_context("fork")
    writers = [
        context.Process(target=_write_many, args=(path, 100 * i), daemon=True) for i in range(4)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(timeout=60)
    assert [writer.exitcode for writer in writers] == [0] * 4
    assert len(_tuned_table.load(path)[ENVIRONMENT]) == 80
    assert [p.name for p in tmp_path.iterdir() if "tmp" in p.name] == []


def test_folder_that_cannot_be_written_is_a_warning(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="not kept"):
        _tuned_table.save(tmp_path / "file" / "tuned.json", {ENVIRONMENT: [entry()]})


def test_a_full_disk_leaves_the_table_and_nothing_besides(tmp_path, monkeypatch):
    path = tmp_path / "tuned.json"
    _tuned_table.save(path, {ENVIRONMENT: [entry(id=1)]})
    before = {p.name: p.read_text() for p in tmp_path.iterdir()}

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fchmod", full)
    with pytest.warns(UserWarning, match="not kept.*No space left"):
        _tuned_table.save(path, {ENVIRONMENT: [entry(id=2)]})
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == before


def test_export_and_import(tmp_path, monkeypatch):
    _tuned_table.save(plan_cache.table_path(), {ENVIRONMENT: [entry(id=1), entry(tokens=16, id=2)]})
    plan_cache.export_table(tmp_path / "exported.json")
    monkeypatch.setenv("SLOPE_EXT_CACHE_DIR", str(tmp_path / "elsewhere"))
    _tuned_table.save(plan_cache.table_path(), {ENVIRONMENT: [entry(id=7), entry(tokens=32, id=8)]})
    plan_cache.import_table(tmp_path / "exported.json")
    found = _tuned_table.load(plan_cache.table_path())[ENVIRONMENT]
    assert {e.tokens: e.id for e in found} == {8: 1, 16: 2, 32: 8}
    with pytest.raises(FileNotFoundError):
        plan_cache.import_table(tmp_path / "missing.json")


def test_export_of_nothing_is_a_table_too(tmp_path):
    plan_cache.export_table(tmp_path / "exported.json")
    assert _tuned_table.read(tmp_path / "exported.json") == {}


def test_export_and_import_say_what_they_cannot_do(tmp_path):
    good, other = tmp_path / "good.json", tmp_path / "other.json"
    _tuned_table.save(good, {ENVIRONMENT: [entry()]})
    own = plan_cache.table_path()
    for text, message in (("notes", "is no table"), (LATER_TABLE, "of a later version")):
        other.write_text(text)
        for use in (plan_cache.export_table, plan_cache.import_table):
            with pytest.raises(ValueError, match=message):
                use(other)
        assert other.read_text() == text
        own.parent.mkdir(exist_ok=True)
        own.write_text(text)
        for use in (plan_cache.export_table, plan_cache.import_table):
            with pytest.raises(ValueError, match=message):
                use(good)
        assert own.read_text() == text
        own.unlink()
    for use in (plan_cache.export_table, plan_cache.import_table):
        with pytest.raises(OSError, match="other"):
            use(other / "folder" / "table.json")


def test_concurrent_exports_lose_nothing(tmp_path, monkeypatch):
    """From several machines, say, into a file that they share."""
    shared = tmp_path / "shared.json"

    def export(number):
        _tuned_table.merge_into(shared, {f"{ENVIRONMENT} {number}": [entry()]})

    threads = [threading.Thread(target=export, args=(i,), daemon=True) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert len(_tuned_table.read(shared)) == 8


def test_shipped_tables_are_readable_and_have_the_shapes_of_the_records():
    assert list(SHIPPED.glob("*.json"))
    for path in SHIPPED.glob("*.json"):
        for environment, found in _tuned_table.read(path).items():
            if all(isinstance(line, Kernels) for line in found):
                continue
            assert len(environment.split(" | ")) == 4
            keys = {e.key for e in found}
            for rows, columns in ((4096, 4096), (14336, 4096), (9216, 9216), (5120, 20480)):
                for tokens in (2048, 8192):
                    assert Key(rows, columns, tokens, "bfloat16") in keys
            for e in found:
                assert math.isfinite(e.seconds)
                assert e.key.tokens & (e.key.tokens - 1) == 0


def test_shipped_kernels_are_of_tiles_that_there_are():
    for path in SHIPPED.glob("*.json"):
        for found in _tuned_table.read(path).values():
            for line in found:
                assert isinstance(line, Entry) or line.choice() is not None
        assert any(
            name.endswith(f"kernels {_tuned_table.KERNELS}") for name in _tuned_table.read(path)
        ), "they were counted up: tune anew"


def test_shipped_times_are_of_the_shipped_kernels():
    for path in SHIPPED.glob("*.json"):
        found = _tuned_table.read(path)
        gpus = [name for name, lines in found.items() if isinstance(lines[0], Kernels)]
        for environment in found.keys() - set(gpus):
            (gpu,) = (name for name in gpus if name.split(" | ")[1] == environment.split(" | ")[2])
            table = Table(environment, gpu, found)
            timed = [e for e in table.entries() if e.native_seconds is not None]
            assert timed
            assert not any(map(table.is_outdated, timed))


def test_times_are_of_kernels_that_are_counted():
    digest = hashlib.sha256()
    for name in (
        "common/launch.cuh", "common/ptx.cuh", "ops/spmm_sm90.cpp", "ops/spmm_sm90.cuh",
        "ops/spmm_sm90_args.h", "ops/spmm_sm90_choice.cpp", "ops/spmm_sm90_tiles.h",
    ):  # fmt: skip
        digest.update((Path(__file__).parents[1] / "csrc" / name).read_bytes())
    counted = (_tuned_table.KERNELS, digest.hexdigest()[:16])
    assert counted == (2, "297639b19ab41d1e"), "does a product take another time? then KERNELS + 1"


def test_shipped_tables_lie_under_the_users_own():
    shipped = _tuned_table.SHIPPED / "gpu.json"
    _tuned_table.save(shipped, {ENVIRONMENT: [entry(id=1), entry(tokens=16, id=2)]})
    _tuned_table.save(plan_cache.table_path(), {ENVIRONMENT: [entry(id=5)]})
    found = _tuned_table.load_all(plan_cache.table_path())[ENVIRONMENT]
    assert {e.tokens: e.id for e in found} == {8: 5, 16: 2}


@pytest.mark.parametrize(
    ("factor", "right"), [(1.0, True), (1.004, True), (1.01, False), (math.nan, False)]
)
def test_results_off_everywhere_by_little_are_wrong(factor, right):
    """None of the elements is 2 % of the largest off."""
    job = object.__new__(_tuner._Sweep)
    job.before, job.expected, job.y = float("nan"), torch.randn(64, 96), torch.empty(64, 96)
    job.norm, job.largest = job.expected.norm(), job.expected.abs().amax()
    trial = _tuner._Trial(None, lambda: job.y.copy_(job.expected * factor))
    assert job._is_right(trial) == right


def test_fp16_sweeps_try_what_is_known_to_be_good(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(_C, "cusparselt_version", lambda: (0, 8, 0), raising=False)
    ids = _tuner.algorithm_ids(False, 0, 40)
    assert ids[0] == 0
    assert max(ids) < 36, "one of those beyond takes the context with it"
    assert _tuner.algorithm_ids(False, 0, 6) == [0, 5]
    assert _tuner.algorithm_ids(True, 0, 40) == list(range(40))
    monkeypatch.setattr(_C, "cusparselt_version", lambda: (0, 9, 0), raising=False)
    assert _tuner.algorithm_ids(False, 0, 40) == [0]


class Job:
    """What a sweep does on the GPU, of algorithms that take so long."""

    slower = 1.0  # in rows, by this factor

    def __init__(self, seconds, launches):
        self.seconds, self.launches, self.timed, self.rests = seconds, launches, [], []

    def trial(self, algorithm):
        return None if algorithm == "wrong" else _tuner._Trial(algorithm, lambda: None)

    def time(self, trials, turns, launches=None, rest=0.0):
        self.timed.append(([t.algorithm for t in trials], turns, launches or self.launches))
        self.rests.append(rest)
        slower = 1 if rest or launches else self.slower  # in rows
        for trial in trials:
            trial.samples += [slower * self.seconds[trial.algorithm]] * turns


@pytest.mark.parametrize("launches", [1, 5])
def test_one_launch_of_a_long_product_tells_what_is_worth_a_row(launches):
    job = Job({"a": 1.0, "b": 1.29, "c": 1.31}, launches)
    trials = _tuner._timed(job, ["a", "wrong", "b", "c"])
    assert [t.algorithm for t in trials] == ["a", "b", "c"]
    if launches == 1:
        assert job.timed == [(["a", "b", "c"], 2, 1)]
        assert not any(t.far for t in trials)
    else:
        assert job.timed == [(["a", "b", "c"], 1, 1), (["a", "b"], 1, 5)]
        assert [t.far for t in trials] == [False, False, True]
        assert [t.samples for t in trials] == [[1.0], [1.29], [1.31]]


@pytest.mark.parametrize(("launches", "rows"), [(1, 0), (2, 8), (25, 5), (1000, 3)])
def test_a_round_of_kernels_counts_its_own_samples(launches, rows):
    job = Job({"a": 1e-3, "b": 0.5e-3}, launches)
    job.slower = 2.0
    trials = [job.trial(name) for name in "ab"]
    for trial in trials:
        trial.samples += 50 * [5.0]  # of the round before
    times = _tuner._time_kernels(job, trials, _tuner._LIKELY)
    expected = [(["a", "b"], 8, 1)]
    if rows:
        expected += [(["a", "b"], rows, launches)]
    assert job.timed == expected
    assert job.rests == [_tuner._REST_SECONDS, 0.0][: len(expected)]
    assert times == {name: (job.seconds[name], 2 * job.seconds[name])[: len(expected)]
                     for name in "ab"}  # fmt: skip


def test_turns_alternate_so_that_none_is_mostly_first(monkeypatch):
    class Event:
        def __init__(self, **_):
            pass

        def record(self):
            pass

        synchronize = record

        def elapsed_time(self, _):
            return 3.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    job = object.__new__(_tuner._Sweep)
    job.device, job.l2_bytes, job.launches = torch.device("cpu"), 64, 2
    order = []
    trials = [_tuner._Trial(name, lambda name=name: order.append(name)) for name in "abc"]
    job.time(trials, turns=20, launches=1)
    turns = ["".join(order[i : i + 3]) for i in range(0, 60, 3)]
    assert all(turn == before[::-1] for before, turn in zip(turns[::2], turns[1::2], strict=True))
    assert len(set(turns)) > 2, "shuffled"
    assert trials[0].samples == 20 * [3e-3]


def test_large_products_are_timed_in_rows():
    assert _tuner.launches(90 << 20, 50 << 20, 10**9) == 1
    assert _tuner.launches(110 << 20, 50 << 20, 2 * 4096**3) == 7
    assert _tuner.launches(110 << 20, 50 << 20, 10**13) == 2


def test_bad_arguments():
    with pytest.raises(ValueError, match="set_policy: value"):
        plan_cache.set_policy("sometimes")
    with pytest.raises(ValueError, match="set_capacity: plans"):
        plan_cache.set_capacity(0)
    with pytest.raises(ValueError, match="sweep: layer"):
        plan_cache.sweep(torch.nn.Linear(8, 8), 8)


def test_tuning_is_refused_while_a_graph_is_captured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="tune: must not be called while a CUDA graph is"):
        plan_cache.tune(torch.nn.Linear(8, 8), 8)
    with pytest.raises(RuntimeError, match="sweep: must not be called while a CUDA graph is"):
        plan_cache.sweep(torch.nn.Linear(8, 8), 8)


def test_policy_from_the_environment():
    code = "import slope_ext; print(slope_ext.plan_cache.policy())"
    for value, expected in (("ahead", "ahead"), ("never", "SLOPE_EXT_AUTOTUNE must be one of")):
        result = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "SLOPE_EXT_AUTOTUNE": value},
            capture_output=True,
            text=True,
            check=False,
        )
        assert expected in result.stdout + result.stderr


def test_without_plans_the_functions_still_answer():
    assert set(plan_cache.info()) == {"plans", "capacity", "hits", "misses", "evictions"}
    if not torch.cuda.is_available():
        assert plan_cache.entries() == []
        plan_cache.clear()


# ---- plans ---------------------------------------------------------------------------------------

CUDA = torch.device("cuda")


def difference(before):
    after = plan_cache.info()
    return {key: after[key] - before[key] for key in after}


def layer_and_input(rows=64, columns=96, tokens=32, dtype=torch.bfloat16, **options):
    options = {"backend": "cusparselt"} | options
    weight = torch.randn(rows, columns, device="cuda", dtype=dtype) / columns**0.5
    bias = torch.randn(rows, device="cuda", dtype=dtype)
    layer = slope.SLoPeLinear.from_dense(weight, bias, **options)
    return layer, torch.randn(tokens, columns, device="cuda", dtype=dtype)


def assert_right(layer, x, y):
    expected = F.linear(x, layer.dense_weight(), layer.bias)
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
def test_second_call_of_a_shape_hits():
    plan_cache.clear()
    before = plan_cache.info()
    layer, x = layer_and_input()
    for _ in range(3):
        assert_right(layer, x, layer(x))
    layer(x[:25])  # padded to 32
    counted = difference(before)
    assert (counted["misses"], counted["hits"]) == (1, 3)
    (found,) = plan_cache.entries()
    assert (found["rows"], found["columns"], found["tokens"]) == (64, 96, 32)
    assert found["bias"]
    assert found["dtype"] == torch.bfloat16


@pytest.mark.gpu
def test_capacity_evicts_what_was_used_longest_ago():
    plan_cache.clear()
    layer, x = layer_and_input(tokens=48)
    plan_cache.set_capacity(2)
    try:
        before = plan_cache.info()
        for tokens in (8, 16, 8, 24, 8, 16):
            assert_right(layer, x[:tokens], layer(x[:tokens]))
        counted = difference(before)
        assert counted["evictions"] == 2
        assert counted["misses"] == 4
        assert {e["tokens"] for e in plan_cache.entries()} == {8, 16}
    finally:
        plan_cache.set_capacity(1024)


@pytest.mark.gpu
def test_a_smaller_capacity_holds_from_the_next_call_on():
    plan_cache.clear()
    layer, x = layer_and_input(tokens=48)
    for tokens in (8, 16, 24):
        layer(x[:tokens])
    plan_cache.set_capacity(1)
    try:
        before = plan_cache.info()
        layer(x[:16])
        assert difference(before)["hits"] == 1
        assert [e["tokens"] for e in plan_cache.entries()] == [16]
    finally:
        plan_cache.set_capacity(1024)


@pytest.mark.gpu
def test_one_plan_serves_every_bias_and_weight_of_its_shape():
    o = Operands(64, 96, torch.bfloat16, CUDA)
    x = o.randn(32, 96)
    plan_cache.clear()
    for _ in range(3):
        bias, values = o.randn(64), o.randn(64, 48)
        expected = F.linear(x, ops.decompress(values, o.bitmask), bias)
        actual = ops.linear(x, values, o.bitmask, bias, backend="cusparselt")
        torch.testing.assert_close(actual, expected, rtol=2e-2, atol=5e-2)
    assert plan_cache.info()["plans"] == 1


@pytest.mark.gpu
def test_threads_have_plans_of_their_own_and_their_successors_reuse_them():
    layer, x = layer_and_input()
    errors = []

    def work():
        try:
            for tokens in (8, 16, 32):
                stream = torch.cuda.Stream()
                stream.wait_stream(torch.cuda.default_stream())
                with torch.cuda.stream(stream), torch.no_grad():
                    y = layer(x[:tokens])
                    stream.synchronize()
                    assert_right(layer, x[:tokens], y)
        except BaseException as error:
            errors.append(error)

    def run(count):
        threads = [threading.Thread(target=work) for _ in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    layer(x)
    plan_cache.clear()
    run(4)
    first = plan_cache.info()["plans"]
    for _ in range(3):
        run(4)
    assert not errors
    assert plan_cache.info()["plans"] <= 12 + first
    assert len(plan_cache.entries()) == plan_cache.info()["plans"]


@pytest.mark.gpu
def test_clear_while_others_multiply():
    layer, x = layer_and_input()
    errors, calls = [], [0, 0]

    def work(number):
        try:
            with torch.no_grad():
                for _ in range(50):
                    assert_right(layer, x, layer(x))
                    calls[number] += 1
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    clears = 0
    while any(thread.is_alive() for thread in threads):
        plan_cache.clear()
        plan_cache.entries()
        clears += bool(min(calls))
    assert not errors
    assert calls == [50, 50]
    assert clears > 0


@pytest.mark.gpu
def test_an_algorithm_that_is_not_offered_falls_back_to_the_default():
    layer, x = layer_and_input()
    table = _tuned_table.of_device(0)
    table.add(entry(64, 96, 32, id=9999))
    plan_cache.clear()
    assert_right(layer, x, layer(x))
    assert plan_cache.entries()[0]["algorithm"] == 0


@pytest.mark.gpu
def test_tuning_persists_and_is_used():
    layer, x = layer_and_input(256, 512, 512)
    added = plan_cache.tune(layer, 512)
    assert [(e.rows, e.columns) for e in added] == [(256, 512), (512, 256)]
    assert all(e.seconds <= e.default_seconds for e in added)
    assert plan_cache.tune(layer, [512, 300]) == [], "300 falls under 512"
    assert plan_cache.tune(layer, 512, backward=False, again=True)
    stored = json.loads(plan_cache.table_path().read_text())
    assert len(stored["environments"][_tuned_table.environment_of(0)]) == 2

    _tuned_table.forget()  # as another process would start
    assert_right(layer, x, layer(x))
    chosen = {e["rows"]: e["algorithm"] for e in plan_cache.entries()}
    assert chosen[256] == {e.rows: e.id for e in plan_cache.tuned()}[256]


@pytest.fixture
def no_step_was_captured(monkeypatch):
    """As in a process that captures none; tests before this one did."""
    monkeypatch.setattr(_freshness, "_step_was_captured", False)


@pytest.mark.gpu
@pytest.mark.parametrize("movable", [True, False])
@pytest.mark.parametrize("native_seconds", [1e-9, 1.0])
def test_auto_goes_by_the_table(native_seconds, movable, no_step_was_captured, monkeypatch):
    """A layer that both products take runs by the faster, but for a weight that must not move."""

    def make(**options):
        return layer_and_input(256, 512, 64, backend="auto", **options)[0]

    def kinds(layer):
        found = (layer.weight_metadata, layer.weight_t_metadata)
        return tuple("own" if m.dtype == torch.int32 else "plan" for m in found if m is not None)

    layer, x = layer_and_input(256, 512, 64, backend="auto")
    if kinds(layer) != ("own", "own"):
        pytest.skip("the own product does not run here")
    earlier = make()
    if not movable:
        layer.weight.data = torch.cat([layer.weight.data, layer.weight.data])[:256]
    sweep = _tuner.sweep

    def biased(problem, native):
        found = sweep(problem, native=native)
        assert 0 < found.native_seconds < 1e-3
        return found._replace(native_seconds=native_seconds)

    monkeypatch.setattr(_tuner, "sweep", biased)
    assert len(plan_cache.tune(layer, 64)) == 2
    assert plan_cache.tune(layer, 64) == []
    faster = "own" if native_seconds < 1 else "plan"
    assert kinds(layer) == ((faster, faster) if movable else ("own", "own"))
    _tuned_table.forget()  # as another process would start
    later = make()
    assert kinds(later) == (faster, faster)
    with_adapter = make()
    with_adapter.add_adapter(8)
    assert kinds(with_adapter) == ("own", "own"), "by plans, an adapter costs a pass over Y"
    assert_right(with_adapter, x, with_adapter(x))
    recomputing = make(backward_copy="recompute")
    assert kinds(recomputing) == (faster,)
    earlier.prepare()
    assert kinds(earlier) == ("own", "own"), "what runs does not change by itself"
    with_relu = slope.SLoPeLinear(512, 256, device="cuda", dtype=x.dtype, activation="relu")
    assert kinds(with_relu) == ("own", "own")
    for tuned in (layer, later, recomputing, earlier):
        dy, leaf = torch.randn(64, 256, device="cuda").bfloat16(), x.clone().requires_grad_()
        y = tuned(leaf)
        y.backward(dy)
        assert_right(tuned, x, y)
        dx = dy @ tuned.backward_weight()
        torch.testing.assert_close(leaf.grad, dx, rtol=2e-2, atol=2e-2 * dx.abs().amax().item())


@pytest.mark.gpu
@pytest.mark.parametrize("slow", [(256, 512), (512, 256)])
def test_an_adapter_takes_a_layer_off_plans(slow, no_step_was_captured):
    """Forward or backward alone was on them."""
    own_layer(64, 64, 8)
    _tuned_table.add(0, entry(*slow, tokens=64, native_seconds=1.0))
    layer, x = layer_and_input(256, 512, 64, backend="auto")

    def kinds():
        return {layer.weight_metadata.dtype, layer.weight_t_metadata.dtype}

    assert kinds() == {torch.int32, torch.uint8}
    layer.add_adapter(8)
    assert kinds() == {torch.int32}
    assert_right(layer, x, layer(x))
    layer(x).sum().backward()
    assert layer.lora_B.grad is not None


@pytest.mark.gpu
def test_an_adapter_leaves_a_layer_on_plans_that_replays_read(monkeypatch):
    own_layer(64, 64, 8)
    _tuned_table.add(0, entry(256, 512, tokens=64, native_seconds=1.0))
    layer, x = layer_and_input(256, 512, 64, backend="auto")
    monkeypatch.setattr(_freshness, "_step_was_captured", True)
    before = layer.weight_metadata
    layer.add_adapter(8)
    assert layer.weight_metadata is before
    assert before.dtype == torch.uint8
    assert_right(layer, x, layer(x))


def own_layer(rows, columns, tokens, backend="native", **options):
    layer, x = layer_and_input(rows, columns, tokens, backend=backend, **options)
    if layer.weight_metadata is None or layer.weight_metadata.dtype != torch.int32:
        pytest.skip("the own product does not run here")
    return layer, x


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_own_product_is_made_by_tuned_kernels(dtype):
    rows, columns, tokens = 640, 544, 72
    layer, x = own_layer(rows, columns, tokens, dtype=dtype)

    def now(tokens=tokens, rows=rows, dtype=dtype):
        return chosen(tokens, rows, columns, dtype=dtype)

    def line(parts):
        return kernels(rows, columns, tokens, str(dtype).removeprefix("torch."), kernels=parts)

    untuned, tuned = now(), line(SPLIT)
    expected = Choice(*tuned.choice())
    assert untuned.first_rows == 0
    assert_right(layer, x, layer(x))
    table = _tuned_table.add(0, tuned)
    assert table.kernels() == [tuned]
    for count in (tokens, tokens - 3):
        assert now(count) == expected
        assert_right(layer, x[:count], layer(x[:count]))
    other = torch.float16 if dtype == torch.bfloat16 else torch.bfloat16
    assert now(dtype=other) == untuned
    for sizes in ({"tokens": tokens - 8}, {"tokens": tokens + 1}, {"rows": rows + 128}):
        assert now(**sizes).first_rows == 0
    found = []
    thread = threading.Thread(target=lambda: found.append(now()))
    thread.start()
    thread.join()
    assert found == [expected]
    _tuned_table.add(0, line(((640, 1, 2, 3, 4),)))
    assert (now(), table.kernels()) == (expected, [tuned]), "there is no such tile"
    _tuned_table.add(0, line(()))
    assert now() == untuned
    assert table.kernels() == [line(())]
    _tuned_table.add(0, tuned)
    _tuned_table.forget()
    assert now() == untuned
    assert_right(layer, x, layer(x))


@pytest.mark.gpu
def test_tuned_kernels_do_all_that_a_layer_does():
    """Bias, adapter, activations, the input gradient and a captured graph, as untuned ones do."""
    rows, columns, tokens = 640, 640, 72
    layer, x = own_layer(rows, columns, tokens)
    layer.add_adapter(16, scale=2.0)
    torch.nn.init.normal_(layer.lora_B, std=0.1)
    dy = torch.randn(tokens, rows, device="cuda", dtype=x.dtype)

    def results():
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        y.backward(dy)
        weight = layer.operand()[:-1]
        with torch.no_grad():  # swiglu has no gradient
            activated = [ops.linear(x, *weight, name) for name in ("relu", "swiglu")]
        return [y.detach(), leaf.grad, *activated]

    expected = results()
    _tuned_table.add(0, kernels(rows, columns, tokens, kernels=SPLIT))
    assert chosen(tokens, rows, columns).first_rows == 512
    found = results()
    for tuned, untuned in zip(found, expected, strict=True):
        torch.testing.assert_close(
            tuned, untuned, rtol=2e-2, atol=1e-2 * untuned.abs().amax().item()
        )
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        y = layer(x)
    graph.replay()
    torch.testing.assert_close(y, found[0], rtol=2e-2, atol=1e-2 * y.abs().amax().item())


@pytest.mark.gpu
def test_the_op_library_refuses_kernels_that_cannot_be():
    own_layer(64, 64, 8)
    sizes = {"device": 0, "bfloat16": True, "tokens": 64, "rows": 1024, "columns": 256}
    good = (TILES.index((256, 192, 2, 1)), 512, TILES.index((128, 64, 1, 2)))
    assert _C.native_tuned(**sizes, choice=good)
    for choice in (
        (good[0], 256, good[2]), (good[0], 1024, 0), (good[0], -512, 0), (-2, 0, 0),
        (len(TILES), 0, 0), (0, 0, len(TILES)),
    ):  # fmt: skip
        assert not _C.native_tuned(**sizes, choice=choice)
    for change in ({"tokens": 0}, {"device": -1}):
        assert not _C.native_tuned(**(sizes | change), choice=good)
    in_segments = (TILES.index((128, 64, 1, 4)), 0, 0)
    assert _C.native_tuned(**(sizes | {"tokens": 8}), choice=in_segments)
    many_rows = sizes | {"tokens": 8, "rows": 128 * 132}
    assert not _C.native_tuned(**many_rows, choice=in_segments), "not all clusters at once"
    assert chosen(64, 1024, 256) == Choice(*good)


@pytest.mark.gpu
@pytest.mark.parametrize("asked", ["in a capture", "by several threads"])
def test_the_table_is_read_before_the_first_own_product(asked):
    rows, columns, tokens = 640, 544, 72
    layer, x = own_layer(rows, columns, tokens)
    layer(x)
    tuned = kernels(rows, columns, tokens, kernels=SPLIT)
    _tuned_table.save(plan_cache.table_path(), {_tuned_table.gpu_of(0): [tuned]})
    expected, found, barrier = Choice(*tuned.choice()), [], threading.Barrier(4)
    _tuned_table.forget()

    def ask():
        barrier.wait()
        found.append(chosen(tokens, rows, columns))

    if asked == "in a capture":
        graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(graph):
            y = layer(x)
        assert 0 in _tuned_table._tables
        graph.replay()
        assert_right(layer, x, y)
        assert chosen(tokens, rows, columns) == expected
    else:
        threads = [threading.Thread(target=ask) for _ in range(barrier.parties)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == [expected] * barrier.parties


@pytest.mark.gpu
def test_a_table_that_could_not_be_read_is_asked_for_again(monkeypatch):
    rows, columns, tokens = 640, 544, 72
    layer, x = own_layer(rows, columns, tokens)
    untuned, tuned = chosen(tokens, rows, columns), kernels(rows, columns, tokens, kernels=SPLIT)
    _tuned_table.save(plan_cache.table_path(), {_tuned_table.gpu_of(0): [tuned]})
    _tuned_table.forget()
    asked = []

    def fails(device):
        asked.append(device)
        raise OSError("no table")

    _C.native_set_loader(fails)
    try:
        monkeypatch.setattr(sys, "unraisablehook", lambda _: None)
        assert chosen(tokens, rows, columns) == untuned
        assert_right(layer, x, layer(x))
        assert asked == [0], "what a thread remembers it does not ask for"
        chosen(2 * tokens, rows, columns)
        assert asked == [0, 0]
    finally:
        _C.native_set_loader(_tuned_table.of_device)
    chosen(3 * tokens, rows, columns)
    assert chosen(tokens, rows, columns) == Choice(*tuned.choice())


@pytest.mark.gpu
def test_what_ships_for_this_gpu_is_taken(monkeypatch):
    own_layer(64, 64, 8)
    tables = [_tuned_table.read(path) for path in SHIPPED.glob("*.json")]
    lines = [line for table in tables for line in table.get(_tuned_table.gpu_of(0), ())]
    shipped = {line.key: line for line in lines}
    if not shipped:
        pytest.skip("no kernels ship for this GPU")
    monkeypatch.setattr(_tuned_table, "SHIPPED", SHIPPED)
    _tuned_table.forget()
    assert {line.key: line for line in plan_cache.tuned_kernels()} == shipped
    for key, line in shipped.items():
        taken = chosen(key.tokens, key.rows, key.columns, dtype=getattr(torch, key.dtype))
        assert line.kernels == () or taken == Choice(*line.choice())


def another(choices, time_):
    """In place of _tuner._elected: never what would be taken untuned."""
    return choices[1], time_(choices[:2], _tuner._LIKELY)


@pytest.mark.gpu
def test_tuning_of_the_own_products_kernels_persists_and_is_used(monkeypatch, tmp_path):
    rows, columns, tokens = 4096, 1024, 1024
    layer, x = own_layer(rows, columns, tokens)
    monkeypatch.setattr(_tuner, "_WITHIN", 1.3)
    monkeypatch.setattr(_tuner, "_elected", another)
    untuned = chosen(tokens, rows, columns)
    assert plan_cache.tune(layer, [tokens, tokens - 1], backward=False) == [], "no plans"
    (line,) = plan_cache.tuned_kernels()
    assert line.key == Key(rows, columns, tokens, "bfloat16")
    assert 0 < line.seconds < 1e-3
    tuned = chosen(tokens, rows, columns)
    assert tuned == Choice(*line.choice()) != untuned
    assert_right(layer, x, layer(x))

    monkeypatch.setattr(_tuner, "sweep_kernels", None)  # nothing is tuned twice
    plan_cache.tune(layer, tokens, backward=False)
    plan_cache.forget_tables()
    assert plan_cache.tuned_kernels() == [line]
    assert chosen(tokens, rows, columns) == tuned

    code = (
        "import slope_ext; from slope_ext._spmm_sm90 import chosen;"
        f"print(chosen({tokens}, {rows}, {columns}))"
    )
    later = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ
    )
    assert later.stdout.strip() == str(tuned), "whoever asks first has the table read"

    plan_cache.export_table(tmp_path / "exported.json")
    monkeypatch.setenv("SLOPE_EXT_CACHE_DIR", str(tmp_path / "elsewhere"))
    plan_cache.forget_tables()
    assert chosen(tokens, rows, columns) == untuned
    plan_cache.import_table(tmp_path / "exported.json")
    assert chosen(tokens, rows, columns) == tuned


@pytest.mark.gpu
def test_weights_that_only_the_own_product_takes_are_tuned_too(monkeypatch):
    layer, _ = own_layer(1000, 544, 1024, backend="auto")
    monkeypatch.setattr(_tuner, "_WITHIN", 2.0)
    assert plan_cache.tune(layer, 1024) == [], "no plans"
    keys = [line.key for line in plan_cache.tuned_kernels()]
    assert keys == [Key(1000, 544, 1024, "bfloat16")], "in backward neither takes it"


@pytest.mark.gpu
def test_wrong_kernels_never_win(monkeypatch):
    layer, _ = own_layer(4096, 1024, 1024)
    monkeypatch.setattr(_tuner, "_WITHIN", 1.3)
    usual, spoiled, *_ = _tuner._spmm_sm90.candidates(1024, 4096, 1024, factor=1.3)
    run, wrong, timed = _tuner._Sweep.run, [spoiled], []

    def spoil(self, trial):
        run(self, trial)
        if not wrong or trial.algorithm in wrong:
            self.y[-1, -1] += 100

    def times(job, trials, round_):
        timed.append([trial.algorithm for trial in trials])
        return {choice: (2.0 if choice == usual else 1.0,) for choice in timed[-1]}

    monkeypatch.setattr(_tuner._Sweep, "run", spoil)
    monkeypatch.setattr(_tuner, "_time_kernels", times)
    plan_cache.tune(layer, 1024, backward=False)
    assert len(timed) == 2, "the soonest again"
    assert all(usual in choices and spoiled not in choices for choices in timed)
    before = plan_cache.tuned_kernels()
    monkeypatch.setattr(_tuner, "_time_kernels", None)  # nothing is timed
    for wrong[:] in ([usual], []):  # none in particular: all
        with pytest.warns(UserWarning, match="the own product errs: weight 4096x1024, 1024 tokens"):
            plan_cache.tune(layer, 1024, backward=False, again=True)
        assert plan_cache.tuned_kernels() == before


@pytest.mark.gpu
def test_the_own_product_is_timed_beside_plans_anew_when_its_kernels_changed(monkeypatch):
    layer, _ = own_layer(256, 512, 64, backend="auto")
    swept = []

    def sweep(problem, native):
        swept.append((problem.tokens, native))
        return Sweep([Candidate(0, 1, 0, 1e-5, True)], 9e-6)

    monkeypatch.setattr(_tuner, "sweep", sweep)
    monkeypatch.setattr(_tuner, "sweep_kernels", lambda _: None)
    plan_cache.tune(layer, 64, backward=False)
    plan_cache.tune(layer, [56, 64], backward=False)
    assert swept == [(64, True)], "known"
    _tuned_table.add(0, kernels(256, 512, 56, kernels=((256, 128, 64, 1, 2),)))
    plan_cache.tune(layer, [56, 64], backward=False)
    assert swept == [(64, True)], "kernels of another count"
    for its_kernels in (((256, 128, 64, 1, 2),), ()):
        swept.clear()
        _tuned_table.add(0, kernels(256, 512, 64, kernels=its_kernels))
        plan_cache.tune(layer, 56, backward=False)
        plan_cache.tune(layer, 64, backward=False)
        assert swept == [(64, True)], "with the tokens of then, and once"


@pytest.mark.gpu
def test_tuning_on_first_use():
    plan_cache.clear()
    plan_cache.set_policy("on_first_use")
    layer, x = layer_and_input(128, 128, 64, dtype=torch.float16)
    assert_right(layer, x, layer(x))
    assert [e.key for e in plan_cache.tuned()] == [Key(128, 128, 64, "float16")]


@pytest.mark.gpu
def test_ahead_warns_once_of_what_was_not_tuned():
    plan_cache.clear()
    plan_cache.set_policy("ahead")
    layer, x = layer_and_input(128, 144, 64)
    with pytest.warns(UserWarning, match="weight 128x144, 64 tokens, bfloat16 is not tuned"):
        assert_right(layer, x, layer(x))


@pytest.mark.gpu
@pytest.mark.parametrize("use", ["plain", "bias", "accumulate"])
def test_a_wrong_algorithm_never_wins(use, monkeypatch):
    """An id whose results are off in any use does not win, however fast."""
    run = _tuner._Sweep.run

    def wrong_for_odd_ids(self, trial):
        run(self, trial)
        if trial.algorithm.id % 2 == 1 and (use == "plain" or getattr(self.problem, use)):
            self.y[-1, -1] += 100

    monkeypatch.setattr(_tuner._Sweep, "run", wrong_for_odd_ids)
    layer, _ = layer_and_input()
    candidates = plan_cache.sweep(layer, 32)
    assert candidates[0].ok
    assert candidates[0].algorithm % 2 == 0
    if use == "plain":
        assert {c.ok for c in candidates if c.algorithm % 2 == 1} == {False}


@pytest.mark.gpu
def test_tune_takes_any_iterable_and_the_largest_of_a_bucket():
    layer, _ = layer_and_input(128, 96)
    added = plan_cache.tune(layer, iter([64, 40, 8]), backward=False)
    assert [e.tokens for e in added] == [8, 64]
    with pytest.raises(ValueError, match="tokens must be at least 1"):
        plan_cache.tune(layer, 0)


@pytest.mark.gpu
def test_sweep_leaves_random_numbers_alone():
    layer, _ = layer_and_input()
    torch.manual_seed(5)
    expected = torch.randn(4, device="cuda")
    torch.manual_seed(5)
    plan_cache.sweep(layer, 32)
    assert torch.equal(torch.randn(4, device="cuda"), expected)


@pytest.mark.gpu
def test_nothing_is_tuned_while_a_graph_is_captured(monkeypatch):
    swept = []
    monkeypatch.setattr(
        _tuner, "sweep", lambda problem, native: swept.append(problem) or Sweep([], None)
    )
    layer, x = layer_and_input(128, 208, 64)
    plan_cache.clear()
    plan_cache.set_policy("on_first_use")
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        y = layer(x)
        with pytest.raises(RuntimeError, match="tune: must not be called while a CUDA graph is"):
            plan_cache.tune(layer, 64)
    assert not swept
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert_right(layer, x, y)
    plan_cache.clear()
    torch.use_deterministic_algorithms(True)
    try:
        layer(x)
    finally:
        torch.use_deterministic_algorithms(False)
    assert not swept
    plan_cache.clear()
    layer(x)
    assert len(swept) == 1, "the patch works"


@pytest.mark.gpu
def test_split_k_entries_run():
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("segments of K are for sm_90")
    layer, x = layer_and_input(256, 1024, 16)
    _tuned_table.of_device(0).add(entry(256, 1024, 16, id=0, split_k=-1))
    plan_cache.clear()
    assert_right(layer, x, layer(x))
    assert plan_cache.entries()[0]["split_k"] == -1


@pytest.mark.gpu
@torch.no_grad()
def test_a_workspace_does_not_outlive_its_call():
    """torch.compile's CUDA graphs refuse memory of their pool that does."""
    layer, x = layer_and_input(256, 1024, 16)
    _tuned_table.of_device(0).add(entry(256, 1024, 16, id=0, split_k=4))
    plan_cache.clear()
    assert_right(layer, x, layer(x))
    if plan_cache.entries()[0]["workspace_bytes"] == 0:
        pytest.skip("no workspace for a split of K here")
    compiled = torch.compile(layer, mode="reduce-overhead", fullgraph=True)
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        assert_right(layer, x, compiled(x).clone())


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["auto", "cusparselt"])
def test_backends_agree(backend):
    o = Operands(64, 96, torch.float16, CUDA)
    x = o.randn(7, 96)
    by_plan = ops.linear(x, o.values, o.bitmask, o.bias, backend=backend)
    dense = ops.linear(x, o.values, o.bitmask, o.bias, backend="reference")
    torch.testing.assert_close(by_plan, dense, rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
def test_cusparselt_refuses_what_it_cannot_do():
    o = Operands(24, 96, torch.float16, CUDA)
    with pytest.raises(
        RuntimeError, match="slope::linear: values must be of a weight with out and in"
    ):
        ops.linear(o.randn(8, 96), o.values, o.bitmask, backend="cusparselt")
    with pytest.raises(RuntimeError, match="slope::linear: values must be float16 or bfloat16"):
        ops.linear(o.randn(8, 96).float(), o.values.float(), o.bitmask, backend="cusparselt")
