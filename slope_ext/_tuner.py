# SPDX-License-Identifier: Apache-2.0
"""Sweeps: the algorithms of cuSPARSELt for a shape and the own product; the latter's kernels.

Each is checked, then timed.

Operands are random. An algorithm counts only if its product is that of a dense GEMM, to rounding;
the fastest must also be right with bias, with an addend, and at both ends of the token counts that
will share its entry. They take turns in shuffled order and in its reverse, so that clocks,
temperature and what ran before hit all alike; algorithms clearly behind after the first turns are
dropped. Small operands are timed in single launches, each after something else was read over the L2
cache; those that exceed the cache twice in rows of launches, since a GPU at its power limit has
other winners than a rested one; a single launch of each tells which are worth a row.

Kernels of the own product are timed on a rested GPU and, where the operands exceed the cache twice,
in rows too. The two soonest are timed anew, beside what would be taken untuned alone, and the
sooner replaces that if it is clearly sooner over both and not clearly later in either.
"""

from __future__ import annotations

import contextlib
import functools
import random
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from slope_ext import _C, _packed, _spmm_sm90, ops
from slope_ext._spmm_sm90 import THE_OPS, TILES, Choice
from slope_ext._tuned_table import Candidate, Kernels, Parts, Sweep, bucket, product_key_of

# (split of K, cusparseLtSplitKMode_t: 1 one kernel, 2 two). On sm_90 the library refuses those and
# has "segments" of K instead, of which elsewhere the making of a plan can hang.
_SPLITS = ((2, 1), (2, 2), (4, 1), (4, 2))
_SEGMENTS = ((-1, 0),)
_SPLIT_OUTPUTS = 1 << 24  # rows * tokens up to which splitting K can pay

# Of the result's norm, where rounding makes 0.002 and a column of W left out 0.016 (of 4096) to
# 0.005 (of 40000); and of its largest magnitude, where rounding makes 0.004
_NORM_TOLERANCE, _TOLERANCE = 0.005, 0.02
_FIRST_TURNS, _FEWEST_TURNS, _MORE_TURNS = 2, 3, 15  # of rows one first
_DROP, _DROP_AT_ONCE = 1.15, 1.3  # slower than the best by these factors
_SECONDS = 0.5  # spent on timing one shape, about
_ROW_FLOP = 1e12  # of the dense products of a row, which takes a millisecond or two

# Kernels of the own product. The model's times err by some percent; of a product that takes many
# rounds of tiles, the last is too little to be worth the time
_WITHIN, _MOST_KERNELS, _MOST_FLOP = 1.04, 8, 2e12  # 20480 x 5120 with 8192 tokens has 1.7e12
_REST_SECONDS = 3e-3
_BACKLOG = 4  # reads of what exceeds the cache, 0.1 ms, in which the host enqueues the launches


class _Round(NamedTuple):
    """How kernels of the own product are timed, and what one needs to be left after it.

    In turns on a rested GPU and, of large operands, as many in rows, but no more than fit in some
    ``seconds``, three at least. Then ``sooner`` than untuned by this factor over both, and
    ``later`` by no more than that one in either.
    """

    turns: int
    seconds: float
    sooner: float
    later: float


# Medians of a few samples err by half a percent, and the best of eight is low by chance; so those
# that are likely are timed again, where chance has two to choose from and errs by less
_LIKELY = _Round(turns=8, seconds=0.2, sooner=0.997, later=1.01)
_AGAIN = _Round(turns=20, seconds=0.2, sooner=0.992, later=1.005)
_MOST_AGAIN = 2
Times = dict[Choice, tuple[float, ...]]  # seconds of a launch: rested, and in rows


@dataclass
class _Trial:
    algorithm: Any  # a Choice: the own product
    launch: Callable[[], None]
    samples: list[float] = field(default_factory=list)
    far: bool = False  # behind, by one launch: not timed in rows

    @property
    def seconds(self) -> float:
        return statistics.median(self.samples)


# Ids that a sweep in fp16 tries, by capability and release: the default, and those that won one of
# 40 sweeps of the first 36. Each plan takes 0.2 s to make and leaves 18 MB of host memory behind;
# one of the ids beyond (36) ends in an "illegal instruction", which takes the process's CUDA
# context with it. Elsewhere nothing is known, so only the default id is taken.
_FP16_IDS = {(9, (0, 8, 0)): (0, 5, 6, 7, 13, 15, 16, 22, 27, 28, 30, 35)}


