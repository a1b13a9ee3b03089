# SPDX-License-Identifier: Apache-2.0
"""Lazy low-rank adapters: added to a model late in training.

Source: arXiv 2405.16325, section 3.2.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from slope_ext import _freshness
from slope_ext.sparse_layer import named_sparse_layers, qualified_name

_NAMES = "param_names"  # what torch's optimizers call parameters that were given with names


class LazyAdapters:
    """Adds adapters to every sparse layer of a model for the last fraction of the steps.

    Build it before any learning-rate scheduler: it adds a parameter group, empty at first, to the
    optimizer, which the scheduler then drives like the others. Call :meth:`step` once per optimizer
    step, before the forward pass. At the switch it fills that group with the adapters (B = 0: the
    loss does not jump).

    To resume, load this object's state before the optimizer's, or the model's before that: either
    adds the adapters if the checkpoint was past the switch, so that the rest fits. What was made
    for the model's parameters before (an AveragedModel, say) must be made anew after the switch.

    A step captured into a CUDA graph before the switch goes on without the adapters: capture one
    anew, after a step that was not captured. The switch warns of it if any step was captured.

    With DistributedDataParallel pass the module inside, and wrap it again after the step that
    returns True: DDP reduces only the parameters that it saw when it wrapped.

    Args:
        model: a converted model.
        optimizer: the optimizer of its parameters.
        rank: of every adapter, 1 or more.
        total_steps: optimizer steps of the whole run.
        fraction: of the steps that train adapters, in (0, 1]; 0.01 in the paper. At least one step.
        scale: factor of the low-rank term.
        group: options of the adapters' parameter group (``lr``, ``weight_decay``, ...); what is
            missing is taken from the optimizer's first group.

    Raises:
        ValueError: an argument is out of range, ``model`` is wrapped by DDP or sharded, or the
            optimizer has a scheduler already or is a ZeroRedundancyOptimizer; the message names the
            argument.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        rank: int,
        total_steps: int,
        fraction: float = 0.01,
        scale: float = 1.0,
        group: dict[str, Any] | None = None,
    ) -> None:
        if rank < 1:
            raise ValueError(f"LazyAdapters: rank must be at least 1, got {rank}")
        if total_steps < 1:
            raise ValueError(f"LazyAdapters: total_steps must be at least 1, got {total_steps}")
        if not 0 < fraction <= 1:
            raise ValueError(f"LazyAdapters: fraction must be in (0, 1], got {fraction}")
        if isinstance(model, nn.parallel.DistributedDataParallel):
            raise ValueError(
                "LazyAdapters: model must be the module inside DistributedDataParallel; "
                "wrap that again after the step that adds the adapters"
            )
        if "ZeroRedundancyOptimizer" in [kind.__name__ for kind in type(optimizer).__mro__]:
            raise ValueError(
                "LazyAdapters: optimizer must not be a ZeroRedundancyOptimizer, which deals out "
                "parameters when a group is added and would never see the adapters"
            )
        if any(is_traceable_wrapper_subclass(p) for p in model.parameters()):
            raise ValueError(
                "LazyAdapters: model must not be sharded: nothing would reduce the gradients of "
                "adapters that are added later; add_adapter to its layers before fully_shard"
            )
        if not named_sparse_layers(model):
            raise ValueError(
                "LazyAdapters: model has no sparse layer; call slope_ext.convert first"
            )
        if any("initial_lr" in existing for existing in optimizer.param_groups):
            raise ValueError(
                "LazyAdapters: optimizer has a learning-rate scheduler already; build that after"
            )
        self.model = model
        self.rank = rank
        self.scale = scale
        self.switch_step = total_steps - max(1, round(total_steps * fraction))
        self.steps = 0
        self.active = False
        self.optimizer = optimizer
        self._group_index = len(optimizer.param_groups)
        options = {**optimizer.param_groups[0], **(group or {}), "params": []}
        if _NAMES in options:  # all groups have names or none
            options[_NAMES] = []
        inner: Any = optimizer  # of a wrapper such as accelerate's, which has no hooks
        while inner is not None and not hasattr(inner, "_optimizer_load_state_dict_pre_hooks"):
            inner = getattr(inner, "optimizer", None)
        if inner is not None:
            inner.register_load_state_dict_pre_hook(self._before_optimizer_loads)
        optimizer.add_param_group(options)

    def step(self) -> bool:
        """Counts one optimizer step; returns True if it is the one that adds the adapters."""
        switching = not self.active and self.steps >= self.switch_step
        if switching and _freshness.step_was_captured():
            warnings.warn(
                "LazyAdapters: a step was captured into a CUDA graph before the adapters were "
                "there; if it is of this model, take one step and capture another: replays of the "
                "first do not train them",
                stacklevel=2,
            )
        if switching:
            self.activate()
        self.steps += 1
        return switching

    def activate(self) -> None:
        """Adds the adapters now. Layers that have one (loaded from a checkpoint) keep it.

        It leaves the group of the optimizer that it is in for that of the others.
        """
        # Not kept from __init__: load_state_dict of an optimizer makes new groups.
        group = self.optimizer.param_groups[self._group_index]
        known = {id(factor) for factor in group["params"]}
        added: dict[int, str] = {}
        for name, layer in named_sparse_layers(self.model):
            if not layer.has_adapter:
                layer.add_adapter(self.rank, self.scale)
            for factor in ("lora_A", "lora_B"):
                parameter = layer.get_parameter(factor)
                if id(parameter) not in known:
                    added[id(parameter)] = qualified_name(name, factor)
                    group["params"].append(parameter)
        if _NAMES in group:
            group[_NAMES] += added.values()
        for other in self.optimizer.param_groups:
            if other is not group:
                kept = [
                    i for i, parameter in enumerate(other["params"]) if id(parameter) not in added
                ]
                for listed in ("params", _NAMES):
                    if listed in other:
                        other[listed] = [other[listed][i] for i in kept]
        self.active = True

    def _before_optimizer_loads(
        self, optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]
    ) -> None:
        groups = state_dict["param_groups"]
        past_the_switch = len(groups) > self._group_index and groups[self._group_index]["params"]
        if past_the_switch and not self.active:
            self.activate()

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "active": self.active, "rank": self.rank, "scale": self.scale}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the count of steps, and the adapters if the checkpoint had them.

        Raises:
            ValueError: the checkpoint's rank differs from this object's, or it has no adapters
                where they are there already.
        """
        if self.active and not state["active"]:
            raise ValueError(
                "LazyAdapters: the checkpoint is of before the switch, but the adapters are there; "
                "load it into a model and an optimizer without"
            )
        if state["active"] and state["rank"] != self.rank:
            raise ValueError(
                f"LazyAdapters: rank is {self.rank}, but the checkpoint has {state['rank']}"
            )
        self.steps = state["steps"]
        self.scale = state["scale"]
        if state["active"] and not self.active:
            self.activate()
