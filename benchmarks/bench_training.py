# SPDX-License-Identifier: Apache-2.0
"""A whole training step of decoder layers: forward, backward, optimizer; dense and 2:4.

As many layers of a Hugging Face model as LAYERS says, so that all methods fit beside each other,
and of four as many as dense and 2:4 let fit (DEEP); 8192 tokens (for some models 16384 too, for
OPT-2.7B 2048) in sequences of 2048, bf16, the input's gradient included, embeddings and head left
out. Methods, each with AdamW whose moments are bf16 (torch's fused kernel keeps no other for bf16
parameters):

dense           torch.optim.AdamW(fused=True)
slope           every linear layer 2:4, OPT's ReLU in the product's kernel,
                slope_ext.optim.AdamW(half_moments=True)
slope;recompute the same with backward_copy="recompute"
slope;r=...     the same with adapters of that rank, 1.56 or 6.25 % of hidden, as in the last 1 % of
                steps
torch-2:4       every linear layer by torch's own 2:4 training: a 4x4 transposable mask chosen anew
                in each step, products by torch._cslt_sparse_mm with searched algorithms; eager
                only

slope;ckpt      and dense;ckpt, eager, of the models in CHECKPOINTED: a layer is computed again in
                backward but for what slope_ext.sac_save_list() names

dense and slope eager, compiled (torch.compile of every layer, fullgraph) and captured: that, and
the whole step as one CUDA graph; with few tokens also eager with backward in the thread that calls
it instead of autograd's ("eager-one-thread"); dense also with the optimizer's step compiled by
torch.compile, which moves bytes faster than the fused kernel, and that captured. The baseline is
the fastest dense one in the same turns; captured steps have turns of their own, against dense ones,
captured and not (", beside captured").

train_step      time of a step; limit: the FLOPs of its products at the rates of this run
train_rate      tokens per second through these layers
train_mfu       the FLOPs of the dense products and of causal attention, of all methods alike, over
                time and the dense peak of the data sheet, so that pruned ones count as done
train_phase     forward, backward, optimizer of steps in a row, captured ones left out; baseline:
                dense, compiled, optimizer too
train_memory    most memory in use during a step: weights, optimizer, activations, gradients; those
                exist in the second half of the step only, or, "accumulating", from an earlier
                backward pass on; "state": what stays after a step, gradients included, without the
                step's input; "requested": without what the allocator rounds up; baseline: dense,
                run the same way
"""

from __future__ import annotations

import functools
import gc
import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding
from transformers.models.mistral.modeling_mistral import (
    MistralDecoderLayer,
    MistralRotaryEmbedding,
)
from transformers.models.opt.modeling_opt import OPTDecoderLayer

import harness
import slope_ext
from model_shapes import adapter_rank
from slope_ext.recipes.models import SIZES

LENGTH = 2048  # of a sequence, tokens
STEPS = 4  # of a timed turn
ROUNDS = 7
PHASES = ("forward", "backward", "optimizer")
PEAK_FLOPS = {"NVIDIA H100 80GB HBM3": 989.4e12, "NVIDIA H200": 989.4e12}  # bf16, dense, SXM
PEAKS = {"peak": False, "peak, accumulating": True}  # whether gradients of an earlier pass exist
# What is counted of a peak, and by which statistics of the allocator.
BYTES = {"": "allocated_bytes.all", ", requested": "requested_bytes.all"}
OPTIMIZER = "-optimizer"  # ends the name of what has the optimizer's step compiled
ONE_THREAD = "-one-thread"  # ends that of what runs backward in the thread that calls it
FEW_TOKENS = 2048  # with which the host may be what a step waits for
CHECKPOINT = ";ckpt"  # ends that of what computes activations again
# Layers that are run.
LAYERS = {
    "LLaMA-3-8B": 2, "OPT-66B": 1, "OPT-13B": 2, "OPT-30B": 1, "OPT-6.7B": 3, "OPT-2.7B": 4,
    "Mistral-7B": 2,
}  # fmt: skip
# By model type: a decoder layer, and what makes its position embeddings.
PARTS: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaDecoderLayer, LlamaRotaryEmbedding),
    "mistral": (MistralDecoderLayer, MistralRotaryEmbedding),
    "opt": (OPTDecoderLayer, None),
}
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Workload:
    """Some layers of a model and what goes through them in a step."""

    model: str
    tokens: int
    layers: int

    @property
    def label(self) -> str:
        """What a record's case begins with."""
        return f"{self.model};layers={self.layers}"

    @property
    def common(self) -> dict[str, Any]:
        """What all its records have."""
        return {"dtype": DTYPE, "tokens": self.tokens}


