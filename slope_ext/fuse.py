# SPDX-License-Identifier: Apache-2.0
"""What a model does around 2:4 layers, done in their products: SlopeConfig.fuse.

"relu"
    A ReLU after a layer: in ``nn.Sequential``, and ``activation_fn`` after ``fc1`` in Hugging
    Face's OPT layers. What hooks of that layer see is then after the ReLU.
"swiglu"
    In MLPs like those of Hugging Face's LLaMA, whose forward method is
    down_proj(act_fn(gate_proj(x)) * up_proj(x)): gate and up-projection become one layer
    ``gate_up_proj``, whose rows come in turns, eight of the gate's, eight of the up-projection's.
    x is read once, and where nobody wants a gradient the own kernel writes neither of the two
    results, only their product. An adapter is one for both. Checkpoints have the names and the
    rows of the one layer.
"qkv"
    q-, k- and v-projection of modules that are called ``self_attn``, as in Hugging Face's models:
    they become one layer ``qkv_proj`` with the rows of all three, one after the other, and what
    stands in their places calls it once for the three and gives its part. x is read once, and of
    few tokens one product takes about as long as the largest of three. An adapter is one for the
    three: one A, so one T = X A^T. Checkpoints have the names and the rows of the one layer.

Modules that have another user, and for "swiglu" and "qkv" hooks, an adapter, a forward method of
their own or tied weights, stay as they are, and so does the model that is passed itself. Attributes
that were set on layers that are joined are not kept.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from slope_ext import _freshness
from slope_ext._check import GATE_ROWS
from slope_ext.linear import SLoPeLinear
from slope_ext.ops.spmm import Activation

Fusion = Literal["relu", "swiglu", "qkv"]


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
    attentions = {parent for parent, _ in _places(model, lambda c: isinstance(c, LinearPart))}
    for parent, name in _places(model, lambda child: isinstance(child, _StandIn)):
        parent._modules[name] = cast(_StandIn, parent._modules[name]).split()
    for attention in attentions:
        del attention._modules[JOINT]
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
    """Stands where another module was, with its mode and hooks."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        _take_over(original, self)

    def split(self) -> nn.Module:
        """What stood here again, with the mode and the hooks of this."""
        raise NotImplementedError


