# SPDX-License-Identifier: Apache-2.0
"""Writes the tables of README.md and docs/performance.md and the charts, from committed records.

    python benchmarks/plot.py            rewrite the tables, draw the charts (needs matplotlib)
    python benchmarks/plot.py --check    exit 1 if a table or a chart is not what the records say

A table stands between ``<!-- records: GPU/FILE DTYPE -->`` and ``<!-- /records -->``, where
GPU/FILE.json lies under benchmarks/results; it shows the records of that dtype. More words
``field=value`` or ``field=value,value`` narrow them down further, e.g. ``tokens=8192,16384``, and
``field~expression`` takes what a regular expression finds something in. With ``columns=tokens`` it
is one of ratios alone, a line for each case and a column for each token count. Between
``<!-- targets: GPU -->`` and ``<!-- /targets -->`` stands the table of targets.py.

The charts are docs/images/CHART-GPU.svg. A chart ends in a comment with a digest of the records it
was drawn from, which is what --check compares; a chart that has no records is skipped.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import targets
from model_shapes import BAR_SHAPES
from targets import RawRecord

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
IMAGES = ROOT / "docs" / "images"
DOCUMENTS = [ROOT / "README.md", ROOT / "docs" / "performance.md"]
BLOCK = re.compile(
    r"(<!-- records: (\S+) (\w+)((?: \w+[=~]\S+)*) -->\n).*?(<!-- /records -->)", re.DOTALL
)
TARGETS = re.compile(r"(<!-- targets: (\S+) -->\n).*?(<!-- /targets -->)", re.DOTALL)


# ---- tables --------------------------------------------------------------------------------------


def table(records: list[RawRecord]) -> str:
    """A Markdown table, and where and when its records were measured.

    A line for each time measured: records that differ in the baseline only share one. Columns for
    tokens and for the limit are there if a record has them.
    """
    tokens = any(r["tokens"] for r in records)
    limit = any(r["limit"] is not None for r in records)
    what = "weight" if all(re.match(r"\d+x\d", r["case"]) for r in records) else "case"
    size = "time" if records[0]["unit"] == "us" else records[0]["metric"]
    columns = [("op", "---"), (what, "---"), ("tokens", "---:"), (size, "---:")]
    columns += [("limit", "---:"), ("of limit", "---:"), ("against", "---")]
    shown = [
        name for name, _ in columns if {"tokens": tokens}.get(name, limit or "limit" not in name)
    ]
    lines = [
        f"| {' | '.join(shown)} |",
        f"|{'|'.join(rule for name, rule in columns if name in shown)}|",
    ]
    for same in _lines(records):
        r = same[0]
        cells = {
            "op": r["bench"],
            what: r["case"],
            "tokens": str(r["tokens"] or ""),
            size: f"{r['value']:.1f} ± {r['spread']:.1f} {r['unit']}"
            if r["spread"]
            else f"{r['value']:.1f} {r['unit']}",
            "limit": "" if r["limit"] is None else f"{r['limit']:.1f} {r['unit']}",
            "of limit": "" if r["limit"] is None else f"{r['limit_fraction']:.0%}",
            "against": ", ".join(_against(r) for r in same),
        }
        lines.append(f"| {' | '.join(cells[name] for name in shown)} |")
    return "\n".join(lines) + f"\n\n{where(records)}. Medians ± interquartile range.\n"


def ratios_by(column: str, records: list[RawRecord]) -> str:
    """A Markdown table of ratios: a line for each case, a column for each value of a field."""
    baseline = records[0]["baseline"]
    ratios = {(r["case"], r[column]): r["ratio"] for r in records if r["baseline"] == baseline}
    if len(ratios) < len(records):
        raise SystemExit(f"columns={column}: several records of a case, or several baselines")
    cases = list(dict.fromkeys(r["case"] for r in records))
    values = sorted({r[column] for r in records})
    lines = [
        f"| {column} | {' | '.join(str(value) for value in values)} |",
        f"|---|{'---:|' * len(values)}",
    ]
    for case in cases:
        cells = (ratios.get((case, value)) for value in values)
        shown = ("" if ratio is None else f"{ratio:.2f}" for ratio in cells)
        lines.append(f"| {case} | {' | '.join(shown)} |")
    return "\n".join(lines) + f"\n\nAgainst {baseline}; {where(records)}.\n"


def where(records: list[RawRecord]) -> str:
    """Type, card, versions and date of the first record, and the commits of all."""
    r = records[0]
    commits = dict.fromkeys(r["commit"] for r in records)
    return (
        f"{r['dtype']}, {r['gpu']}, torch {r['torch']}, {r['date']}, "
        f"commit{'s' * (len(commits) > 1)} {', '.join(commits)}"
    )


def render(text: str) -> str:
    """``text`` with every table made anew from its records."""

    def replace(match: re.Match[str]) -> str:
        start, file, dtype, options, end = match.groups()
        words = options.split()
        columns = [word for word in words if word.startswith("columns=")]
        records = [
            r
            for r in json.loads((RESULTS / f"{file}.json").read_text())
            if r["dtype"] == dtype and all(_fits(r, word) for word in words if word not in columns)
        ]
        if not records:
            raise SystemExit(f"no records for {start.strip()}")
        if columns:
            return start + ratios_by(columns[0].removeprefix("columns="), records) + end
        return start + table(records) + end

    def replace_targets(match: re.Match[str]) -> str:
        start, folder, end = match.groups()
        return start + targets.table(RESULTS / folder) + end

    return TARGETS.sub(replace_targets, BLOCK.sub(replace, text))


def _fits(r: RawRecord, word: str) -> bool:
    if "~" in word:
        field, expression = word.split("~", 1)
        return re.search(expression, str(r[field])) is not None
    field, values = word.split("=")
    return str(r[field]) in values.split(",")


def _lines(records: list[RawRecord]) -> Iterator[list[RawRecord]]:
    def key(r: RawRecord) -> tuple[Any, ...]:
        return tuple(r[name] for name in ("bench", "case", "dtype", "tokens", "metric", "value"))

    for _, same in itertools.groupby(records, key):
        yield list(same)


def _against(r: RawRecord) -> str:
    # Products and sizes differ by per cents, moving kernels by factors
    digits = 1 if r["tokens"] == 0 and r["unit"] == "us" else 2
    return f"{r['ratio']:.{digits}f}x {r['baseline']}"


# ---- charts --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chart:
    """A picture of some records of one card."""

    name: str
    files: tuple[str, ...]  # of results/<gpu>, those that exist
    wants: Callable[[RawRecord], bool]
    draw: Callable[[Any, list[RawRecord]], None]  # onto matplotlib axes, a list if several
    panels: int = 1

    def records(self, folder: Path) -> list[RawRecord]:
        paths = [folder / f"{file}.json" for file in self.files]
        found = [r for p in paths if p.is_file() for r in json.loads(p.read_text())]
        return [r for r in found if self.wants(r)]


def draw_speedup(panels: Any, records: list[RawRecord]) -> None:
    """Speedup of the product against tokens, a line for each weight: over cuBLAS, over plans."""
    kinds = ("linear_tokens", "linear_forward_vs_best_id")
    titles = ("2:4 product, speedup over cuBLAS", "over the best algorithm of cuSPARSELt")
    for axes, bench, title in zip(panels, kinds, titles, strict=True):
        _draw_tokens(axes, [r for r in records if r["bench"] == bench], title)
    panels[0].legend(title="out x in", frameon=False, ncols=2, loc="lower right", fontsize=8)


def draw_own(panels: Any, records: list[RawRecord]) -> None:
    """The own product over the best plan in long runs; with an adapter of rank 64 over others."""
    product, adapter = panels
    of_product = [r for r in records if r["bench"] == "spmm_native"]
    of_weights = [{**r, "case": r["case"].split(";")[0]} for r in of_product]
    _draw_tokens(product, of_weights, "Own product over the best plan")
    product.legend(title="out x in", frameon=False, ncols=2, loc="lower right", fontsize=8)

    found = [r for r in records if r["bench"] == "linear_lowrank"]
    cases = _draw_bars(adapter, found, groups="case", bars="baseline", value="ratio")
    labels = [case.split(";")[0] for case in cases]
    adapter.set_xticks(range(len(cases)), labels, rotation=30, ha="right", fontsize=8)
    adapter.set_ylim(0, 2)
    adapter.set_title("With an adapter of rank 64, 8192 tokens, over", loc="left", fontsize=10)
    adapter.legend(frameon=False, loc="upper right", fontsize=8)


def _draw_tokens(axes: Any, records: list[RawRecord], title: str) -> None:
    """Ratios against tokens, a line for each case."""
    for case in dict.fromkeys(r["case"] for r in records):
        line = sorted((r["tokens"], r["ratio"]) for r in records if r["case"] == case)
        axes.plot(*zip(*line, strict=True), marker="o", markersize=4, label=case)
    tokens = sorted({r["tokens"] for r in records})
    axes.set_xscale("log", base=2)
    axes.set_xticks(tokens, [str(count) for count in tokens], rotation=45)
    axes.set_xlabel("tokens")
    axes.axhline(1, color="0.4", linewidth=1, linestyle="--")
    axes.set_ylim(bottom=0)
    axes.set_title(title, loc="left", fontsize=10)


def _draw_bars(
    axes: Any, records: list[RawRecord], *, groups: str, bars: str, value: str
) -> list[str]:
    """Groups of bars, by fields of the records, beside a line at 1; returns the groups' names."""
    names = list(dict.fromkeys(r[groups] for r in records))
    kinds = list(dict.fromkeys(r[bars] for r in records))
    width = 0.8 / len(kinds)
    for i, kind in enumerate(kinds):
        heights = {r[groups]: r[value] for r in records if r[bars] == kind}
        places = [names.index(name) - 0.4 + (i + 0.5) * width for name in heights]
        axes.bar(places, list(heights.values()), width, label=kind)
    axes.axhline(1, color="0.4", linewidth=1, linestyle="--")
    return names