WORKLOADS = [
    *(Workload(model, 8192, layers) for model, layers in LAYERS.items()),
    *(Workload(model, 16384, LAYERS[model]) for model in ("LLaMA-3-8B", "OPT-13B")),
    Workload("OPT-2.7B", FEW_TOKENS, LAYERS["OPT-2.7B"]),  # is the host fast enough?
]
DEEP = [
    Workload(model, 8192, layers)
    for model, layers in (("LLaMA-3-8B", 16), ("OPT-66B", 3), ("OPT-30B", 5), ("OPT-13B", 10))
]
CHECKPOINTED = [Workload("LLaMA-3-8B", 8192, 8), Workload("OPT-13B", 8192, 5)]


# ---- models --------------------------------------------------------------------------------------


class Layers(nn.Module):
    """Decoder layers of a model, from hidden states to hidden states."""

    def __init__(self, model: str, count: int) -> None:
        super().__init__()
        sizes = SIZES[model.lower()] | {"max_position_embeddings": LENGTH, "use_cache": False}
        config = AutoConfig.for_model(**sizes, dropout=0.0)
        config._attn_implementation = "sdpa"
        self.hidden = self.hidden_of(model)
        layer, rotary = PARTS[config.model_type]
        self.rotary: nn.Module | None = None if rotary is None else rotary(config)
        self.layers = nn.ModuleList(layer(config, layer_idx=i) for i in range(count))
        self.context_fn: Callable[[], Any] | None = None  # of a checkpoint for each layer

    @staticmethod
    def hidden_of(model: str) -> int:
        """The hidden size of a model."""
        return int(SIZES[model.lower()]["hidden_size"])

    def forward(self, x: Tensor) -> Tensor:
        options: dict[str, Any] = {"attention_mask": None}
        if self.rotary is not None:
            positions = torch.arange(LENGTH, device=x.device)[None]
            options["position_embeddings"] = self.rotary(x, positions)
        if self.context_fn is not None:
            options |= {"use_reentrant": False, "context_fn": self.context_fn}
        for layer in self.layers:
            run = layer if self.context_fn is None else functools.partial(checkpoint, layer)
            y = run(x, **options)
            x = y[0] if isinstance(y, tuple) else y
        return x


