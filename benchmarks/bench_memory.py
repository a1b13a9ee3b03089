# SPDX-License-Identifier: Apache-2.0
"""Bytes of the training state of whole models, counted from shapes and dtypes; needs no GPU.

Weights, masks, metadata as on a GPU of capability 9.0, backward copy, gradients and two moments per
parameter, bf16 weights. All linear layers of the decoder are 2:4; "linears" is them alone, "whole"
is the model with its dense embeddings, norms and head at full cost.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

import harness
import slope_ext
from slope_ext.memory import memory_report

OPT_13B = {
    "hidden_size": 5120,
    "ffn_dim": 20480,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
}
OPT_66B = {
    "hidden_size": 9216,
    "ffn_dim": 36864,
    "num_hidden_layers": 64,
    "num_attention_heads": 72,
}
LLAMA_8B = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256,
    "num_attention_heads": 32, "num_key_value_heads": 8,
}  # fmt: skip
MODELS: dict[str, tuple[Any, Any]] = {
    "LLaMA-3-8B": (LlamaForCausalLM, LlamaConfig(**LLAMA_8B)),
    "OPT-13B": (OPTForCausalLM, OPTConfig(word_embed_proj_dim=5120, **OPT_13B)),
    "OPT-66B": (OPTForCausalLM, OPTConfig(word_embed_proj_dim=9216, **OPT_66B)),
}


def bench(run: harness.Run) -> Iterator[harness.Record]:
    """Records of every model, backward copy and type of moments."""
    for name, (model_type, config) in run.first(list(MODELS.items()), 1):
        for backward_copy in ("cached", "recompute"):
            with torch.device("meta"):
                model = model_type(config).bfloat16()
            slope_ext.convert(model, slope_ext.SlopeConfig(backward_copy=backward_copy))
            linears = [m for m in model.modules() if isinstance(m, slope_ext.SLoPeLinear)]
            for part, module in (("linears", nn.ModuleList(linears)), ("whole", model)):
                for moments in (torch.float32, torch.bfloat16):
                    report = memory_report(module, moments=moments, on_gpu=True)
                    yield harness.bytes_record(
                        bench="train_memory",
                        case=f"{name};{part};{backward_copy};moments={str(moments)[6:]};state",
                        dtype=torch.bfloat16,
                        tokens=0,
                        ours=report.training,
                        baseline="dense",
                        theirs=report.dense_training,
                    )


if __name__ == "__main__":
    harness.main("memory", __doc__, bench, needs_gpu=False)