def draw_limits(axes: Any, records: list[RawRecord]) -> None:
    """Fraction of copy bandwidth: a group of bars for each kernel, a bar for each weight."""
    kernels = _draw_bars(axes, records, groups="bench", bars="case", value="limit_fraction")
    labels = [k.replace("_", "_\n", 1) if len(k) > 12 else k for k in kernels]
    axes.set_xticks(range(len(kernels)), labels)
    axes.set_ylabel("of what copy bandwidth allows")
    axes.set_ylim(0, 1.05)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set_title("Memory-bound kernels", loc="left")
    axes.legend(
        title="out x in",
        frameon=False,
        ncols=len({r["case"] for r in records}),
        loc="upper center",
        bbox_to_anchor=(0.5, -0.16),
    )


def draw_training(panels: Any, records: list[RawRecord]) -> None:
    """Steps: speedup over the best dense one, a group of bars for each model. State: of dense.

    Of a model with several counts of layers and tokens, those that come first.
    """
    steps, state = panels
    firsts: dict[str, tuple[str, int]] = {}
    timed = []
    for r in records:
        model, layers, _ = r["case"].split(";", 2)
        work = layers, r["tokens"]
        if r["bench"] == "train_step" and firsts.setdefault(model, work) == work:
            timed.append(r)
    models = list(firsts)
    methods = {
        "2:4": r"slope;(eager|compiled)$",
        "2:4 with adapters, 1.56 %": r"slope;r=(?P<rank>\d+);compiled$",
        "torch's 2:4": "torch-2:4",
    }

    def best_of(model: str, method: str) -> float:
        """The ratio of the fastest, of several ranks of the lowest; 0 if there is none."""
        by_rank: dict[int, list[float]] = {}
        for r in timed:
            its_model, _, name = r["case"].split(";", 2)
            if its_model == model and (match := re.match(method, name)):
                rank = int(match["rank"]) if "rank" in match.re.groupindex else 0
                by_rank.setdefault(rank, []).append(r["ratio"])
        return max(by_rank[min(by_rank)]) if by_rank else 0.0

    for i, (label, method) in enumerate(methods.items()):
        best = [best_of(model, method) for model in models]
        steps.bar([k + (i - 1) * 0.28 for k in range(len(models))], best, 0.26, label=label)
    steps.set_xticks(range(len(models)), models, rotation=30, ha="right")
    steps.axhline(1, color="0.4", linewidth=1, linestyle="--")
    steps.set_ylim(0, 1.75)
    steps.set_title("Speed of a training step,\nbest dense = 1", loc="left")
    steps.legend(frameon=False, ncols=2, loc="upper left", fontsize=8)

    counted = [r for r in records if r["bench"] == "train_memory"]
    models = list(dict.fromkeys(r["case"].split(";")[0] for r in counted))
    kinds = {"cached": "2:4", "recompute": "2:4, backward copy recomputed"}
    for i, (kind, label) in enumerate(kinds.items()):
        parts = [1 / r["ratio"] for r in counted if r["case"].split(";")[2] == kind]
        state.bar([k + (i - 0.5) * 0.36 for k in range(len(models))], parts, 0.34, label=label)
    state.set_xticks(range(len(models)), models, rotation=30, ha="right")
    state.axhline(1, color="0.4", linewidth=1, linestyle="--")
    state.set_ylim(0, 1.4)
    state.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    state.set_title("Training state of whole models,\nof dense", loc="left")
    state.legend(frameon=False, loc="upper left", fontsize=8)


