# SPDX-License-Identifier: Apache-2.0
"""The table of tuned products: what is in it, its file, and looking up.

The file is JSON: {"format": 3, "environments": {environment: [line, ...]}}. A line is an Entry, of
plans, or Kernels, of the own product; format 1 had entries alone, 2 none that say by which kernels
the own product was made. Its environment names what its times depend on: capability, GPU, driver
and cuSPARSELt; of Kernels, capability, GPU, its multiprocessors and KERNELS. (Of two such GPUs one
may have room for fewer large clusters; Kernels that need more are refused there.) Writers merge
under a lock and replace the file in one step, so that readers need none. Only a writer puts a file
aside that is no table, and none touches one of a later format. Tables shipped with the package
(slope_ext/tuned/*.json) lie under the user's own.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import tempfile
import threading
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch

from slope_ext import _C, _library

FORMAT = 3
KERNELS = 2  # to be counted up where the own product's kernels or the model of their times change
SHIPPED = Path(__file__).with_name("tuned")

_CLEARLY = 0.98  # plan over own product
# What reading anything else may raise
_NOT_A_TABLE = (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError)
# Kernels that share a product, of each rows of W, then rows, tokens, cluster, segments of its tile
Parts: TypeAlias = tuple[tuple[int, ...], ...]

_lock = threading.Lock()
_tables: dict[int, Table] = {}  # by CUDA ordinal


@dataclass(frozen=True)
class Candidate:
    """An algorithm of a sweep: cuSPARSELt's id, split of K, time, and whether it was right."""

    algorithm: int
    split_k: int
    split_k_mode: int
    seconds: float
    ok: bool


class Sweep(NamedTuple):
    """What a sweep found: cuSPARSELt's algorithms, right ones first, fastest first; and the seconds
    of the own product, None where it was not tried, infinity if it was wrong."""

    candidates: list[Candidate]
    native_seconds: float | None


class Key(NamedTuple):
    """What shares an entry: tokens up to the next power of two, with or without bias."""

    rows: int
    columns: int
    tokens: int
    dtype: str

    def __str__(self) -> str:
        return f"weight {self.rows}x{self.columns}, {self.tokens} tokens, {self.dtype}"


@dataclass(frozen=True)
class Entry:
    """The fastest right algorithm of a sweep, and the own product beside it; times in seconds.

    The own product's is of ``native_tokens`` tokens (0: ``tokens``), by ``native_kernels`` (none:
    as untuned) of those that KERNELS counted as ``native_version``.
    """

    rows: int
    columns: int
    tokens: int
    dtype: str
    id: int
    split_k: int
    split_k_mode: int
    seconds: float
    default_seconds: float
    native_seconds: float | None = None
    native_tokens: int = 0
    native_kernels: Parts = ()
    native_version: int = 1

    def __post_init__(self) -> None:
        times = (self.seconds, 1.0 if self.native_seconds is None else self.native_seconds)
        object.__setattr__(self, "native_kernels", _tuples(self.native_kernels))
        own = (self.native_tokens, self.native_version)
        _require_line(self, (self.id, self.split_k, self.split_k_mode, *own), times)
        _require_kernels(self, self.native_kernels)
        if type(self.default_seconds) not in (int, float):
            raise TypeError(f"times must be numbers, got {self}")
        if self.native_tokens % 8 != 0:
            raise ValueError(f"native_tokens must be a multiple of 8, got {self}")
        if self.native_tokens != 0 and bucket(self.native_tokens) != self.tokens:
            raise ValueError(f"native_tokens must share the entry, got {self}")

    @property
    def key(self) -> Key:
        return Key(self.rows, self.columns, self.tokens, self.dtype)

    @property
    def native_key(self) -> Key:
        """Of the Kernels that the own product was to be made by when it was timed."""
        return self.key._replace(tokens=self.native_tokens or self.tokens)

    @property
    def compares(self) -> bool:
        """Whether it has a time of the own product too, by kernels of today's version."""
        return self.native_seconds is not None and self.native_version == KERNELS

    def algorithm(self) -> Any:
        """As the plan cache takes it."""
        return _C.SpmmAlgorithm(self.id, self.split_k, self.split_k_mode)


