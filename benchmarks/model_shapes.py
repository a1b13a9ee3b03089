# SPDX-License-Identifier: Apache-2.0
"""Weights [out, in] of the linear layers of known models, and those that targets are set on.

The layers as Hugging Face's models have them: query, key, value and output projections are four
layers (none of these models fuses them), and so are the gate and the up projection.
"""

from __future__ import annotations

Shape = tuple[int, int]  # out, in

# The shapes that targets are set on: projections of LLaMA-3-8B, OPT-13B and OPT-66B.
BAR_SHAPES: list[Shape] = [
    (4096, 4096),
    (14336, 4096),
    (4096, 14336),
    (20480, 5120),
    (5120, 20480),
    (9216, 9216),
]


def _opt(hidden: int) -> dict[str, Shape]:
    return {
        "q, k, v, o": (hidden, hidden),
        "up": (4 * hidden, hidden),
        "down": (hidden, 4 * hidden),
    }


def _llama(hidden: int, intermediate: int, key_value: int) -> dict[str, Shape]:
    return {
        "q, o": (hidden, hidden),
        "k, v": (key_value, hidden),
        "gate, up": (intermediate, hidden),
        "down": (hidden, intermediate),
    }


MODELS: dict[str, dict[str, Shape]] = {
    "OPT-2.7B": _opt(2560),
    "OPT-6.7B": _opt(4096),
    "OPT-13B": _opt(5120),
    "OPT-30B": _opt(7168),
    "OPT-66B": _opt(9216),
    "LLaMA-3-8B": _llama(4096, 14336, 1024),
    "LLaMA-3-70B": _llama(8192, 28672, 1024),
    "Mistral-7B": _llama(4096, 14336, 1024),
}


def adapter_rank(features: int) -> int:
    """The rank that is 1.56 % of ``features``, rounded up to a multiple of 8."""
    return -(-features * 156 // 10000 // 8) * 8


def users() -> dict[Shape, list[str]]:
    """Every shape once, with the layers that have it, e.g. ``["OPT-13B up"]``."""
    found: dict[Shape, list[str]] = {}
    for model, layers in MODELS.items():
        for layer, shape in layers.items():
            found.setdefault(shape, []).append(f"{model} {layer}")
    return found
