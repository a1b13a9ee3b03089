# SPDX-License-Identifier: Apache-2.0
"""What the project set itself for an H100, and what the committed records say of it.

plot.py writes the table between ``<!-- targets: GPU -->`` and ``<!-- /targets -->``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model_shapes import BAR_SHAPES, adapter_rank

RawRecord = dict[str, Any]
Values = dict[str, float]  # by case
# Weights of which a kernel takes long enough for its share of the copy bandwidth to be its own
LARGE = ("4096x4096", "8192x8192", "14336x4096", "20480x5120")
DIGITS = {"x": 3, "": 3, "%": 2, "us": 1, "ms": 1, "s": 2, "MiB": 0}  # by unit
WEIGHTS = tuple(f"{rows}x{columns}" for rows, columns in BAR_SHAPES)


class Records:
    """The records of a GPU, in bf16."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def of(
        self, file: str, case: str = "", baseline: str | None = None, **fields: Any
    ) -> Iterator[tuple[str, RawRecord]]:
        """Those whose ``case`` is matched whole, with what its group is, or else the case."""
        for r in json.loads((self._folder / f"{file}.json").read_text()):
            match = re.fullmatch(case or ".*", r["case"])
            fits = r["dtype"] == "bfloat16" and baseline in (None, r["baseline"])
            if match and fits and all(r[name] == value for name, value in fields.items()):
                yield (match[1] if match.groups() else r["case"]), r


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


# ---- how records are read ------------------------------------------------------------------------


def ratios(file: str, **wanted: Any) -> Callable[[Records], Values]:
    """Times as fast as the baseline."""
    return lambda records: {name: r["ratio"] for name, r in records.of(file, **wanted)}


def times(file: str, **wanted: Any) -> Callable[[Records], Values]:
    """Microseconds."""
    return lambda records: {name: r["value"] for name, r in records.of(file, **wanted)}


def each_token_count(
    file: str, scale: float | None = None, **wanted: Any
) -> Callable[[Records], Values]:
    """Ratios or, of a unit that ``scale`` microseconds are, times, where token counts differ."""
    return lambda records: {
        f"{name}, {r['tokens']} tokens": r["ratio"] if scale is None else r["value"] / scale
        for name, r in records.of(file, **wanted)
    }


def of_limit(file: str, weights: tuple[str, ...], **wanted: Any) -> Callable[[Records], Values]:
    """Per cent of the limit."""
    return lambda records: {
        name: 100 * r["limit_fraction"] for name, r in records.of(file, **wanted) if name in weights
    }


def more(file: str, **wanted: Any) -> Callable[[Records], Values]:
    """Per cent of the baseline's time that come on top of it."""
    return lambda records: {
        name: 100 * (1 / r["ratio"] - 1) for name, r in records.of(file, **wanted)
    }


def both_regimes(tokens: int) -> Callable[[Records], Values]:
    """The own product against the best plan, rested and in 50 ms of work."""
    return ratios("spmm_native", **PLAN, case="(.*;(?:burst|sustained))", tokens=tokens)


def shares(part: str, kind: str) -> Callable[[Records], Values]:
    """The part of the dense training state that is needed, fp32 moments."""
    return lambda records: {
        name: 1 / r["ratio"]
        for name, r in records.of("memory", f"(.*);{part};{kind};moments=float32;state")
    }


def tails_of_one_in_64(records: Records) -> Values:
    """What a tail of 1.56 % of the columns costs."""
    costs = more("spmm_native", bench="spmm_native_fused", tokens=8192, case="(.*;r=.*)")(records)
    ranks = {f"{rows}x{columns};r={adapter_rank(columns)}" for rows, columns in BAR_SHAPES}
    return {case: cost for case, cost in costs.items() if case in ranks}


def lowrank_against_the_best(records: Records) -> Values:
    """linear_lowrank, T = X A^T included, against the fastest way that does not fuse."""
    found: Values = {}
    for case, r in records.of("spmm_native", bench="linear_lowrank", tokens=8192):
        if r["baseline"] != "without adapter":
            found[case] = min(found.get(case, r["ratio"]), r["ratio"])
    return found


