# SPDX-License-Identifier: Apache-2.0
"""Selective activation checkpointing: which results are worth keeping."""

from __future__ import annotations

import torch
from torch._ops import OpOverload


def sac_save_list() -> list[OpOverload]:
    """Ops whose results to keep when the rest of a layer is computed again in backward.

    The products (ours, torch's dense ones) and attention: what is left is cheap. For torch's
    selective checkpointing::

        context_fn = functools.partial(
            torch.utils.checkpoint.create_selective_checkpoint_contexts, slope.sac_save_list()
        )
        y = checkpoint(layer, x, use_reentrant=False, context_fn=context_fn)
    """
    aten, slope = torch.ops.aten, torch.ops.slope
    return [
        slope.linear.default,
        slope.linear_lowrank.default,
        aten.mm.default,
        aten.addmm.default,
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
    ]