def draw_losses(panels: Any, records: list[RawRecord]) -> None:
    """Loss against tokens; and how far each run is from the references."""
    losses, apart = panels
    wide: dict[str, Any] = {"linewidth": 4, "alpha": 0.3}
    lines = {"resumed": "--", "nudged kernels": ":", "nudged reference": "-."}
    for run in ("reference", "kernels", *lines):
        curve = [r for r in records if r["case"].endswith(f";{run}")]
        if not curve:
            continue
        tokens = [r["tokens"] / 1e6 for r in curve]
        if run in ("reference", "kernels"):
            style = wide if run == "reference" else {}
            losses.plot(tokens, [r["value"] for r in curve], label=run, **style)
        if run != "reference":
            difference = [100 * (r["value"] / r["baseline_value"] - 1) for r in curve]
            style = wide if run == "kernels" else {"linestyle": lines[run]}
            apart.plot(tokens, difference, label=run, **style)
    for axes in panels:
        axes.set_xlabel("million tokens")
        axes.legend(frameon=False)
    losses.set_title("Training loss in nats per token", loc="left")
    apart.set_title("Against the references, in %", loc="left")


BAR_CASES = [f"{rows}x{columns}" for rows, columns in BAR_SHAPES]

CHARTS = [
    Chart(
        "training",
        ("training", "memory"),
        lambda r: (r["bench"] == "train_step" and r["tokens"] == 8192)
        or (r["bench"] == "train_memory" and re.search(";whole;.*=float32", r["case"]) is not None),
        draw_training,
        panels=2,
    ),
    Chart("losses", ("loss_curves",), lambda _: True, draw_losses, panels=2),
    Chart(
        "speedup",
        ("spmm",),
        lambda r: (
            (
                r["bench"] == "linear_forward_vs_best_id"
                or (r["bench"], r["baseline"]) == ("linear_tokens", "F.linear")
            )
            and r["dtype"] == "bfloat16"
            and r["case"] in BAR_CASES
        ),
        draw_speedup,
        panels=2,
    ),
    Chart(
        "own-product",
        ("spmm_native",),
        lambda r: (
            r["dtype"] == "bfloat16"
            and (
                (r["case"].endswith(";sustained") and r["baseline"].startswith("best cuSPARSELt"))
                or (
                    (r["bench"], r["tokens"]) == ("linear_lowrank", 8192)
                    and r["case"].endswith(";r=64")
                    and r["baseline"] != "without adapter"
                )
            )
        ),
        draw_own,
        panels=2,
    ),
    Chart(
        "limits",
        ("compress", "prune", "transpose", "pack"),
        lambda r: r["dtype"] == "bfloat16" and r["limit"] is not None and not r["tokens"],
        draw_limits,
    ),
]


