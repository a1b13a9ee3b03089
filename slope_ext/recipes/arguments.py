# SPDX-License-Identifier: Apache-2.0
"""Command line of ``slope-pretrain``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch

from slope_ext.recipes import UsageError
from slope_ext.recipes.models import SIZES, short_name

# About three minutes on two CPU cores.
DEMO: dict[str, Any] = {
    "model": "llama-demo",
    "data": "demo",
    "vocab_size": 2048,
    "seq_len": 128,
    "batch_size": 8,
    "grad_accum": 1,
    "steps": 500,
    "lr": 3e-3,
    "warmup_steps": 20,
    "eval_interval": 100,
    "eval_batches": 8,
    "save_interval": 50,
    "sample_prompt": "HAMLET.\n",
}

# Options that may differ between the start of a run and its resumption: they change where, how
# fast and how long it computes and what it reports, but not the losses.
_FREE_ON_RESUME = {
    "backward_copy",
    "demo",
    "deterministic",
    "device",
    "compile",
    "eval_batches",
    "eval_interval",
    "gradient_checkpointing",
    "keep_checkpoints",
    "output_dir",
    "resume",
    "sample_prompt",
    "sample_tokens",
    "save_interval",
    "stop_after",
    "tensorboard",
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default == "":
            return f"{action.help} (default: none)"
        return super()._get_help_string(action)


def _number(
    kind: type[int] | type[float], low: float, high: float, description: str
) -> Callable[[str], Any]:
    """An argparse type: a number in [low, high]."""

    def parse(text: str) -> int | float:
        try:
            value = kind(text)
        except ValueError:
            value = kind(low) - 1
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not {description}")
        return value

    return parse


_count = _number(int, 1, float("inf"), "a positive integer")
_count_or_zero = _number(int, 0, float("inf"), "a non-negative integer")
_seed = _number(int, 0, 2**32 - 1, "an integer from 0 to 2**32 - 1")
_non_negative = _number(float, 0, 1e300, "a non-negative number")
_share = _number(float, 0, 1, "a number between 0 and 1")
_decay_rate = _number(float, 0, 1 - 1e-12, "a number from 0 to below 1")


def build_parser() -> argparse.ArgumentParser:
    """The parser; its defaults are those of a run without ``--demo``."""
    parser = _Parser(
        prog="slope-pretrain",
        description="Pretrain a causal language model, dense or 2:4 sparse (SLoPe), on text.",
        epilog="A run that was stopped or killed goes on when the same command is given again "
        "(with --resume auto, which it has by itself).",
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--demo",
        action="store_true",
        help="preset: a small LLaMA on the text that ships with the package, about three minutes "
        "on two CPU cores; options given explicitly take precedence",
    )

    model = parser.add_argument_group("model")
    model.add_argument(
        "--model",
        default="llama-25m",
        help=f"size name or path of a Hugging Face config.json; sizes: {', '.join(SIZES)}",
    )
    model.add_argument(
        "--gradient-checkpointing",
        action="store_true",
        help="recompute activations in the backward pass to save memory",
    )

    data = parser.add_argument_group("data")
    data.add_argument(
        "--data",
        default="demo",
        help="demo, a .txt file (one document), a .jsonl file (a text field per line), a directory "
        "or glob of .txt files, a directory with train.jsonl and valid.jsonl, or "
        "hf:NAME[:CONFIG][:SPLIT]",
    )
    data.add_argument(
        "--valid-fraction",
        type=_share,
        default=0.05,
        help="share of the documents for validation, chosen by hash",
    )
    data.add_argument(
        "--tokenizer",
        default="train",
        help="train (byte-level BPE on the training documents) or path of a tokenizer.json",
    )
    data.add_argument(
        "--vocab-size",
        type=_number(int, 257, 2**31, "an integer of at least 257 (the bytes and the end)"),
        default=32000,
        help="entries of a trained tokenizer, at most",
    )
    data.add_argument("--seq-len", type=_count, default=1024, help="tokens per sequence")

    method = parser.add_argument_group("method")
    method.add_argument(
        "--method",
        choices=("slope", "dense"),
        default="slope",
        help="slope: 2:4 sparse linear layers with lazy adapters; dense: the baseline",
    )
    method.add_argument(
        "--mask",
        choices=("magnitude", "random"),
        default="magnitude",
        help="how the static 2:4 mask is chosen from the initial weights",
    )
    method.add_argument(
        "--backward-copy",
        choices=("cached", "recompute"),
        default=argparse.SUPPRESS,
        help="keep the transposed compressed weights, or rebuild them in each backward pass "
        "(default: cached; recompute for float32 parameters under autocast, which derives them "
        "from the cast weights anyway)",
    )
    method.add_argument(
        "--mask-interval",
        type=_count,
        default=100,
        help="steps between updates of the transposed masks",
    )
    method.add_argument(
        "--adapter-rank", type=_count_or_zero, default=8, help="rank of the adapters; 0 for none"
    )
    method.add_argument(
        "--adapter-fraction",
        type=_share,
        default=0.01,
        help="share of the steps, at the end, that train with adapters",
    )

    optimization = parser.add_argument_group("optimization (AdamW, warm-up, cosine decay)")
    optimization.add_argument("--steps", type=_count, default=10000, help="optimizer steps")
    optimization.add_argument(
        "--batch-size", type=_count, default=8, help="sequences per micro batch"
    )
    optimization.add_argument(
        "--grad-accum", type=_count, default=1, help="micro batches per optimizer step"
    )
    optimization.add_argument("--lr", type=_non_negative, default=6e-4, help="peak learning rate")
    optimization.add_argument(
        "--warmup-steps",
        type=_count_or_zero,
        default=100,
        help="steps over which the learning rate rises from 0; fewer than --steps",
    )
    optimization.add_argument(
        "--min-lr-ratio",
        type=_share,
        default=0.1,
        help="learning rate at the last step, as a share of --lr",
    )
    optimization.add_argument(
        "--beta1", type=_decay_rate, default=0.9, help="decay of the gradient's mean, per step"
    )
    optimization.add_argument(
        "--beta2", type=_decay_rate, default=0.95, help="decay of the gradient's square, per step"
    )
    optimization.add_argument(
        "--eps", type=_non_negative, default=1e-8, help="AdamW's added denominator"
    )
    optimization.add_argument(
        "--weight-decay",
        type=_non_negative,
        default=0.1,
        help="decay of the matrices, times the learning rate; norms and biases have none",
    )
    optimization.add_argument(
        "--decay-embeddings", action="store_true", help="apply weight decay to embeddings too"
    )
    optimization.add_argument(
        "--grad-clip",
        type=_non_negative,
        default=1.0,
        help="largest norm of the gradient; 0 for no clipping",
    )
    optimization.add_argument(
        "--seed",
        type=_seed,
        default=0,
        help="seed of the weights, random masks, data order, dropout and sample",
    )

    compute = parser.add_argument_group("device and precision")
    compute.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="auto takes a GPU if there is one",
    )
    compute.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="dtype of the parameters",
    )
    compute.add_argument(
        "--autocast",
        action=argparse.BooleanOptionalAction,
        help="compute in bfloat16 where safe (default: on for CUDA, off for CPU)",
        default=argparse.SUPPRESS,
    )
    compute.add_argument(
        "--master-weights",
        action="store_true",
        help="keep float32 copies of bfloat16 parameters in the optimizer (method slope)",
    )
    compute.add_argument(
        "--half-moments",
        action="store_true",
        help="keep AdamW's moments of bfloat16 parameters in bfloat16, as method dense always does "
        "(no effect on float32 ones)",
    )
    compute.add_argument("--compile", action="store_true", help="run the model by torch.compile")
    compute.add_argument(
        "--deterministic",
        action="store_true",
        help="PyTorch's deterministic algorithms: on a GPU too, runs alike give the same bits; "
        "slower",
    )

    output = parser.add_argument_group("evaluation and output")
    output.add_argument(
        "--output-dir",
        default=argparse.SUPPRESS,
        help="directory of everything that the run writes (default: runs/MODEL-METHOD)",
    )
    output.add_argument(
        "--resume",
        default="auto",
        help="auto: from the newest whole checkpoint, if any; never: start anew and delete the "
        "checkpoints in --output-dir; or the path of a checkpoint: the later ones in --output-dir, "
        "or all if it is none of these, are deleted once the run has saved again",
    )
    output.add_argument(
        "--stop-after",
        type=_count,
        metavar="STEP",
        help="save and stop at this step, to be resumed later",
    )
    output.add_argument(
        "--save-interval", type=_count, default=500, help="steps between checkpoints"
    )
    output.add_argument(
        "--keep-checkpoints", type=_count, default=2, help="newest checkpoints to keep"
    )
    output.add_argument(
        "--eval-interval",
        type=_count,
        default=500,
        help="steps between evaluations on the validation split (and one at the end)",
    )
    output.add_argument(
        "--eval-batches",
        type=_count,
        default=20,
        help="batches of --batch-size sequences per evaluation, at most",
    )
    output.add_argument(
        "--tensorboard", action="store_true", help="log to OUTPUT_DIR/tensorboard as well"
    )
    output.add_argument(
        "--sample-prompt", default="", help="text that the sample at the end continues"
    )
    output.add_argument(
        "--sample-tokens", type=_count, default=200, help="tokens of the sample, at most"
    )
    return parser


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse and check the command line; raises :class:`UsageError` naming the argument."""
    parser = build_parser()
    if parser.parse_args(argv).demo:
        parser.set_defaults(**DEMO)
    args = parser.parse_args(argv)
    if not 0 < args.valid_fraction < 1:
        parser.error("argument --valid-fraction: must lie between 0 and 1, both excluded")
    if args.adapter_fraction == 0:
        parser.error("argument --adapter-fraction: must be above 0; --adapter-rank 0 means none")
    if args.warmup_steps >= args.steps:
        parser.error(
            f"argument --warmup-steps: {args.warmup_steps} is not below --steps {args.steps}"
        )
    if args.master_weights and args.method == "dense":
        parser.error("argument --master-weights: only with --method slope")
    if args.master_weights and args.half_moments:
        parser.error("argument --half-moments: not with --master-weights")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: this PyTorch finds no CUDA device")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if "autocast" not in args:
        args.autocast = args.device == "cuda"
    if "backward_copy" not in args:
        cast = args.autocast and args.dtype == "float32"
        args.backward_copy = "recompute" if cast else "cached"
    if "output_dir" not in args:
        args.output_dir = f"runs/{short_name(args.model)}-{args.method}"
    return args


def require_same(saved: dict[str, Any], args: argparse.Namespace) -> None:
    """Refuse to resume with other arguments than the run was started with.

    Raises :class:`UsageError` naming the first argument that would change the losses.
    """
    for name, value in vars(args).items():
        if name not in _FREE_ON_RESUME and name in saved and saved[name] != value:
            option = "--" + name.replace("_", "-")
            raise UsageError(
                f"{option} {value}: the run in {args.output_dir} has {option} {saved[name]}; "
                "use that, another --output-dir, or --resume never"
            )
