# SPDX-License-Identifier: Apache-2.0
"""Lazy low-rank adapters: added to a model late in training.

Source: arXiv 2405.16325, section 3.2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from slope_ext.sparse_layer import SparseLayer


class LazyAdapters:
    """Adds adapters to every sparse layer of a model for the last fraction of the steps.

    Call :meth:`step` once per optimizer step, before the forward pass. At the switch it adds the
    adapters (B = 0: the loss does not jump) and a parameter group for them to the optimizer.

    To resume, load this object's state first: it adds the adapters and their group if the
    checkpoint was past the switch, so that the model's and the optimizer's state fit.

    Args:
        model: a converted model.
        optimizer: the optimizer of its parameters.
        rank: of every adapter, 1 or more.
        total_steps: optimizer steps of the whole run.
        fraction: of the steps that train adapters, in (0, 1]; 0.01 in the paper. At least one step.
        scale: factor of the low-rank term.
        group: options of the adapters' parameter group (``lr``, ``weight_decay``, ...); what is
            missing is taken from the optimizer's first group.
        scheduler: a torch LRScheduler that should drive the new group as it drives the first.

    Raises:
        ValueError: an argument is out of range; the message names it.
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
        scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
    ) -> None:
        if rank < 1:
            raise ValueError(f"LazyAdapters: rank must be at least 1, got {rank}")
        if total_steps < 1:
            raise ValueError(f"LazyAdapters: total_steps must be at least 1, got {total_steps}")
        if not 0 < fraction <= 1:
            raise ValueError(f"LazyAdapters: fraction must be in (0, 1], got {fraction}")
        if not _sparse_layers(model):
            raise ValueError(
                "LazyAdapters: model has no sparse layer; call slope_ext.convert first"
            )
        self.model = model
        self.optimizer = optimizer
        self.rank = rank
        self.scale = scale
        self.group = group or {}
        self.scheduler = scheduler
        self.switch_step = total_steps - max(1, round(total_steps * fraction))
        self.steps = 0
        self.active = False

    def step(self) -> bool:
        """Counts one optimizer step; returns True if it is the one that adds the adapters."""
        switching = not self.active and self.steps >= self.switch_step
        if switching:
            self.activate()
        self.steps += 1
        return switching

    def activate(self) -> None:
        """Adds the adapters now. Layers that have one (loaded from a checkpoint) keep it."""
        layers = _sparse_layers(self.model)
        for layer in layers:
            if not layer.has_adapter:
                layer.add_adapter(self.rank, self.scale)
        known = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        factors = [factor for layer in layers for factor in (layer.lora_A, layer.lora_B)]
        new = [factor for factor in factors if id(factor) not in known]
        if new:
            self._add_group(new)
        self.active = True

    def _add_group(self, factors: list[Any]) -> None:
        first = self.optimizer.param_groups[0]
        options = {key: value for key, value in first.items() if key != "params"}
        self.optimizer.add_param_group({**options, **self.group, "params": factors})
        if self.scheduler is not None:
            added = self.optimizer.param_groups[-1]
            added["initial_lr"] = self.group.get("lr", first["initial_lr"])
            # As far along its schedule as the first group is.
            added["lr"] = added["initial_lr"] * first["lr"] / first["initial_lr"]
            self.scheduler.base_lrs.append(added["initial_lr"])
            if isinstance(self.scheduler, torch.optim.lr_scheduler.LambdaLR):
                self.scheduler.lr_lambdas.append(self.scheduler.lr_lambdas[0])

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "active": self.active, "rank": self.rank, "scale": self.scale}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the count of steps, and the adapters if the checkpoint had them.

        Raises:
            ValueError: the checkpoint's rank differs from this object's.
        """
        if state["active"] and state["rank"] != self.rank:
            raise ValueError(
                f"LazyAdapters: rank is {self.rank}, but the checkpoint has {state['rank']}"
            )
        self.steps = state["steps"]
        self.scale = state["scale"]
        if state["active"] and not self.active:
            self.activate()


def _sparse_layers(model: nn.Module) -> list[SparseLayer]:
    return [module for module in model.modules() if isinstance(module, SparseLayer)]
