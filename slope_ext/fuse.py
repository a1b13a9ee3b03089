# SPDX-License-Identifier: Apache-2.0
"""What a model does around 2:4 layers, done in their products: SlopeConfig.fuse.

"relu"
    A ReLU after a layer: in ``nn.Sequential``, and ``activation_fn`` after ``fc1`` in Hugging
    Face's OPT layers. What hooks of that layer see is then after the ReLU; and so is what code gets
    that calls a module of a Sequential by itself, which cannot be seen from here.
"swiglu"
    In MLPs like those of Hugging Face's LLaMA, whose forward method is
    down_proj(act_fn(gate_proj(x)) * up_proj(x)): gate and up-projection become one layer
    ``gate_up_proj``, whose rows come in turns, eight of the gate's, eight of the up-projection's.
    x is read once, and where nobody wants a gradient the own kernel writes neither of the two
    results, only their product. An adapter is one for both. Checkpoints have the names and the
    rows of the one layer.

Modules that stand in another place too, and for "swiglu" hooks, an adapter, a forward method of
their own or tied weights, stay as they are, and so does the model that is passed itself. Attributes
that were set on a gate or an up-projection are not kept.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from slope_ext._check import GATE_ROWS
from slope_ext.linear import SLoPeLinear

Fusion = Literal["relu", "swiglu"]


def _uses(model: nn.Module) -> Counter[int]:
    """How often modules and Parameters stand in the model, by id."""
    uses = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    for module in model.modules():
        uses.update(id(parameter) for parameter in module._parameters.values())
    return uses


def fused_layers(model: nn.Module) -> Iterator[nn.Module]:
    """The layers whose activation stands for modules that were there."""
    for parent in model.modules():
        if isinstance(parent, SwiGLUMLP):
            yield from parent.gate_up_proj.modules()
        for layer, name in _layers_and_next(parent):
            if isinstance(parent._modules[name], ReLUInProduct):
                yield from layer.modules()


def unfuse(model: nn.Module) -> nn.Module:
    """Puts back what stood in ``model`` before it was fused; layers keep their "relu", and the ReLU
    that is there again changes nothing.

    Returns:
        ``model``, or its replacement if something else stood in its place itself.
    """
    for parent, name in _places(model, lambda child: isinstance(child, _StandIn)):
        parent._modules[name] = cast(_StandIn, parent._modules[name]).split()
    return model.split() if isinstance(model, _StandIn) else model


def _places(model: nn.Module, wanted: Callable[[nn.Module], bool]) -> list[tuple[nn.Module, str]]:
    """Parents and names of the children that are wanted, without holding on to those."""
    return [
        (parent, name)
        for parent in model.modules()
        for name, child in parent._modules.items()
        if child is not None and wanted(child)
    ]


def _take_over(old: nn.Module, new: nn.Module) -> nn.Module:
    """``new`` with the mode and the hooks (the same dicts) of ``old``."""
    vars(new).update({key: value for key, value in vars(old).items() if "hook" in key})
    return new.train(old.training)


class _StandIn(nn.Module):
    """Stands where ``original`` was, with its mode and hooks."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        _take_over(original, self)
        self.__dict__["original"] = original  # no child: without parameters, and not in names

    def split(self) -> nn.Module:
        """The original again, with the mode and the hooks of this."""
        return _take_over(self, self.__dict__["original"])


# ---- ReLU ----------------------------------------------------------------------------------------


class ReLUInProduct(_StandIn):
    """Stands where the ReLU was that the layer before it applies."""

    def forward(self, y: Tensor) -> Tensor:
        """y as it is."""
        return y


def _layers_and_next(parent: nn.Module) -> list[tuple[nn.Module, str]]:
    """Children whose result another takes, and the name of that."""
    children = parent._modules
    pairs: list[tuple[str, str]] = []
    if type(parent).__module__.startswith("transformers.models.opt."):
        pairs = [("fc1", "activation_fn")]
    elif type(parent).forward is nn.Sequential.forward and "forward" not in vars(parent):
        pairs = list(itertools.pairwise(children))
    return [
        (layer, following)
        for name, following in pairs
        if (layer := children.get(name)) is not None and children.get(following) is not None
    ]


def fuse_relus(model: nn.Module) -> None:
    """Has layers apply the ReLU that follows them."""
    uses = _uses(model)
    for parent in list(model.modules()):
        for layer, name in _layers_and_next(parent):
            relu = parent._modules[name]
            if (
                isinstance(layer, SLoPeLinear)
                and layer.activation == "none"
                and type(relu) is nn.ReLU
                and uses[id(layer)] == uses[id(relu)] == 1
            ):
                layer.activation = "relu"
                if layer.weight.is_cuda:
                    layer.choose_product()
                parent._modules[name] = ReLUInProduct(relu)


# ---- SwiGLU --------------------------------------------------------------------------------------


