# SPDX-License-Identifier: Apache-2.0
"""What a run tells: the JSONL log, the progress bar, the loss curve, a sample and the summary."""

from __future__ import annotations

import json
import math
import resource
import statistics
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

import slope_ext as slope
from slope_ext.recipes import UsageError
from slope_ext.recipes.files import json_object, replace_text

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Record = dict[str, Any]


def _summary_writer() -> Any:
    """The class SummaryWriter; raises :class:`UsageError` if tensorboard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError as error:
        raise UsageError(
            "--tensorboard: needs the package tensorboard (pip install 'slope-ext[tensorboard]')"
        ) from error
    return SummaryWriter


def read_log(path: Path) -> list[Record]:
    """The records of a log, if there is one; lines that are none, as a kill cuts them, are left
    out."""
    records = []
    for line in path.read_bytes().splitlines() if path.exists() else ():
        record = json_object(line)
        if record is not None and isinstance(record.get("step"), int):
            records.append(record)
    return records


class RunLog:
    """``log.jsonl``: one JSON object per line, with the keys ``kind`` and ``step``.

    Kinds: ``train`` (each step once), ``valid`` and ``adapters``. Opening the log drops what lies
    past ``last_step``, the step of the checkpoint that the run goes on from.
    """

    def __init__(self, path: Path, last_step: int, tensorboard: Path | None = None) -> None:
        """Raises :class:`UsageError` if ``tensorboard`` (a directory) is given without it."""
        self._writer: Any = None
        if tensorboard is not None:
            self._writer = _summary_writer()(str(tensorboard), purge_step=last_step + 1)
        self._path = path
        kept = [record for record in self.records() if record["step"] <= last_step]
        replace_text(path, "".join(json.dumps(record) + "\n" for record in kept))
        self._file = path.open("a", buffering=1)

    def write(self, record: Record) -> None:
        """Append a record."""
        self._file.write(json.dumps(record) + "\n")
        if self._writer is not None:
            for key, value in record.items():
                if isinstance(value, float):
                    self._writer.add_scalar(f"{record['kind']}/{key}", value, record["step"])

    def records(self) -> list[Record]:
        """All records."""
        return read_log(self._path)

    def close(self) -> None:
        """Close the files."""
        self._file.close()
        if self._writer is not None:
            self._writer.close()


class Progress:
    """A progress bar over the steps of a run, on standard error; silent unless ``show``."""

    def __init__(self, step: int, steps: int, show: bool) -> None:
        from tqdm import tqdm

        # A log file gets a line now and then instead of an animation.
        interval = 0.2 if sys.stderr.isatty() else 15.0
        self._bar = tqdm(
            total=steps, initial=step, unit="step", disable=not show, mininterval=interval
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()

    def update(self, record: Record) -> None:
        """Advance by one step, described by a ``train`` record."""
        self._bar.set_postfix_str(
            f"loss {record['loss']:.3f}, {record['tokens_per_s']:.0f} tokens/s, "
            f"{record['memory_bytes'] / 1e9:.2f} GB, {record['sparsity']:.0%} zeros",
            refresh=False,
        )
        self._bar.update()


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory in bytes: allocated on a CUDA device, else resident in the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def sparsity(model: nn.Module) -> float:
    """Share of zeros in the weights of the sparse layers; 0.0 if there are none."""
    layers = [m for m in model.modules() if isinstance(m, slope.SLoPeLinear)]
    dense = sum(layer.in_features * layer.out_features for layer in layers)
    return 1 - sum(layer.weight.numel() for layer in layers) / dense if dense else 0.0


def dense_checkpoint_bytes(model: nn.Module, checkpoint_bytes: int) -> int:
    """Size of a weights file of ``checkpoint_bytes`` were its sparse layers stored dense.

    The compressed weights, masks and adapters of those layers are exchanged for a full matrix of
    the same dtype each.
    """
    total = checkpoint_bytes
    for layer in model.modules():
        if isinstance(layer, slope.SLoPeLinear):
            stored = [t for name, t in layer.state_dict().items() if name != "bias"]
            total -= sum(t.numel() * t.element_size() for t in stored)
            total += layer.in_features * layer.out_features * layer.weight.element_size()
    return total


@torch.no_grad()
def write_sample(
    path: Path, model: Any, tokenizer: Tokenizer, prompt: str, tokens: int, seed: int
) -> None:
    """Continue ``prompt`` by up to ``tokens`` tokens drawn from the model, into a text file."""
    end = model.config.eos_token_id
    positions = getattr(model.config, "max_position_embeddings", math.inf)
    ids = tokenizer.encode(prompt, add_special_tokens=False).ids or [end]
    ids = ids[: int(min(len(ids), positions - 1))]
    inputs = torch.tensor([ids], device=model.device)
    training = model.training
    model.eval()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        output = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=int(min(tokens, positions - len(ids))),
            do_sample=True,
            temperature=0.8,
            top_k=50,
            pad_token_id=end,
        )
    model.train(training)
    path.write_text(tokenizer.decode(output[0].tolist()) + "\n", encoding="utf-8")


def plot_losses(path: Path, records: list[Record], title: str) -> None:
    """Draw the training and validation loss over the steps into a PNG file."""
    from matplotlib.figure import Figure

    train = [r for r in records if r["kind"] == "train"]
    valid = [r for r in records if r["kind"] == "valid"]
    steps, losses = [r["step"] for r in train], [r["loss"] for r in train]
    figure = Figure(figsize=(7, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    axes.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=0.8, label="training")
    axes.plot(steps, _smoothed(losses), color="tab:blue", label="training, smoothed")
    axes.plot(
        [r["step"] for r in valid],
        [r["valid_loss"] for r in valid],
        color="tab:orange",
        marker="o",
        markersize=4,
        label="validation",
    )
    for record in records:
        if record["kind"] == "adapters":
            axes.axvline(record["step"], color="tab:green", linestyle="--", label="adapters added")
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)


def _smoothed(values: list[float]) -> npt.NDArray[np.float64]:
    """Mean over a centred window of a twenty-fifth of the run, narrower towards its ends."""
    position = np.arange(len(values))
    half = np.minimum(np.minimum(position, position[::-1]), len(values) // 50)
    sums = np.cumsum([0.0, *values], dtype=np.float64)
    means: npt.NDArray[np.float64]
    means = (sums[position + half + 1] - sums[position - half]) / (2 * half + 1)
    return means


def summarize(
    records: list[Record],
    *,
    model: nn.Module,
    model_name: str,
    method: str,
    vocab_size: int,
    weights: Path,
    plot: Path,
    sample: Path,
) -> Record:
    """The contents of ``summary.json``; losses in nats per token, sizes in bytes."""
    train = [r for r in records if r["kind"] == "train"]
    valid_loss = [r["valid_loss"] for r in records if r["kind"] == "valid"][-1]
    checkpoint_bytes = weights.stat().st_size
    return {
        "model": model_name,
        "method": method,
        "steps": train[-1]["step"],
        "tokens": train[-1]["tokens"],
        "first_loss": train[0]["loss"],
        "last_loss": train[-1]["loss"],
        "ln_vocab": math.log(vocab_size),
        "valid_loss": valid_loss,
        "valid_perplexity": math.exp(valid_loss),
        "tokens_per_s": statistics.median(r["tokens_per_s"] for r in train),
        "sparsity": train[-1]["sparsity"],
        "checkpoint": str(weights),
        "checkpoint_bytes": checkpoint_bytes,
        "dense_checkpoint_bytes": dense_checkpoint_bytes(model, checkpoint_bytes),
        "plot": str(plot),
        "sample": str(sample),
    }


def format_summary(summary: Record) -> str:
    """The lines printed at the end of a run."""
    sparse, dense = summary["checkpoint_bytes"], summary["dense_checkpoint_bytes"]
    size = f"{sparse / 1e6:.1f} MB"
    if summary["sparsity"]:
        size += f" sparse, {dense / 1e6:.1f} MB if the linears were dense ({sparse / dense:.2f}x)"
    return "\n".join(
        [
            f"{summary['model']}, {summary['method']}: {summary['steps']} steps, "
            f"{summary['tokens']:,} tokens at {summary['tokens_per_s']:,.0f} tokens/s (median)",
            f"loss: {summary['first_loss']:.3f} at the first step, {summary['last_loss']:.3f} at "
            f"the last; ln(vocab) = {summary['ln_vocab']:.3f}",
            f"validation: loss {summary['valid_loss']:.3f}, "
            f"perplexity {summary['valid_perplexity']:.1f}",
            f"zeros in the sparse layers: {summary['sparsity']:.1%}",
            f"checkpoint: {size}",
            f"plot: {summary['plot']}",
            f"sample: {summary['sample']}",
        ]
    )
