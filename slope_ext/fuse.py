# SPDX-License-Identifier: Apache-2.0
"""What a model does around 2:4 layers, done in their products: SlopeConfig.fuse.

"relu"
    A ReLU after a layer: in ``nn.Sequential``, and ``activation_fn`` after ``fc1`` in Hugging
    Face's OPT layers. What hooks of that layer see is then after the ReLU.
"swiglu"
    In MLPs of Hugging Face's LLaMA family, down_proj(silu(gate_proj(x)) * up_proj(x)): gate and
    up-projection become one layer ``gate_up_proj``, whose rows come in turns, eight of the gate's,
    eight of the up-projection's. x is read once, and where nobody wants a gradient neither of the
    two results is written, only their product. An adapter is one for both.

Modules that have another user, and for "swiglu" hooks, an adapter or tied weights, stay as they
are, and so does the model that is passed itself. Attributes that were set on a gate or an
up-projection are not kept.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from typing import Literal, cast

import torch
from torch import Tensor, nn

from slope_ext.linear import SLoPeLinear

Fusion = Literal["relu", "swiglu"]

TURN = 8  # rows of the gate, then as many of the up-projection; kGateRows of the kernels


def _uses(model: nn.Module) -> Counter[int]:
    """How often modules and Parameters stand in the model, by id."""
    uses = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    for module in model.modules():
        uses.update(id(parameter) for parameter in module._parameters.values())
    return uses


# ---- ReLU ----------------------------------------------------------------------------------------


class ReLUInProduct(nn.Identity):
    """Stands where the ReLU was that the layer before it applies."""


def fuse_relus(model: nn.Module) -> None:
    """Has layers apply the ReLU that follows them."""
    uses = _uses(model)
    for parent in list(model.modules()):
        children = parent._modules
        pairs = [("fc1", "activation_fn")]
        if isinstance(parent, nn.Sequential):
            pairs = list(itertools.pairwise(children))
        for name, next_name in pairs:
            layer, relu = children.get(name), children.get(next_name)
            if (
                isinstance(layer, SLoPeLinear)
                and type(relu) is nn.ReLU
                and uses[id(layer)] == uses[id(relu)] == 1
            ):
                layer.activation = "relu"
                children[next_name] = ReLUInProduct()


# ---- SwiGLU --------------------------------------------------------------------------------------


class SwiGLUMLP(nn.Module):
    """down_proj(gate_up_proj(x)), where gate_up_proj gives silu(gate) * up.

    Args:
        gate_up_proj: [2 * intermediate, hidden], see :mod:`slope_ext.fuse`.
        original: the MLP that this stands for; its down-projection is taken over.
    """

    def __init__(self, gate_up_proj: SLoPeLinear, original: nn.Module) -> None:
        super().__init__()
        self.gate_up_proj = gate_up_proj
        self.down_proj = cast(nn.Module, original.down_proj)
        self.training = original.training
        for name in ("gate_proj", "up_proj", "down_proj"):
            original._modules[name] = None
        self.__dict__["original"] = original  # no child: without parameters, and not in names

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden] -> [..., hidden]."""
        return self.down_proj(self.gate_up_proj(x))  # type: ignore[no-any-return]


def fuse_swiglus(model: nn.Module) -> None:
    """Makes one layer of gate and up-projection."""
    uses = _uses(model)
    for parent in list(model.modules()):
        for name, mlp in list(parent._modules.items()):
            if mlp is not None and _is_swiglu(mlp, uses):
                gate, up = cast(SLoPeLinear, mlp.gate_proj), cast(SLoPeLinear, mlp.up_proj)
                parent._modules[name] = SwiGLUMLP(_in_turns(gate, up), mlp)


