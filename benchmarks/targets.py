# SPDX-License-Identifier: Apache-2.0
"""What the project set itself for an H100, and what the committed records say of it.

plot.py writes the table between ``<!-- targets: GPU -->`` and ``<!-- /targets -->``.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model_shapes import BAR_SHAPES, adapter_rank

RawRecord = dict[str, Any]
Values = dict[str, float]  # by case
DIGITS = {"x": 3, "": 3, "%": 2, "us": 1, "ms": 1, "s": 2, "MiB": 0}  # by unit
WEIGHTS = tuple(f"{rows}x{columns}" for rows, columns in BAR_SHAPES)


class Records:
    """The records of a GPU, in bf16; remembers those that were asked for."""

    def __init__(self, folder: Path) -> None:
        self._all = functools.cache(lambda file: json.loads((folder / f"{file}.json").read_text()))
        self.read: list[RawRecord] = []

    def of(self, file: str, case: str = ".*", **fields: Any) -> list[tuple[str, RawRecord]]:
        """Those whose ``case`` is matched whole, with what its group is, or else the case.

        Token counts follow where there are several. ``fields``: a value, a tuple of them, or a
        pattern that is matched whole.
        """
        found = [
            (match, r)
            for r in self._all(file)
            if (match := re.fullmatch(case, r["case"]))
            and r["dtype"] == "bfloat16"
            and all(self._is(r[name], wanted) for name, wanted in fields.items())
        ]
        several = len({r["tokens"] for _, r in found}) > 1
        self.read += [r for _, r in found]
        return [
            ((match[1] if match.groups() else match[0]) + f", {r['tokens']} tokens" * several, r)
            for match, r in found
        ]

    @staticmethod
    def _is(value: Any, wanted: Any) -> bool:
        if isinstance(wanted, re.Pattern):
            return wanted.fullmatch(value) is not None
        return value in (wanted if isinstance(wanted, tuple) else (wanted,))


@dataclass(frozen=True)
class Target:
    """A figure that was aimed at, of one or several cases."""

    what: str
    wanted: float | dict[str, float]  # of all cases, or of each
    values: Callable[[Records], Values]
    unit: str = "x"
    at_most: bool = False  # else at least

    def wants(self, case: str) -> float:
        return self.wanted if isinstance(self.wanted, float) else self.wanted[case]

    def line(self, records: Records) -> str:
        """The table's line."""
        values = self.values(records)
        if not values:
            raise SystemExit(f"no records for the target {self.what!r}")
        missed = {
            case: value
            for case, value in values.items()
            if (value > self.wants(case) if self.at_most else value < self.wants(case))
        }
        wanted = sorted(map(self.wants, values))
        bound = "at most" if self.at_most else "at least"
        cells = [
            self.what,
            f"{bound} {self._range(wanted[0], wanted[-1])}",
            self._range(min(values.values()), max(values.values())),
            f"{len(values) - len(missed)} of {len(values)}",
            "; ".join(
                f"{case} {self._number(value)}"
                + (f" of {self._number(self.wants(case))}" if wanted[0] != wanted[-1] else "")
                for case, value in missed.items()
            ),
        ]
        return f"| {' | '.join(cells)} |"

    def _number(self, value: float) -> str:
        return f"{value:.{DIGITS[self.unit]}f}"

    def _range(self, low: float, high: float) -> str:
        ends = list(dict.fromkeys(map(self._number, (low, high))))
        unit = self.unit if self.unit == "x" else f" {self.unit}".rstrip()
        return f"{' to '.join(ends)}{unit}"


# ---- figures of a record -------------------------------------------------------------------------


def speedup(r: RawRecord) -> float:
    """Times as fast, or as small, as the baseline; not of the ratio's three digits."""
    return float(r["baseline_value"] / r["value"])


def share(r: RawRecord) -> float:
    """Of the baseline's time or bytes."""
    return 1 / speedup(r)


def per_cent_more(ours: float, theirs: float) -> float:
    return 100 * (ours / theirs - 1)


