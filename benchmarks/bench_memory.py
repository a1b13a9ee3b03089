# SPDX-License-Identifier: Apache-2.0
"""Bytes of the training state of whole models, counted from shapes and dtypes; needs no GPU.

Weights, masks, metadata as on a GPU of capability 9.0, backward copy, gradients and two moments per
parameter, bf16 weights. All linear layers of the decoder are 2:4; "linears" is them alone, "whole"
is the model with its dense embeddings, norms and head at full cost.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_args

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import harness
import slope_ext
from slope_ext._check import dtype_name
from slope_ext.linear import BackwardCopy
from slope_ext.memory import memory_report
from slope_ext.recipes.models import SIZES

VOCABULARY = {
    **{"LLaMA-3-8B": 128256, "Mistral-7B": 32000},
    **dict.fromkeys(("OPT-2.7B", "OPT-6.7B", "OPT-13B", "OPT-30B", "OPT-66B"), 50272),
}


def converted_on_meta(name: str, backward_copy: BackwardCopy = "cached") -> nn.Module:
    """A whole model with every linear layer of its decoder 2:4, on the meta device."""
    config = AutoConfig.for_model(**SIZES[name.lower()], vocab_size=VOCABULARY[name])
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config).bfloat16()
    return slope_ext.convert(model, slope_ext.SlopeConfig(backward_copy=backward_copy))


def bench(run: harness.Run) -> Iterator[harness.Record]:
    """Records of every model, backward copy and type of moments."""
    for name in run.first(list(VOCABULARY), 1):
        for backward_copy in get_args(BackwardCopy):
            model = converted_on_meta(name, backward_copy)
            linears = [m for m in model.modules() if isinstance(m, slope_ext.SLoPeLinear)]
            for part, module in (("linears", nn.ModuleList(linears)), ("whole", model)):
                for moments in (torch.float32, torch.bfloat16):
                    report = memory_report(module, moments=moments, on_gpu=True)
                    yield harness.bytes_record(
                        bench="train_memory",
                        case=f"{name};{part};{backward_copy};moments={dtype_name(moments)};state",
                        dtype=torch.bfloat16,
                        tokens=0,
                        ours=report.training,
                        baseline="dense",
                        theirs=report.dense_training,
                    )


if __name__ == "__main__":
    harness.main("memory", __doc__, bench, needs_gpu=False)
