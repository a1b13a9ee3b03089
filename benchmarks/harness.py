# SPDX-License-Identifier: Apache-2.0
"""Times CUDA work and host work and writes records; every bench_<family>.py is built on it.

How a figure of GPU time comes about. A case is a function of one argument, the index of a buffer
set. The sets together are larger than the L2 cache, so that no call finds its operands there. A
CUDA graph holds calls on one set after the other, as many as make a replay last 500 us (two at
least): what it costs to start a graph, 4 or 5 us, is then 1 % of the time, and so is what the last
calls leave unwritten in the L2 cache. The time of a replay is taken by a pair of CUDA events and
divided by the calls. Before it a backlog keeps the GPU busy while the host enqueues; it reads more
than the L2 cache holds, so that no operand and nothing to be written back is left there. A call's
time is thus what it adds to a row of calls, the gap between two kernels included. Competing cases
take turns in one run, in shuffled order, so that clock and temperature drift hit all alike.
Reported: median and interquartile range over the rounds.

Host time is another figure: what a call keeps the Python thread busy for, with the GPU idle.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import json
import math
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from slope_ext import _tuned_table, ops, plan_cache
from slope_ext._check import dtype_name

RESULTS = Path(__file__).parent / "results"
Case = Callable[[int], Any]
T = TypeVar("T")

CASE_SECONDS = 0.2  # the replays of a case take no longer, but there are at least MIN_ROUNDS
MIN_ROUNDS = 10

# Weights [out, in] that the memory-bound kernels are timed on.
WEIGHT_SHAPES = [(1024, 4096), (4096, 4096), (8192, 8192), (14336, 4096), (20480, 5120)]


@dataclass(frozen=True)
class Regime:
    """How long a replay lasts at least, and how long the GPU rests before it."""

    replay_seconds: float
    rest_seconds: float = 0.0
    max_calls: int = 512  # of a replay, which is shorter then


USUAL = Regime(500e-6)
BURST = Regime(2e-3, rest_seconds=60e-3)  # clocks are up
SUSTAINED = Regime(50e-3, max_calls=4096)  # at the power limit, if there is one to be met


@dataclass(frozen=True)
class Timing:
    """Seconds of one call."""

    median: float
    iqr: float  # between the quartiles


@dataclass(frozen=True, kw_only=True)
class Record:
    """One line of a result file. ratio > 1: ours is better; limit_fraction 1: at the limit.

    limit and limit_fraction are None where no limit of the hardware applies, as to host time.
    """

    bench: str
    case: str
    dtype: str
    tokens: int
    metric: str
    value: float
    spread: float
    unit: str
    baseline: str
    baseline_value: float
    baseline_spread: float
    ratio: float
    limit: float | None
    limit_fraction: float | None
    gpu: str
    torch: str
    cusparselt: str
    commit: str
    date: str


@dataclass(frozen=True)
class Run:
    """What a bench is told: how much to do, and the limits of this card in this run."""

    quick: bool
    bandwidth: float  # bytes/s, copy_bandwidth()
    matmul_rate: float  # FLOP/s, matmul_rate()
    part: tuple[int, int] = (0, 1)  # which of how many parts of the work
    only: str = ""  # a regular expression that the text of an item of the work must hold

    def first(self, items: Sequence[T], count: int) -> Sequence[T]:
        """The first ``count`` items in a quick run, otherwise all."""
        return items[:count] if self.quick else items

    def own(self, items: Iterable[T]) -> list[T]:
        """The items of this part of the work."""
        number, count = self.part
        wanted = [item for item in items if re.search(self.only, str(item))]
        return [item for place, item in enumerate(wanted) if place % count == number]

    def limit(self, moved: float, flops: float = 0.0) -> float:
        """Least seconds of work that must move that many bytes and do that many FLOP."""
        return max(moved / self.bandwidth, flops / self.matmul_rate)


# ---- timing --------------------------------------------------------------------------------------


def buffer_sets(bytes_of_one: int) -> int:
    """How many sets of buffers of that size exceed the L2 cache three times; at least 2."""
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    return max(2, -(-3 * l2 // max(1, bytes_of_one)))


def product_bytes(shape: tuple[int, int], dtype: torch.dtype, tokens: int) -> float:
    """Bytes of what a product with a 2:4 weight [out, in] touches once: values, mask, X and Y."""
    out_features, in_features = shape
    weight = out_features * in_features * (dtype.itemsize / 2 + 1 / 8)
    return weight + tokens * (out_features + in_features) * dtype.itemsize


def compressed_weights(
    rows: int, columns: int, dtype: torch.dtype, count: int
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Random weights [rows, columns], and the values and bitmasks of each."""
    weights = [torch.randn(rows, columns, device="cuda").to(dtype) for _ in range(count)]
    values, bitmasks = zip(*map(ops.prune_compress, weights), strict=True)
    return weights, list(values), list(bitmasks)


