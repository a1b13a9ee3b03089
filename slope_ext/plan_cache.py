# SPDX-License-Identifier: Apache-2.0
"""How sparse products on CUDA run: the plans of cuSPARSELt, and what was tuned.

A plan is made in the first call of a shape and kept (:func:`info`, :func:`entries`,
:func:`set_capacity`, :func:`clear`). cuSPARSELt offers some twenty algorithms for a shape, up to
twice as fast as each other; which is best depends on the shape, the number of tokens and the GPU.
A sweep by hand, each algorithm checked before it may win, fills a table that persists. On Hopper
:func:`tune` times the own product beside them, and layers of ``backend="auto"`` go by the result.

The own product has a kernel for each of several tiles, and may share the rows of a weight between
two of them. A model of times chooses; :func:`tune` times what it holds for about as fast, and the
table keeps the soonest for each weight and token count (:func:`tuned_kernels`).

==================  ================================================================================
``"on_first_use"``  sweep in the first call of a shape that the table lacks (the default)
``"ahead"``         sweep in :func:`tune` only; a call that finds no entry warns once
``"off"``           never sweep
==================  ================================================================================

Without an entry a call takes the algorithm of the nearest shape in the table, else the library's
default. Nothing is swept while a CUDA graph is captured or under
``torch.use_deterministic_algorithms``. Environment: ``SLOPE_EXT_AUTOTUNE`` sets
the policy, ``SLOPE_EXT_CACHE_DIR`` the folder of the table (default ``~/.cache/slope_ext``).
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import nn

from slope_ext import _C, _library, _packed, _streams, _tuned_table, _tuner
from slope_ext._tuned_table import Candidate, Entry, Kernels, Key
from slope_ext.linear import SLoPeLinear

__all__ = [
    "Candidate",
    "Kernels",
    "clear",
    "entries",
    "export_table",
    "forget_tables",
    "import_table",
    "info",
    "policy",
    "set_capacity",
    "set_policy",
    "sweep",
    "table_path",
    "tune",
    "tuned",
    "tuned_kernels",
]

_Line = TypeVar("_Line", Entry, Kernels)
Policy = Literal["on_first_use", "ahead", "off"]

_lock = threading.RLock()
_warned: set[Key] = set()


def _checked_policy(name: str, value: str) -> Policy:
    if value not in get_args(Policy):
        raise ValueError(f"{name} must be one of {', '.join(get_args(Policy))}, got {value!r}")
    return value  # type: ignore[return-value]


_policy = _checked_policy(
    "SLOPE_EXT_AUTOTUNE", os.environ.get("SLOPE_EXT_AUTOTUNE", "on_first_use")
)


def policy() -> Policy:
    """When algorithms are swept; see the module."""
    return _policy


def set_policy(value: Policy) -> None:
    """Sets when algorithms are swept; plans that exist stay as they are.

    Raises:
        ValueError: no such policy.
    """
    global _policy
    _policy = _checked_policy("set_policy: value", value)


# ---- plans ---------------------------------------------------------------------------------------


def info() -> dict[str, int]:
    """Counts over all threads and devices: plans, hits, misses, evictions; and the capacity.

    The capacity is of each thread and device: a plan never serves two of them.
    """
    if not _has_plans():
        return dict.fromkeys(("plans", "capacity", "hits", "misses", "evictions"), 0)
    return _C.plan_cache_info()


def entries() -> list[dict[str, Any]]:
    """Every plan, as a dict: device, rows, columns, tokens, dtype, bias, accumulate, algorithm,
    split_k, split_k_mode, workspace_bytes."""
    if not _has_plans():
        return []
    return [
        {
            "device": problem.device,
            "rows": problem.rows,
            "columns": problem.columns,
            "tokens": problem.tokens,
            "dtype": torch.bfloat16 if problem.bfloat16 else torch.float16,
            "bias": problem.bias,
            "accumulate": problem.accumulate,
            "algorithm": algorithm.id,
            "split_k": algorithm.split_k,
            "split_k_mode": algorithm.split_k_mode,
            "workspace_bytes": workspace_bytes,
        }
        for problem, algorithm, workspace_bytes in _C.plan_cache_entries()
    ]


def set_capacity(plans: int) -> None:
    """Sets how many plans a thread keeps for a device (1024); those used longest ago go first.

    Raises:
        ValueError: fewer than 1.
    """
    if plans < 1:
        raise ValueError(f"set_capacity: plans must be at least 1, got {plans}")
    if _has_plans():
        _C.plan_cache_set_capacity(plans)


def clear() -> None:
    """Forgets every plan; the next calls make them again, by the table as it is then."""
    if _has_plans():
        _C.plan_cache_clear()


# ---- tuning --------------------------------------------------------------------------------------


def tune(
    model: nn.Module, tokens: int | Iterable[int], *, backward: bool = True, again: bool = False
) -> list[Entry]:
    """Sweeps the algorithms of every 2:4 layer of ``model`` ahead of use, and keeps the best.

    The own product's kernels are tuned first, of ``backend="native"`` and "auto": from then on it
    is made by those that were soonest for a weight and exactly so many tokens (up to the next
    multiple of 8), with an adapter, bias and activation too.

    For layers of ``backend="auto"`` whose weights the own product takes too it is then timed beside
    the plans, and again where it has other kernels than at that time. Such a layer runs by plans if
    they are the faster for its weight, by more than 2 % in the geometric mean over the token counts
    in the table; and so do layers made afterwards, here or by other processes. Layers that have an
    activation or an adapter by then keep to the own product, which has these in its kernel, and so
    do backward copies that are recomputed. Values may move: tune before capturing CUDA graphs and
    before making copies whose buffers are paired with the model's (``AveragedModel``). Each fp16
    sweep, of a shape and a bucket of token counts, takes some seconds on Hopper and leaves 0.3 GB
    of host memory behind (cuSPARSELt 0.8). With several processes tune in one, and
    :func:`import_table` in all before they make the model. What FSDP shards it cannot move, and
    plans then pack in every call: do not tune for such models.

    Args:
        model: a layer or a model with layers on CUDA; other layers, and those of backend
            "reference", are passed over.
        tokens: token counts (product of the leading dimensions of the input) to tune for. Counts
            share an entry, but not the own product's kernels, up to the next power of two.
        backward: tune the input gradient too.
        again: sweep even where the table has an entry.

    Returns:
        The entries of plans that were added.

    Raises:
        ValueError: a token count is below 1.
        RuntimeError: a CUDA graph is being captured.
    """
    _refuse_capture("tune")
    added = []
    counts = [tokens] if isinstance(tokens, int) else list(tokens)
    for problem in _own_problems(model, counts, backward):
        table = _tuned_table.of_device(problem.device)
        if again or table.kernels_of(_tuned_table.product_key_of(problem)) is None:
            _kernels_into_table(problem)
    for problem, native in _problems(model, counts, backward):
        table = _tuned_table.of_device(problem.device)
        known = table.exact(_tuned_table.key_of(problem))
        if again or known is None or (native and known.native_seconds is None):
            wanted = problem
        elif native and table.is_outdated(known):
            wanted = _tuner.variant(problem, tokens=known.native_key.tokens)
        else:
            continue
        entry = _sweep_into_table(wanted, native)
        if entry is not None:
            added.append(entry)
    clear()
    for layer in _layers(model):
        layer.choose_product()
    return added


def sweep(layer: nn.Module, tokens: int) -> list[Candidate]:
    """Times every algorithm for one 2:4 layer's forward product; the fastest right one first.

    Operands are random, of the layer's shape and dtype. Nothing is kept. Of long products the times
    of algorithms that are far behind are of one launch each, those of others of launches in rows.

    Raises:
        ValueError: ``layer`` is no 2:4 layer that plans take.
        RuntimeError: a CUDA graph is being captured.
    """
    _refuse_capture("sweep")
    problems = _problems(layer, [tokens], backward=False)
    if len(problems) != 1:
        raise ValueError("sweep: layer must be one SLoPeLinear on CUDA whose product plans take")
    return _tuner.sweep(problems[0][0]).candidates


def _refuse_capture(function: str) -> None:
    if _streams.current_is_capturing():
        raise RuntimeError(f"{function}: must not be called while a CUDA graph is captured")


def _products(
    model: nn.Module, tokens: Iterable[int], backward: bool
) -> Iterator[tuple[Any, bool, bool]]:
    """Problems of the layers, and for each whether plans make it and whether the own product does.

    Both where the layer is to choose.
    """
    counts = sorted(tokens)
    if counts and counts[0] < 1:
        raise ValueError(f"tune, sweep: tokens must be at least 1, got {counts[0]}")
    for layer in _layers(model):
        weight, backend = layer.weight, layer.backend
        shapes = [(layer.out_features, layer.in_features)]
        if backward:
            shapes.append((layer.in_features, layer.out_features))
        for rows, columns in shapes:
            place = (weight.dtype, weight.device)
            native = _packed.backend_of(rows, columns, *place, backend) == "native"
            takes_plans = backend in ("auto", "cusparselt")
            by_plans = takes_plans and _packed.is_packable(rows, columns, *place)
            for count in counts if native or by_plans else ():
                problem = _C.SpmmProblem(
                    rows=rows,
                    columns=columns,
                    tokens=-(-count // 8) * 8,
                    device=weight.device.index,
                    bfloat16=weight.dtype == torch.bfloat16,
                )
                yield problem, by_plans, native


def _problems(model: nn.Module, tokens: Iterable[int], backward: bool) -> list[tuple[Any, bool]]:
    """What plans take of the layers, and whether one of them may choose the own product instead."""
    found: dict[Any, tuple[Any, bool]] = {}
    for problem, by_plans, native in _products(model, tokens, backward):
        if by_plans:
            key = (problem.device, _tuned_table.key_of(problem))
            known_to_choose = key in found and found[key][1]
            # The largest count of those that share an entry comes last and stays
            found[key] = (problem, native or known_to_choose)
    return list(found.values())


def _own_problems(model: nn.Module, tokens: Iterable[int], backward: bool) -> list[Any]:
    """What the own product takes of the layers."""
    found = {
        (problem.device, _tuned_table.product_key_of(problem)): problem
        for problem, _, native in _products(model, tokens, backward)
        if native
    }
    return list(found.values())


def _layers(model: nn.Module) -> list[SLoPeLinear]:
    """The 2:4 layers on CUDA."""
    modules = model.modules()
    return [m for m in modules if isinstance(m, SLoPeLinear) and m.weight.is_cuda]


def _sweep_into_table(problem: Any, native: bool) -> Entry | None:
    def find() -> Entry | None:
        table = _tuned_table.of_device(problem.device)
        kernels = table.kernels_in_use(_tuned_table.product_key_of(problem))
        return _tuned_table.entry_of(problem, _tuner.sweep(problem, native=native), kernels)

    return _into_table(problem.device, _tuned_table.key_of(problem), find)


def _kernels_into_table(problem: Any) -> None:
    key = _tuned_table.product_key_of(problem)
    _into_table(problem.device, key, lambda: _tuner.sweep_kernels(problem))


def _into_table(device: int, key: Key, find: Callable[[], _Line | None]) -> _Line | None:
    """Keeps what is found for a key, if it is; warns where there is no memory to find it."""
    try:
        line = find()
    except torch.OutOfMemoryError:
        warnings.warn(f"slope_ext: no memory to tune {key}; see plan_cache.tune", stacklevel=2)
        return None
    if line is not None:
        with _lock:
            table = _tuned_table.add(device, line)
            _tuned_table.save(table_path(), {table.environment_for(line): [line]})
    return line


def _choose(problem: Any, capturing: bool) -> Any:
    """What a new plan takes; called by the op library, on any thread."""
    with _lock:
        key = _tuned_table.key_of(problem)
        table = _tuned_table.of_device(problem.device)
        entry = table.exact(key)
        # A sweep's winner depends on timing.
        may_sweep = not capturing and not torch.are_deterministic_algorithms_enabled()
        if entry is None and _policy == "on_first_use" and may_sweep:
            entry = _sweep_into_table(problem, native=False)
        if entry is None and _policy == "ahead" and key not in _warned:
            _warned.add(key)
            warnings.warn(
                f"slope_ext: {key} is not tuned; plan_cache.tune(model, tokens) does it",
                stacklevel=2,
            )
        entry = entry or table.nearest(key)
        return _C.SpmmAlgorithm() if entry is None else entry.algorithm()


# ---- table ---------------------------------------------------------------------------------------


def table_path() -> Path:
    """The file that the table persists in."""
    return _tuned_table.user_path()


def tuned(device: int = 0) -> list[Entry]:
    """The entries that hold for a CUDA device."""
    with _lock:
        return _tuned_table.of_device(device).entries()


def tuned_kernels(device: int = 0) -> list[Kernels]:
    """The kernels of the own product that hold for a CUDA device, of each product tuned."""
    with _lock:
        return _tuned_table.of_device(device).kernels()


def export_table(path: str | Path) -> None:
    """Merges the table of every environment that this user ever tuned in into the file at ``path``.

    Raises:
        OSError, ValueError: the file cannot be written; it, or this user's own, is no table.
    """
    own = table_path()
    _tuned_table.merge_into(Path(path), _tuned_table.read(own) if own.exists() else {})


def import_table(path: str | Path) -> None:
    """Merges an exported table into this user's; entries there win. Plans are forgotten.

    Layers made afterwards choose between the own product and plans by it; those that exist stay,
    but the own product is made by its kernels from then on.

    Raises:
        OSError, ValueError: there is no such table, or it is not one; or this user's own cannot be
            written, or is not one.
    """
    found = _tuned_table.read(Path(path))
    with _lock:
        _tuned_table.merge_into(table_path(), found)
    forget_tables()


def forget_tables() -> None:
    """Reads the tables from their files again; plans are forgotten."""
    with _lock:
        _tuned_table.forget()
    clear()


def _has_plans() -> bool:
    return bool(_library.CUDA_KERNELS)


if _has_plans():
    _C.plan_cache_set_chooser(_choose)
