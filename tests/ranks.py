# SPDX-License-Identifier: Apache-2.0
"""Tests of several processes: run_ranks starts them, and they end whatever happens."""

import faulthandler
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

_SECONDS = 120  # from the start of all ranks; some ten are usual, most of them imports


def run_ranks(worker: Callable[..., None], *args: Any, folder: os.PathLike, ranks: int = 2) -> None:
    """Calls ``worker(rank, *args)`` in processes of one gloo group; raises what one raises.

    Args:
        worker: a function of a module, which spawned processes import.
        folder: an empty one; the ranks find each other through a file in it.

    Raises:
        TimeoutError: some rank hangs; those that came to their work have printed where.
    """
    arguments = (worker, args, os.fspath(folder), ranks)
    context = mp.spawn(_run, args=arguments, nprocs=ranks, join=False)
    deadline = time.monotonic() + _SECONDS
    while not context.join(timeout=max(0, deadline - time.monotonic())):
        if time.monotonic() > deadline:
            for process in context.processes:
                process.kill()
            raise TimeoutError(f"{worker.__name__} has not ended after {_SECONDS} seconds")


def _run(rank: int, worker: Callable[..., None], args: Any, folder: str, ranks: int) -> None:
    faulthandler.dump_traceback_later(_SECONDS / 2)
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks)
    worker(rank, *args)
    dist.barrier()  # a rank that leaves closes connections that others may still read from
    # What takes a process group down may wait for ever, for the other side or for a thread that the
    # interpreter stopped; nothing is tested there.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
