# SPDX-License-Identifier: Apache-2.0
"""Mixed calls from two threads on two streams, every result checked, memory watched.

    PYTHONPATH=. python scripts/stress.py [--calls 100000] [--out tests/stress_report.json]

Each call takes a layer, a token count and an op at random; its result is compared on the GPU with
one computed beforehand, products in fp64. One of them is a step of training, forward, backward and
AdamW, of a layer that the thread has for itself; its result is computed then. Layers are of random
shapes, in bf16 and fp16, by the own product and by plans where these take them, else by what "auto"
takes. At first each thread runs every product once with every token count, which makes its plans.
Memory is looked at after each fifth of the calls. Exit code 1 if a result is wrong, or device or
host memory grew after the first fifth by more than the allocators' own granularity.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import random
import resource
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import torch
from gpu_report import source_hash
from torch import Tensor

import slope_ext as slope
from slope_ext import _packed, ops, plan_cache, reference
from slope_ext.ops.spmm import Backend

SHAPES = 24
ODD_SHAPES = [(80, 48), (40, 136)]  # that plans alone take, and neither
LARGE_SHAPE = (17408, 1280)  # 256 tokens: the product in two kernels; dW in chunks on two streams
PLANS_IN_FP16 = 2  # shapes; cuSPARSELt takes 0.2 s for each product, of each thread
TOKENS = [1, 7, 8, 16, 33, 64, 100, 256]
PHASES = 5
THREADS = ("first", "second")
DEVICE_SLACK, HOST_SLACK = 32 << 20, 32 << 20  # bytes
LR, BETA1, BETA2, EPS, DECAY = 0.02, 0.9, 0.95, 1e-8, 0.1  # a step moves a weight by many ulp
MASK_INTERVAL = 5
SCALE = 0.5  # of adapters

OPS = (
    *("linear", "linear_lowrank", "input_grad", "input_grad_lowrank", "weight_grad"),
    *("weight_grad_add_", "compress", "decompress", "prune_24", "prune_compress"),
    *("prune_compress_transposed", "prune_transposed", "double_prune_", "transpose_values"),
    *("pack", "pack_metadata", "train"),
)
PRODUCTS = ("linear", "linear_lowrank", "input_grad", "input_grad_lowrank", "train")


class Expected:
    """A result, computed in fp64 and rounded."""

    def __init__(self, result: Tensor) -> None:
        self.result = result
        self.allowed = 0.02 * result.abs().amax()

    def misses(self, actual: Tensor) -> Tensor:
        """Whether ``actual``, the first rows of the result, is off; NaN is."""
        off = (actual - self.result[: actual.shape[0]]).abs_().amax()
        return ~(off <= self.allowed)


def differ(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> Tensor:
    """Whether any of some tensors is not what it should be."""
    pairs = zip(found, expected, strict=True)
    return torch.stack([(ours != theirs).any() for ours, theirs in pairs]).any()


def products(
    layer: slope.SLoPeLinear, x: Tensor, dy: Tensor, dense: Tensor, backward: Tensor
) -> tuple[Tensor, ...]:
    """fp64 Y without and with the adapter, dX without and with it, of weights [out, in]."""
    x, dy, a, b = (tensor.double() for tensor in (x, dy, layer.lora_A, layer.lora_B))
    y = x @ dense.double().t() + layer.bias.double()
    dx = dy @ backward.double()
    return y, y + SCALE * (x @ a.t()) @ b.t(), dx, dx + SCALE * (dy @ b) @ a


class Trained:
    """A copy of a layer that one thread trains."""

    def __init__(self, layer: slope.SLoPeLinear) -> None:
        self.layer = copy.deepcopy(layer)
        self.layer.weight.requires_grad_()
        self.layer.prepare()
        self.optimizer = slope.optim.AdamW(
            [self.layer.weight],
            lr=LR,
            betas=(BETA1, BETA2),
            eps=EPS,
            weight_decay=DECAY,
            mask_interval=MASK_INTERVAL,
        )
        self.steps = 0


class Case:
    """A layer, inputs for the largest token count, and what must come out.

    A public method is one of OPS, run with so many tokens; it returns whether that was wrong.
    """

    def __init__(self, rows: int, columns: int, dtype: torch.dtype, backend: Backend) -> None:
        self.layer = slope.SLoPeLinear(columns, rows, device="cuda", dtype=dtype, backend=backend)
        self.layer.add_adapter(8, scale=SCALE)
        torch.nn.init.normal_(self.layer.lora_B, std=0.1)
        self.layer.requires_grad_(False)
        self.layer.prepare()
        self.x = torch.randn(max(TOKENS), columns, device="cuda").to(dtype)
        self.dy = torch.randn(max(TOKENS), rows, device="cuda").to(dtype)
        layer = self.layer
        self.weight = (layer.weight, layer.weight_bitmask)
        self.dense = layer.dense_weight()
        results = products(layer, self.x, self.dy, self.dense, layer.backward_weight())
        self._y, self._y_lowrank, self._dx, self._dx_lowrank = (
            Expected(result.to(dtype)) for result in results
        )
        x, dy = self.x.double(), self.dy.double()
        self._dw = {n: Expected(self._weight_grad(dy[:n], x[:n])) for n in TOKENS}
        # Of this weight, whose masks need not be the layer's, since its zeros are ties
        self.pruned = ops.prune_compress_transposed(self.dense)
        assert layer.weight_t is not None
        self.values_t = layer.weight_t.clone()
        self.ops = list(OPS)
        if _packed.is_packable(rows, columns, dtype, self.x.device):
            self.packed = ops.pack(*self.weight)
        else:
            self.ops.remove("pack")
        if columns % 32 == 0:
            self.words = _packed.empty_words(rows, columns, self.x.device)
            ops.pack_metadata(layer.weight_bitmask, self.words)
        else:
            self.ops.remove("pack_metadata")
        self.trained = {name: Trained(layer) for name in THREADS}

    def __str__(self) -> str:
        rows, columns = self.dense.shape
        return f"{rows}x{columns} {self.dense.dtype} {self.layer.backend}"

    def _weight_grad(self, dy: Tensor, x: Tensor) -> Tensor:
        dense = (dy.t() @ x).to(self.layer.weight.dtype)
        return ops.compress(dense, self.layer.weight_bitmask)

    def _backward_operand(self) -> tuple[Tensor | None, ...]:
        layer = self.layer
        return (*self.weight, layer.weight_t_bitmask, layer.weight_t, layer.weight_t_metadata)

    # ---- products --------------------------------------------------------------------------------

    def linear(self, tokens: int) -> Tensor:
        return self._y.misses(ops.linear(self.x[:tokens], *self.layer.operand()))

    def linear_lowrank(self, tokens: int) -> Tensor:
        return self._y_lowrank.misses(self.layer(self.x[:tokens]))

    def input_grad(self, tokens: int) -> Tensor:
        dy, backend = self.dy[:tokens], self.layer.backend
        dx = torch.ops.slope.input_grad(dy, *self._backward_operand(), backend)
        return self._dx.misses(dx)

    def input_grad_lowrank(self, tokens: int) -> Tensor:
        layer, dy = self.layer, self.dy[:tokens]
        values, bitmask, bitmask_t, *copies = self._backward_operand()
        adapter = (layer.lora_A, layer.lora_B, SCALE)
        dx, _ = torch.ops.slope.input_grad_lowrank(
            dy, values, bitmask, bitmask_t, *adapter, *copies, layer.backend
        )
        return self._dx_lowrank.misses(dx)

    def weight_grad(self, tokens: int) -> Tensor:
        dw = ops.weight_grad(self.dy[:tokens], self.x[:tokens], self.layer.weight_bitmask)
        return self._dw[tokens].misses(dw)

    def weight_grad_add_(self, tokens: int) -> Tensor:
        grad = torch.zeros_like(self.layer.weight)
        ops.weight_grad_add_(grad, self.dy[:tokens], self.x[:tokens], self.layer.weight_bitmask)
        return self._dw[tokens].misses(grad)

    # ---- forms of a weight -----------------------------------------------------------------------

    def compress(self, _: int) -> Tensor:
        return (ops.compress(self.dense, self.layer.weight_bitmask) != self.layer.weight).any()

    def decompress(self, _: int) -> Tensor:
        return (ops.decompress(*self.weight) != self.dense).any()

    def prune_24(self, _: int) -> Tensor:
        return (ops.prune_24(self.dense.abs()) != self.pruned[1]).any()

    def prune_compress(self, _: int) -> Tensor:
        return differ(ops.prune_compress(self.dense), self.pruned[:2])

    def prune_compress_transposed(self, _: int) -> Tensor:
        return differ(ops.prune_compress_transposed(self.dense), self.pruned)

    def prune_transposed(self, _: int) -> Tensor:
        return (ops.prune_transposed(*self.pruned[:2]) != self.pruned[3]).any()

    def double_prune_(self, _: int) -> Tensor:
        values, bitmask, values_t, bitmask_t = self.pruned
        found = torch.zeros_like(bitmask_t), torch.full_like(values_t, 7)
        ops.double_prune_(values, bitmask, *found)
        return differ(found, (bitmask_t, values_t))

    def transpose_values(self, _: int) -> Tensor:
        out = torch.full_like(self.values_t, 7)
        ops.transpose_values(*self.weight, self.layer.weight_t_bitmask, out)
        return (out != self.values_t).any()

    def pack(self, _: int) -> Tensor:
        return (ops.pack(*self.weight) != self.packed).any()

    def pack_metadata(self, _: int) -> Tensor:
        words = torch.full_like(self.words, 7)
        ops.pack_metadata(self.layer.weight_bitmask, words)
        return (words != self.words).any()

    # ---- training --------------------------------------------------------------------------------

    def train(self, tokens: int) -> Tensor:
        """One step of this thread's copy of the layer."""
        trained = self.trained[threading.current_thread().name]
        layer, optimizer = trained.layer, trained.optimizer
        x, dy = self.x[:tokens].requires_grad_(), self.dy[:tokens]
        weight, masks = layer.weight, (layer.weight_bitmask, layer.weight_t_bitmask)
        dense = layer.dense_weight()
        kept = ops.decompress(torch.ones_like(self.values_t), masks[1]).t()
        moved = weight.detach().to(torch.float32, copy=True)
        state = optimizer.state[weight]
        moments = [
            state[key].clone() if state else torch.zeros_like(moved)
            for key in ("exp_avg", "exp_avg_sq")
        ]
        with torch.enable_grad():
            y = layer(x)
        y.backward(dy)
        assert weight.grad is not None
        assert x.grad is not None
        gradient = weight.grad.float()
        optimizer.step()
        weight.grad = None
        trained.steps += 1

        _, wanted, _, wanted_dx = products(layer, x, dy, dense, dense * kept)
        reference.adamw_(
            *([moved], [gradient], [moments[0]], [moments[1]], []),
            [torch.tensor(float(trained.steps))],
            *([], [], []),
            lr=LR,
            beta1=BETA1,
            beta2=BETA2,
            eps=EPS,
            weight_decay=DECAY,
        )
        ulps = 2 * torch.finfo(weight.dtype).eps
        off = (weight.detach().float() - moved).abs()
        checks = [
            Expected(wanted.to(y.dtype)).misses(y),
            Expected(wanted_dx.to(y.dtype)).misses(x.grad),
            self._dw[tokens].misses(gradient),
            ~(off <= ulps * moved.abs() + 1e-5).all(),
        ]
        if trained.steps % MASK_INTERVAL == 0:
            chosen = ops.prune_transposed(weight.detach(), masks[0])
            checks.append((layer.weight_t_bitmask != chosen).any())
        return torch.stack(checks).any()


