# SPDX-License-Identifier: Apache-2.0
"""2:4 sparse pretraining, fine-tuning and inference of LLMs on compressed weights.

import slope_ext as slope

slope.convert(model)                                    # nn.Linear -> SLoPeLinear, in place
opt = slope.optim.AdamW(model.parameters(), lr=3e-4)    # or any torch optimizer
"""

from slope_ext import ops, optim, plan_cache
from slope_ext._library import is_available
from slope_ext._version import __version__
from slope_ext.accumulation import accumulate_in_place
from slope_ext.adapters import LazyAdapters
from slope_ext.checkpointing import sac_save_list
from slope_ext.convert import SlopeConfig, SlopeConversionWarning, convert, to_dense
from slope_ext.linear import SLoPeLinear
from slope_ext.simulate import MaskedLinear
from slope_ext.sparse_layer import (
    end_mask_broadcasts,
    load_transposed_masks,
    transposed_masks,
    update_transposed_masks,
)

__all__ = [
    "LazyAdapters",
    "MaskedLinear",
    "SLoPeLinear",
    "SlopeConfig",
    "SlopeConversionWarning",
    "__version__",
    "accumulate_in_place",
    "convert",
    "end_mask_broadcasts",
    "is_available",
    "load_transposed_masks",
    "ops",
    "optim",
    "plan_cache",
    "sac_save_list",
    "to_dense",
    "transposed_masks",
    "update_transposed_masks",
]
