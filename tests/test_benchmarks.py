# SPDX-License-Identifier: Apache-2.0
"""What of benchmarks/ runs without a GPU: records, host time, tables, digests of charts."""

import importlib
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def load(name):
    """A module of benchmarks/, which finds its neighbours as it does when run as a script."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(BENCHMARKS))


harness, plot, model_shapes = load("harness"), load("plot"), load("model_shapes")
targets = load("targets")


@pytest.fixture
def record(monkeypatch):
    """A record of 10 us against 15 us, with a limit of 8 us."""
    environment = {
        "gpu": "NVIDIA Test 1",
        "torch": "2.0",
        "cusparselt": "0",
        "commit": "c",
        "date": "d",
    }
    monkeypatch.setattr(harness, "environment", lambda: environment)
    return harness.time_record(
        bench="op",
        case="64x32",
        dtype=torch.bfloat16,
        tokens=0,
        ours=harness.Timing(10e-6, 1e-6),
        baseline="theirs",
        theirs=harness.Timing(15e-6, 2e-6),
        limit=8e-6,
    )


# ---- records -------------------------------------------------------------------------------------


def test_record_holds_microseconds_and_ratios(record):
    assert (record.value, record.spread, record.baseline_value) == (10.0, 1.0, 15.0)
    assert (record.ratio, record.limit, record.limit_fraction) == (1.5, 8.0, 0.8)
    assert "80.0% of limit 8.0" in harness.line(record)


def test_what_is_timed_sees_no_arguments(record, tmp_path, monkeypatch):
    """torch.compile copies what follows an --only in sys.argv into its code, quotes and all."""
    command = ["bench", "--only", "'64', 32", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", list(command))
    seen = []

    def bench(run):
        seen.append((run.only, list(sys.argv)))
        yield record

    harness.main("name", None, bench, parts=True, needs_gpu=False)
    assert seen == [("'64', 32", ["bench"])]


def test_parts_of_a_bench_are_all_of_it(record, tmp_path):
    runs = [harness.Run(quick=False, bandwidth=1, matmul_rate=1, part=(i, 3)) for i in range(3)]
    assert [run.own("abcdefg") for run in runs] == [list("adg"), list("be"), list("cf")]
    cases = [[replace(record, case=f"{i}x{j}") for j in range(i + 1)] for i in range(3)]
    parts = [harness.save(records, f"op.{i}", tmp_path) for i, records in enumerate(cases)]
    harness.merge(parts, tmp_path / "op.json")
    assert len(json.loads((tmp_path / "op.json").read_text())) == 6


def test_later_records_replace_those_of_their_case(record, tmp_path):
    """Whatever their baselines: the best algorithm, say, may be another one now."""
    old = [replace(record, tokens=t, baseline=b) for t in (8, 16) for b in ("id 1", "F.linear")]
    new = [replace(record, tokens=16, baseline="id 2"), replace(record, tokens=32)]
    files = [
        harness.save(records, "op", tmp_path / name) for name, records in (("a", old), ("b", new))
    ]
    harness.merge(files, files[0])
    found = [harness.Record(**fields) for fields in json.loads(files[0].read_text())]
    assert found == [*old[:2], *new]


def test_only_the_items_that_are_wanted():
    items = [((64, 32), torch.float16, 8), ((64, 32), torch.float16, 512), ((8, 8), "x", 8)]
    options = {"quick": False, "bandwidth": 1, "matmul_rate": 1}
    assert harness.Run(**options, only=r"float16, (8|64)\)").own(items) == items[:1]
    assert harness.Run(**options, only="32", part=(1, 2)).own(items) == items[1:2]


def test_record_without_limit(record):
    host = replace(record, limit=None, limit_fraction=None)
    assert "limit" not in harness.line(host)
    assert json.loads(json.dumps(asdict(host)))["limit"] is None


def test_records_round_trip(record, tmp_path):
    path = harness.save([record, record], "op", tmp_path / "new")
    assert path == tmp_path / "new" / "op.json"
    assert [harness.Record(**fields) for fields in json.loads(path.read_text())] == [record] * 2


def test_records_of_a_card_have_its_folder(record, monkeypatch, tmp_path):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    assert harness.save([record], "op") == tmp_path / "test-1" / "op.json"


def test_limit_is_the_longer_of_bytes_and_flops():
    run = harness.Run(quick=True, bandwidth=10.0, matmul_rate=100.0)
    assert run.limit(moved=20.0) == 2.0
    assert run.limit(moved=20.0, flops=500.0) == 5.0
    assert run.first([1, 2, 3], 2) == [1, 2]
    assert replace(run, quick=False).first([1, 2, 3], 2) == [1, 2, 3]


# ---- timing --------------------------------------------------------------------------------------


def test_host_time_is_that_of_a_call(monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr(harness.time, "perf_counter", lambda: 4.0 * next(clock))
    calls = []
    timing = harness.host_time(lambda: calls.append(0), calls=8, batches=10)
    assert timing == harness.Timing(median=0.5, iqr=0.0)
    assert len(calls) == 8 * 12  # two batches untimed


@pytest.mark.parametrize("calls", [0, 101])
def test_host_time_refuses_batches_that_fill_the_queue(calls):
    with pytest.raises(ValueError, match="calls"):
        harness.host_time(lambda: None, calls=calls)


def test_timing_of_samples():
    assert harness.timing_of([1.0, 2.0, 3.0]) == harness.Timing(median=2.0, iqr=2.0)


# ---- shapes --------------------------------------------------------------------------------------


def test_target_shapes_are_shapes_of_models():
    users = model_shapes.users()
    assert set(model_shapes.BAR_SHAPES) <= set(users)
    assert "LLaMA-3-8B gate, up" in users[14336, 4096]
    assert "OPT-66B q, k, v, o" in users[9216, 9216]


def test_layers_of_every_model_that_is_trained_have_its_shapes(monkeypatch):
    pytest.importorskip("transformers")
    training = load("bench_training")
    monkeypatch.setattr(training, "LENGTH", 16)
    assert set(training.LAYERS) == set(model_shapes.MODELS) - {"LLaMA-3-70B"}
    for name, count in training.LAYERS.items():
        with torch.device("meta"):
            model = training.Layers(name, count)
            x = torch.empty(1, 16, model.hidden)
            assert model(x).shape == x.shape
        shapes = [
            (m.out_features, m.in_features)
            for m in model.modules()
            if isinstance(m, torch.nn.Linear)
        ]
        assert set(shapes) == set(model_shapes.MODELS[name].values())
        assert len(model.layers) == count


# ---- tables --------------------------------------------------------------------------------------


def test_table_of_a_kernel(record):
    head, rule, line, _, foot = plot.table([asdict(record)]).splitlines()
    assert head == "| op | weight | time | limit | of limit | against |"
    assert rule == "|---|---|---:|---:|---:|---|"
    assert line == "| op | 64x32 | 10.0 ± 1.0 us | 8.0 us | 80% | 1.5x theirs |"
    assert foot.startswith("bfloat16, NVIDIA Test 1, torch 2.0, d, commit c.")


def test_table_with_tokens_puts_baselines_into_a_line(record):
    records = [
        replace(record, tokens=8),
        replace(record, tokens=8, baseline="others", ratio=0.994),
        replace(record, tokens=64),
    ]
    head, _, first, second, *_ = plot.table([asdict(r) for r in records]).splitlines()
    assert head == "| op | weight | tokens | time | limit | of limit | against |"
    assert first.endswith("| 8 | 10.0 ± 1.0 us | 8.0 us | 80% | 1.50x theirs, 0.99x others |")
    assert second.endswith("| 64 | 10.0 ± 1.0 us | 8.0 us | 80% | 1.50x theirs |")


def test_table_without_limits(record):
    head, _, line, *_ = plot.table(
        [asdict(replace(record, limit=None, limit_fraction=None))]
    ).splitlines()
    assert head == "| op | weight | time | against |"
    assert line == "| op | 64x32 | 10.0 ± 1.0 us | 1.5x theirs |"


def test_block_shows_the_records_it_names(record, monkeypatch, tmp_path):
    monkeypatch.setattr(plot, "RESULTS", tmp_path)
    records = [replace(record, tokens=tokens) for tokens in (8, 64, 512)]
    harness.save([*records, replace(record, tokens=8, dtype="float16")], "op", tmp_path / "card")
    block = "a\n<!-- records: card/op bfloat16 tokens=8,512 -->\nold\n<!-- /records -->\nb\n"
    rendered = plot.render(block)
    assert plot.render(rendered) == rendered
    assert [line.split(" | ")[2] for line in rendered.splitlines()[4:6]] == ["8", "512"]
    assert "| 64 |" not in rendered
    assert rendered.startswith("a\n<!--")
    assert rendered.endswith("<!-- /records -->\nb\n")
    with pytest.raises(SystemExit, match="no records"):
        plot.render(block.replace("bfloat16", "float32"))


def test_columns_make_a_table_of_ratios(record, monkeypatch, tmp_path):
    monkeypatch.setattr(plot, "RESULTS", tmp_path)
    places = [("64x32", 8, 1.5), ("64x32", 512, 1.25), ("32x64", 512, 0.5)]
    records = [replace(record, case=c, tokens=t, ratio=ratio) for c, t, ratio in places]
    harness.save(records, "op", tmp_path / "card")
    block = "<!-- records: card/op bfloat16 bench=op columns=tokens -->\n<!-- /records -->\n"
    rendered = plot.render(block)
    assert plot.render(rendered) == rendered
    assert rendered.splitlines()[1:5] == [
        "| tokens | 8 | 512 |",
        "|---|---:|---:|",
        "| 64x32 | 1.50 | 1.25 |",
        "| 32x64 |  | 0.50 |",
    ]
    assert f"Against {record.baseline}; {record.dtype}" in rendered

    harness.save([*records, replace(records[0], baseline="others")], "op", tmp_path / "card")
    with pytest.raises(SystemExit, match="several"):
        plot.render(block)


# ---- charts --------------------------------------------------------------------------------------


@pytest.fixture
def tree(record, monkeypatch, tmp_path):
    """results/card with one record that a chart wants; documents without tables."""
    document = tmp_path / "README.md"
    document.write_text("no tables\n")
    monkeypatch.setattr(plot, "DOCUMENTS", [document])
    monkeypatch.setattr(plot, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(plot, "IMAGES", tmp_path)
    harness.save([record], "compress", tmp_path / "results" / "card")
    return tmp_path


def test_check_wants_charts_of_the_present_records(tree, record, capsys):
    ((path, chart, records),) = plot.charts()
    assert (path, chart.name, len(records)) == (tree / "limits-card.svg", "limits", 1)
    assert plot.check() == 1
    assert "limits-card.svg" in capsys.readouterr().out

    path.write_text(f"<svg>{plot.comment(records)}</svg>")
    assert plot.check() == 0

    harness.save([replace(record, value=11.0)], "compress", tree / "results" / "card")
    assert plot.check() == 1


def test_charts_are_deterministic(tree, record):
    pytest.importorskip("matplotlib")
    ((_, limits, records),) = plot.charts()
    text = plot.svg(limits, records)
    assert text == plot.svg(limits, records)
    assert plot.comment(records) in text
    assert text.endswith("</svg>\n")

    (speedup,) = (chart for chart in plot.CHARTS if chart.name == "speedup")
    wanted = replace(record, bench="linear_tokens", case="4096x4096", baseline="F.linear")
    lines = [asdict(replace(wanted, tokens=tokens)) for tokens in (8, 512)]
    assert all(speedup.wants(r) for r in lines)
    assert not speedup.wants(lines[0] | {"baseline": "others"})
    assert "4096x4096" in plot.svg(speedup, lines)


# ---- targets -------------------------------------------------------------------------------------


def of(record, ours, theirs=1.0, **changes):
    """A record of other values."""
    return replace(record, value=ours, baseline_value=theirs, ratio=0.0, **changes)


def saved(tmp_path, file, *records):
    """The records that targets read."""
    harness.save(records, file, tmp_path)
    return targets.Records(tmp_path)


def test_a_target_names_the_cases_that_miss_it(record, tmp_path):
    times = {"64x32;a": 1.5, "32x64;a": 1.05, "32x32;a": 1.0499, "64x64;b": 0.1}
    records = saved(tmp_path, "op", *(of(record, 1.0, t, case=c) for c, t in times.items()))
    values = targets.each(targets.speedup, "op", case="(.*);a", baseline="theirs")
    wanted = {"64x32": 1.6, "32x64": 1.05, "32x32": 1.04}
    assert targets.Target("it", wanted, values).line(records) == (
        "| it | at least 1.040 to 1.600x | 1.050 to 1.500x | 2 of 3 | 64x32 1.500 of 1.600 |"
    )
    assert targets.Target("it", 1.05, values, at_most=True).line(records) == (
        "| it | at most 1.050x | 1.050 to 1.500x | 2 of 3 | 64x32 1.500 |"
    )
    assert [r["case"] for r in records.read] == 2 * list(times)[:3]
    none = targets.Target("none", 1.0, targets.each(targets.speedup, "op", baseline="nobody"))
    with pytest.raises(SystemExit, match="no records for the target 'none'"):
        none.line(records)


def test_figures_are_of_whole_values(record, tmp_path):
    r = asdict(of(record, 3.0, 2.0, limit=1.5, limit_fraction=0.0))
    assert targets.speedup(r) == pytest.approx(2 / 3)
    assert targets.on_top(r) == pytest.approx(50.0)
    assert targets.of_limit(r) == pytest.approx(50.0)
    assert targets.in_units(2.0)(r) == 1.5
    both = [of(record, 4.0, tokens=8), of(record, 5.0, tokens=64)]
    values = targets.each(targets.in_units(1.0), "op")
    assert values(saved(tmp_path, "op", *both)) == {"64x32, 8 tokens": 4, "64x32, 64 tokens": 5}
    assert values(saved(tmp_path, "op", both[0], both[0])) == {"64x32": 4}
    with pytest.raises(SystemExit, match="two figures of one case: 64x32"):
        values(saved(tmp_path, "op", both[0], replace(both[1], tokens=8)))


def test_steps_are_held_against_the_fastest_dense_one_of_all_turns(record, tmp_path):
    step = replace(record, bench="train_step", tokens=8192, dtype="bfloat16")
    times = {
        "dense;compiled": (130, 126), "dense;captured": (125, 124), "slope;compiled": (100, 126),
        "slope;recompute;compiled": (103, 126), "slope;r=8;compiled": (105, 126),
        "slope;r=64;compiled": (120, 126),
    }  # fmt: skip
    records = [of(step, *t, case=f"M;layers=1;{c}") for c, t in times.items()]
    read = saved(tmp_path, "training", *records, of(step, 9, 9, case="N;layers=1;dense;compiled"))
    assert targets.steps("compiled", "M|N")(read) == pytest.approx({"M;layers=1": 1.24})
    assert targets.adapters(read) == pytest.approx({"M;layers=1": 5.0})
    assert targets.recomputing(read) == pytest.approx({"M;layers=1": 3.0})


def test_what_a_peak_saves_is_held_against_what_the_state_does(record, tmp_path):
    memory = replace(record, bench="train_memory", tokens=8192, dtype="bfloat16")
    bytes_ = {"state": (60, 100), "peak": (170, 200), "peak, accumulating": (150, 200)}
    records = [
        of(memory, *b, case=f"M;slope;compiled;{kind}, requested") for kind, b in bytes_.items()
    ]
    read = saved(tmp_path, "training", *records)
    assert targets.peaks("peak", "compiled")(read) == {"M": -10}
    assert targets.peaks("peak, accumulating", "compiled")(read) == {"M": 10}


def test_low_rank_layers_and_tails(record, tmp_path):
    fused = replace(record, bench="spmm_native_fused", baseline="without", tokens=8192)
    tails = [of(fused, t, 100, case=f"9216x9216;{c}") for c, t in (("r=64", 101), ("r=144", 103))]
    lowrank = replace(record, bench="linear_lowrank", tokens=8192)
    theirs = {"plan": 1.5, "own, then addmm_": 1.04, "without adapter": 0.9}
    layers = [of(lowrank, 1.0, t, baseline=b) for b, t in theirs.items()]
    read = saved(tmp_path, "spmm_native", *tails, *layers)
    assert targets.tails_of_one_in_64(read) == pytest.approx({"9216x9216;r=144": 3.0})
    assert targets.lowrank_against_the_best(read) == {"64x32": 1.04}


def test_the_committed_records_have_every_target():
    text = (BENCHMARKS.parent / "docs" / "performance.md").read_text()
    shown = text.partition("<!-- targets: h200 -->")[2].partition("<!-- /targets -->")[0]
    lines = [line for line in shown.splitlines() if line.startswith("| ")][1:]
    assert [line.split(" | ")[0] for line in lines] == [f"| {t.what}" for t in targets.TARGETS]
    assert len({t.what for t in targets.TARGETS}) == len(targets.TARGETS), "each has a name"