@dataclass(frozen=True)
class Kernels:
    """What makes a product of the own soonest, of what was tried.

    ``tokens`` is a multiple of 8; the product of as many, or of up to 7 fewer, is made so.
    ``kernels`` are one, or two that share the rows of W: its number of rows, then the rows, tokens,
    cluster and segments of its tile; none where what is taken untuned is the soonest. Times in
    seconds, theirs and of what is taken untuned: of a launch on a rested GPU or, where the operands
    exceed the L2 cache twice, the geometric mean of that and of one in rows of them (in lines made
    before those of two rounds: of one in rows).
    """

    rows: int
    columns: int
    tokens: int
    dtype: str
    kernels: Parts
    seconds: float
    usual_seconds: float

    def __post_init__(self) -> None:
        kernels = _tuples(self.kernels)
        object.__setattr__(self, "kernels", kernels)
        _require_line(self, (), (self.seconds, self.usual_seconds))
        _require_kernels(self, kernels)
        if self.rows % 8 != 0 or self.columns % 32 != 0 or self.tokens % 8 != 0:
            raise ValueError(f"the own product is not tuned for such sizes, got {self}")
        if self.dtype not in ("bfloat16", "float16"):
            raise ValueError(f"the own product takes no such dtype, got {self}")

    @property
    def key(self) -> Key:
        return Key(self.rows, self.columns, self.tokens, self.dtype)

    def choice(self) -> tuple[int, int, int] | None:
        """tile, first_rows, rest_tile as the op library takes them; None: it has no such tile, or
        the first kernel's rows are no whole clusters of them."""
        tiles = [kernel[1:] for kernel in self.kernels]
        if not tiles:
            return (-1, 0, 0)
        if not all(tile in _C.SPMM_SM90_TILES for tile in tiles):
            return None
        first, *rest = map(_C.SPMM_SM90_TILES.index, tiles)
        if not rest:
            return (first, 0, 0)
        first_rows, tile_rows, _, cluster, _ = self.kernels[0]
        return (first, first_rows, rest[0]) if first_rows % (tile_rows * cluster) == 0 else None


Line: TypeAlias = Entry | Kernels


def _tuples(kernels: Iterable[Iterable[int]]) -> Parts:
    """Tuples, of which JSON makes lists."""
    return tuple(tuple(kernel) for kernel in kernels)


def _require_line(line: Line, integers: tuple[int, ...], seconds: tuple[float, ...]) -> None:
    """Raises TypeError or ValueError for what no line holds: these beside its key."""
    integers = (*line.key[:3], *integers)
    if not all(type(value) is int for value in integers) or type(line.dtype) is not str:
        raise TypeError(f"lines hold integers and the name of a dtype, got {line}")
    if not all(type(time) in (int, float) for time in seconds):
        raise TypeError(f"times must be numbers, got {line}")
    if not all(0 < size < 2**31 for size in line.key[:3]):
        raise ValueError(f"sizes must be in [1, 2^31), got {line}")
    if not all(-(2**31) <= value < 2**31 for value in integers):
        raise ValueError(f"integers must be of 32 bits, got {line}")
    if not all(float(time) > 0 for time in seconds):
        raise ValueError(f"times must be above 0 s, got {line}")


def _require_kernels(line: Line, kernels: Parts) -> None:
    """Raises TypeError or ValueError for what are no kernels that make the product of a line."""
    if not all(type(number) is int for kernel in kernels for number in kernel):
        raise TypeError(f"kernels are integers, got {line}")
    if not all(len(kernel) == 5 and min(kernel) > 0 for kernel in kernels):
        raise ValueError(f"a kernel is five numbers above 0, got {line}")
    if kernels and (len(kernels) > 2 or sum(kernel[0] for kernel in kernels) != line.rows):
        raise ValueError(f"kernels must be one or two that share the rows, got {line}")


