# SPDX-License-Identifier: Apache-2.0
"""Is a derived tensor still what its sources say?

The backward copy of a weight (``weight_t``, ``weight_t_bitmask``) is derived from the weight. A
derived tensor carries, on its storage, a stamp of the state that its sources had when it was
computed. A later look compares stamps:

* the source's storage object, so that ``p.data = other`` is seen (the stamp keeps a weak reference,
  so the address of a freed storage cannot pass for it),
* its version counter, so that every in-place write is seen,
* for trained sources a count of optimizer steps, so that optimizers which write through ``p.data``
  (which has a version counter of its own) are seen too.

What torch itself cannot see, a write through ``.data`` outside any ``torch.optim.Optimizer``, needs
``SLoPeLinear.mark_backward_copy_stale()``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook

Stamp = tuple[Any, ...]

_ATTRIBUTE = "_slope_stamp"
_optimizer_steps = 0


def _count_optimizer_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    # An optimizer that keeps the backward copies itself says so.
    if not getattr(optimizer, "keeps_backward_copies", False):
        global _optimizer_steps
        _optimizer_steps += 1


register_optimizer_step_post_hook(_count_optimizer_step)


def _stamp(derived: Tensor, sources: tuple[Tensor, ...]) -> Stamp:
    state: list[Any] = [_version(derived)]
    for source in sources:
        trained = source.is_floating_point()
        state += [
            StorageWeakRef(source.untyped_storage()),
            source.storage_offset(),
            _version(source),
            _optimizer_steps if trained else 0,
        ]
    return tuple(state)


def _version(tensor: Tensor) -> Any:
    # Inference tensors count no versions: equal to nothing, so always stale.
    return object() if tensor.is_inference() else tensor._version


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