def make_cases() -> list[Case]:
    """All layers; a backend that does not take a shape, forward and backward, is left out."""
    device = torch.device("cuda", torch.cuda.current_device())
    draw = random.Random(0).randint
    shapes = [(16 * draw(1, 96), 32 * draw(1, 48)) for _ in range(SHAPES)]
    shapes += [*ODD_SHAPES, LARGE_SHAPE]
    cases = []
    for number, (rows, columns) in enumerate(shapes):
        for dtype in (torch.bfloat16, torch.float16):
            plans = dtype == torch.bfloat16 or number < PLANS_IN_FP16
            kinds: tuple[Backend, ...] = ("native", "cusparselt") if plans else ("native",)
            taken: list[Backend] = [
                kind
                for kind in kinds
                if _packed.backend_of(rows, columns, dtype, device, kind) == kind
                and _packed.backend_of(columns, rows, dtype, device, kind) == kind
            ]
            cases += [Case(rows, columns, dtype, backend) for backend in taken or ["auto"]]
    return cases


class Worker(threading.Thread):
    """A thread with a stream of its own that makes its calls in PHASES equal parts."""

    def __init__(self, name: str, cases: list[Case], calls: int, phase: threading.Barrier) -> None:
        super().__init__(name=name)
        self.cases, self.calls, self.phase = cases, calls // PHASES, phase
        self.choose = random.Random(name).choice
        self.stream = torch.cuda.Stream()
        self.wrong = torch.zeros(len(cases), len(OPS), dtype=torch.int64, device="cuda")
        self.counts = dict.fromkeys(OPS, 0)

    def run(self) -> None:
        try:
            self._run()
        except BaseException:
            self.phase.abort()  # the main thread waits there
            raise

    def _run(self) -> None:
        self.stream.wait_stream(torch.cuda.default_stream())
        with torch.cuda.stream(self.stream), torch.no_grad():
            for number in range(len(self.cases)):
                for op in PRODUCTS:
                    for tokens in TOKENS:
                        self._call(number, op, tokens)
            for _ in range(PHASES):
                for call in range(self.calls):
                    number = self.choose(range(len(self.cases)))
                    op = self.choose(self.cases[number].ops)
                    self._call(number, op, self.choose(TOKENS))
                    self.counts[op] += 1
                    if call % 500 == 0:
                        self.stream.synchronize()
                self.stream.synchronize()
                self.phase.wait()  # the main thread looks at memory
                self.phase.wait()

    def _call(self, number: int, op: str, tokens: int) -> None:
        self.wrong[number, OPS.index(op)] += getattr(self.cases[number], op)(tokens)


