# SPDX-License-Identifier: Apache-2.0
"""Is a derived tensor still what its sources say?

The backward copy of a weight (``weight_t``, ``weight_t_bitmask``) is derived from the weight. A
derived tensor carries, on its storage, a stamp of the state that its sources had when it was
computed. A later look compares stamps:

* the address of the source's storage object, so that ``p.data = other`` is seen (the stamp keeps a
  weak reference, so that no other storage gets that address),
* its version counter, so that every in-place write is seen,
* for trained sources a count of optimizer steps, so that optimizers are seen which write through
  ``p.data`` (it has a version counter of its own), or to a tensor that ``p`` is then copied from.

Replays of a CUDA graph run no host code. So once a step of any optimizer was captured, what derives
from trained sources never counts as fresh again, in this process.

A trained source that is a view of a larger buffer (a flat parameter, say) is written through that
buffer's own version counter; what derives from it is never taken as fresh.

What torch itself cannot see needs ``SLoPeLinear.mark_backward_copy_stale()``: a write through
``.data`` after ``slope_ext.optim.AdamW`` stepped that very weight, or outside of any
``torch.optim.Optimizer``; and the replay of a graph that writes weights outside of one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook

from slope_ext import _streams

_ATTRIBUTE = "_slope_stamp"
_NEVER_EQUAL = object
_optimizer_steps = 0
_step_was_captured = False


# Not traced: torch.compile would guard on the count, and is not there when a step is captured.
@torch.compiler.disable  # type: ignore[misc]
def count_optimizer_step() -> None:
    """Makes everything that derives from trained tensors stale, for good in a captured step."""
    global _optimizer_steps, _step_was_captured
    _optimizer_steps += 1
    if _streams.current_is_capturing():
        _step_was_captured = True


def step_was_captured() -> bool:
    """Whether replays may change trained tensors."""
    return _step_was_captured


def _after_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    # An optimizer that keeps the backward copies itself counts before it stamps them.
    if not getattr(optimizer, "keeps_backward_copies", False):
        count_optimizer_step()


register_optimizer_step_post_hook(_after_step)


class _Stamp(NamedTuple):
    state: list[Any]
    held: list[StorageWeakRef]  # storages of the sources
    dtypes: tuple[torch.dtype, ...]  # of the sources


def _state(
    derived: Tensor,
    sources: tuple[Tensor, ...],
    storages: list[torch.UntypedStorage],
    trained: bool,
) -> list[Any]:
    state: list[Any] = [version(derived)]
    for source, storage in zip(sources, storages, strict=True):
        state += (storage._cdata, source.storage_offset(), version(source))
        if trained and source.is_floating_point():
            part_of_more = storage.nbytes() != source.numel() * source.element_size()
            unseen = part_of_more or _step_was_captured
            state.append(_NEVER_EQUAL() if unseen else _optimizer_steps)
    return state


def version(tensor: Tensor) -> Any:
    """Equal between two looks only if nothing wrote; inference tensors, which count none, never."""
    return _NEVER_EQUAL() if tensor.is_inference() else tensor._version


def mark_fresh(derived: Tensor, *sources: Tensor, trained: bool = True) -> None:
    """Records that ``derived`` was computed from the present state of ``sources``.

    ``trained``: of sources in floating point count optimizer steps too, which may write unseen.
    """
    storages = [source.untyped_storage() for source in sources]
    state = _state(derived, sources, storages, trained)
    held = list(map(StorageWeakRef, storages))
    stamp = _Stamp(state, held, tuple(source.dtype for source in sources))
    setattr(derived.untyped_storage(), _ATTRIBUTE, stamp)


def mark_stale(derived: Tensor) -> None:
    """Records that ``derived`` must be computed again before its next use."""
    setattr(derived.untyped_storage(), _ATTRIBUTE, None)


def is_fresh(derived: Tensor, *sources: Tensor, trained: bool = True) -> bool:
    """Whether neither ``sources`` nor ``derived`` changed since :func:`mark_fresh`."""
    stamp: _Stamp | None = getattr(derived.untyped_storage(), _ATTRIBUTE, None)
    storages = [source.untyped_storage() for source in sources]
    return stamp is not None and stamp.state == _state(derived, sources, storages, trained)


def marked_dtypes(derived: Tensor) -> tuple[torch.dtype, ...]:
    """Of the sources at the last :func:`mark_fresh`, fresh or not; () after :func:`mark_stale`."""
    stamp: _Stamp | None = getattr(derived.untyped_storage(), _ATTRIBUTE, None)
    return () if stamp is None else stamp.dtypes


def is_followed(derived: Tensor) -> bool:
    """Whether ``derived`` was ever marked: its owner wants it kept up to date."""
    return hasattr(derived.untyped_storage(), _ATTRIBUTE)
