# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that are whole or absent, and the random-number state for an exact resume.

``checkpoints/step-XXXXXX/`` holds ``model.safetensors`` and ``config.json`` as Hugging Face names
them, ``training_state.pt`` (everything else, readable with ``weights_only=True``) and
``checksums.json``, by which damaged files are recognized.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from slope_ext.recipes import UsageError

WEIGHTS = "model.safetensors"
STATE = "training_state.pt"
CONFIG = "config.json"
CHECKSUMS = "checksums.json"
_ASIDE = "aside-"


def save_checkpoint(
    root: Path, step: int, model: nn.Module, state: dict[str, Any], keep: int
) -> Path:
    """Write ``root/step-XXXXXX`` and drop all but the newest ``keep`` checkpoints up to it.

    Checkpoints of later steps and those set aside go too: the run was resumed from an earlier one.
    The files are written and synced under a temporary name first: a process killed at any time
    leaves the earlier checkpoints and, at worst, a temporary directory that nothing reads. Raises
    :class:`UsageError` where they cannot be written, on a full disk say; the earlier ones stay.
    """
    final = root / f"step-{step:06d}"
    temporary = root / f"tmp-{step:06d}"
    for leftover in root.glob("tmp-*"):
        shutil.rmtree(leftover)
    try:
        _write(temporary, model, state)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if _is_of_the_disk(error):
            raise UsageError(
                f"--output-dir: cannot write the checkpoint {final}: {error}; "
                "earlier ones are whole"
            ) from error
        raise
    if final.exists():  # the same step again, after a resume from an older checkpoint
        shutil.rmtree(final)
    temporary.rename(final)
    _sync(root)
    steps = _steps(root)
    here = steps.index(final)
    for other in (*steps[: max(0, here + 1 - keep)], *steps[here + 1 :], *root.glob(f"{_ASIDE}*")):
        shutil.rmtree(other)
    return final


def _write(folder: Path, model: nn.Module, state: dict[str, Any]) -> None:
    """Writes and syncs the files of a checkpoint into a new folder."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    save_file(_unique_tensors(model), folder / WEIGHTS, metadata={"format": "pt"})
    torch.save(state, folder / STATE)
    model.config.save_pretrained(folder)  # type: ignore[operator, union-attr]
    sums = {file.name: checksum(file) for file in sorted(folder.iterdir())}
    (folder / CHECKSUMS).write_text(json.dumps(sums, indent=2) + "\n")
    for path in [*folder.iterdir(), folder]:
        _sync(path)


def _is_of_the_disk(error: BaseException) -> bool:
    """Whether writing failed: as torch.save says it, as safetensors does, or as Python does."""
    from safetensors import SafetensorError

    of_torch = isinstance(error, RuntimeError) and "inline_container" in str(error)
    return of_torch or isinstance(error, (OSError, SafetensorError))


def find_checkpoint(root: Path) -> Path | None:
    """The newest whole checkpoint under ``root``; warns about each damaged one it passes over.

    None if there is no checkpoint; raises :class:`UsageError` if there are some, but none is whole.
    """
    for path in reversed(_steps(root)):
        problem = damage(path)
        if problem is None:
            return path
        warnings.warn(f"skipping the checkpoint {path}: {problem}", stacklevel=2)
    if _steps(root):
        raise UsageError(
            f"--resume auto: none of the checkpoints in {root} is whole; "
            "--resume never deletes them and starts anew"
        )
    return None


def discard_checkpoints(root: Path) -> None:
    """Delete every checkpoint under ``root``, unfinished and set aside ones too, nothing else."""
    for path in (*_steps(root), *root.glob("tmp-*"), *root.glob(f"{_ASIDE}*")):
        shutil.rmtree(path)


def set_aside_checkpoints(root: Path, checkpoint: Path) -> None:
    """Rename what a run that goes on from ``checkpoint`` leaves: the later ones under ``root``.

    All of them, if it is not one of those: they are another run's then. ``--resume auto`` does not
    find them any more, and they are deleted once the run has saved one of its own.
    """
    steps = _steps(root)
    own = [path for path in steps if path.exists() and path.samefile(checkpoint)]
    for path in steps[steps.index(own[0]) + 1 :] if own else steps:
        aside = root / f"{_ASIDE}{path.name}"
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)


def damage(path: Path) -> str | None:
    """What is wrong with the checkpoint directory ``path``, or None if its files are whole."""
    try:
        sums = json.loads((path / CHECKSUMS).read_text())
        if missing := {WEIGHTS, STATE, CONFIG} - sums.keys():
            return f"{CHECKSUMS} lacks {', '.join(sorted(missing))}"
        for name, expected in sums.items():
            if checksum(path / name) != expected:
                return f"{name} is damaged"
    except (OSError, ValueError, AttributeError, TypeError) as error:
        return str(error)
    return None


def load_state(path: Path) -> dict[str, Any]:
    """The dictionary given to :func:`save_checkpoint`, with tensors on the CPU."""
    state: dict[str, Any] = torch.load(path / STATE, map_location="cpu", weights_only=True)
    return state


def load_weights(path: Path, model: nn.Module) -> None:
    """Copy the weights of a checkpoint into ``model``; raises RuntimeError if names differ."""
    from safetensors.torch import load_file

    weights = load_file(path / WEIGHTS)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    tied = model.state_dict().keys() - _unique_tensors(model).keys()
    if unexpected or set(missing) - tied:
        raise RuntimeError(f"{path / WEIGHTS}: missing {missing}, unexpected {unexpected}")


def rng_state() -> dict[str, Any]:
    """The state of every global random generator, as tensors and plain Python values."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": (kind, keys.tolist(), *rest),  # type: ignore[union-attr]
        "python": random.getstate(),
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Put back what :func:`rng_state` returned."""
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])


def _unique_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state_dict with tied weights once, under their first name (as Hugging Face does)."""
    seen: set[int] = set()
    unique: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            unique[name] = tensor.detach().contiguous()
    return unique


def _steps(root: Path) -> list[Path]:
    """The checkpoints, the oldest first; a copy that somebody put beside them is none."""
    numbers = {path: path.name.removeprefix("step-") for path in root.glob("step-*")}
    found = [path for path, number in numbers.items() if number.isdecimal()]
    return sorted(found, key=lambda path: int(numbers[path]))


def checksum(file: Path) -> str:
    """Hash of a file's bytes, 32 hex digits."""
    digest = hashlib.blake2b(digest_size=16)
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