class _Keeper(_StandIn):
    """Keeps what stood there."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__(original)
        self.__dict__["original"] = original  # no child: without parameters, and not in names

    def split(self) -> nn.Module:
        return _take_over(self, self.__dict__["original"])


# ---- ReLU ----------------------------------------------------------------------------------------


class ReLUInProduct(_Keeper):
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
                parent._modules[name] = ReLUInProduct(relu)


# ---- SwiGLU --------------------------------------------------------------------------------------


class SwiGLUMLP(_Keeper):
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
        for index, name in enumerate(("gate_proj", "up_proj")):
            original._modules[name] = _rows_of(self.gate_up_proj, _one_of_turns(index))
        original.down_proj = self.down_proj
        return original


def fuse_swiglus(model: nn.Module) -> None:
    """Makes one layer of gate and up-projection, one MLP after the other."""
    uses = _uses(model)
    for parent, name in _places(model, lambda child: _is_swiglu(child, uses)):
        mlp = cast(nn.Module, parent._modules[name])
        layers = [cast(SLoPeLinear, mlp.gate_proj), cast(SLoPeLinear, mlp.up_proj)]
        parent._modules[name] = SwiGLUMLP(_joined(layers, _in_turns, "swiglu"), mlp)
        del layers  # so that they are gone before the next


def _is_swiglu(mlp: nn.Module, uses: Counter[int]) -> bool:
    """Whether gate and up-projection of ``mlp`` can be one layer."""
    children = mlp._modules
    if set(children) != {"gate_proj", "up_proj", "down_proj", "act_fn"}:
        return False
    gate, up, activation = children["gate_proj"], children["up_proj"], children["act_fn"]
    return (
        activation is not None
        and type(activation).__name__ in ("SiLU", "SiLUActivation")
        and not _is_changed(activation)
        and _has_llamas_forward(mlp)
        and not (mlp._parameters or mlp._buffers)
        and not _is_changed(mlp)
        and uses[id(mlp)] == 1
        and _can_be_one([gate, up], uses)
        and cast(SLoPeLinear, gate).out_features == cast(SLoPeLinear, up).out_features
    )


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


def _in_turns(gate_rows: Tensor, up_rows: Tensor) -> Tensor:
    pair = [rows.unflatten(0, (-1, GATE_ROWS)) for rows in (gate_rows, up_rows)]
    return torch.stack(pair, 1).flatten(0, 2)


def _one_of_turns(index: int) -> Callable[[Tensor], Tensor]:
    return lambda rows: rows.unflatten(0, (-1, 2, GATE_ROWS))[:, index].flatten(0, 1)


# ---- q, k, v -------------------------------------------------------------------------------------

PARTS = ("q_proj", "k_proj", "v_proj")
JOINT = "qkv_proj"


class SharedCall:
    """Calls ``attention.qkv_proj`` once for its parts.

    The result is kept until each part was taken, for the same x in the same state: unwritten since,
    with the same weight, in the same grad mode.
    """

    def __init__(self, attention: nn.Module, rows: Sequence[int]) -> None:
        self.attention = attention  # not the layer, in whose place others may put a wrapper
        self.rows = list(rows)
        self.last: tuple[Tensor, tuple[object, ...], dict[int, Tensor]] | None = None

    def part(self, x: Tensor, index: int) -> Tensor:
        """The part of number ``index``: [..., rows[index]]."""
        layer = self.attention._modules[JOINT]
        assert layer is not None
        state = _state(x, layer)
        last = self.last
        if last is None or last[0] is not x or last[1] != state or index not in last[2]:
            last = (x, state, dict(enumerate(layer(x).split(self.rows, -1))))
        part = last[2].pop(index)
        self.last = last if last[2] else None
        return part

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"last": None}


def _state(x: Tensor, layer: nn.Module) -> tuple[object, ...]:
    """What a product of ``layer`` with x depends on beside them, as far as it is seen."""
    if torch.compiler.is_compiling():  # of one pass, in which nothing of it changes
        return (torch.is_grad_enabled(),)
    versions = [_freshness.version(tensor) for tensor in (x, *layer.parameters(recurse=False))]
    return (torch.is_grad_enabled(), torch.is_autocast_enabled(x.device.type), *versions)


class LinearPart(_StandIn):
    """Stands where a layer was whose rows are part of another now."""

    def __init__(self, shared: SharedCall, index: int, original: SLoPeLinear) -> None:
        super().__init__(original)
        self.__dict__["shared"] = shared
        self.index = index
        self.in_features, self.out_features = original.in_features, original.out_features

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out], a view of the result for all parts."""
        return self._shared.part(x, self.index)

    def split(self) -> nn.Module:
        """The layer again; of an adapter each has the same A."""
        start = sum(self._shared.rows[: self.index])
        layer = cast(SLoPeLinear, self._shared.attention._modules[JOINT])
        rows = slice(start, start + self.out_features)
        return _take_over(self, _rows_of(layer, lambda tensor: tensor[rows]))

    @property
    def _shared(self) -> SharedCall:
        return cast(SharedCall, self.__dict__["shared"])


def fuse_qkvs(model: nn.Module) -> None:
    """Makes one layer of q-, k- and v-projection, one attention after the other."""
    uses = _uses(model)
    for parent, name in _places(model, lambda child: _has_qkv(child, uses)):
        if name != "self_attn":
            continue
        attention = cast(nn.Module, parent._modules[name])
        layers = [cast(SLoPeLinear, attention._modules[part]) for part in PARTS]
        shared = SharedCall(attention, [layer.out_features for layer in layers])
        joint = _joined(layers, lambda *rows: torch.cat(rows), "none")
        for index, part in enumerate(PARTS):
            attention._modules[part] = LinearPart(shared, index, layers[index])
        attention._modules[JOINT] = joint
        del layers  # so that they are gone before the next