def memory() -> tuple[int, int]:
    """Bytes of the process: in use on the device, and resident on the host."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    resident = int(Path("/proc/self/statm").read_text().split()[1])
    return total - free, resident * resource.getpagesize()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--calls", type=int, default=100_000)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    plan_cache.set_policy("off")
    torch.manual_seed(0)
    cases = make_cases()

    start = time.perf_counter()
    phase = threading.Barrier(len(THREADS) + 1)
    workers = [Worker(name, cases, arguments.calls // 2, phase) for name in THREADS]
    for worker in workers:
        worker.start()
    samples = []
    for _ in range(PHASES):
        phase.wait()
        samples.append(memory())
        phase.wait()
    for worker in workers:
        worker.join()
    device, host = ([sample[i] - samples[0][i] for sample in samples] for i in range(2))
    wrong = torch.stack([worker.wrong for worker in workers]).sum(0).tolist()
    total = sum(map(sum, wrong))
    result = {
        "calls": sum(sum(worker.counts.values()) for worker in workers),
        "by_op": {op: sum(worker.counts[op] for worker in workers) for op in OPS},
        "layers": dict(Counter(case.layer.backend for case in cases)),
        "wrong": total,
        "wrong_where": {
            f"{op} of {case}": row[i]
            for case, row in zip(cases, wrong, strict=True)
            for i, op in enumerate(OPS)
            if row[i] > 0
        },
        "plans": plan_cache.info()["plans"],
        "device_growth_bytes": device,
        "host_growth_bytes": host,
        "host_bytes": samples[-1][1],
        "seconds": round(time.perf_counter() - start, 1),
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "sources": source_hash(),
    }
    print(json.dumps(result))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    return int(total > 0 or device[-1] > DEVICE_SLACK or host[-1] > HOST_SLACK)


if __name__ == "__main__":
    sys.exit(main())