def bucket(tokens: int) -> int:
    """The largest token count that shares an entry with ``tokens``: the next power of two."""
    return 1 << max(3, math.ceil(math.log2(tokens)))


def key_of(problem: Any) -> Key:
    """The key that a problem of the plan cache falls under."""
    dtype = "bfloat16" if problem.bfloat16 else "float16"
    return Key(problem.rows, problem.columns, bucket(problem.tokens), dtype)


def product_key_of(problem: Any) -> Key:
    """The key of Kernels: of this product alone."""
    return key_of(problem)._replace(tokens=problem.tokens)


def entry_of(problem: Any, found: Sweep, kernels: Parts = ()) -> Entry | None:
    """The entry that a sweep's result makes, with the own product made by those kernels; None if no
    algorithm was right."""
    right = [candidate for candidate in found.candidates if candidate.ok]
    if not right:
        return None
    best = min(right, key=lambda candidate: candidate.seconds)
    default = [c.seconds for c in right if (c.algorithm, c.split_k) == (0, 1)]
    return Entry(
        **key_of(problem)._asdict(),
        id=best.algorithm,
        split_k=best.split_k,
        split_k_mode=best.split_k_mode,
        seconds=best.seconds,
        default_seconds=default[0] if default else math.nan,
        native_seconds=found.native_seconds,
        native_tokens=problem.tokens,
        native_kernels=kernels,
        native_version=KERNELS,
    )


def environment_of(device: int) -> str:
    """Names the GPU, driver and library that the entries of a device hold for."""
    major, minor = torch.cuda.get_device_capability(device)
    try:
        library = ".".join(map(str, _C.cusparselt_version()))
    except RuntimeError:  # there is none
        library = "-"
    name = torch.cuda.get_device_name(device)
    return f"sm_{major}{minor} | cuSPARSELt {library} | {name} | driver {_C.driver_version()}"


def gpu_of(device: int) -> str:
    """Names what kernels of the own product hold for. MPS may leave a process fewer processors."""
    major, minor = torch.cuda.get_device_capability(device)
    name = torch.cuda.get_device_name(device)
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return f"sm_{major}{minor} | {name} | {processors} multiprocessors | kernels {KERNELS}"


class Table:
    """What holds for a device: the entries of its environment, and those of its relatives (same
    capability and library); the kernels of its GPU."""

    def __init__(
        self, environment: str, gpu: str, by_environment: Mapping[str, Iterable[Line]]
    ) -> None:
        self.environment, self.gpu = environment, gpu
        family = environment.split(" | ")[:2]
        entries = {
            name: [line for line in lines if isinstance(line, Entry)]
            for name, lines in by_environment.items()
            if name.split(" | ")[:2] == family
        }
        own = entries.get(environment, [])
        related = [entry for found in entries.values() for entry in found]
        self._own = {entry.key: entry for entry in own}
        self._related = {entry.key: entry for entry in related}
        # What is of this environment comes last and stays
        self._comparing = {entry.key: entry for entry in (*related, *own) if entry.compares}
        self._kernels = {
            line.key: line for line in by_environment.get(gpu, ()) if isinstance(line, Kernels)
        }

    def add(self, line: Line) -> None:
        if isinstance(line, Kernels):
            self._kernels[line.key] = line
            return
        self._own[line.key] = self._related[line.key] = line
        if line.compares:
            self._comparing[line.key] = line

    def environment_for(self, line: Line) -> str:
        return self.gpu if isinstance(line, Kernels) else self.environment

    def kernels(self) -> list[Kernels]:
        return list(self._kernels.values())

    def kernels_of(self, key: Key) -> Kernels | None:
        return self._kernels.get(key)

    def kernels_in_use(self, key: Key) -> Parts:
        """As Kernels have them; () where nothing is tuned."""
        known = self.kernels_of(key)
        return () if known is None else known.kernels

    def is_outdated(self, entry: Entry) -> bool:
        """Whether the own product was made by other kernels when it was timed for an entry."""
        timed = (entry.native_version, entry.native_kernels)
        return timed != (KERNELS, self.kernels_in_use(entry.native_key))

    def drop(self, kernels: Kernels) -> None:
        del self._kernels[kernels.key]

    def entries(self) -> list[Entry]:
        return list(self._own.values())

    def exact(self, key: Key) -> Entry | None:
        return self._own.get(key)

    def nearest(self, key: Key) -> Entry | None:
        """The entry of the shape that is least far away, in factors of rows, columns and tokens.

        Only within a factor of 8 in each: an algorithm is known to be right near where it was
        checked. Splits of K are for the shape that they were tuned for, so they are not taken over.
        """
        if key in self._related:
            return self._related[key]
        near = [
            entry
            for entry in self._related.values()
            if entry.dtype == key.dtype and entry.split_k == 1 and max(_steps(entry.key, key)) <= 3
        ]
        return min(near, key=lambda entry: sum(_steps(entry.key, key)), default=None)

    def prefers_plans(self, rows: int, columns: int, dtype: str) -> bool:
        """Whether a weight is multiplied clearly faster by plans than by the own product.

        In the geometric mean over the token counts that the table has times of both for, by more
        than 2 %: the best of twenty medians is low by chance.
        """
        ratios = [
            entry.seconds / entry.native_seconds
            for key, entry in list(self._comparing.items())
            if (key.rows, key.columns, key.dtype) == (rows, columns, dtype)
            and entry.native_seconds is not None
        ]
        return bool(ratios) and math.prod(ratios) < _CLEARLY ** len(ratios)


