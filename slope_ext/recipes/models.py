# SPDX-License-Identifier: Apache-2.0
"""Causal language models by size name or Hugging Face config file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from slope_ext.recipes import UsageError


def _opt(hidden: int, layers: int, heads: int, **extra: Any) -> dict[str, Any]:
    return {
        "model_type": "opt",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "ffn_dim": 4 * hidden,
        "word_embed_proj_dim": hidden,
        "max_position_embeddings": 2048,
        **extra,
    }


def _gpt2(hidden: int, layers: int, heads: int) -> dict[str, Any]:
    return {"model_type": "gpt2", "n_embd": hidden, "n_layer": layers, "n_head": heads}


def _llama(hidden: int, ffn: int, layers: int, heads: int, **extra: Any) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": 2048,
        **extra,
    }


# The published dimensions, but for the vocabulary, which comes from the tokenizer.
SIZES: dict[str, dict[str, Any]] = {
    "llama-demo": _llama(256, 768, 4, 4, tie_word_embeddings=False),
    "llama-25m": _llama(384, 1024, 8, 6, tie_word_embeddings=True),
    "llama-100m": _llama(768, 2048, 12, 12, tie_word_embeddings=True),
    "llama-2-7b": _llama(4096, 11008, 32, 32, max_position_embeddings=4096, rms_norm_eps=1e-5),
    "llama-2-13b": _llama(5120, 13824, 40, 40, max_position_embeddings=4096, rms_norm_eps=1e-5),
    "llama-3-8b": _llama(
        4096,
        14336,
        32,
        32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
    ),
    "mistral-7b": _llama(
        4096,
        14336,
        32,
        32,
        model_type="mistral",
        num_key_value_heads=8,
        max_position_embeddings=32768,
        sliding_window=4096,
        rms_norm_eps=1e-5,
    ),
    "opt-125m": _opt(768, 12, 12),
    "opt-350m": _opt(1024, 24, 16, word_embed_proj_dim=512, do_layer_norm_before=False),
    "opt-1.3b": _opt(2048, 24, 32),
    "opt-2.7b": _opt(2560, 32, 32),
    "opt-6.7b": _opt(4096, 32, 32),
    "opt-13b": _opt(5120, 40, 40),
    "opt-30b": _opt(7168, 48, 56),
    "opt-66b": _opt(9216, 64, 72),
    "gpt2": _gpt2(768, 12, 12),
    "gpt2-medium": _gpt2(1024, 24, 16),
    "gpt2-large": _gpt2(1280, 36, 20),
    "gpt2-xl": _gpt2(1600, 48, 25),
}


def short_name(name: str) -> str:
    """What ``--model`` is called in titles and paths: the size, or the config's file name."""
    return Path(name.removesuffix(".json")).name


def model_config(name: str, vocab_size: int, end_of_text: int, seq_len: int) -> Any:
    """The Hugging Face config for ``--model``: a name in :data:`SIZES` or a config.json.

    Raises :class:`UsageError` for an unknown name, a file that is no model config, or a
    ``seq_len`` (tokens) beyond the model's positions.
    """
    from transformers import AutoConfig

    tokens = {
        "vocab_size": vocab_size,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        # Batches have no padding, and nn.Embedding would freeze the row of a padding token.
        "pad_token_id": None,
    }
    if name in SIZES:
        config = AutoConfig.for_model(**SIZES[name], **tokens)
    elif Path(name).exists():
        try:
            config = AutoConfig.from_pretrained(name, local_files_only=True)
        except Exception as error:  # transformers raises many kinds for a bad file
            reason = str(error).strip().splitlines()[0]
            raise UsageError(f"--model {name}: not a model config ({reason})") from error
        for key, value in tokens.items():
            setattr(config, key, value)
    else:
        raise UsageError(
            f"--model {name}: neither a config.json nor one of the sizes {', '.join(SIZES)}"
        )
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and seq_len > positions:
        raise UsageError(f"--seq-len {seq_len}: --model {name} has {positions} positions")
    return config


def build_model(config: Any, dtype: torch.dtype, gradient_checkpointing: bool) -> nn.Module:
    """A causal LM with fresh weights in ``dtype``, drawn from torch's global generator.

    Raises :class:`UsageError` where transformers has no such model, or none with sdpa attention.
    """
    from transformers import AutoModelForCausalLM

    try:
        model: nn.Module = AutoModelForCausalLM.from_config(
            config, attn_implementation="sdpa", dtype=dtype
        )
    except ValueError as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(f"--model: no causal LM of type {config.model_type} ({reason})") from error
    if gradient_checkpointing:
        # The older name warns where transformers has the newer one.
        name = "activation_checkpointing_enable"
        enable: Any = getattr(model, name, None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    return model


def decay_groups(
    model: nn.Module, weight_decay: float, decay_embeddings: bool
) -> list[dict[str, Any]]:
    """Parameter groups for AdamW: matrices decay, norms and biases do not.

    Embeddings (and a head tied to them) decay only with ``decay_embeddings``.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for parameter in model.parameters():
        decays = parameter.ndim >= 2 and (decay_embeddings or id(parameter) not in embeddings)
        groups[decays].append(parameter)
    return [
        {"params": groups[True], "weight_decay": weight_decay},
        {"params": groups[False], "weight_decay": 0.0},
    ]