class SwiGLUMLP(_StandIn):
    """down_proj(gate_up_proj(x)), where gate_up_proj gives silu(gate) * up.

    Args:
        gate_up_proj: [2 * intermediate, hidden], see :mod:`slope_ext.fuse`.
        original: the MLP that this stands for; its down-projection is taken over.
    """

    def __init__(self, gate_up_proj: SLoPeLinear, original: nn.Module) -> None:
        down_proj = cast(nn.Module, original.down_proj)
        for name in ("gate_proj", "up_proj", "down_proj"):
            original._modules[name] = None
        super().__init__(original)
        self.gate_up_proj = gate_up_proj
        self.down_proj = down_proj

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden] -> [..., hidden]."""
        return self.down_proj(self.gate_up_proj(x))  # type: ignore[no-any-return]

    def split(self) -> nn.Module:
        """The MLP again; an adapter becomes two with the same A."""
        original = super().split()
        original.gate_proj, original.up_proj = _apart(self.gate_up_proj)
        original.down_proj = self.down_proj
        return original


def fuse_swiglus(model: nn.Module) -> None:
    """Makes one layer of gate and up-projection, one MLP after the other."""
    uses = _uses(model)
    for parent, name in _places(model, lambda child: _is_swiglu(child, uses)):
        mlp = cast(nn.Module, parent._modules[name])
        layers = cast(SLoPeLinear, mlp.gate_proj), cast(SLoPeLinear, mlp.up_proj)
        parent._modules[name] = SwiGLUMLP(_in_turns(*layers), mlp)
        del layers  # so that they are gone before the next


def _is_swiglu(mlp: nn.Module, uses: Counter[int]) -> bool:
    """Whether gate and up-projection of ``mlp`` can be one layer."""
    children = mlp._modules
    if set(children) != {"gate_proj", "up_proj", "down_proj", "act_fn"}:
        return False
    gate, up, activation = children["gate_proj"], children["up_proj"], children["act_fn"]
    if not (isinstance(gate, SLoPeLinear) and isinstance(up, SLoPeLinear)) or activation is None:
        return False
    names = ("in_features", "out_features", "backend", "backward_copy", "activation", "training")
    alike = all(getattr(gate, name) == getattr(up, name) for name in names) and all(
        _kind(gate._parameters[name]) == _kind(up._parameters[name]) for name in ("weight", "bias")
    )
    parameters = [p for layer in (gate, up) for p in (layer.weight, layer.bias) if p is not None]
    return (
        _has_llamas_forward(mlp)
        and type(activation).__name__ in ("SiLU", "SiLUActivation")
        and alike
        and gate.activation == "none"
        and not (gate.has_adapter or up.has_adapter)
        and not (mlp._parameters or mlp._buffers)
        and all(uses[id(module)] == 1 for module in (mlp, gate, up))
        and all(uses[id(parameter)] == 1 for parameter in parameters)
        and not any(_is_changed(module) for module in (mlp, gate, up, activation))
    )


def _kind(parameter: Tensor | None) -> tuple[object, ...] | None:
    if parameter is None:
        return None
    return parameter.dtype, parameter.device, parameter.requires_grad


def _at_once(mlp: Any, x: Any) -> Any:
    return mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x))


def _in_two_lines(mlp: Any, x: Any) -> Any:
    y = mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x))
    return y  # so is the bytecode of LlamaMLP


def _has_llamas_forward(mlp: nn.Module) -> bool:
    """Whether the forward method of ``mlp`` has the bytecode of one of the above."""
    forward = type(mlp).forward

    def instructions(function: Any) -> Any:
        code = getattr(function, "__code__", None)
        return code and (code.co_code, code.co_names, code.co_freevars)

    same = instructions(forward) in map(instructions, (_at_once, _in_two_lines))
    return same and not hasattr(forward, "__wrapped__")


def _is_changed(module: nn.Module) -> bool:
    """Whether a module has hooks or a forward method of its own."""
    attributes = vars(module)
    return "forward" in attributes or any(v for name, v in attributes.items() if "hook" in name)


def _parameter(tensor: Tensor, like: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=like.requires_grad)


def _in_turns(gate: SLoPeLinear, up: SLoPeLinear) -> SLoPeLinear:
    """The layer of both."""

    def join(gate_rows: Tensor, up_rows: Tensor) -> Tensor:
        pair = [rows.detach().unflatten(0, (-1, GATE_ROWS)) for rows in (gate_rows, up_rows)]
        return torch.stack(pair, 1).flatten(0, 2)

    layer = SLoPeLinear.from_compressed(
        join(gate.weight, up.weight).requires_grad_(gate.weight.requires_grad),
        join(gate.weight_bitmask, up.weight_bitmask),
        None if gate.bias is None else _parameter(join(gate.bias, up.bias), gate.bias),
        backward_copy=gate.backward_copy,
        backend=gate.backend,
        activation="swiglu",
    )
    return layer.train(gate.training)


def _apart(layer: SLoPeLinear) -> tuple[SLoPeLinear, SLoPeLinear]:
    """Gate and up-projection of a layer that _in_turns made."""

    def part(index: int) -> SLoPeLinear:
        def half(rows: Tensor) -> Tensor:
            turns: Tensor = rows.detach().unflatten(0, (-1, 2, GATE_ROWS))
            return turns[:, index].flatten(0, 1).clone()

        result = SLoPeLinear.from_compressed(
            half(layer.weight).requires_grad_(layer.weight.requires_grad),
            half(layer.weight_bitmask),
            None if layer.bias is None else _parameter(half(layer.bias), layer.bias),
            backward_copy=layer.backward_copy,
            backend=layer.backend,
        )
        if layer.has_adapter:
            result.lora_A = _parameter(layer.lora_A.detach().clone(), layer.lora_A)
            result.lora_B = _parameter(half(layer.lora_B), layer.lora_B)
            result.lora_scale = layer.lora_scale
        return result.train(layer.training)

    return part(0), part(1)


FUSIONS: dict[str, Callable[[nn.Module], None]] = {"relu": fuse_relus, "swiglu": fuse_swiglus}
