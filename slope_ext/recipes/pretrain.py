# SPDX-License-Identifier: Apache-2.0
"""``slope-pretrain``: pretrain a causal language model with 2:4 sparse weights (SLoPe).

The parts that concern :mod:`slope_ext` are :func:`prepare_slope` and :func:`train`.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import math
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import slope_ext as slope
from slope_ext.recipes import UsageError
from slope_ext.recipes.arguments import parse_arguments, require_same
from slope_ext.recipes.checkpoint import (
    WEIGHTS,
    damage,
    discard_checkpoints,
    find_checkpoint,
    load_state,
    load_weights,
    rng_state,
    save_checkpoint,
    set_aside_checkpoints,
    set_rng_state,
)
from slope_ext.recipes.data import Blocks, TokenizedCorpus, tokenize_corpus
from slope_ext.recipes.files import read_object, replace_text
from slope_ext.recipes.models import build_model, decay_groups, model_config, short_name
from slope_ext.recipes.reporting import (
    Progress,
    RunLog,
    format_summary,
    peak_memory_bytes,
    plot_losses,
    read_log,
    sparsity,
    summarize,
    write_sample,
)


@dataclass(frozen=True)
class Processes:
    """This process among those of the launch (torchrun's environment variables)."""

    rank: int
    world_size: int

    @classmethod
    def from_environment(cls) -> Processes:
        """Raises :class:`UsageError` for more than one process, which is not supported yet."""
        rank, size = (os.environ.get(name) for name in ("RANK", "WORLD_SIZE"))
        processes = cls(int(rank or 0), int(size or 1))
        if processes.world_size > 1:
            raise UsageError("WORLD_SIZE: slope-pretrain runs in a single process so far")
        return processes

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files and the progress bar."""
        return self.rank == 0


class StopSignal:
    """Within the context, the first SIGINT or SIGTERM is only noted; a second acts as usual."""

    received: int | None = None

    def __enter__(self) -> StopSignal:
        # Python allows signal handlers in the main thread only.
        in_main_thread = threading.current_thread() is threading.main_thread()
        signals = (signal.SIGINT, signal.SIGTERM) if in_main_thread else ()
        self._previous = {number: signal.signal(number, self._receive) for number in signals}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self.__exit__()


@contextlib.contextmanager
def deterministic_algorithms(wanted: bool) -> Iterator[None]:
    """Within the context, if wanted, PyTorch's deterministic algorithms, or an error for an
    operation that has none. For cuBLAS, unless it was used before, by its environment variable."""
    if not wanted:
        yield
        return
    mode = torch.get_deterministic_debug_mode()
    workspace = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_deterministic_debug_mode("error")
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        if workspace is None:
            del os.environ["CUBLAS_WORKSPACE_CONFIG"]


# ------------------------------------------------------------------------------------------------
# Methods


Prepared = tuple[torch.optim.Optimizer, slope.LazyAdapters | None]


def prepare_dense(model: nn.Module, args: argparse.Namespace) -> Prepared:
    """The baseline: leave the model as it is."""
    groups = decay_groups(model, args.weight_decay, args.decay_embeddings)
    betas = (args.beta1, args.beta2)
    fused = args.device == "cuda"
    return torch.optim.AdamW(groups, lr=args.lr, betas=betas, eps=args.eps, fused=fused), None


def prepare_slope(model: nn.Module, args: argparse.Namespace) -> Prepared:
    """Make the linear layers 2:4 sparse, with SLoPe's optimizer and lazy adapters."""
    config = slope.SlopeConfig(
        mask=args.mask,
        seed=args.seed,
        backward_copy=args.backward_copy,
        exclude_modules=("lm_head",),
    )
    slope.convert(model, config)
    optimizer = slope.optim.AdamW(
        decay_groups(model, args.weight_decay, args.decay_embeddings),
        lr=args.lr,
        betas=(args.beta1, args.beta2),
        eps=args.eps,
        mask_interval=args.mask_interval,
        master_weights=args.master_weights,
        half_moments=args.half_moments,
    )
    if args.adapter_rank == 0:
        return optimizer, None
    return optimizer, slope.LazyAdapters(
        model,
        optimizer,
        rank=args.adapter_rank,
        total_steps=args.steps,
        fraction=args.adapter_fraction,
    )


def clip_gradients(model: nn.Module, optimizer: torch.optim.Optimizer, limit: float) -> float:
    """Clips the norm of all gradients, in the optimizer's own pass if it can; returns the norm."""
    if isinstance(optimizer, slope.optim.AdamW):
        return float(optimizer.clip_grad_norm_(limit))
    return nn.utils.clip_grad_norm_(model.parameters(), limit).item()


METHODS: dict[str, Callable[[nn.Module, argparse.Namespace], Prepared]] = {
    "dense": prepare_dense,
    "slope": prepare_slope,
}


# ------------------------------------------------------------------------------------------------
# Training


class Run:
    """Model, optimizer, adapters and data of a run, and the number of steps done."""

    def __init__(
        self, args: argparse.Namespace, corpus: TokenizedCorpus, processes: Processes
    ) -> None:
        """Build everything at step 0; raises :class:`UsageError` for unusable arguments."""
        self.args, self.corpus, self.processes = args, corpus, processes
        self.step = 0
        self.device = torch.device(args.device)
        self.train_blocks = Blocks(corpus.train, args.seq_len, args.seed)
        self.valid_blocks = Blocks(corpus.valid, args.seq_len)
        config = model_config(args.model, corpus.vocab_size, corpus.end_of_text, args.seq_len)
        torch.manual_seed(args.seed)
        np.random.seed(args.seed)
        random.seed(args.seed)
        model = build_model(config, getattr(torch, args.dtype), args.gradient_checkpointing)
        self.config = json.dumps(config.to_dict(), default=str)
        self.model = model.to(self.device)
        try:
            self.optimizer, self.adapters = METHODS[args.method](self.model, args)
        except ValueError as error:  # no layer that can be sparse, say
            raise UsageError(f"--model {args.model}: {error}") from error
        self.forward = torch.compile(self.model) if args.compile else self.model

    @property
    def checkpoints(self) -> Path:
        """Directory of the checkpoints."""
        return Path(self.args.output_dir) / "checkpoints"

    def batch(self, step: int, micro: int) -> torch.Tensor:
        """This process' int64 tokens [batch_size, seq_len + 1] of a micro batch of ``step``."""
        index = (step - 1) * self.args.grad_accum + micro
        index = index * self.processes.world_size + self.processes.rank
        return self.train_blocks.batch(index * self.args.batch_size, self.args.batch_size)

    def loss(self, tokens: torch.Tensor) -> torch.Tensor:
        """Mean loss in nats per token of int64 ``tokens`` [batch, seq_len + 1], a scalar."""
        tokens = tokens.to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.autocast):
            logits = self.forward(input_ids=tokens[:, :-1], use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())

    @torch.no_grad()
    def evaluate(self) -> float:
        """Mean validation loss in nats per token over up to ``--eval-batches`` batches."""
        size: int = self.args.batch_size
        count: int = min(self.valid_blocks.count, size * self.args.eval_batches)
        self.model.eval()
        total = 0.0
        for first in range(0, count, size):
            rows = min(size, count - first)
            total += rows * self.loss(self.valid_blocks.batch(first, rows)).item()
        self.model.train()
        return total / count

    def save(self) -> Path:
        """Write a checkpoint from which :meth:`restore` continues exactly."""
        state = {
            "step": self.step,
            "arguments": vars(self.args),
            "corpus": self.corpus.digest,
            "config": self.config,
            "optimizer": self.optimizer.state_dict(),
            "adapters": self.adapters.state_dict() if self.adapters is not None else None,
            "rng": rng_state(),
        }
        return save_checkpoint(
            self.checkpoints, self.step, self.model, state, self.args.keep_checkpoints
        )

    def restore(self, checkpoint: Path, state: dict[str, Any]) -> None:
        """Continue from ``state``, read from ``checkpoint``.

        Raises :class:`UsageError` if the data or the model's config changed.
        """
        if state["corpus"] != self.corpus.digest:
            raise UsageError(f"--data {self.args.data}: its text changed since {checkpoint}")
        if not _same_where_both_have(
            json.loads(state.get("config", "{}")), json.loads(self.config)
        ):
            raise UsageError(f"--model {self.args.model}: its config changed since {checkpoint}")
        # The adapters come first: they add the parameters that the other two states refer to.
        if self.adapters is not None:
            self.adapters.load_state_dict(state["adapters"])
        load_weights(checkpoint, self.model)
        self.optimizer.load_state_dict(state["optimizer"])
        set_rng_state(state["rng"])
        self.step = state["step"]


