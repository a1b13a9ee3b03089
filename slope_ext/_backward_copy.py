# SPDX-License-Identifier: Apache-2.0
"""The backward copy of a 2:4 weight, kept up to date: W^{R,C} transposed.

Three derived tensors. The mask ``bitmask_t`` follows ``bitmask`` (and is re-chosen by whoever owns
its schedule); ``metadata_t``, what the product wants of that mask, follows it; the values
``values_t`` follow values and both masks. Whoever needs the copy calls :func:`follow`; nothing else
decides whether it is stale.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor

from slope_ext import _freshness, _packed, _streams


def choose_mask(values: Tensor, bitmask: Tensor, bitmask_t: Tensor) -> None:
    """Overwrites ``bitmask_t`` with the double-pruned mask of the present values.

    Raises:
        RuntimeError: a CUDA graph is captured, whose replays nothing that follows the mask would
            see.
    """
    if _streams.is_capturing(values):
        raise RuntimeError(
            "slope_ext: transposed masks must not be chosen while a CUDA graph is captured; choose "
            "them between replays"
        )
    bitmask_t.copy_(torch.ops.slope.prune_transposed(values, bitmask))
    mark(bitmask_t, bitmask)


def mask_is_stale(bitmask: Tensor, bitmask_t: Tensor) -> bool:
    """Whether a layer follows ``bitmask`` with ``bitmask_t`` and has yet to choose it."""
    return _freshness.is_followed(bitmask_t) and not _freshness.is_fresh(bitmask_t, bitmask)


def follow(
    values: Tensor,
    bitmask: Tensor,
    bitmask_t: Tensor,
    values_t: Tensor | None,
    metadata_t: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor | None]:
    """Returns the up-to-date transposed values [in, out/2] and their metadata.

    ``values_t`` and ``metadata_t`` themselves, or new tensors where ``values_t`` is None.

    ``bitmask_t`` is re-chosen if a layer follows ``bitmask`` with it and that changed; a mask that
    no layer owns is taken as it is. While a CUDA graph is captured the values are always written,
    since its replays run after changes that no host code sees; so optimizers leave that to captured
    backward passes.

    A layer that is used twice in a forward pass has its copy saved twice for backward, and the
    first backward refreshes it. To autograd that is no change: the copy says nothing that values
    and masks do not. So version counters stay as they are here.

    Backward passes on several streams share a copy: one refreshes it, the others wait for that.
    """
    kept = values_t is not None  # else nobody looks at it again
    if values_t is None:
        values_t, metadata_t = new_values_t(values, backend)
    sources = (values, bitmask, bitmask_t)
    if mask_is_stale(bitmask, bitmask_t):
        with _unseen():
            torch.ops.slope.double_prune_(values, bitmask, bitmask_t, values_t)
        if metadata_t is not None:
            _freshness.mark_stale(metadata_t)  # no version counter told it
        if kept:
            _mark_enqueued(values_t, *sources)
        _mark_enqueued(bitmask_t, bitmask)
    elif not kept or _streams.is_capturing(values) or not _is_ready(values_t, *sources):
        _streams.wait_for_writer(bitmask_t)
        with _unseen():
            torch.ops.slope.transpose_values(values, bitmask, bitmask_t, values_t)
        if kept:
            _mark_enqueued(values_t, *sources)
    if kept and metadata_t is not None:
        follow_metadata(bitmask_t, metadata_t)
    elif metadata_t is not None:
        _write_metadata(bitmask_t, metadata_t)
    return values_t, metadata_t


def new_values_t(
    values: Tensor, backend: str, prefers_plans: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Uninitialised transposed values [in, out/2] and their metadata, as the backend wants them."""
    rows, columns = 2 * values.shape[1], values.shape[0]
    kind = _packed.backend_of(rows, columns, values.dtype, values.device, backend, prefers_plans)
    if kind == "cusparselt":
        return _packed.empty(rows, columns, values.dtype, values.device)
    words = _packed.empty_words(rows, columns, values.device) if kind == "native" else None
    with torch.inference_mode(False):  # it outlives the call
        return values.new_empty(rows, columns // 2), words


def follow_metadata(bitmask: Tensor, metadata: Tensor) -> bool:
    """Brings the metadata of a mask up to date; whether anything was to do."""
    if _is_ready(metadata, bitmask):
        return False
    _write_metadata(bitmask, metadata)
    _mark_enqueued(metadata, bitmask)
    return True


def _write_metadata(bitmask: Tensor, metadata: Tensor) -> None:
    _streams.wait_for_writer(bitmask)
    with _unseen():
        torch.ops.slope.pack_metadata(bitmask, metadata)


def mark(derived: Tensor, *sources: Tensor) -> None:
    """Records that ``derived`` was computed from ``sources``; captured, it is not yet.

    By what wrote ``sources`` too, or before: whoever reads those waited for it.
    """
    if _streams.is_capturing(derived):
        _freshness.mark_stale(derived)  # nothing was computed yet
    else:
        _freshness.mark_fresh(derived, *sources)


def _mark_enqueued(derived: Tensor, *sources: Tensor) -> None:
    """As :func:`mark`, of what the current stream has yet to do."""
    _streams.mark_written(derived)  # before anybody may take it as fresh
    mark(derived, *sources)


def _is_ready(derived: Tensor, *sources: Tensor) -> bool:
    """Whether ``derived`` is up to date for what the current stream does from here on."""
    if not _freshness.is_fresh(derived, *sources):
        return False
    _streams.wait_for_writer(derived)
    return True


def _unseen() -> AbstractContextManager[None]:
    """Writes to derived tensors neither count as versions nor concern autograd."""
    return torch._C._ExcludeDispatchKeyGuard(_AUTOGRAD_KEYS)


_AUTOGRAD_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)
for _key in ("AutogradCPU", "AutogradCUDA", "AutogradMeta", "AutogradOther"):
    _AUTOGRAD_KEYS = _AUTOGRAD_KEYS | torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, _key))