def on_top(r: RawRecord) -> float:
    """Per cent more than the baseline."""
    return per_cent_more(r["value"], r["baseline_value"])


def of_limit(r: RawRecord) -> float:
    """Per cent of the limit."""
    return float(100 * r["limit"] / r["value"])


def in_units(microseconds: float) -> Callable[[RawRecord], float]:
    """The time, in a unit of so many microseconds."""
    return lambda r: r["value"] / microseconds


def each(
    figure: Callable[[RawRecord], float], file: str, **wanted: Any
) -> Callable[[Records], Values]:
    """Of each record that ``Records.of`` finds, a figure."""

    def values(records: Records) -> Values:
        return _by_case((case, figure(r)) for case, r in records.of(file, **wanted))

    return values


def _by_case(pairs: Iterator[tuple[str, float]]) -> Values:
    values: Values = {}
    for case, value in pairs:
        if values.setdefault(case, value) != value:
            raise SystemExit(f"two figures of one case: {case}")
    return values


# ---- figures of several records ------------------------------------------------------------------


def tails_of_one_in_64(records: Records) -> Values:
    """What a tail of 1.56 % of the columns costs."""
    ranks = [f"{rows}x{columns};r={adapter_rank(columns)}" for rows, columns in BAR_SHAPES]
    case = f"({'|'.join(ranks)})"
    return _by_case((name, on_top(r)) for name, r in records.of("spmm_native", case, **FUSED))


def lowrank_against_the_best(records: Records) -> Values:
    """linear_lowrank, T = X A^T included, against the fastest way that does not fuse."""
    found: Values = {}
    for case, r in records.of("spmm_native", bench="linear_lowrank"):
        if r["baseline"] != "without adapter":
            found[case] = min(found.get(case, speedup(r)), speedup(r))
    return found


def steps(method: str, models: str, tokens: int = 8192) -> Callable[[Records], Values]:
    """Against the fastest dense step of any method, in whatever turns."""

    def values(records: Records) -> Values:
        found = dict(records.of("training", f"(?:{models});.*", bench="train_step", tokens=tokens))
        best: Values = {}
        for case, r in found.items():
            label = ";".join(case.split(";")[:2])
            best[label] = min(best.get(label, r["baseline_value"]), r["baseline_value"])
        cases = {label: f"{label};slope;{method}" for label in best}
        return {
            label: best[label] / found[case]["value"]
            for label, case in cases.items()
            if case in found
        }

    return values


def adapters(records: Records) -> Values:
    """What adapters of 1.56 % of the hidden size cost of a compiled step."""
    found = dict(records.of("training", bench="train_step", tokens=8192))
    costs: dict[str, tuple[int, float]] = {}  # by model: the least rank, and what it costs
    for case, r in found.items():
        if match := re.fullmatch(r"(.*);slope;r=(\d+);compiled", case):
            label, rank = match[1], int(match[2])
            cost = per_cent_more(r["value"], found[f"{label};slope;compiled"]["value"])
            costs[label] = min(costs.get(label, (rank, cost)), (rank, cost))
    return {label: cost for label, (_, cost) in costs.items()}


def recomputing(records: Records) -> Values:
    """What it costs of a compiled step that backward makes the backward copy."""
    found = dict(records.of("training", bench="train_step", tokens=8192))
    pairs = [(case, case.replace("recompute;", "")) for case in found if "recompute" in case]
    return {
        case.removesuffix(";slope;recompute;compiled"): per_cent_more(
            found[case]["value"], found[cached]["value"]
        )
        for case, cached in pairs
    }


def peaks(kind: str, method: str) -> Callable[[Records], Values]:
    """MiB that a step needs less at most, beyond those that the state does."""

    def saved(records: Records, what: str) -> Values:
        case = f"(.*);slope;{method};{what}, requested"
        found = records.of("training", case, bench="train_memory", tokens=8192)
        return {label: r["baseline_value"] - r["value"] for label, r in found}

    def values(records: Records) -> Values:
        peak, state = saved(records, kind), saved(records, "state")
        return {label: peak[label] - state[label] for label in state}

    return values


