# SPDX-License-Identifier: Apache-2.0
"""Mixed calls from two threads on two streams, every result checked, memory watched.

    PYTHONPATH=. python scripts/stress.py [--calls 100000] [--out tests/stress_report.json]

Each call takes a layer, a token count and an op at random; its result is compared on the GPU with
one computed beforehand, products in fp64. Layers are of every shape, in bf16 and fp16, by the own
product and by plans where these take them, else by what "auto" takes. Memory is looked at after
each fifth of the calls. Exit code 1 if a result is wrong, device memory grew after the first fifth,
or host memory after the second (by then every plan is made), by more than the allocators' own
granularity.
"""

from __future__ import annotations

import argparse
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
from slope_ext import _packed, ops, plan_cache
from slope_ext.ops.spmm import Backend

SHAPES = [(128, 192), (256, 256), (64, 512), (512, 64), (320, 96), (80, 48), (1536, 2048)]
TOKENS = [1, 7, 8, 16, 33, 64, 100, 256]
PHASES = 5
DEVICE_SLACK, HOST_SLACK = 32 << 20, 32 << 20  # bytes


class Expected:
    """A result, computed in fp64 and rounded."""

    def __init__(self, result: Tensor) -> None:
        self.result = result
        self.allowed = 0.02 * result.abs().amax()

    def misses(self, actual: Tensor) -> Tensor:
        """Whether ``actual``, the first rows of the result, is off; NaN is."""
        off = (actual - self.result[: actual.shape[0]]).abs_().amax()
        return ~(off <= self.allowed)


class Case:
    """A layer, inputs for the largest token count, and what must come out."""

    def __init__(self, rows: int, columns: int, dtype: torch.dtype, backend: Backend) -> None:
        self.layer = slope.SLoPeLinear(columns, rows, device="cuda", dtype=dtype, backend=backend)
        self.layer.add_adapter(8, scale=0.5)
        torch.nn.init.normal_(self.layer.lora_B, std=0.1)
        self.layer.requires_grad_(False)
        self.layer.prepare()
        self.x = torch.randn(max(TOKENS), columns, device="cuda").to(dtype)
        self.dy = torch.randn(max(TOKENS), rows, device="cuda").to(dtype)
        layer = self.layer
        x, dy = self.x.double(), self.dy.double()
        y = x @ layer.dense_weight().double().t() + layer.bias.double()
        low_rank = 0.5 * (x @ layer.lora_A.double().t()) @ layer.lora_B.double().t()
        self.y = Expected(y.to(dtype))
        self.y_lowrank = Expected((y + low_rank).to(dtype))
        self.dx = Expected((dy @ layer.backward_weight().double()).to(dtype))
        self.dw = {n: Expected(self._weight_grad(dy[:n], x[:n])) for n in TOKENS}
        self.dense = layer.dense_weight()
        # Of this weight, whose masks need not be the layer's, since its zeros are ties
        self.pruned = ops.prune_compress_transposed(self.dense)
        assert layer.weight_t is not None
        self.values_t = layer.weight_t.clone()
        self.packed = ops.pack(layer.weight, layer.weight_bitmask)

    def _weight_grad(self, dy: Tensor, x: Tensor) -> Tensor:
        dense = (dy.t() @ x).to(self.layer.weight.dtype)
        return ops.compress(dense, self.layer.weight_bitmask)

    def call(self, op: str, tokens: int) -> Tensor:
        """Runs one op; returns a bool scalar: was it wrong?"""
        layer, x, dy = self.layer, self.x[:tokens], self.dy[:tokens]
        weight = (layer.weight, layer.weight_bitmask)
        if op == "linear":
            return self.y.misses(ops.linear(x, *layer.operand()))
        if op == "linear_lowrank":
            return self.y_lowrank.misses(layer(x))
        if op == "input_grad":
            dx = ops.input_grad(
                dy,
                *weight,
                layer.weight_t_bitmask,
                layer.weight_t,
                layer.weight_t_metadata,
                backend=layer.backend,
            )
            return self.dx.misses(dx)
        if op == "weight_grad":
            return self.dw[tokens].misses(ops.weight_grad(dy, x, layer.weight_bitmask))
        if op == "decompress":
            return (ops.decompress(*weight) != self.dense).any()
        if op == "prune_compress":
            return differ(ops.prune_compress(self.dense), self.pruned[:2])
        if op == "prune_compress_transposed":
            return differ(ops.prune_compress_transposed(self.dense), self.pruned)
        if op == "double_prune_":
            values, bitmask, values_t, bitmask_t = self.pruned
            found = torch.zeros_like(bitmask_t), torch.full_like(values_t, 7)
            ops.double_prune_(values, bitmask, *found)
            return differ(found, (bitmask_t, values_t))
        if op == "transpose_values":
            out = torch.full_like(self.values_t, 7)
            ops.transpose_values(*weight, layer.weight_t_bitmask, out)
            return (out != self.values_t).any()
        assert op == "pack"
        return (ops.pack(*weight) != self.packed).any()


OPS = (
    *("linear", "linear_lowrank", "input_grad", "weight_grad", "transpose_values", "pack"),
    *("decompress", "prune_compress", "prune_compress_transposed", "double_prune_"),
)


def differ(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> Tensor:
    """Whether any of some tensors is not what it should be."""
    pairs = zip(found, expected, strict=True)
    return torch.stack([(ours != theirs).any() for ours, theirs in pairs]).any()


def make_cases() -> list[Case]:
    """All layers; a backend that does not take a shape, forward and backward, is left out."""
    device = torch.device("cuda", torch.cuda.current_device())
    cases = []
    for rows, columns in SHAPES:
        for dtype in (torch.bfloat16, torch.float16):
            kinds: tuple[Backend, ...] = ("native", "cusparselt")
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

    def __init__(self, cases: list[Case], calls: int, seed: int, phase: threading.Barrier) -> None:
        super().__init__()
        self.cases, self.calls, self.phase = cases, calls // PHASES, phase
        self.choose = random.Random(seed).choice
        self.stream = torch.cuda.Stream()
        self.wrong = torch.zeros((), dtype=torch.int64, device="cuda")
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
            for _ in range(PHASES):
                for number in range(self.calls):
                    op = self.choose(OPS)
                    self.wrong += self.choose(self.cases).call(op, self.choose(TOKENS))
                    self.counts[op] += 1
                    if number % 500 == 0:
                        self.stream.synchronize()
                self.stream.synchronize()
                self.phase.wait()  # the main thread looks at memory
                self.phase.wait()


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
    phase = threading.Barrier(3)
    workers = [Worker(cases, arguments.calls // 2, seed, phase) for seed in (1, 2)]
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
    wrong = sum(int(worker.wrong) for worker in workers)
    result = {
        "calls": sum(sum(worker.counts.values()) for worker in workers),
        "by_op": {op: sum(worker.counts[op] for worker in workers) for op in OPS},
        "layers": dict(Counter(case.layer.backend for case in cases)),
        "wrong": wrong,
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
    return int(wrong > 0 or device[-1] > DEVICE_SLACK or host[-1] - host[1] > HOST_SLACK)


if __name__ == "__main__":
    sys.exit(main())