# What a config says of the library that read it, and what --dtype says.
_NOT_OF_THE_MODEL = {"transformers_version", "_name_or_path", "dtype", "torch_dtype"}


def _same_where_both_have(saved: dict[str, Any], present: dict[str, Any]) -> bool:
    """Whether two configs are of one model; versions of transformers differ in the keys."""
    keys = (saved.keys() & present.keys()) - _NOT_OF_THE_MODEL
    return all(saved[key] == present[key] for key in keys)


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Linear warm-up to ``--lr``, then cosine decay to ``--min-lr-ratio`` of it; steps from 1."""
    if step <= args.warmup_steps:
        return float(args.lr * step / args.warmup_steps)
    progress = (step - args.warmup_steps) / (args.steps - args.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return float(args.lr * (args.min_lr_ratio + (1 - args.min_lr_ratio) * cosine))


def train(run: Run, log: RunLog) -> int | None:
    """Take the steps that are left, and save at the end.

    Returns the number of the signal that ended the run early, if one did. Raises
    FloatingPointError when the loss or its gradient is not finite.
    """
    args, model, optimizer, adapters = run.args, run.model, run.optimizer, run.adapters
    step_tokens = args.batch_size * args.grad_accum * args.seq_len * run.processes.world_size
    zeros = sparsity(model)
    last = min(args.steps, args.stop_after or args.steps)
    model.train()
    with StopSignal() as stop, Progress(run.step, args.steps, run.processes.is_main) as progress:
        for step in range(run.step + 1, last + 1):
            started = time.perf_counter()
            if adapters is not None and adapters.step():
                log.write({"kind": "adapters", "step": step, "rank": args.adapter_rank})
            lr = learning_rate(step, args)
            for group in optimizer.param_groups:  # the adapters' group has joined by now
                group["lr"] = lr * group.get("lr_scale", 1.0)

            loss = 0.0
            for micro in range(args.grad_accum):
                micro_loss = run.loss(run.batch(step, micro)) / args.grad_accum
                # One device: a second thread would run beside nothing, on a core with cold caches
                with (
                    torch.autograd.set_multithreading_enabled(False),
                    slope.accumulate_in_place(),
                ):
                    micro_loss.backward()
                loss += micro_loss.item()
            grad_norm = clip_gradients(model, optimizer, args.grad_clip or math.inf)
            if not math.isfinite(loss) or not math.isfinite(grad_norm):
                raise FloatingPointError(
                    f"step {step}: loss {loss}, norm of the gradient {grad_norm}; try a lower --lr"
                )
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            run.step = step

            record = {
                "kind": "train",
                "step": step,
                "loss": loss,
                "lr": lr,
                "grad_norm": grad_norm,
                "tokens": step * step_tokens,
                "tokens_per_s": step_tokens / (time.perf_counter() - started),
                "memory_bytes": peak_memory_bytes(run.device),
                "sparsity": zeros,
            }
            log.write(record)
            progress.update(record)
            if step % args.eval_interval == 0 or step == args.steps:
                log.write({"kind": "valid", "step": step, "valid_loss": run.evaluate()})
            if step % args.save_interval == 0 or step == last or stop.received is not None:
                run.save()
            if stop.received is not None:
                return stop.received
    return None


# ------------------------------------------------------------------------------------------------
# Program


def choose_checkpoint(resume: str, root: Path) -> Path | None:
    """The checkpoint that ``--resume`` asks for; None to start anew."""
    if resume == "auto":
        return find_checkpoint(root)
    if resume == "never":  # what is there goes once the new run is ready to start
        return None
    problem = damage(Path(resume))
    if problem is not None:
        raise UsageError(f"--resume {resume}: not a whole checkpoint ({problem})")
    return Path(resume)


def finish(run: Run, log: RunLog, output: Path) -> dict[str, Any]:
    """Write the loss curve, the text sample and, last, ``summary.json``."""
    args, records = run.args, log.records()
    model_name = short_name(args.model)
    plot, sample = output / "loss.png", output / "sample.txt"
    plot_losses(plot, records, f"{model_name}, {args.method}")
    write_sample(
        sample, run.model, run.corpus.tokenizer, args.sample_prompt, args.sample_tokens, args.seed
    )
    summary = summarize(
        records,
        model=run.model,
        model_name=model_name,
        method=args.method,
        vocab_size=run.corpus.vocab_size,
        weights=run.checkpoints / f"step-{run.step:06d}" / WEIGHTS,
        plot=plot,
        sample=sample,
    )
    replace_text(output / "summary.json", json.dumps(summary, indent=2) + "\n")
    return summary


def pretrain(args: argparse.Namespace) -> int:
    """Start or resume the run that ``args`` describe; returns the exit code."""
    processes = Processes.from_environment()
    output = Path(args.output_dir)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--output-dir {output}: {error.strerror}") from error
    with only_run_in(output):
        return _pretrain(args, output, processes)


@contextlib.contextmanager
def only_run_in(output: Path) -> Iterator[None]:
    """Within the context no other run writes to ``output``; UsageError if one does."""
    with contextlib.ExitStack() as stack:
        try:
            lock = stack.enter_context((output / ".lock").open("a"))
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(f"--output-dir {output}: another run writes to it now") from error
        except OSError as error:
            raise UsageError(f"--output-dir {output}: {error.strerror}") from error
        yield


def _pretrain(args: argparse.Namespace, output: Path, processes: Processes) -> int:
    checkpoint = choose_checkpoint(args.resume, output / "checkpoints")
    state = load_state(checkpoint) if checkpoint is not None else None
    summary_file = output / "summary.json"
    if state is not None:
        require_same(state["arguments"], args)
        if state["step"] == args.steps:
            if (summary := read_object(summary_file)) is not None:
                print(f"{output}: the run is complete")
                print(format_summary(summary))
                return 0
            log_of_it = read_log(output / "log.jsonl")
            if ("train", args.steps) not in {(r.get("kind"), r["step"]) for r in log_of_it}:
                raise UsageError(
                    f"--resume {args.resume}: that run is complete, and {output} has no log of it "
                    "to report from"
                )

    corpus = tokenize_corpus(
        output, args.data, args.valid_fraction, args.tokenizer, args.vocab_size
    )
    run = Run(args, corpus, processes)
    if checkpoint is not None and state is not None:
        run.restore(checkpoint, state)
        print(f"resuming after step {run.step} from {checkpoint}")
    # The log comes first: without tensorboard it raises, and nothing of an earlier run has gone
    log = RunLog(
        output / "log.jsonl", run.step, output / "tensorboard" if args.tensorboard else None
    )
    corpus.keep()
    summary_file.unlink(missing_ok=True)
    if args.resume == "never":
        discard_checkpoints(run.checkpoints)
    elif checkpoint is not None and args.resume != "auto":
        set_aside_checkpoints(run.checkpoints, checkpoint)
    (output / "arguments.json").write_text(json.dumps(vars(args), indent=2) + "\n")
    parameters = sum(parameter.numel() for parameter in run.model.parameters())
    print(
        f"{args.model}, {args.method}: {parameters / 1e6:.2f} M parameters stored; {args.data}: "
        f"{corpus.note}, {len(corpus.train):,} training and {len(corpus.valid):,} validation "
        f"tokens of {corpus.vocab_size} kinds"
    )
    try:
        received = train(run, log)
        if run.step == args.steps and received is None:
            print(format_summary(finish(run, log, output)))
            return 0
    finally:
        log.close()
    changes = ["without --stop-after"] if args.stop_after else []
    changes += ["with --resume auto"] if args.resume != "auto" else []
    command = " ".join(["the same command", " and ".join(changes)]).rstrip()
    print(f"saved after step {run.step} of {args.steps}; {command} resumes the run")
    return 0 if received is None else 128 + received


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``slope-pretrain``.

    Returns the exit code: 0 when the run is complete or has reached ``--stop-after``, 1 when the
    loss or its gradient is not finite, 2 for a mistake in the arguments or a checkpoint that cannot
    be written, 130 or 143 after SIGINT or SIGTERM.
    """
    try:
        args = parse_arguments(argv)
        with deterministic_algorithms(args.deterministic):
            return pretrain(args)
    except UsageError as error:
        print(f"slope-pretrain: error: {error}", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"slope-pretrain: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        if error.name not in {"matplotlib", "safetensors", "tokenizers", "tqdm", "transformers"}:
            raise
        print(
            f"slope-pretrain: needs the package {error.name} (pip install 'slope-ext[pretrain]')",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing was saved since the last checkpoint", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