class _TorchTwoFour(torch.autograd.Function):
    """Y = X W^T + b with the 4x4-pruned W; the gradient of W passes straight through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, layer: Any) -> Tensor:
        pruned = SparseSemiStructuredTensorCUSPARSELT.prune_dense_static_sort(weight)
        ctx.layer, ctx.has_bias = layer, bias is not None
        ctx.save_for_backward(x, pruned.packed_t)
        y: Tensor = layer.product("forward", pruned.packed, x, bias)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, packed_t = ctx.saved_tensors
        dx = ctx.layer.product("backward", packed_t, dy)
        return dx, dy.t() @ x, dy.sum(0) if ctx.has_bias else None, None


class TorchTwoFourLinear(nn.Linear):
    """torch's 2:4 training, as fully sparse training with transposable masks does it.

    Products by the algorithms that torch's search finds for the two of them, kept from their first
    calls: the default one takes up to 1.5 times as long. Metadata are in Ampere's order, so that on
    Hopper this has the time of right results only.
    """

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        y: Tensor = _TorchTwoFour.apply(rows, self.weight, self.bias, self)  # type: ignore[no-untyped-call]
        return y.view(*x.shape[:-1], -1)

    def product(self, which: str, packed: Tensor, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """X W^T + b of a packed W, which is "forward" or "backward"."""
        algorithms: dict[str, int] = self.__dict__.setdefault("algorithms", {})
        if which not in algorithms:
            algorithms[which] = torch._cslt_sparse_mm_search(
                packed, x.t(), bias=bias, transpose_result=True
            )
        return torch._cslt_sparse_mm(
            packed, x.t(), bias=bias, transpose_result=True, alg_id=algorithms[which]
        )


def model_flops(model: Layers, tokens: int) -> float:
    """FLOPs of a step of the dense model: its linear layers, and attention below the diagonal."""
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    weights = sum(module.in_features * module.out_features for module in linears)
    attention = 2 * LENGTH / 2 * model.hidden * len(model.layers)  # scores, and values by them
    return 3 * 2 * tokens * (weights + attention)


def product_seconds(model: nn.Module, tokens: int, run: harness.Run) -> float:
    """Least time of the products of a step: sparse ones at twice the rate of dense ones."""
    flops = 0.0
    for module in model.modules():
        if isinstance(module, nn.Linear):
            dense = 2.0 * tokens * module.in_features * module.out_features
            flops += 3 * dense
            if isinstance(module, TorchTwoFourLinear):
                flops -= dense
            if isinstance(module, slope_ext.SLoPeLinear):
                flops -= dense
                rank = 0 if module.lora_A is None else module.lora_A.shape[0]
                flops += 6.0 * tokens * rank * (module.in_features + module.out_features)
    return flops / run.matmul_rate


# ---- methods -------------------------------------------------------------------------------------


def quiet_stats() -> dict[str, int]:
    """The allocator's statistics when nothing runs and nothing waits to be freed."""
    gc.collect()  # earlier models, and steps of torch's 2:4 tensors, leave cycles
    torch.cuda.synchronize()
    torch._C._cuda_clearCublasWorkspaces()  # of other streams; a step makes its own
    return torch.cuda.memory_stats()