def _has_qkv(attention: nn.Module, uses: Counter[int]) -> bool:
    """Whether q-, k- and v-projection of ``attention`` can be one layer."""
    layers = [attention._modules.get(name) for name in PARTS]
    return uses[id(attention)] == 1 and not hasattr(attention, JOINT) and _can_be_one(layers, uses)


# ---- layers in one -------------------------------------------------------------------------------


def _can_be_one(layers: Sequence[nn.Module | None], uses: Counter[int]) -> bool:
    """Whether these are 2:4 layers alike in all but out_features, and nobody would miss them."""
    if not all(isinstance(layer, SLoPeLinear) for layer in layers):
        return False
    found = cast(list[SLoPeLinear], layers)
    names = ("in_features", "backend", "backward_copy", "activation", "training")

    def likeness(layer: SLoPeLinear) -> list[object]:
        kinds = [_kind(layer._parameters[name]) for name in ("weight", "bias")]
        return [*(getattr(layer, name) for name in names), *kinds]

    parameters = [p for layer in found for p in (layer.weight, layer.bias) if p is not None]
    return (
        all(likeness(layer) == likeness(found[0]) for layer in found)
        and found[0].activation == "none"
        and not any(layer.has_adapter or _is_changed(layer) for layer in found)
        and all(uses[id(item)] == 1 for item in (*found, *parameters))
    )


def _kind(parameter: Tensor | None) -> tuple[object, ...] | None:
    if parameter is None:
        return None
    return parameter.dtype, parameter.device, parameter.requires_grad


def _is_changed(module: nn.Module) -> bool:
    """Whether a module has hooks or a forward method of its own."""
    attributes = vars(module)
    return "forward" in attributes or any(v for name, v in attributes.items() if "hook" in name)


def _parameter(tensor: Tensor, like: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=like.requires_grad)


def _joined(
    layers: Sequence[SLoPeLinear], join: Callable[..., Tensor], activation: Activation
) -> SLoPeLinear:
    """The layer whose rows are what ``join`` makes of the rows of these."""

    def rows(name: str) -> Tensor:
        return join(*(getattr(layer, name).detach() for layer in layers))

    first = layers[0]
    layer = SLoPeLinear.from_compressed(
        rows("weight").requires_grad_(first.weight.requires_grad),
        rows("weight_bitmask"),
        None if first.bias is None else _parameter(rows("bias"), first.bias),
        backward_copy=first.backward_copy,
        backend=first.backend,
        activation=activation,
    )
    return layer.train(first.training)


def _rows_of(layer: SLoPeLinear, take: Callable[[Tensor], Tensor]) -> SLoPeLinear:
    """A layer of those rows that ``take`` takes; of an adapter it has all of A."""

    def taken(rows: Tensor) -> Tensor:
        return take(rows.detach()).clone()

    result = SLoPeLinear.from_compressed(
        taken(layer.weight).requires_grad_(layer.weight.requires_grad),
        taken(layer.weight_bitmask),
        None if layer.bias is None else _parameter(taken(layer.bias), layer.bias),
        backward_copy=layer.backward_copy,
        backend=layer.backend,
    )
    if layer.has_adapter:
        result.lora_A = _parameter(layer.lora_A.detach().clone(), layer.lora_A)
        result.lora_B = _parameter(taken(layer.lora_B), layer.lora_B)
        result.lora_scale = layer.lora_scale
    return result.train(layer.training)


FUSIONS: dict[str, Callable[[nn.Module], None]] = {
    "relu": fuse_relus,
    "swiglu": fuse_swiglus,
    "qkv": fuse_qkvs,
}