def algorithm_ids(bfloat16: bool, device: int, count: int) -> list[int]:
    """The ids that a sweep tries, of the ``count`` that the library offers."""
    if bfloat16:
        return list(range(count))
    major = torch.cuda.get_device_capability(device)[0]
    known = _FP16_IDS.get((major, _C.cusparselt_version()), (0,))
    return [algorithm for algorithm in known if algorithm < count]


def launches(operand_bytes: int, l2_bytes: int, flop: int) -> int:
    """How many launches of a dense product's ``flop`` are timed as one sample."""
    return max(2, round(_ROW_FLOP / flop)) if operand_bytes > 2 * l2_bytes else 1


def variant(problem: Any, **changes: Any) -> Any:
    """A problem with some fields changed."""
    fields = ("rows", "columns", "tokens", "device", "bfloat16", "bias", "accumulate")
    return _C.SpmmProblem(**({name: getattr(problem, name) for name in fields} | changes))


class _Sweep:
    """The operands of one problem and what is tried on them."""

    def __init__(self, problem: Any) -> None:
        self.device = torch.device("cuda", problem.device)
        dtype = torch.bfloat16 if problem.bfloat16 else torch.float16
        rows, columns, tokens = problem.rows, problem.columns, problem.tokens
        self.problem = problem
        self.values = torch.randn(rows, columns // 2, dtype=dtype, device=self.device)
        self.bitmask = _random_mask(rows, columns, self.device)
        self.x = torch.randn(tokens, columns, dtype=dtype, device=self.device)
        self.y = torch.empty(tokens, rows, dtype=dtype, device=self.device)
        self.bias = None
        if problem.bias:
            self.bias = 10 * torch.randn(rows, dtype=dtype, device=self.device)
        self.expected = F.linear(self.x, ops.decompress(self.values, self.bitmask), self.bias)
        # An addend must be there; without one nothing of y may be.
        self.before = 5.0 if problem.accumulate else float("nan")
        if problem.accumulate:
            self.expected += self.before
        self.norm = torch.linalg.vector_norm(self.expected, dtype=torch.float32)
        self.largest = self.expected.abs().amax()
        self.l2_bytes = torch.cuda.get_device_properties(self.device).L2_cache_size
        operands = (self.values, self.bitmask, self.x, self.y)  # metadata are as long as the mask
        operand_bytes = sum(tensor.nbytes for tensor in operands)
        self.launches = launches(operand_bytes, self.l2_bytes, 2 * rows * columns * tokens)

    def trial(self, algorithm: Any) -> _Trial | None:
        """Makes the plan and runs it once; None where the library refuses or the result is off."""
        packed = self.packed
        try:
            plan = _C.SpmmPlan(self.problem, algorithm)
            bytes_ = max(1, plan.workspace_bytes)
            workspace = torch.empty(bytes_, dtype=torch.uint8, device=self.device)
            trial = _Trial(algorithm, functools.partial(self._run_plan, packed, plan, workspace))
            return trial if self._is_right(trial) else None
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            raise
        except RuntimeError:
            return None

    def native_trial(self, choice: Choice = THE_OPS) -> _Trial | None:
        """The own product on the same operands; None if the result is off."""
        weight = (self.values, self.words)
        try:
            trial = _Trial(choice, _spmm_sm90.launcher(self.x, *weight, self.y, choice=choice))
            return trial if self._is_right(trial) else None
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            raise
        except RuntimeError:
            return None

    @functools.cached_property
    def packed(self) -> Tensor:
        """W as plans take it."""
        return ops.pack(self.values, self.bitmask)

    @functools.cached_property
    def words(self) -> Tensor:
        """Metadata of W as the own product takes them."""
        words = _packed.empty_words(self.problem.rows, self.problem.columns, self.device)
        ops.pack_metadata(self.bitmask, words)
        return words

    def run(self, trial: _Trial) -> None:
        trial.launch()

    def _run_plan(self, packed: Tensor, plan: Any, workspace: Tensor) -> None:
        plan.run(
            packed.data_ptr(),
            self.x.data_ptr(),
            0 if self.bias is None else self.bias.data_ptr(),
            self.y.data_ptr(),
            workspace.data_ptr(),
            torch.cuda.current_stream(self.device).cuda_stream,
        )

    def _is_right(self, trial: _Trial) -> bool:
        self.y.fill_(self.before)
        self.run(trial)
        off = (self.y - self.expected).abs_()  # NaN stays NaN
        norm = torch.linalg.vector_norm(off, dtype=torch.float32)
        right = (norm <= _NORM_TOLERANCE * self.norm) & (off.amax() <= _TOLERANCE * self.largest)
        return bool(right)

    def time(
        self, trials: list[_Trial], turns: int, launches: int | None = None, rest: float = 0.0
    ) -> None:
        """Adds a sample of each trial and turn; ``rest``: seconds of rest before each."""
        launches = launches or self.launches
        cold = torch.zeros(2 * self.l2_bytes // 4, dtype=torch.int32, device=self.device)
        order, shuffle = list(trials), random.Random(0).shuffle
        for turn in range(turns):
            if turn % 2 == 0:
                shuffle(order)
            else:
                order.reverse()
            events = []
            for trial in order:
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                if rest > 0:
                    torch.cuda.synchronize(self.device)
                    time.sleep(rest)
                for _ in range(_BACKLOG if rest > 0 else 1):
                    cold.amax()
                start.record()
                for _ in range(launches):
                    self.run(trial)
                end.record()
                events.append((start, end))
            for trial, (start, end) in zip(order, events, strict=True):
                end.synchronize()
                trial.samples.append(start.elapsed_time(end) * 1e-3 / launches)


@contextlib.contextmanager
def _apart(device: int) -> Iterator[None]:
    """Neither depends on the caller's modes nor changes its random numbers."""
    with (
        torch.no_grad(),
        torch.cuda.device(device),
        torch.autocast("cuda", enabled=False),
        torch.random.fork_rng(devices=[device]),
    ):
        yield


def sweep_kernels(problem: Any) -> Kernels | None:
    """The soonest kernels of the own product for a problem; None where there is nothing to tune.

    Those that would be taken untuned, unless others are clearly sooner.
    """
    rows, columns, tokens = problem.rows, problem.columns, problem.tokens
    wanted = _spmm_sm90.candidates(tokens, rows, columns, factor=_WITHIN, device=problem.device)
    if len(wanted) == 1 or 2 * rows * columns * tokens > _MOST_FLOP:
        return None
    usual, key = wanted[0], product_key_of(problem)
    with _apart(problem.device):
        job = _Sweep(variant(problem, bias=False, accumulate=False))
        tried = [job.native_trial(choice) for choice in wanted[:_MOST_KERNELS]]
        if tried[0] is None:
            warnings.warn(f"slope_ext: the own product errs: {key}; please report it", stacklevel=2)
            return None
        trials = {trial.algorithm: trial for trial in tried if trial is not None}

        def time_them(choices: list[Choice], how: _Round) -> Times:
            return _time_kernels(job, [trials[choice] for choice in choices], how)

        best, times = _elected(list(trials), time_them)
    return Kernels(
        **key._asdict(),
        kernels=() if best == usual else _kernels_of(best, rows),
        seconds=statistics.geometric_mean(times[best]),
        usual_seconds=statistics.geometric_mean(times[usual]),
    )


def _time_kernels(job: _Sweep, trials: list[_Trial], how: _Round) -> Times:
    """Seconds of a launch on a rested GPU and, of large operands, in rows."""

    def anew(turns: int, **options: Any) -> dict[Choice, float]:
        for trial in trials:
            trial.samples.clear()
        job.time(trials, turns, **options)
        return {trial.algorithm: trial.seconds for trial in trials}

    rested = anew(how.turns, launches=1, rest=_REST_SECONDS)
    if job.launches == 1:
        return {choice: (seconds,) for choice, seconds in rested.items()}
    turns = int(how.seconds / (job.launches * sum(rested.values())))
    in_rows = anew(min(max(turns, _FEWEST_TURNS), how.turns))
    return {choice: (seconds, in_rows[choice]) for choice, seconds in rested.items()}


def _elected(
    choices: list[Choice], time_them: Callable[[list[Choice], _Round], Times]
) -> tuple[Choice, Times]:
    """The kernels to take, and the times by which they are taken.

    Args:
        choices: the first is what is taken untuned.
        time_them: times some choices, as a round says.
    """
    usual = choices[0]
    times = time_them(choices, _LIKELY)
    likely = _sooner(times, usual, _LIKELY)[:_MOST_AGAIN]
    if not likely:
        return usual, times
    times = time_them([usual, *likely], _AGAIN)
    return next(iter(_sooner(times, usual, _AGAIN)), usual), times


def _sooner(times: Times, usual: Choice, after: _Round) -> list[Choice]:
    """Those that a round leaves, the soonest first: by the geometric mean of a choice's times."""

    def mean(choice: Choice) -> float:
        return statistics.geometric_mean(times[choice])

    def is_left(choice: Choice) -> bool:
        pairs = zip(times[choice], times[usual], strict=True)
        is_late = any(time > after.later * untuned for time, untuned in pairs)
        return not is_late and mean(choice) <= after.sooner * mean(usual)

    return sorted(filter(is_left, times), key=mean)


def _kernels_of(choice: Choice, rows: int) -> Parts:
    """As the table has them."""
    if choice.first_rows == 0:
        return ((rows, *TILES[choice.tile]),)
    first = (choice.first_rows, *TILES[choice.tile])
    return (first, (rows - choice.first_rows, *TILES[choice.rest_tile]))


def sweep(problem: Any, *, native: bool = False) -> Sweep:
    """Times every algorithm for a problem of the plan cache; ``native``: the own product too."""
    with _apart(problem.device):
        plain = variant(problem, bias=False, accumulate=False)
        tried, seconds, native_seconds = _time_all(plain, native)
        right = _verified(plain, seconds)
    candidates = [
        Candidate(
            algorithm=algorithm.id,
            split_k=algorithm.split_k,
            split_k_mode=algorithm.split_k_mode,
            seconds=right.get(algorithm, float("inf")),
            ok=algorithm in right,
        )
        for algorithm in tried
    ]
    by_time = sorted(candidates, key=lambda candidate: candidate.seconds)
    return Sweep(by_time, native_seconds)


def _time_all(problem: Any, native: bool) -> tuple[list[Any], dict[Any, float], float | None]:
    """What was tried, the times of those that are right, and the own product's."""
    count = _C.SpmmPlan(problem, _C.SpmmAlgorithm()).algorithm_count
    ids = algorithm_ids(problem.bfloat16, problem.device, count)
    job = _Sweep(problem)
    tried = [_C.SpmmAlgorithm(i) for i in ids]
    trials = _timed(job, tried)
    if problem.rows * problem.tokens <= _SPLIT_OUTPUTS and len(ids) > 1:
        segments = torch.cuda.get_device_capability(problem.device)[0] == 9
        best = sorted(_near(trials), key=lambda trial: trial.seconds)[:2]
        splits = _SEGMENTS if segments else _SPLITS
        wanted = [_C.SpmmAlgorithm(t.algorithm.id, *split) for t in best for split in splits]
        trials += _timed(job, wanted)
        tried += wanted
    own = job.native_trial() if native else None
    if trials:
        fastest = min(trial.seconds for trial in _near(trials))
        close = [trial for trial in _near(trials) if trial.seconds <= _DROP * fastest]
        seconds = sum(job.launches * trial.seconds + 1e-4 for trial in close)
        turns = int(_SECONDS / seconds)
        close += [] if own is None else [own]
        job.time(close, min(max(turns, _FEWEST_TURNS), _MORE_TURNS))
    native_seconds = own.seconds if own is not None and trials else float("inf")
    times = {trial.algorithm: trial.seconds for trial in trials}
    return tried, times, native_seconds if native else None


def _timed(job: _Sweep, algorithms: list[Any]) -> list[_Trial]:
    """Trials of the algorithms that are right; a launch of each tells which are worth a row."""
    trials = [trial for algorithm in algorithms if (trial := job.trial(algorithm)) is not None]
    if job.launches > 1 and trials:
        job.time(trials, turns=1, launches=1)
        fastest = min(trial.seconds for trial in trials)
        for trial in trials:
            trial.far = trial.seconds > _DROP_AT_ONCE * fastest
            if not trial.far:
                trial.samples.clear()
    turns = 1 if job.launches > 1 else _FIRST_TURNS
    job.time(_near(trials), turns)
    return trials


def _near(trials: list[_Trial]) -> list[_Trial]:
    return [trial for trial in trials if not trial.far]


def _verified(problem: Any, seconds: dict[Any, float]) -> dict[Any, float]:
    """``seconds`` without those that are faster than the first which is right in every use."""
    largest = bucket(problem.tokens)
    jobs = [
        _Sweep(variant(problem, tokens=largest, bias=True)),
        _Sweep(variant(problem, tokens=max(8, largest // 2), accumulate=True)),
    ]
    by_time = sorted(seconds, key=lambda algorithm: seconds[algorithm])
    while by_time and not all(job.trial(by_time[0]) for job in jobs):
        by_time = by_time[1:]
    return {algorithm: seconds[algorithm] for algorithm in by_time}


def _random_mask(rows: int, columns: int, device: torch.device) -> Tensor:
    nibbles = torch.tensor([3, 5, 6, 9, 10, 12], dtype=torch.uint8, device=device)
    low, high = torch.randint(6, (2, rows, columns // 8), device=device)
    return nibbles[low] | nibbles[high] << 4