def adapters(records: Records) -> Values:
    """What adapters of 1.56 % of the hidden size cost of a compiled step."""
    steps = dict(records.of("training", bench="train_step", tokens=8192))
    found: dict[str, tuple[int, float]] = {}  # by model: the least rank, and what it costs
    for case, r in steps.items():
        if match := re.fullmatch(r"(.*);slope;r=(\d+);compiled", case):
            model, rank = match[1], int(match[2])
            cost = 100 * (r["value"] / steps[f"{model};slope;compiled"]["value"] - 1)
            found[model] = min(found.get(model, (rank, cost)), (rank, cost))
    return {model: cost for model, (_, cost) in found.items()}


def recomputing(records: Records) -> Values:
    """What it costs of a compiled step that backward makes the backward copy."""
    steps = dict(records.of("training", bench="train_step", tokens=8192))
    return {
        case.removesuffix(";slope;recompute;compiled"): 100
        * (r["value"] / steps[case.replace("recompute;", "")]["value"] - 1)
        for case, r in steps.items()
        if case.endswith(";slope;recompute;compiled")
    }


def peaks(records: Records) -> Values:
    """MiB that a compiled step needs less at most, beyond those that the state does."""
    saved: dict[str, Values] = {"peak, accumulating": {}, "state": {}}
    for kind, of_kind in saved.items():
        case = f"(.*);slope;compiled;{kind}, requested"
        for name, r in records.of("training", case, bench="train_memory", tokens=8192):
            of_kind[name] = r["baseline_value"] - r["value"]
    peak, state = saved.values()
    return {name: peak[name] - state[name] for name in peak if name in state}


# ---- what was aimed at ---------------------------------------------------------------------------

FORWARD = {"bench": "linear_forward", "baseline": "F.linear", "case": f"({'|'.join(WEIGHTS)})"}
PLAN = {"bench": "spmm_native", "baseline": "best cuSPARSELt plan"}
FUSED = {"bench": "spmm_native_fused", "baseline": "without"}
STEP = {"bench": "train_step", "tokens": 8192}
WIDE = dict.fromkeys(("20480x5120", "5120x20480", "9216x9216"), 1.55)
LONG = {"14336x4096": 1.43, "4096x14336": 1.43}
BURSTS = (1.05, 1.04, 1.02, 1.02, 1.02, 1.05)