class Method:
    """A model, its optimizer, and a step of both."""

    def __init__(self, name: str, work: Workload, how: str, rank: int | None = None) -> None:
        torch.manual_seed(0)
        self.name, self.how, self.label = name, how, f"{name};{how}"
        self.is_captured = how.startswith("captured")
        with torch.device("cuda"):
            self.model = Layers(work.model, work.layers).to(DTYPE).train()
            x = torch.randn(work.tokens // LENGTH, LENGTH, self.model.hidden)
            self.x = x.to(DTYPE).requires_grad_()
            self.dy = torch.randn_like(self.x)
        options: dict[str, Any] = {"lr": 1e-5, "betas": (0.9, 0.95), "weight_decay": 0.1}
        if name == "torch-2:4":
            for module in self.model.modules():
                if type(module) is nn.Linear:
                    module.__class__ = TorchTwoFourLinear
        if not name.startswith("slope"):
            params = self.model.parameters()
            kernel: Any = {"foreach" if how.endswith(OPTIMIZER) else "fused": True}
            capturable = self.is_captured or how.endswith(OPTIMIZER)
            self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(
                params, capturable=capturable, **kernel, **options
            )
        else:
            copy: Any = "recompute" if name == "slope;recompute" else "cached"
            config = slope_ext.SlopeConfig(backward_copy=copy, fuse=["relu"])
            slope_ext.convert(self.model, config)
            for layer in self.model.modules():
                if rank is not None and isinstance(layer, slope_ext.SLoPeLinear):
                    layer.add_adapter(rank)
            self.optimizer = slope_ext.optim.AdamW(
                self.model.parameters(), half_moments=True, **options
            )
        if name.endswith(CHECKPOINT):
            self.model.context_fn = functools.partial(
                create_selective_checkpoint_contexts, slope_ext.sac_save_list()
            )
        if not how.startswith("eager"):
            for layer in self.model.layers.children():
                layer.compile(fullgraph=True)
        self.optimize: Callable[[], Any] = self.optimizer.step
        if how.endswith(OPTIMIZER):
            self.optimize = torch.compile(self.optimizer.step)
        self.run: Callable[[], None] = self.step

    def step(self) -> None:
        """One training step."""
        self.forget_gradients()
        self.backward(self.model(self.x))
        self.optimize()

    def backward(self, y: Tensor) -> None:
        """The backward pass from the model's result on."""
        with torch.autograd.set_multithreading_enabled(not self.how.endswith(ONE_THREAD)):
            y.backward(self.dy)

    def forget_gradients(self) -> None:
        """As before a step."""
        self.optimizer.zero_grad(set_to_none=True)
        self.x.grad = None

    def prepare(self) -> None:
        """Compiles, warms up, captures."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.step()
            if self.is_captured:
                self.forget_gradients()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        if self.is_captured:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.backward(self.model(self.x))
                self.optimize()
            self.run = graph.replay

    def state(self) -> dict[str, int]:
        """Bytes in use between steps, as ``peak`` counts them, but for the step's input."""
        stats = quiet_stats()
        assert self.x.grad is not None
        inputs = sum(tensor.nbytes for tensor in (self.x, self.dy, self.x.grad))
        return {kind: stats[f"{name}.current"] - inputs for kind, name in BYTES.items()}

    def peak(self, accumulating: bool) -> dict[str, int]:
        """Most bytes in use during a step, of each of BYTES, those of other methods included."""
        quiet_stats()
        torch.cuda.reset_peak_memory_stats()
        if accumulating:  # onto the gradients of the step before
            self.backward(self.model(self.x))
            self.optimize()
        else:
            self.step()
        torch.cuda.synchronize()
        stats = torch.cuda.memory_stats()
        return {kind: stats[f"{name}.peak"] for kind, name in BYTES.items()}


# ---- records -------------------------------------------------------------------------------------


def turns(methods: list[Method]) -> Iterator[tuple[Method, bool]]:
    """Methods in shuffled order, again and again; and whether a turn counts: the first do not."""
    order = list(methods)
    shuffle = random.Random(0).shuffle
    for turn in range(-1, ROUNDS):
        shuffle(order)
        yield from ((method, turn >= 0) for method in order)


def time_methods(methods: list[Method]) -> dict[str, harness.Timing]:
    """Seconds of a step of each, in turns of STEPS steps."""
    samples: dict[str, list[float]] = {method.label: [] for method in methods}
    for method, counts in turns(methods):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        method.run()
        start.record()
        for _ in range(STEPS):
            method.run()
        end.record()
        torch.cuda.synchronize()
        if counts:
            samples[method.label].append(start.elapsed_time(end) / 1e3 / STEPS)
    return {name: harness.timing_of(values) for name, values in samples.items()}


def time_phases(methods: list[Method]) -> dict[str, dict[str, harness.Timing]]:
    """Seconds of the phases of a step of each, in the same turns."""
    samples: dict[str, dict[str, list[float]]] = {
        method.label: {phase: [] for phase in PHASES} for method in methods
    }
    for method, counts in turns(methods):
        steps = [
            [torch.cuda.Event(enable_timing=True) for _ in range(len(PHASES) + 1)]
            for _ in range(1 + STEPS)
        ]
        for start, forward, backward, end in steps:
            start.record()
            method.forget_gradients()
            y = method.model(method.x)
            forward.record()
            method.backward(y)
            backward.record()
            method.optimize()
            end.record()
        torch.cuda.synchronize()
        for events in steps[1:] if counts else ():
            for phase, (first, last) in zip(PHASES, itertools.pairwise(events), strict=True):
                samples[method.label][phase].append(first.elapsed_time(last) / 1e3)
    return {
        name: {phase: harness.timing_of(values) for phase, values in phases.items()}
        for name, phases in samples.items()
    }


def _rounded(value: float, relative_spread: float, digits: int) -> tuple[float, float]:
    """A value and its spread, to so many digits."""
    return round(value, digits), round(value * relative_spread, digits)


Peaks = dict[str, dict[str, int]]  # by method and kind, bytes


def prepared(name: str, work: Workload, how: str, peaks: Peaks, rank: int | None = None) -> Method:
    """A method that is ready to run, when its peaks are known."""
    before = quiet_stats()
    method = Method(name, work, how, rank)
    method.prepare()
    used = {"state": method.state()}
    used |= {kind: method.peak(accumulating) for kind, accumulating in PEAKS.items()}
    peaks[method.label] = {
        kind + counted: most - before[f"{BYTES[counted]}.current"]
        for kind, of_kind in used.items()
        for counted, most in of_kind.items()
    }
    return method


def bench_model(work: Workload, run: harness.Run) -> Iterator[harness.Record]:
    """Records of one workload but for captured steps."""
    torch._dynamo.reset()
    methods: list[Method] = []
    peaks: Peaks = {}
    hidden = Layers.hidden_of(work.model)
    ranks = (adapter_rank(hidden), hidden // 16)
    wanted: list[tuple[str, str, int | None]] = [
        *(("dense", how, None) for how in ("eager", "compiled", "compiled-optimizer")),
        *(("slope", how, None) for how in ("eager", "compiled")),
        ("slope;recompute", "compiled", None),
        *((f"slope;r={rank}", "compiled", rank) for rank in ranks),
    ]
    if work.tokens <= FEW_TOKENS:
        wanted += [(name, "eager" + ONE_THREAD, None) for name in ("dense", "slope")]

    for name, how, its_rank in wanted:
        methods.append(prepared(name, work, how, peaks, its_rank))
    try:
        methods.append(prepared("torch-2:4", work, "eager", peaks))
    except RuntimeError as error:
        harness.say_left_out("torch 2:4", error)
        peaks.pop("torch-2:4;eager", None)

    yield from step_records(methods, work, run)
    phases = time_phases(methods)
    for name, phase in itertools.product(phases, PHASES):
        yield harness.time_record(
            bench="train_phase",
            case=f"{work.label};{name};{phase}",
            ours=phases[name][phase],
            baseline="dense;compiled-optimizer",
            theirs=phases["dense;compiled-optimizer"][phase],
            **work.common,
        )
    yield from memory_records(peaks, work)


def memory_records(peaks: Peaks, work: Workload) -> Iterator[harness.Record]:
    """Most bytes in use of each method, against dense run the same way."""
    for name, of_name in peaks.items():
        if not name.startswith("dense"):
            method, _, how = name.rpartition(";")
            baseline = f"dense{CHECKPOINT if method.endswith(CHECKPOINT) else ''};{how}"
            for kind, most in of_name.items():
                yield harness.bytes_record(
                    bench="train_memory",
                    case=f"{work.label};{name};{kind}",
                    ours=most,
                    baseline=baseline,
                    theirs=peaks[baseline][kind],
                    **work.common,
                )


def bench_deep(work: Workload, run: harness.Run) -> Iterator[harness.Record]:
    """Records of a workload of many layers, compiled, dense and 2:4."""
    torch._dynamo.reset()
    rank = adapter_rank(Layers.hidden_of(work.model))
    wanted: list[tuple[str, str, int | None]] = [
        *(("dense", how, None) for how in ("compiled", "compiled-optimizer")),
        ("slope", "compiled", None),
        (f"slope;r={rank}", "compiled", rank),
    ]
    peaks: Peaks = {}
    methods: list[Method] = []
    for name, how, its_rank in wanted:
        try:
            methods.append(prepared(name, work, how, peaks, its_rank))
        except torch.OutOfMemoryError as error:
            harness.say_left_out(f"{work.label};{name}", error)
            break
    if len(methods) < len(wanted) - 1:
        return
    yield from step_records(methods, work, run)
    yield from memory_records(peaks, work)


def bench_checkpointed(work: Workload, run: harness.Run) -> Iterator[harness.Record]:
    """Records of eager steps with and without checkpoints of activations."""
    torch._dynamo.reset()
    peaks: Peaks = {}
    for end in ("", CHECKPOINT):
        methods = [prepared(f"{name}{end}", work, "eager", peaks) for name in ("dense", "slope")]
        yield from step_records(methods, work, run)
    yield from memory_records(peaks, work)


def bench_captured(work: Workload, run: harness.Run) -> Iterator[harness.Record]:
    """Records of a workload's captured steps, and of a dense one that is not."""
    torch._dynamo.reset()
    gc.collect()
    hows = ["compiled" + OPTIMIZER, "captured" + OPTIMIZER]
    if work not in DEEP:  # those leave no room
        hows.append("captured")
    methods: list[Method] = []
    try:
        for name, how in (*(("dense", how) for how in hows), ("slope", "captured")):
            methods.append(Method(name, work, how))
            methods[-1].prepare()
    except torch.OutOfMemoryError as error:
        harness.say_left_out(f"{work.label};captured", error)
        return
    methods[0].label += ", beside captured"
    yield from step_records(methods, work, run)


def step_records(
    methods: list[Method], work: Workload, run: harness.Run
) -> Iterator[harness.Record]:
    """Times of a step, tokens per second and MFU, in turns against each other."""
    timings = time_methods(methods)
    limits = {method.name: product_seconds(method.model, work.tokens, run) for method in methods}
    best = min((n for n in timings if n.startswith("dense")), key=lambda n: timings[n].median)
    for name, timing in timings.items():
        yield harness.time_record(
            bench="train_step",
            case=f"{work.label};{name}",
            ours=timing,
            baseline=best,
            theirs=timings[best],
            limit=limits[name.rpartition(";")[0]],
            **work.common,
        )
    rates = [("train_rate", "tokens per second", "/s", float(work.tokens), 0)]
    if peak := PEAK_FLOPS.get(torch.cuda.get_device_name()):
        per_cent = 100 * model_flops(methods[0].model, work.tokens) / peak
        rates.append(("train_mfu", "model FLOPs utilization", "%", per_cent, 1))
    for name, timing in timings.items():
        ours, theirs = ((t.median, t.iqr / t.median) for t in (timing, timings[best]))
        for bench_name, metric, unit, done, digits in rates:
            yield harness.record_of(
                bench=bench_name,
                case=f"{work.label};{name}",
                metric=metric,
                unit=unit,
                ours=_rounded(done / ours[0], ours[1], digits),
                baseline=best,
                theirs=_rounded(done / theirs[0], theirs[1], digits),
                ratio=round(theirs[0] / ours[0], 3),
                **work.common,
            )


def bench(run: harness.Run) -> Iterator[harness.Record]:
    """Records of all workloads; captured steps last: after one no backward copy counts as fresh."""
    workloads = run.own(run.first(WORKLOADS, 2))
    deep = run.own([] if run.quick else DEEP)
    for bench_of, works in (
        (bench_model, workloads),
        (bench_deep, deep),
        (bench_checkpointed, run.own([] if run.quick else CHECKPOINTED)),
        (bench_captured, [*workloads, *deep]),
    ):
        for work in works:
            yield from bench_of(work, run)
            torch.cuda.empty_cache()


if __name__ == "__main__":
    harness.main("training", __doc__, bench, parts=True)