def split_swiglus(model: nn.Module) -> None:
    """Takes back what fuse_swiglus did; an adapter becomes two that share their values of A."""
    for parent in list(model.modules()):
        for name, mlp in list(parent._modules.items()):
            if isinstance(mlp, SwiGLUMLP):
                original: nn.Module = mlp.__dict__["original"]
                original.gate_proj, original.up_proj = _apart(mlp.gate_up_proj)
                original.down_proj = mlp.down_proj
                original.training = mlp.training
                parent._modules[name] = original


def _is_swiglu(mlp: nn.Module, uses: Counter[int]) -> bool:
    """Whether ``mlp`` is one of transformers' whose gate and up-projection can be one layer."""
    children = mlp._modules
    if set(children) != {"gate_proj", "up_proj", "down_proj", "act_fn"}:
        return False
    if not type(mlp).__module__.startswith("transformers.models."):
        return False
    gate, up = children["gate_proj"], children["up_proj"]
    activation = children["act_fn"]
    if not (isinstance(gate, SLoPeLinear) and isinstance(up, SLoPeLinear)):
        return False
    alike = all(
        getattr(gate, name) == getattr(up, name)
        for name in ("in_features", "out_features", "backend", "backward_copy", "activation")
    )
    weights = gate.weight.dtype == up.weight.dtype and gate.weight.device == up.weight.device
    trained = gate.weight.requires_grad == up.weight.requires_grad
    return (
        type(activation).__name__ in ("SiLU", "SiLUActivation")
        and alike
        and weights
        and trained
        and gate.activation == "none"
        and (gate.bias is None) == (up.bias is None)
        and not (gate.has_adapter or up.has_adapter)
        and all(uses[id(module)] == 1 and not _has_hooks(module) for module in (mlp, gate, up))
        and all(uses[id(weight)] == 1 for weight in (gate.weight, up.weight))
    )


def _has_hooks(module: nn.Module) -> bool:
    return any(value for name, value in vars(module).items() if "hook" in name)


def _parameter(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach(), requires_grad=tensor.requires_grad)


def _in_turns(gate: SLoPeLinear, up: SLoPeLinear) -> SLoPeLinear:
    """The layer of both; what they had is free as soon as they are."""

    def join(gate_rows: Tensor, up_rows: Tensor) -> Tensor:
        pair = [rows.detach().unflatten(0, (-1, TURN)) for rows in (gate_rows, up_rows)]
        joined = torch.stack(pair, 1).flatten(0, 2)
        return joined.requires_grad_(gate_rows.requires_grad)

    return SLoPeLinear.from_compressed(
        join(gate.weight, up.weight),
        join(gate.weight_bitmask, up.weight_bitmask),
        None if gate.bias is None else _parameter(join(gate.bias, up.bias)),
        backward_copy=gate.backward_copy,
        backend=gate.backend,
        activation="swiglu",
    )


def _apart(layer: SLoPeLinear) -> tuple[SLoPeLinear, SLoPeLinear]:
    """Gate and up-projection of a layer that _in_turns made."""

    def half(rows: Tensor, index: int) -> Tensor:
        part: Tensor = rows.detach().unflatten(0, (-1, 2, TURN))[:, index].flatten(0, 1).clone()
        return part.requires_grad_(rows.requires_grad)

    def part(index: int) -> SLoPeLinear:
        result = SLoPeLinear.from_compressed(
            half(layer.weight, index),
            half(layer.weight_bitmask, index),
            None if layer.bias is None else _parameter(half(layer.bias, index)),
            backward_copy=layer.backward_copy,
            backend=layer.backend,
        )
        result.train(layer.training)
        if layer.has_adapter:
            result.add_adapter(layer.lora_A.shape[0], layer.lora_scale)
            with torch.no_grad():
                result.lora_A.copy_(layer.lora_A)
                result.lora_B.copy_(half(layer.lora_B, index))
        return result

    return part(0), part(1)


FUSIONS: dict[str, Callable[[nn.Module], None]] = {"relu": fuse_relus, "swiglu": fuse_swiglus}