def of_device(device: int) -> Table:
    """The table that holds for a CUDA device, read when first asked for.

    The op library asks before its own product's first there, and goes by the kernels in it.
    """
    with _lock:
        if device not in _tables:
            table = Table(environment_of(device), gpu_of(device), load_all(user_path()))
            for kernels in table.kernels():
                if not _tell(device, kernels):
                    table.drop(kernels)
            _tables[device] = table
        return _tables[device]


def add(device: int, line: Line) -> Table:
    """Adds a line to the table of a device, which is returned; kernels take effect."""
    table = of_device(device)
    with _lock:
        if not isinstance(line, Kernels) or _tell(device, line):
            table.add(line)
    return table


def _tell(device: int, kernels: Kernels) -> bool:
    """Has the op library make that product so from now on; False: it lacks a tile, or room."""
    choice = kernels.choice()
    if choice is None or not _C.native_runs(device):
        return False
    sizes = {"tokens": kernels.tokens, "rows": kernels.rows, "columns": kernels.columns}
    bfloat16 = kernels.dtype == "bfloat16"
    with torch.cuda.device(device):
        return _C.native_tuned(device=device, bfloat16=bfloat16, choice=choice, **sizes)


def forget() -> None:
    """Reads the tables from their files again, when next asked."""
    with _lock:
        _tables.clear()
        if _library.CUDA_KERNELS:
            _C.native_forget()


if _library.CUDA_KERNELS:
    _C.native_set_loader(of_device)


def _steps(a: Key, b: Key) -> list[float]:
    """Factors of two between rows, columns and tokens."""
    pairs = ((a.rows, b.rows), (a.columns, b.columns), (a.tokens, b.tokens))
    return [abs(math.log2(x / y)) for x, y in pairs]


# ---- file ----------------------------------------------------------------------------------------


def user_path() -> Path:
    """The file that the user's table persists in."""
    if folder := os.environ.get("SLOPE_EXT_CACHE_DIR"):
        return Path(folder) / "tuned.json"
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if cache.startswith("~"):  # no home; nothing is read or kept then
        cache = os.devnull
    return Path(cache) / "slope_ext" / "tuned.json"


def load_all(path: Path) -> dict[str, list[Line]]:
    """The shipped tables with the user's laid over them."""
    merged: dict[str, list[Line]] = {}
    for source in (*sorted(SHIPPED.glob("*.json")), path):
        _merge(merged, load(source))
    return merged