def digest(records: list[RawRecord]) -> str:
    """What a chart of these records carries."""
    return hashlib.sha256(json.dumps(records, sort_keys=True).encode()).hexdigest()


def comment(records: list[RawRecord]) -> str:
    """The last line of a chart but one."""
    return f"<!-- records: {where(records)}; sha256 {digest(records)} -->"


def svg(chart: Chart, records: list[RawRecord]) -> str:
    """The chart; the same records give the same text with the same release of matplotlib."""
    import matplotlib
    from matplotlib.figure import Figure

    settings = {
        "svg.hashsalt": chart.name,
        "svg.fonttype": "none",
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "axes.axisbelow": True,
        "grid.color": "0.9",
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(8, 4), layout="constrained")
        panels = [figure.add_subplot(1, chart.panels, i + 1) for i in range(chart.panels)]
        chart.draw(panels[0] if chart.panels == 1 else panels, records)
        figure.supxlabel(where(records), fontsize=7, color="0.4")
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    body, end, _ = out.getvalue().rpartition("</svg>")
    text = f"{body}{comment(records)}\n{end}\n"
    return "".join(f"{line.rstrip()}\n" for line in text.splitlines())


def charts() -> Iterator[tuple[Path, Chart, list[RawRecord]]]:
    """Every chart that has records, with the path of its file."""
    for folder in sorted(path for path in RESULTS.iterdir() if path.is_dir()):
        for chart in CHARTS:
            if records := chart.records(folder):
                yield IMAGES / f"{chart.name}-{folder.name}.svg", chart, records


# ---- command line --------------------------------------------------------------------------------


def check() -> int:
    """1 and a line for each table or chart that is not what the records say, otherwise 0."""
    wrong = [
        f"{path.name}: a table differs from its records"
        for path in DOCUMENTS
        if render(path.read_text()) != path.read_text()
    ]
    wrong += [
        f"{path.name}: was not drawn from the present records"
        for path, _, records in charts()
        if not path.is_file() or comment(records) not in path.read_text()
    ]
    for message in wrong:
        print(f"{message}; run python benchmarks/plot.py")
    return int(bool(wrong))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    if parser.parse_args().check:
        return check()
    for path in DOCUMENTS:
        path.write_text(render(path.read_text()))
    for path, chart, records in charts():
        path.write_text(svg(chart, records))
    return 0


if __name__ == "__main__":
    sys.exit(main())
