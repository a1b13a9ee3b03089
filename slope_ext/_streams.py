# SPDX-License-Identifier: Apache-2.0
"""Order between the streams of a GPU, for tensors that the project writes of itself.

Backward copies and, in place, gradients are written where a backward pass happens to run. Autograd
orders what it hands on, but knows nothing of these; so each such write leaves an event, for which
the next one and whoever reads on another stream can wait.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WRITER = "_slope_writer"  # of a storage: the stream that wrote it last, an event after that


def current_is_capturing() -> bool:
    """Whether the current GPU's current stream is captured into a CUDA graph; starts no CUDA."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def is_capturing(tensor: Tensor) -> bool:
    """Whether what is enqueued for ``tensor`` goes into a CUDA graph instead of running."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def mark_written(tensor: Tensor) -> None:
    """Notes that the current stream writes ``tensor`` by what it has been given so far."""
    if tensor.is_cuda and not is_capturing(tensor):
        storage = tensor.untyped_storage()
        _, done = getattr(storage, _WRITER, None) or (0, torch.cuda.Event())
        done.record(torch.cuda.current_stream(tensor.device))
        setattr(storage, _WRITER, (_current(tensor), done))


def wait_for_writer(tensor: Tensor) -> None:
    """Has the current stream wait where another one writes ``tensor``.

    A capture does not: it started when all was done.
    """
    if tensor.is_cuda:
        writer, done = getattr(tensor.untyped_storage(), _WRITER, None) or (0, None)
        if done is not None and writer != _current(tensor) and not is_capturing(tensor):
            done.wait(torch.cuda.current_stream(tensor.device))


def _current(tensor: Tensor) -> int:
    """The handle of the current stream of a tensor's GPU."""
    return torch._C._cuda_getCurrentRawStream(tensor.get_device())