def _line_of(line: dict[str, Any]) -> Line:
    return Kernels(**line) if "kernels" in line else Entry(**line)


class LaterFormatError(ValueError):
    """A table that a later version of the package wrote."""


def read(path: Path) -> dict[str, list[Line]]:
    """Reads a table.

    Raises:
        OSError, ValueError: there is none, or it is no table; LaterFormatError: not one of today's.
    """
    try:
        content = json.loads(path.read_text())
        found = content["format"]
        if found in (1, 2, FORMAT):
            return {
                environment: [_line_of(line) for line in lines]
                for environment, lines in content["environments"].items()
            }
    except _NOT_A_TABLE as error:
        raise ValueError(f"{path} is no table of slope_ext: {error}") from error
    if isinstance(found, int) and found > FORMAT:
        raise LaterFormatError(f"{path} is of a later version of slope_ext: format {found}")
    raise ValueError(f"{path} is no table of slope_ext: format {found}, not {FORMAT}")


def load(path: Path) -> dict[str, list[Line]]:
    """Reads a table; {} where there is none, and with a warning where it cannot be read."""
    try:
        return read(path)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        warnings.warn(f"slope_ext: no tuned algorithms are read: {error}", stacklevel=2)
        return {}


def merge_into(path: Path, added: Mapping[str, Iterable[Line]], *, put_aside: bool = False) -> None:
    """Lays lines, by environment, over those of the file at ``path``, under a lock.

    ``put_aside`` renames a file that is no table, with a warning, and starts a new one.

    Raises:
        OSError, ValueError: it cannot be written; or it is no table and stays as it is.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f"{path.name}.lock"), "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        merged: dict[str, list[Line]] = {}
        try:
            merged = read(path)
        except FileNotFoundError:
            pass
        except ValueError as error:
            if not put_aside or isinstance(error, LaterFormatError):
                raise
            aside = path.with_suffix(".corrupt")
            warnings.warn(f"slope_ext: {error}; moved to {aside}", stacklevel=3)
            os.replace(path, aside)
        _merge(merged, added)
        content = {
            "format": FORMAT,
            "environments": {
                name: [asdict(line) for line in found] for name, found in merged.items()
            },
        }
        text = json.dumps(content, indent=1) + "\n"
        _replace(path, text, os.fstat(lock.fileno()).st_mode & 0o777)


def _replace(path: Path, text: str, mode: int) -> None:
    """Writes a file in one step: all of it, or nothing."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=path.name, delete=False) as new:
        try:
            new.write(text)
            os.fchmod(new.fileno(), mode)
            new.close()
            os.replace(new.name, path)
        except BaseException:
            os.unlink(new.name)
            raise


def save(path: Path, added: Mapping[str, Iterable[Line]]) -> None:
    """merge_into for the user's own table, where what cannot be done is a warning."""
    try:
        if added:
            merge_into(path, added, put_aside=True)
    except (OSError, LaterFormatError) as error:
        warnings.warn(f"slope_ext: tuned algorithms are not kept: {error}", stacklevel=2)


def _merge(tables: dict[str, list[Line]], added: Mapping[str, Iterable[Line]]) -> None:
    """Lays ``added`` over ``tables``, in place; times of today's own product stay till new ones."""
    for environment, lines in added.items():
        by_key = {line.key: line for line in tables.get(environment, ())}
        for line in lines:
            known = by_key.get(line.key)
            if isinstance(line, Entry) and isinstance(known, Entry):
                line = _with_native(line, known)
            by_key[line.key] = line
        tables[environment] = list(by_key.values())


def _with_native(new: Entry, known: Entry) -> Entry:
    """A new entry with the known one's time of today's own product, if it has none itself and its
    times are of as many tokens."""
    if new.compares or not known.compares or new.native_key != known.native_key:
        return new
    return replace(
        new,
        native_seconds=known.native_seconds,
        native_kernels=known.native_kernels,
        native_version=known.native_version,
    )
