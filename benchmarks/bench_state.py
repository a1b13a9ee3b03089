# SPDX-License-Identifier: Apache-2.0
"""The training state of a whole 13B model, measured on a GPU and held against the count.

OPT-13B is made and converted on the meta device, so that it is dense nowhere, gets its memory and
random weights on the GPU layer by layer, and trains for two steps of 512 tokens: bf16 weights, fp32
moments, cached backward copies.

state         bytes in use between steps, gradients there; baseline: as memory_report counts them;
              the rest is workspaces of cuBLAS and rounding of the allocator
setting up    most bytes in use until all layers have their weights; baseline: the count of weights,
              masks, metadata and backward copies
a step        most bytes in use during the second step; baseline: the count for the dense model
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

import harness
import slope_ext
from bench_memory import VOCABULARY, converted_on_meta
from slope_ext.memory import memory_report

MODEL, TOKENS = "OPT-13B", 512


def set_up(name: str) -> nn.Module:
    """A converted model on the GPU with random weights."""
    model = converted_on_meta(name)
    model.to_empty(device="cuda")
    model.tie_weights()  # type: ignore[operator]
    for module in model.modules():
        if isinstance(module, (slope_ext.SLoPeLinear, nn.Embedding, nn.LayerNorm)):
            module.reset_parameters()
    return model.train()


def bench(run: harness.Run) -> Iterator[harness.Record]:
    """Records of one model."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model = set_up(MODEL)
    peaks = {"setting up": torch.cuda.max_memory_allocated() - before}
    optimizer = slope_ext.optim.AdamW(model.parameters(), lr=1e-5)
    tokens = torch.randint(VOCABULARY[MODEL], (1, TOKENS), device="cuda")
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        optimizer.zero_grad(set_to_none=True)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
    peaks["a step"] = torch.cuda.max_memory_allocated() - before
    if not loss.isfinite():
        raise RuntimeError(f"{MODEL}: the loss is {loss.item()}")
    del loss
    peaks["state"] = torch.cuda.memory_allocated() - before
    report = memory_report(model)
    baselines = {
        "state": ("counted", report.training),
        "setting up": ("counted", report.weights + report.backward_copy),
        "a step": ("dense, counted", report.dense_training),
    }
    for kind, (baseline, counted) in baselines.items():
        yield harness.bytes_record(
            bench="train_state",
            case=f"{MODEL};whole;cached;moments=float32;{kind}",
            dtype=torch.bfloat16,
            tokens=TOKENS,
            ours=peaks[kind],
            baseline=baseline,
            theirs=counted,
        )


if __name__ == "__main__":
    harness.main("state", __doc__, bench)
