# SPDX-License-Identifier: Apache-2.0
"""Gradient accumulation without autograd's own pass over the weights."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

_lock = threading.Lock()
_depth = 0  # contexts that are open, in any thread: autograd has threads of its own


@contextlib.contextmanager
def accumulate_in_place() -> Iterator[None]:
    """Eager backward passes in this context add to a 2:4 weight's ``.grad`` where there is one.

    Autograd would compute a gradient, then read it and ``.grad`` and write the sum; here the kernel
    that compresses the gradient adds it. For a weight that is used once in a pass the sums are the
    same bits. Weights with hooks of their own are left to autograd. DistributedDataParallel and its
    like, whose hooks cannot be seen, must not miss a gradient: leave the last pass of an
    accumulation, which they wait for, out::

        for micro_batch in micro_batches[:-1]:
            with slope.accumulate_in_place():
                model(micro_batch).loss.backward()
        model(micro_batches[-1]).loss.backward()

    It holds for all threads of the process. Compiled backward passes are as without it.
    """
    global _depth
    with _lock:
        _depth += 1
    try:
        yield
    finally:
        with _lock:
            _depth -= 1


def is_in_place() -> bool:
    """Whether such a context is open."""
    return _depth > 0