# ---- what was aimed at ---------------------------------------------------------------------------

FORWARD = {"bench": "linear_forward", "baseline": "F.linear", "case": f"({'|'.join(WEIGHTS)})"}
AUTO = {"4096x4096": 1.45, "14336x4096": 1.5, "9216x9216": 1.58, "20480x5120": 1.58}
PLAN = {"bench": "spmm_native", "baseline": re.compile("best cuSPARSELt plan.*")}
BOTH = {**PLAN, "case": "(.*;(?:burst|sustained))"}
FUSED = {"bench": "spmm_native_fused", "baseline": "without"}
FIRST = dict(zip(WEIGHTS, (1.36, 1.43, 1.43, 1.55, 1.55, 1.55), strict=True))
BURSTS = dict(zip(WEIGHTS, (1.05, 1.04, 1.02, 1.02, 1.02, 1.05), strict=True))
FROM_4096_UP = "((?:4096|8192|14336|20480)x.*)"
STATE = "(.*);{};moments=float32;state"

TARGETS = [
    Target("`linear` against cuBLAS, 8192 tokens", FIRST,
           each(speedup, "spmm", **FORWARD, tokens=8192)),
    Target("`linear` of backend \"auto\" against cuBLAS, 8192 tokens", AUTO,
           each(speedup, "spmm", **FORWARD | {"case": f"({'|'.join(AUTO)})"}, tokens=8192)),
    Target("`linear` against cuBLAS, 2048 tokens", 1.29,
           each(speedup, "spmm", **FORWARD, tokens=2048)),
    Target("`linear` against the best of a sweep of cuSPARSELt's algorithms", 0.97,
           each(speedup, "spmm", bench="linear_forward_vs_best_id")),
    Target("own product against the best plan, 8192 tokens, bursts", BURSTS,
           each(speedup, "spmm_native", **PLAN, case="(.*);burst", tokens=8192)),
    Target("own product against the best plan, 8192 tokens, 50 ms of work", 1.0,
           each(speedup, "spmm_native", **PLAN, case="(.*);sustained", tokens=8192)),
    Target("own product against the best plan, 2048 tokens, both", 1.03,
           each(speedup, "spmm_native", **BOTH, tokens=2048)),
    Target("own product against the best plan, 512 and 1024 tokens, both", 1.0,
           each(speedup, "spmm_native", **BOTH, tokens=(512, 1024))),
    Target("low-rank tail of rank 64 on top", 2.5,
           each(on_top, "spmm_native", **FUSED, case="(.*);r=64"), "%", at_most=True),
    Target("low-rank tail of 1.56 % of the columns on top", 5.0, tails_of_one_in_64, "%",
           at_most=True),
    Target("low-rank layer against the best way that does not fuse", 1.05,
           lowrank_against_the_best),
    Target("bias and ReLU on top", 2.0,
           each(on_top, "spmm_native", **FUSED, case="(.*);bias, relu"), "%", at_most=True),
    Target("SwiGLU on top", 2.0,
           each(on_top, "spmm_native", **FUSED, case="(.*);swiglu"), "%", at_most=True),
    Target("host time of a warm `torch.ops.slope.linear`", 15.0,
           each(in_units(1.0), "host_overhead", case=".*;op;(.*)"), "us", at_most=True),
    Target("`prune_compress`, of the copy bandwidth, 4096x4096 and up", 75.0,
           each(of_limit, "prune", case=FROM_4096_UP, bench="prune_compress"), "%"),
    Target("`prune_compress_transposed`, of the copy bandwidth, 4096x4096 and up", 70.0,
           each(of_limit, "prune", case=FROM_4096_UP, bench="prune_compress_transposed"), "%"),
    Target("`prune_compress` and `prune_compress_transposed` against torch's tile packer", 1.7,
           lambda records: {f"{r['bench']} {case}": speedup(r) for case, r
                            in records.of("prune", baseline="torch tile packer")}),
    Target("`transpose_values`, of the copy bandwidth", 75.0, each(of_limit, "transpose"), "%"),
    Target("`weight_grad` on top of the dense product, 8192 tokens", 3.0,
           each(on_top, "weight_grad", baseline="dense dY^T X", tokens=8192), "%", at_most=True),
    Target("`pack`, times as long as a copy of what it writes", 2.0,
           each(share, "pack", baseline="copy"), at_most=True),
    Target("first call of a shape, nothing tuned", 50.0,
           each(in_units(1e3), "first_call", case="(.*;(?:auto|plan))"), "ms", at_most=True),
    Target("first call of a shape by a plan that is tuned first", 1.5,
           each(in_units(1e6), "first_call", case="(.*);tune"), "s", at_most=True),
    Target("first call of a shape by a layer of backend \"auto\" that is tuned first", 1.5,
           each(in_units(1e6), "first_call", case="(.*);all"), "s", at_most=True),
    Target("compiled step against the fastest dense one, OPT-66B", 1.3,
           steps("compiled", "OPT-66B")),
    Target("compiled step against the fastest dense one, OPT-30B", 1.28,
           steps("compiled", "OPT-30B")),
    Target("compiled step against the fastest dense one, OPT-13B", 1.25,
           steps("compiled", "OPT-13B")),
    Target("compiled step against the fastest dense one, LLaMA-3-8B and Mistral-7B", 1.18,
           steps("compiled", "LLaMA-3-8B|Mistral-7B")),
    Target("eager step against the fastest dense one, OPT-2.7B, 8192 tokens", 1.0,
           steps("eager", "OPT-2.7B")),
    Target("eager step against the fastest dense one, OPT-2.7B, 2048 tokens", 1.0,
           steps("eager", "OPT-2.7B", 2048)),
    Target("adapters of 1.56 % on top of a compiled step", 5.0, adapters, "%", at_most=True),
    Target("`backward_copy=\"recompute\"` on top of a compiled step", 6.0, recomputing, "%",
           at_most=True),
    Target("fused AdamW, of the copy bandwidth", 80.0, each(of_limit, "adamw"), "%"),
    Target("fused AdamW against torch's on the dense twin", 1.9,
           each(speedup, "adamw", baseline="torch fused AdamW, dense")),
    Target("training state of the linears, of dense", 0.63,
           each(share, "memory", case=STATE.format("linears;cached")), "", at_most=True),
    Target("training state of the linears, copy recomputed, of dense", 0.55,
           each(share, "memory", case=STATE.format("linears;recompute")), "", at_most=True),
    Target("training state of whole models, of dense", 0.7,
           each(share, "memory", case=STATE.format("whole;cached")), "", at_most=True),
    Target("training state of whole models, copy recomputed, of dense", 0.63,
           each(share, "memory", case=STATE.format("whole;recompute")), "", at_most=True),
    *(Target(f"{how} step {kind}: peak saved beyond the state saved", 0.0,
             peaks(f"peak{', accumulating' * (kind == 'that accumulates')}", method), "MiB")
      for kind in ("that accumulates", "from no gradients")
      for how, method in (("compiled", "compiled"), ("eager", "eager"),
                          ("recomputing, compiled", "recompute;compiled"))),
]  # fmt: skip


def table(folder: Path) -> str:
    """A Markdown table of all targets, from the records in a folder, and which those are."""
    records = Records(folder)
    head = ["what", "wanted", "measured", "cases that reach it", "those that do not"]
    lines = [f"| {' | '.join(head)} |", "|---|---|---|---:|---|"]
    lines += [target.line(records) for target in TARGETS]
    cards, dates, commits = (
        sorted({r[name] for r in records.read}) for name in ("gpu", "date", "commit")
    )
    card = next(name for name in cards if name != "none")  # that of what was only counted
    where = f"bfloat16, {card}, {dates[0]} to {dates[-1]}, commits {', '.join(commits)}"
    return "\n".join(lines) + f"\n\n{where}; training state is counted.\n"