def time_cases(
    cases: dict[str, Case],
    sets: int,
    rounds: int = 60,
    optional: Collection[str] = (),
    regime: Regime = USUAL,
) -> dict[str, Timing]:
    """GPU times of cases, taken against each other. Not for work that waits for the GPU.

    Args:
        cases: name -> function that launches the work on buffer set ``i``, 0 <= i < sets. What it
            returns is kept until its set comes round again, so that outputs rotate too.
        sets: number of buffer sets, from :func:`buffer_sets`.
        rounds: timed replays of each case, after a fifth as many untimed ones; fewer if the longest
            case takes more than CASE_SECONDS.
        optional: names that are left out of the result, with a line of output, if they cannot be
            captured into a CUDA graph.
        regime: what the GPU does before and during a replay.

    Returns:
        name -> Timing of one call, in seconds.
    """
    busy = torch.zeros(1 << 26, device="cuda")
    graphs: dict[str, _Graph] = {}
    for name, case in cases.items():
        try:
            graphs[name] = _Graph.of(case, sets, busy, regime)
        except RuntimeError as error:
            if name not in optional:
                raise
            say_left_out(f"{name} cannot be captured", error)
    longest = max(graph.replay_seconds(busy) for graph in graphs.values())
    rounds = max(MIN_ROUNDS, min(rounds, int(CASE_SECONDS / longest)))
    samples: dict[str, list[float]] = {name: [] for name in graphs}
    order = list(graphs)
    shuffle = random.Random(0).shuffle
    for turn in range(-(rounds // 5), rounds):
        shuffle(order)
        for name in order:
            if regime.rest_seconds > 0:
                time.sleep(regime.rest_seconds)
            seconds = graphs[name].replay_seconds(busy) / graphs[name].calls
            if turn >= 0:
                samples[name].append(seconds)
    return {name: timing_of(values) for name, values in samples.items()}


def host_time(case: Callable[[], Any], calls: int = 50, batches: int = 40) -> Timing:
    """Host seconds of a call: how long it keeps the Python thread busy.

    Batches of calls are enqueued without waiting for the GPU. Between batches the GPU is waited
    for, outside the time, so that its queue never fills up; the GPU work of a call must be shorter
    than its host work for that.

    Args:
        case: makes one call.
        calls: calls of a batch, at most 100.
        batches: timed batches, after a fifth as many untimed ones.

    Returns:
        Timing of one call over the batches, in seconds.

    Raises:
        ValueError: calls is not in [1, 100].
    """
    if not 1 <= calls <= 100:
        raise ValueError(f"host_time: calls must be in [1, 100], got {calls}")
    samples: list[float] = []
    for batch in range(-(batches // 5), batches):
        _wait_for_gpu()
        start = time.perf_counter()
        for _ in range(calls):
            case()
        seconds = time.perf_counter() - start
        if batch >= 0:
            samples.append(seconds / calls)
    _wait_for_gpu()
    return timing_of(samples)


def wall_time(case: Callable[[], Any]) -> float:
    """Seconds of one call, by the wall clock, from an idle GPU until it is idle again."""
    _wait_for_gpu()
    start = time.perf_counter()
    case()
    _wait_for_gpu()
    return time.perf_counter() - start


def copy_bandwidth() -> float:
    """Bytes per second, read plus written, of the fastest large device-to-device copy.

    The faster of a memcpy and an elementwise kernel: the limit that ours are held against.
    """
    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source)
    copies: dict[str, Case] = {
        "memcpy": lambda _: target.copy_(source),
        "kernel": lambda _: torch.neg(source, out=target),
    }
    fastest = min(timing.median for timing in time_cases(copies, sets=1, rounds=20).values())
    return 2 * source.numel() * source.element_size() / fastest


def matmul_rate(size: int = 8192) -> float:
    """FLOP per second of a dense bf16 product by cuBLAS, both factors [size, size], in a burst."""
    a, b = (torch.randn(size, size, device="cuda").bfloat16() for _ in range(2))
    out = torch.empty_like(a)
    timing = time_cases({"matmul": lambda _: torch.mm(a, b, out=out)}, sets=1, rounds=20)
    return 2 * size * size * size / timing["matmul"].median


@dataclass(frozen=True)
class _Graph:
    """A CUDA graph of ``calls`` calls of one case."""

    graph: torch.cuda.CUDAGraph
    calls: int

    @classmethod
    def of(cls, case: Case, sets: int, busy: Tensor, regime: Regime) -> _Graph:
        """As many calls as the regime wants, at least two, going by a first, small graph."""
        first = cls._capture(case, sets, min(4, sets))
        first.replay_seconds(busy)
        seconds = first.replay_seconds(busy) / first.calls
        calls = min(regime.max_calls, max(2, math.ceil(regime.replay_seconds / seconds)))
        return first if calls == first.calls else cls._capture(case, sets, calls)

    @classmethod
    def _capture(cls, case: Case, sets: int, calls: int) -> _Graph:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        outputs: list[Any] = [None] * sets
        with torch.cuda.stream(stream):
            for i in range(min(sets, calls)):
                case(i)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # The outer context restores the stream even if the capture fails on its way out.
        with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):
            for call in range(calls):
                outputs[call % sets] = case(call % sets)
        return cls(graph, calls)

    def replay_seconds(self, busy: Tensor) -> float:
        """Seconds of a replay that starts behind a read of ``busy``."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        busy.sum()  # backlog: the events and the replay are queued before it ends
        start.record()
        self.graph.replay()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e-3


def _wait_for_gpu() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def say_left_out(what: str, error: Exception) -> None:
    """Prints that a case has no record, and why."""
    print(f"left out: {what} ({str(error).splitlines()[0]})", flush=True)


def timing_of(samples: Sequence[float]) -> Timing:
    """Median and interquartile range of two samples or more."""
    first, median, third = statistics.quantiles(samples, n=4)
    return Timing(median=median, iqr=third - first)


# ---- records -------------------------------------------------------------------------------------


def record_of(
    *, dtype: torch.dtype, ours: tuple[float, float], theirs: tuple[float, float], **rest: Any
) -> Record:
    """A record of two values, each with its spread, in the unit it has; without a limit, if none is
    among the other fields; of this environment."""
    return Record(
        dtype=dtype_name(dtype),
        value=ours[0],
        spread=ours[1],
        baseline_value=theirs[0],
        baseline_spread=theirs[1],
        **{"limit": None, "limit_fraction": None} | rest | environment(),
    )


def time_record(
    *, ours: Timing, theirs: Timing, limit: float | None = None, **common: Any
) -> Record:
    """A record of metric "time": microseconds, limit and timings given in seconds.

    ``common``: bench, case, dtype, tokens, baseline.
    """
    return record_of(
        metric="time",
        unit="us",
        ours=(_microseconds(ours.median), _microseconds(ours.iqr)),
        theirs=(_microseconds(theirs.median), _microseconds(theirs.iqr)),
        ratio=round(theirs.median / ours.median, 3),
        limit=None if limit is None else _microseconds(limit),
        limit_fraction=None if limit is None else round(limit / ours.median, 3),
        **common,
    )


def bytes_record(*, ours: int, theirs: int, **common: Any) -> Record:
    """A record of metric "bytes": in MiB, given in bytes; ``common`` as in :func:`time_record`."""
    return record_of(
        metric="bytes",
        unit="MiB",
        ours=(round(ours / 2**20, 1), 0.0),
        theirs=(round(theirs / 2**20, 1), 0.0),
        ratio=round(theirs / ours, 3),
        **common,
    )


def baseline_records(timings: dict[str, Timing], **common: Any) -> list[Record]:
    """A :func:`time_record` of the case "ours" against each other one, named as its baseline."""
    ours = timings["ours"]
    return [
        time_record(ours=ours, baseline=baseline, theirs=theirs, **common)
        for baseline, theirs in timings.items()
        if baseline != "ours"
    ]


@functools.cache
def environment() -> dict[str, str]:
    """GPU, versions, commit and date, as the records hold them."""
    version = torch.backends.cusparselt.version() if torch.backends.cusparselt.is_available() else 0
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "torch": torch.__version__,
        "cusparselt": str(version or "none"),
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
    }


def main(
    name: str,
    description: str | None,
    bench: Callable[[Run], Iterable[Record]],
    parts: bool = False,
    needs_gpu: bool = True,
) -> None:
    """The command line of a bench: prints and writes the records that ``bench`` yields.

    The file is written anew after every record: a bench that is stopped leaves what it has. A quick
    run, or one with --only, writes one only where --out says so, lest it replace the records of a
    whole one; --merge joins it with those.

    Args:
        name: of the record file, without its suffix.
        description: shown by --help.
        bench: called with the limits of this run.
        parts: whether the bench does the part of the work that its Run names.
        needs_gpu: False for what is counted; its Run then has no limits.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="folder of the records (default: results/<gpu>)")
    parser.add_argument("--quick", action="store_true", help="few shapes and types")
    if parts:
        parser.add_argument(
            "--part",
            type=part_of,
            metavar="I/N",
            help="this part of the work, into a file of its own",
        )
        parser.add_argument(
            "--only",
            default="",
            metavar="REGEX",
            help="only items whose text holds this, e.g. 'torch.float16, (64|512)\\)'",
        )
        parser.add_argument(
            "--merge",
            type=Path,
            nargs="+",
            metavar="FILE",
            help="only join files, of parts or of earlier runs, into one beside the first; what "
            "the last of them has of a case stands",
        )
    parser.add_argument("--table", type=Path, help="merge what was tuned into this table")
    parser.set_defaults(part=(0, 1), only="", merge=None)
    arguments = parser.parse_args()
    del sys.argv[1:]  # torch.compile would write what follows an --only, quotes too, into its code
    if arguments.merge:
        merge(arguments.merge, arguments.merge[0].with_name(f"{name}.json"))
        return

    started = time.perf_counter()
    bandwidth, rate = (copy_bandwidth(), matmul_rate()) if needs_gpu else (math.nan, math.nan)
    run = Run(arguments.quick, bandwidth, rate, arguments.part, arguments.only)
    if needs_gpu:
        print(
            f"{torch.cuda.get_device_name()}: copy bandwidth {bandwidth / 1e12:.2f} TB/s, "
            f"dense bf16 product {rate / 1e12:.0f} TFLOP/s"
        )
    file = name if run.part == (0, 1) else f"{name}.{run.part[0]}"
    records: list[Record] = []
    with own_table(arguments.table):
        for record in bench(run):
            records.append(record)
            print(line(record), flush=True)
            if arguments.out or not (run.quick or run.only):
                save(records, file, arguments.out)
    print(f"{len(records)} records of {name} in {time.perf_counter() - started:.0f} s")


@contextlib.contextmanager
def own_table(table: Path | None) -> Iterator[None]:
    """Tunes from nothing, by neither the user's table nor a shipped one; merges into ``table``."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["SLOPE_EXT_CACHE_DIR"] = folder
        _tuned_table.SHIPPED = Path(folder)
        plan_cache.forget_tables()
        yield
        if table is not None:
            _tuned_table.save(table, _tuned_table.load(plan_cache.table_path()))


def merge(files: Iterable[Path], path: Path) -> None:
    """Writes the records of all files as one; what a later file has of a case replaces it whole."""
    cases: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for file in files:
        found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
        for record in json.loads(file.read_text()):
            case = tuple(record[name] for name in ("bench", "case", "dtype", "tokens"))
            found.setdefault(case, []).append(record)
        cases |= found
    records = [record for case in cases.values() for record in case]
    path.write_text(_text(records))


def part_of(text: str) -> tuple[int, int]:
    """What --part I/N says."""
    number, count = map(int, text.split("/"))
    if not 0 <= number < count:
        raise argparse.ArgumentTypeError(f"must be I/N with 0 <= I < N, got {text}")
    return number, count


def save(records: Sequence[Record], name: str, directory: Path | None = None) -> Path:
    """Writes results/<gpu>/<name>.json (or directory/<name>.json); returns the path."""
    gpu = records[0].gpu.lower().removeprefix("nvidia ").replace(" ", "-")
    folder = directory or RESULTS / gpu
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(_text([asdict(record) for record in records]))
    return path


def _text(records: Iterable[dict[str, Any]]) -> str:
    """A JSON list with a line for each record."""
    return "[\n" + ",\n".join(json.dumps(record) for record in records) + "\n]\n"


def line(r: Record) -> str:
    """A record in a line, for reading along."""
    tokens = f"{r.tokens:6d}" if r.tokens else " " * 6
    text = (
        f"{r.bench:<26} {r.case:<22} {tokens} {r.dtype:<9} {r.value:9.1f} +- {r.spread:6.1f} "
        f"{r.unit}  {r.ratio:5.2f}x {r.baseline}"
    )
    if r.limit is None or r.limit_fraction is None:
        return text
    return f"{text}  {r.limit_fraction:6.1%} of limit {r.limit:.1f}"


def _microseconds(seconds: float) -> float:
    return round(seconds * 1e6, 3)


def _commit() -> str:
    # A copy of the tree without its history is told which commit it is.
    if commit := os.environ.get("SLOPE_COMMIT"):
        return commit
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip() or "unknown"
