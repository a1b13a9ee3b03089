# SPDX-License-Identifier: Apache-2.0
"""Is a derived tensor still what its sources say?

The backward copy of a weight (``weight_t``, ``weight_t_bitmask``) is derived from the weight. A
derived tensor carries, on its storage, a stamp of the state that its sources had when it was
computed. A later look compares stamps:

* the source's storage object, so that ``p.data = other`` is seen (the stamp keeps a weak reference,
  so the address of a freed storage cannot pass for it),
* its version counter, so that every in-place write is seen,
* for trained sources the last optimizer step, so that optimizers are seen which write through
  ``p.data`` (it has a version counter of its own), or to a tensor that ``p`` is then copied from.

What graphs write (copies that a captured backward pass refreshes, weights that a captured optimizer
step updates) changes without host code, so it never counts as fresh again.

A trained source that is a view of a larger buffer (a flat parameter, say) is written through that
buffer's own version counter; what derives from it is never taken as fresh.

What torch itself cannot see needs ``SLoPeLinear.mark_backward_copy_stale()``: a write through
``.data`` after ``slope_ext.optim.AdamW`` stepped that very weight, or outside of any
``torch.optim.Optimizer``.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook

Stamp = tuple[Any, ...]

_ATTRIBUTE = "_slope_stamp"
_GRAPHS = "_slope_written_by_graphs"
_NEVER_EQUAL = object
_last_step = object()  # another for each optimizer step: on a count torch.compile would guard


def mark_optimizer_step() -> None:
    """Makes everything that derives from trained tensors stale."""
    global _last_step
    _last_step = object()


def _after_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    # An optimizer that keeps the backward copies itself does that before it stamps them.
    if not getattr(optimizer, "keeps_backward_copies", False):
        mark_optimizer_step()
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        for param in itertools.chain.from_iterable(g["params"] for g in optimizer.param_groups):
            if param.grad is not None:
                mark_written_by_graphs(param)


# Untraced: a compiled optimizer may be captured, too
register_optimizer_step_post_hook(torch.compiler.disable(_after_step))


def _stamp(derived: Tensor, sources: tuple[Tensor, ...]) -> Stamp:
    state: list[Any] = [_writes(derived)]
    for source in sources:
        storage = source.untyped_storage()
        state += [StorageWeakRef(storage), source.storage_offset(), _writes(source)]
        if source.is_floating_point():
            part_of_more = storage.nbytes() != source.numel() * source.element_size()
            state.append(_NEVER_EQUAL() if part_of_more else _last_step)
    return tuple(state)


def version(tensor: Tensor) -> Any:
    """Equal between two looks only if nothing wrote; inference tensors, which count none, never."""
    return _NEVER_EQUAL() if tensor.is_inference() else tensor._version


def _writes(tensor: Tensor) -> Any:
    """As :func:`version`, but replays of graphs count too: what they write is never equal."""
    return _NEVER_EQUAL() if is_written_by_graphs(tensor) else version(tensor)


def is_capturing(tensor: Tensor) -> bool:
    """Whether what is enqueued for ``tensor`` goes into a CUDA graph instead of running."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def mark_written_by_graphs(tensor: Tensor) -> None:
    """Records that replays of a CUDA graph write to ``tensor``."""
    setattr(tensor.untyped_storage(), _GRAPHS, True)


def is_written_by_graphs(tensor: Tensor) -> bool:
    """Whether :func:`mark_written_by_graphs` was called, for this storage."""
    return hasattr(tensor.untyped_storage(), _GRAPHS)


def mark_fresh(derived: Tensor, *sources: Tensor) -> None:
    """Records that ``derived`` was computed from the present state of ``sources``."""
    setattr(derived.untyped_storage(), _ATTRIBUTE, _stamp(derived, sources))


def mark_stale(derived: Tensor) -> None:
    """Records that ``derived`` must be computed again before its next use."""
    setattr(derived.untyped_storage(), _ATTRIBUTE, None)


def is_fresh(derived: Tensor, *sources: Tensor) -> bool:
    """Whether neither ``sources`` nor ``derived`` changed since :func:`mark_fresh`."""
    return getattr(derived.untyped_storage(), _ATTRIBUTE, None) == _stamp(derived, sources)


def is_followed(derived: Tensor) -> bool:
    """Whether ``derived`` was ever marked: its owner wants it kept up to date."""
    return hasattr(derived.untyped_storage(), _ATTRIBUTE)