TARGETS = [
    Target("`linear`, 8192 tokens, against cuBLAS", {"4096x4096": 1.36, **LONG, **WIDE},
           ratios("spmm", **FORWARD, tokens=8192)),
    Target("by the own product and plans, whichever `backend=\"auto\"` takes",
           {"4096x4096": 1.45, "14336x4096": 1.5, "9216x9216": 1.58, "20480x5120": 1.58},
           ratios("spmm", **FORWARD | {"case": "(4096x4096|14336x4096|9216x9216|20480x5120)"},
                  tokens=8192)),
    Target("`linear`, 2048 tokens, against cuBLAS", 1.29, ratios("spmm", **FORWARD, tokens=2048)),
    Target("`linear`, 8 to 16384 tokens, against the best of a sweep of cuSPARSELt's algorithms",
           0.97, each_token_count("spmm", bench="linear_forward_vs_best_id")),
    Target("own product against the best plan, 8192 tokens, bursts",
           dict(zip(WEIGHTS, BURSTS, strict=True)),
           ratios("spmm_native", **PLAN, case="(.*);burst", tokens=8192)),
    Target("own product against the best plan, 8192 tokens, in 50 ms of work", 1.0,
           ratios("spmm_native", **PLAN, case="(.*);sustained", tokens=8192)),
    Target("own product against the best plan, 2048 tokens, both", 1.03, both_regimes(2048)),
    Target("own product against the best plan, 1024 tokens, both", 1.0, both_regimes(1024)),
    Target("own product against the best plan, 512 tokens, both", 1.0, both_regimes(512)),
    Target("low-rank tail of rank 64 on top, 8192 tokens", 2.5,
           more("spmm_native", **FUSED, case="(.*);r=64", tokens=8192), "%", at_most=True),
    Target("low-rank tail of rank 64 on top, 2048 tokens", 2.5,
           more("spmm_native", **FUSED, case="(.*);r=64", tokens=2048), "%", at_most=True),
    Target("low-rank tail of 1.56 % of the columns on top, 8192 tokens", 5.0, tails_of_one_in_64,
           "%", at_most=True),
    Target("low-rank layer against the best way that does not fuse, 8192 tokens", 1.05,
           lowrank_against_the_best),
    Target("bias and ReLU on top, 8192 tokens", 2.0,
           more("spmm_native", **FUSED, case="(.*);bias, relu", tokens=8192), "%", at_most=True),
    Target("SwiGLU on top, 8192 tokens", 2.0,
           more("spmm_native", **FUSED, case="(.*);swiglu", tokens=8192), "%", at_most=True),
    Target("host time of a warm `torch.ops.slope.linear`", 15.0,
           times("host_overhead", bench="host_overhead", baseline="F.linear",
                 case=".*;op;(inference_mode|no_grad)"), "us", at_most=True),
    Target("`prune_compress`, of the copy bandwidth", 75.0,
           of_limit("prune", LARGE, bench="prune_compress"), "%"),
    Target("`prune_compress_transposed`, of the copy bandwidth", 70.0,
           of_limit("prune", LARGE, bench="prune_compress_transposed"), "%"),
    Target("`prune_compress`, one way and both, against torch's tile packer", 1.7,
           lambda records: {f"{r['bench']} {case}": r["ratio"] for case, r
                            in records.of("prune", baseline="torch tile packer")}),
    Target("`transpose_values`, of the copy bandwidth", 75.0,
           of_limit("transpose", LARGE, bench="transpose_values"), "%"),
    Target("`weight_grad` on top of the dense product, 8192 tokens", 3.0,
           more("weight_grad", baseline="dense dY^T X", tokens=8192), "%", at_most=True),
    Target("`pack` against a copy of what it writes", 0.5, ratios("pack", baseline="copy")),
    Target("first call of a shape, nothing tuned", 50.0,
           each_token_count("first_call", 1e3, case="(.*;(?:auto|plan))"), "ms", at_most=True),
    Target("first call of a shape that is tuned first", 1.5,
           each_token_count("first_call", 1e6, case="(.*;(?:tune|all))"), "s", at_most=True),
    Target("compiled training step, OPT-66B", 1.3,
           ratios("training", **STEP, case="(OPT-66B;.*);slope;compiled")),
    Target("compiled training step, OPT-30B", 1.28,
           ratios("training", **STEP, case="(OPT-30B;.*);slope;compiled")),
    Target("compiled training step, OPT-13B", 1.25,
           ratios("training", **STEP, case="(OPT-13B;.*);slope;compiled")),
    Target("compiled training step, LLaMA-3-8B and Mistral-7B", 1.18,
           ratios("training", **STEP, case="((?:LLaMA-3-8B|Mistral-7B);.*);slope;compiled")),
    Target("eager step of OPT-2.7B, 8192 tokens", 1.0,
           ratios("training", **STEP, case="(OPT-2.7B;.*);slope;eager")),
    Target("eager step of OPT-2.7B, 2048 tokens", 1.0,
           ratios("training", bench="train_step", tokens=2048, case="(OPT-2.7B;.*);slope;eager")),
    Target("adapters of 1.56 % on top of a step", 5.0, adapters, "%", at_most=True),
    Target("`backward_copy=\"recompute\"` on top of a step", 6.0, recomputing, "%", at_most=True),
    Target("fused AdamW, of the copy bandwidth", 80.0,
           lambda records: {case: 100 * r["limit_fraction"] for case, r in records.of("adamw")},
           "%"),
    Target("fused AdamW against torch's on the dense twin", 1.9,
           ratios("adamw", baseline="torch fused AdamW, dense")),
    Target("training state of the linears, of dense", 0.63, shares("linears", "cached"), "",
           at_most=True),
    Target("training state of the linears, copy recomputed", 0.55, shares("linears", "recompute"),
           "", at_most=True),
    Target("training state of whole models, of dense", 0.7, shares("whole", "cached"), "",
           at_most=True),
    Target("training state of whole models, copy recomputed", 0.63, shares("whole", "recompute"),
           "", at_most=True),
    Target("peak of a compiled step that accumulates: saved beyond the state saved", 0.0, peaks,
           "MiB"),
]  # fmt: skip


def table(folder: Path) -> str:
    """A Markdown table of all targets, from the records in a folder."""
    records = Records(folder)
    head = ["what", "wanted", "measured", "cases that reach it", "those that do not"]
    lines = [f"| {' | '.join(head)} |", "|---|---|---|---:|---|"]
    return "\n".join([*lines, *(target.line(records) for target in TARGETS)]) + "\n"
