# SPDX-License-Identifier: Apache-2.0
"""The backward copy of a 2:4 weight, kept up to date: W^{R,C} transposed.

Two derived tensors. The mask ``bitmask_t`` follows ``bitmask`` (and is re-chosen by whoever owns
its schedule); the values ``values_t`` follow values and both masks. Whoever needs the copy calls
:func:`follow`; nothing else decides whether it is stale.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.autograd.grad_mode import _unsafe_preserve_version_counter

from slope_ext import _freshness


def choose_mask(values: Tensor, bitmask: Tensor, bitmask_t: Tensor) -> None:
    """Overwrites ``bitmask_t`` with the double-pruned mask of the present values."""
    bitmask_t.copy_(torch.ops.slope.prune_transposed(values, bitmask))
    _freshness.mark_fresh(bitmask_t, bitmask)


def follow(values: Tensor, bitmask: Tensor, bitmask_t: Tensor, values_t: Tensor | None) -> Tensor:
    """Returns up-to-date transposed values [in, out/2]: ``values_t``, or a new tensor for None.

    ``bitmask_t`` is re-chosen if a layer follows ``bitmask`` with it and that changed; a mask that
    no layer owns is taken as it is. While a CUDA graph is captured the values are always written,
    since its replays run after changes that no host code sees.

    A layer that is used twice in a forward pass has its copy saved twice for backward, and the
    first backward refreshes it. To autograd that is no change: the copy says nothing that values
    and masks do not. So version counters stay as they are here.
    """
    capturing = values.is_cuda and torch.cuda.is_current_stream_capturing()
    mask_is_stale = _freshness.is_followed(bitmask_t) and not _freshness.is_fresh(
        bitmask_t, bitmask
    )
    sources = (values, bitmask, bitmask_t)
    if values_t is None:
        values_t = values.new_empty(2 * values.shape[1], values.shape[0] // 2)
    elif _freshness.is_fresh(values_t, *sources) and not mask_is_stale and not capturing:
        return values_t
    with _same_version(values_t), _same_version(bitmask_t):
        if mask_is_stale:
            torch.ops.slope.double_prune_(values, bitmask, bitmask_t, values_t)
        else:
            torch.ops.slope.transpose_values(values, bitmask, bitmask_t, values_t)
    if mask_is_stale:
        _freshness.mark_fresh(bitmask_t, bitmask)
    if capturing:
        _freshness.mark_stale(values_t)  # nothing was computed yet
    else:
        _freshness.mark_fresh(values_t, *sources)
    return values_t


def _same_version(tensor: Tensor) -> AbstractContextManager[None]:
    # Inference tensors count no versions.
    return nullcontext() if tensor.is_inference() else _unsafe_preserve_version_counter(tensor)
