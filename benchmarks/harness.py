# SPDX-License-Identifier: Apache-2.0
"""Times CUDA work and writes records; every bench_<family>.py is built on it.

How a figure comes about. A case is a function of one argument, the index of a buffer set. It is
captured into a CUDA graph once per buffer set; the sets together are larger than the L2 cache, so
that no run finds its operands there. A replay of one graph is timed by a pair of CUDA events behind
a backlog that keeps the GPU busy while the host enqueues. Competing cases take turns in one run,
in shuffled order, so that clock and temperature drift hit all alike. Reported: median and
interquartile range.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import os
import random
import statistics
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
Case = Callable[[int], Any]

# Weights [out, in] that the memory-bound kernels are timed on.
WEIGHT_SHAPES = [(1024, 4096), (4096, 4096), (8192, 8192), (14336, 4096), (20480, 5120)]


@dataclass(frozen=True)
class Timing:
    """Seconds of one call."""

    median: float
    iqr: float  # between the quartiles


@dataclass(frozen=True, kw_only=True)
class Record:
    """One line of a result file. ratio > 1: ours is better; limit_fraction 1: at the limit."""

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
    limit: float
    limit_fraction: float
    gpu: str
    torch: str
    cusparselt: str
    commit: str
    date: str


# ---- timing --------------------------------------------------------------------------------------


def buffer_sets(bytes_of_one: int) -> int:
    """How many sets of buffers of that size exceed the L2 cache three times; at least 2."""
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    return max(2, -(-3 * l2 // max(1, bytes_of_one)))


def time_cases(cases: dict[str, Case], sets: int, rounds: int = 60) -> dict[str, Timing]:
    """Times cases against each other.

    Args:
        cases: name -> function that launches the work on buffer set ``i``, 0 <= i < sets.
        sets: number of buffer sets, from :func:`buffer_sets`.
        rounds: timed replays of each case, after a fifth as many untimed ones.

    Returns:
        name -> Timing in seconds.
    """
    graphs = {name: [_capture(case, i) for i in range(sets)] for name, case in cases.items()}
    busy = torch.empty(1 << 26, device="cuda")
    samples: dict[str, list[float]] = {name: [] for name in cases}
    order = list(cases)
    shuffle = random.Random(0).shuffle
    for turn in range(rounds + rounds // 5):
        shuffle(order)
        for name in order:
            graph = graphs[name][turn % sets]
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            busy.fill_(turn)  # backlog: the events and the replay are queued before it ends
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            if turn >= rounds // 5:
                samples[name].append(start.elapsed_time(end) * 1e-3)
    return {name: _timing(values) for name, values in samples.items()}


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


def _capture(case: Case, index: int) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        case(index)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        case(index)
    return graph


def _timing(samples: Sequence[float]) -> Timing:
    first, median, third = statistics.quantiles(samples, n=4)
    return Timing(median=median, iqr=third - first)


# ---- records -------------------------------------------------------------------------------------


def time_record(
    *,
    bench: str,
    case: str,
    dtype: torch.dtype,
    tokens: int,
    ours: Timing,
    baseline: str,
    theirs: Timing,
    limit: float,
) -> Record:
    """A record of metric "time": microseconds, limit and timings given in seconds."""
    return Record(
        bench=bench,
        case=case,
        dtype=str(dtype).removeprefix("torch."),
        tokens=tokens,
        metric="time",
        value=_microseconds(ours.median),
        spread=_microseconds(ours.iqr),
        unit="us",
        baseline=baseline,
        baseline_value=_microseconds(theirs.median),
        baseline_spread=_microseconds(theirs.iqr),
        ratio=round(theirs.median / ours.median, 3),
        limit=_microseconds(limit),
        limit_fraction=round(limit / ours.median, 3),
        **environment(),
    )


@functools.cache
def environment() -> dict[str, str]:
    """GPU, versions, commit and date, as the records hold them."""
    version = torch.backends.cusparselt.version() if torch.backends.cusparselt.is_available() else 0
    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cusparselt": str(version or "none"),
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
    }


def main(name: str, description: str | None, bench: Callable[[float], list[Record]]) -> None:
    """The command line of a bench: prints and writes the records that ``bench`` returns.

    Args:
        name: of the record file, without its suffix.
        description: shown by --help.
        bench: called with the copy bandwidth in bytes per second.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, help="folder of the records (default: results/<gpu>)")
    arguments = parser.parse_args()

    bandwidth = copy_bandwidth()
    print(f"copy bandwidth {bandwidth / 1e12:.2f} TB/s on {torch.cuda.get_device_name()}")
    records = bench(bandwidth)
    print_table(records)
    print(save(records, name, arguments.out))


def save(records: Sequence[Record], name: str, directory: Path | None = None) -> Path:
    """Writes results/<gpu>/<name>.json (or directory/<name>.json); returns the path."""
    gpu = torch.cuda.get_device_name().lower().removeprefix("nvidia ").replace(" ", "-")
    folder = directory or RESULTS / gpu
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps([asdict(record) for record in records], indent=1) + "\n")
    return path


def print_table(records: Sequence[Record]) -> None:
    """A line per record, for reading along."""
    for r in records:
        print(
            f"{r.bench:<12} {r.case:<14} {r.dtype:<9} {r.value:9.1f} +- {r.spread:5.1f} {r.unit}"
            f"  {r.ratio:5.2f}x {r.baseline}  {r.limit_fraction:6.1%} of limit {r.limit:.1f}"
        )


def _microseconds(seconds: float) -> float:
    return round(seconds * 1e6, 3)


def _commit() -> str:
    # A copy of the tree without its history is told which commit it is.
    if commit := os.environ.get("SLOPE_COMMIT"):
        return commit
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip() or "unknown"
