# SPDX-License-Identifier: Apache-2.0
"""convert: nn.Linear -> sparse layers, in place; to_dense: back again."""

from __future__ import annotations

import re
import warnings
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, Literal, TypeGuard

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from slope_ext import ops, reference
from slope_ext._check import BACKENDS, FLOAT_DTYPES, dtype_name
from slope_ext.fuse import FUSIONS, Fusion, SwiGLUMLP, fused_layers, unfuse
from slope_ext.linear import DERIVED_BUFFERS, BackwardCopy, SLoPeLinear
from slope_ext.ops.spmm import Backend
from slope_ext.simulate import MaskedLinear, parse_pattern, prune_nm
from slope_ext.sparse_layer import SparseLayer, qualified_name

FilterFn = Callable[[nn.Module, str], bool]

# Output heads by the names that transformers gives them.
HEAD_NAMES = ("lm_head", "embed_out", "score", "classifier", "qa_outputs", "cls")

# Where DistributedDataParallel looks up what it leaves alone, on the module that it wraps.
_DDP_IGNORES = "_ddp_params_and_buffers_to_ignore"


class SlopeConversionWarning(UserWarning):
    """Some linear layers stayed dense; the message lists each with its reason."""


@dataclass(frozen=True, kw_only=True)
class SlopeConfig:
    """What :func:`convert` makes sparse, and how the masks are chosen.

    Attributes:
        mask: "magnitude" keeps the largest weights of each group, "random" any (seeded by ``seed``
            and the layer's name, so the result depends on neither device nor order).
        seed: of random masks.
        masks: given masks by layer name (or name + ".weight"): bool or 0/1 [out, in]; uint8 bitmask
            [out, in/8], lowest bit first; or MaskLLM's packed bits, a flat uint8 or NumPy array
            [out * in / 8], highest bit first (keys name + ".weight.mask" are understood).
        scores: given scores by layer name, [out, in]; the largest of each group are kept (e.g.
            Wanda's |W| * norm of the input).
        pattern: "2:4", compressed; any other N:M, or ``simulate``, is dense masked arithmetic.
        simulate: use MaskedLinear for 2:4 too.
        backward_copy: "cached" or "recompute", see SLoPeLinear.
        backend: "auto", "native", "cusparselt" or "reference", see :class:`slope_ext.SLoPeLinear`.
        fuse: what else the products of 2:4 layers do, see :mod:`slope_ext.fuse`: "relu" applies a
            ReLU that follows; "swiglu" makes one layer of an MLP's gate and up-projection.
        target_modules: "all-linear", a regular expression that must match the whole name, or a
            sequence of names; a name matches its last components ("q_proj" any q_proj). Each must
            match a linear layer.
        exclude_modules: like ``target_modules``, left dense; of a layer with several names one is
            enough, and of those that match none a warning tells. Output heads always stay dense,
            unless targeted by their exact full name.
        strict: raise instead of warn where a targeted layer cannot be converted.
    """

    mask: Literal["magnitude", "random"] = "magnitude"
    seed: int = 0
    masks: Mapping[str, Any] = field(default_factory=dict)
    scores: Mapping[str, Tensor] = field(default_factory=dict)
    pattern: str = "2:4"
    simulate: bool = False
    backward_copy: BackwardCopy = "cached"
    backend: Backend = "auto"
    fuse: Collection[Fusion] = ()
    target_modules: str | Sequence[str] = "all-linear"
    exclude_modules: str | Sequence[str] = ()
    strict: bool = False

    def __post_init__(self) -> None:
        if self.mask not in ("magnitude", "random"):
            raise ValueError(
                f"SlopeConfig: mask must be 'magnitude' or 'random', got {self.mask!r}"
            )
        if self.backend not in BACKENDS:
            raise ValueError(
                f"SlopeConfig: backend must be one of {', '.join(BACKENDS)}, got {self.backend!r}"
            )
        several = isinstance(self.fuse, Collection) and not isinstance(self.fuse, str)
        if not several or not all(isinstance(f, str) and f in FUSIONS for f in self.fuse):
            raise ValueError(
                f"SlopeConfig: fuse must be a collection of {', '.join(FUSIONS)}, got {self.fuse!r}"
            )
        if self.backward_copy not in ("cached", "recompute"):
            raise ValueError(
                "SlopeConfig: backward_copy must be 'cached' or 'recompute', "
                f"got {self.backward_copy!r}"
            )
        try:
            parse_pattern(self.pattern)
        except ValueError as error:
            raise ValueError(f"SlopeConfig: {error}") from None
        for name in ("target_modules", "exclude_modules"):
            _check_names(name, getattr(self, name))
        if not self.target_modules:
            raise ValueError("SlopeConfig: target_modules must not be empty")
        for name, kind in (("masks", Mapping), ("scores", Mapping), ("seed", Integral)):
            if not isinstance(getattr(self, name), kind):
                raise ValueError(
                    f"SlopeConfig: {name} must be a {kind.__name__}, got {getattr(self, name)!r}"
                )

    @property
    def compressed(self) -> bool:
        """Whether layers become SLoPeLinear rather than MaskedLinear."""
        return parse_pattern(self.pattern) == (2, 4) and not self.simulate


def _check_names(argument: str, names: Any) -> None:
    """Raises unless these are a regular expression or a collection of names."""
    if isinstance(names, str):
        try:
            re.compile(names)
        except re.error as error:
            raise ValueError(f"SlopeConfig: {argument} is no regular expression: {error}") from None
    elif not isinstance(names, Collection) or not all(isinstance(name, str) for name in names):
        raise ValueError(
            f"SlopeConfig: {argument} must be a regular expression or a sequence of names, "
            f"got {names!r}"
        )


# ---- convert -------------------------------------------------------------------------------------


def convert(
    model: nn.Module, config: SlopeConfig | None = None, filter_fn: FilterFn | None = None
) -> nn.Module:
    """Replaces the linear layers of ``model`` by sparse ones, in place.

    Handles ``nn.Linear`` and Hugging Face's ``Conv1D`` (GPT-2). Output heads, weights tied to
    something that is no linear layer, layers whose ``forward`` was replaced (accelerate's hooks do
    that: convert before ``dispatch_model``), and shapes that the pattern does not divide stay
    dense; one SlopeConversionWarning lists every targeted layer that does, with its reason.

    Kept: bias, dtype, device (on the meta device load a sparse state_dict, or reset parameters,
    after ``to_empty``), training mode, requires_grad, module hooks, attributes of modules and
    Parameters, and weights shared between layers. Hooks of a weight itself are not: its gradient
    has another shape; nor is what ``compile()`` of that very module made. Build the optimizer
    afterwards.

    DistributedDataParallel would broadcast every buffer in each forward pass. The model that is
    converted tells it to leave out what layers derive from weight and bitmask, which each rank
    derives by itself; wrap that model, not one around it, and call
    :func:`slope_ext.end_mask_broadcasts` then. With FSDP2 convert first, too, and train by torch's
    optimizers.

    Args:
        model: any module; if it is itself a linear layer, use the return value.
        config: see SlopeConfig; None is SlopeConfig().
        filter_fn: called with (module, name) of every dense linear layer; False, for any of a
            layer's names, leaves it dense without a word.

    Returns:
        ``model``, or its replacement if it is itself a linear layer.

    Raises:
        ValueError: a mask or score does not fit its layer or names none; a target matches no linear
            layer; DistributedDataParallel wraps the model or a part of it; or, with ``strict``, a
            targeted layer cannot be converted. The model is then as it was.
        TypeError: ``config`` is something else.
    """
    config = SlopeConfig() if config is None else config
    if not isinstance(config, SlopeConfig):
        raise TypeError(f"convert: config must be a SlopeConfig, got {config!r}")
    if any(isinstance(m, nn.parallel.DistributedDataParallel) for m in model.modules()):
        raise ValueError("convert: model must not be wrapped by DistributedDataParallel yet")
    if unmatched := _unmatched(model, config.target_modules):
        raise ValueError(f"convert: target_modules matches no linear layer with {unmatched[0]!r}")
    if unmatched := _unmatched(model, config.exclude_modules):
        warnings.warn(
            "slope_ext.convert: exclude_modules matches no linear layer with "
            f"{', '.join(map(repr, unmatched))}",
            SlopeConversionWarning,
            stacklevel=2,
        )
    plan, skipped = _plan(model, config, filter_fn)
    _check_given_names(config, [name for names in plan.values() for name in names])
    listing = "\n".join(f"  {name}: {reason}" for name, reason in skipped.items())
    if skipped and config.strict:
        raise ValueError(f"convert: strict, but these layers cannot be converted:\n{listing}")
    if skipped:
        warnings.warn(
            f"slope_ext.convert left {len(skipped)} linear layers dense:\n{listing}",
            SlopeConversionWarning,
            stacklevel=2,
        )
    if experts := _experts(model, config):
        warnings.warn(
            "slope_ext.convert takes linear layers; these Parameters, of experts it seems, stay "
            f"dense: {', '.join(experts)}",
            SlopeConversionWarning,
            stacklevel=2,
        )

    derived = set(_derived_buffers(model))
    # Everything that can fail happens before the model is touched.
    model = _replace(model, _sparse_twins(plan, config))
    for fusion in config.fuse:
        FUSIONS[fusion](model)
    _have_ddp_ignore(model, derived)
    return model


def to_dense(model: nn.Module) -> nn.Module:
    """Replaces the sparse layers of ``model`` by dense ones with the same outputs, in place.

    The dense weights contain the zeros; adapters are added into them (in fp32, then rounded). A
    layer that was a ``Conv1D`` becomes one again. Hooks, dtype, device, mode, requires_grad and
    shared weights are kept, but for hooks of what SlopeConfig.fuse made of two layers.

    Returns:
        ``model``, or its replacement if it is itself a sparse layer or a fused MLP.

    Raises:
        ValueError: a layer applies an activation that no module of ``model`` stands for, has a
            ``forward`` that was replaced, or has a weight that is sharded.
    """
    _require_modules_of_activations(model)
    _require_own_forwards(model)
    _require_whole_weights(model)
    derived = set(_derived_buffers(model))
    model = unfuse(model)
    replacements: dict[nn.Module, nn.Module] = {}
    twins: dict[int, list[tuple[Tensor, nn.Module]]] = {}  # by weight, with their masks
    for layer in model.modules():
        if isinstance(layer, SparseLayer):
            dense = _dense_twin(layer)
            if not layer.has_adapter:  # which makes the dense weight the layer's own
                of_weight = twins.setdefault(id(layer.weight), [])
                same = (twin for mask, twin in of_weight if _are_equal(mask, layer.mask))
                dense.weight = next(same, dense).weight
                of_weight.append((layer.mask, dense))
            replacements[layer] = dense
    model = _replace(model, replacements)
    _have_ddp_ignore(model, derived)
    return model


def _are_equal(mask: Tensor, other: Tensor) -> bool:
    return mask is other or (not mask.is_meta and torch.equal(mask, other))


def _require_modules_of_activations(model: nn.Module) -> None:
    known = {id(layer) for layer in fused_layers(model)}
    for name, layer in model.named_modules():
        lone = isinstance(layer, SLoPeLinear) and id(layer) not in known
        if lone and layer.activation != "none":
            raise ValueError(
                f"to_dense: {name or 'the layer'} applies {layer.activation!r}, which a dense "
                "layer does not, and the module that would is not part of the model"
            )


def _require_own_forwards(model: nn.Module) -> None:
    for name, layer in model.named_modules():
        if isinstance(layer, SparseLayer) and _has_replaced_forward(layer):
            raise ValueError(
                f"to_dense: {name or 'the layer'} has a forward that was replaced, which a dense "
                "layer would not have; undo that first (accelerate: remove_hook_from_submodules)"
            )


def _require_whole_weights(model: nn.Module) -> None:
    for name, layer in model.named_modules():
        if isinstance(layer, SparseLayer) and is_traceable_wrapper_subclass(layer.weight):
            kind = type(layer.weight).__name__
            raise ValueError(
                f"to_dense: the weight of {name or 'the layer'} is a {kind}; "
                "load its full state into a model that is not sharded"
            )


# ---- which layers --------------------------------------------------------------------------------


def _unmatched(model: nn.Module, patterns: str | Sequence[str]) -> list[str]:
    """Those that are the name of no linear layer of ``model``."""
    names = []
    for name, module in model.named_modules(remove_duplicate=False):
        if _is_linear_like(module):
            names.append(name)
        elif isinstance(module, SwiGLUMLP):  # as it was converted, and may be again
            names += [f"{name}.gate_proj", f"{name}.up_proj"]
    if isinstance(patterns, str):
        known = patterns == "all-linear" or any(_matches(patterns, name) for name in names)
        return [] if known else [patterns]
    return [pattern for pattern in patterns if not any(_matches([pattern], name) for name in names)]


def _plan(
    model: nn.Module, config: SlopeConfig, filter_fn: FilterFn | None
) -> tuple[dict[nn.Linear, list[str]], dict[str, str]]:
    """Layers to convert with all their names, and reasons for those that stay dense."""
    plan: dict[nn.Linear, list[str]] = {}
    skipped: dict[str, str] = {}
    owners = _weight_owners(model)
    head = _output_head(model)
    dense_layers = [
        (name, module)
        for name, module in model.named_modules(remove_duplicate=False)
        if _is_linear_like(module) and not isinstance(module, SparseLayer)
    ]
    left_dense = {
        module
        for name, module in dense_layers
        if _matches(config.exclude_modules, name)
        or (filter_fn is not None and not filter_fn(module, name))
    }
    for name, module in dense_layers:
        if module in left_dense or not _matches(config.target_modules, name):
            continue
        parent = model.get_submodule(name.rpartition(".")[0])
        if isinstance(parent, nn.TransformerEncoderLayer):
            reason: str | None = "nn.TransformerEncoderLayer reads its weight by itself"
        else:
            reason = _obstacle(module, name, config, owners, head)
        if reason is None:
            plan.setdefault(module, []).append(name)
        else:
            skipped[name] = reason

    for module, names in list(plan.items()):
        dense = [name for name, owner in owners[id(module.weight)] if owner not in plan]
        if dense:
            del plan[module]
            skipped |= dict.fromkeys(names, f"weight is tied to {dense[0]}, which stays dense")
    return plan, skipped


def _experts(model: nn.Module, config: SlopeConfig) -> list[str]:
    """Names of targeted Parameters [experts, .., ..] of modules that are none of torch's own."""
    multiple = _multiple(config)
    return [
        full_name
        for name, module in model.named_modules()
        if not _is_a_torch_layer(module)
        for parameter_name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 3 and parameter.shape[0] > 1
        if parameter.shape[1] % multiple == 0 and parameter.shape[2] % multiple == 0
        if _matches(config.target_modules, full_name := qualified_name(name, parameter_name))
        and not _matches(config.exclude_modules, full_name)
    ]


def _is_a_torch_layer(module: nn.Module) -> bool:
    """Whether its class is one of torch.nn, or derives from one."""
    kinds = (kind for kind in type(module).__mro__ if kind is not nn.Module)
    return any(kind.__module__.startswith("torch.nn.modules") for kind in kinds)


def _obstacle(
    module: nn.Linear,
    name: str,
    config: SlopeConfig,
    owners: dict[int, list[tuple[str, nn.Module]]],
    head: nn.Module | None,
) -> str | None:
    """Why a layer must stay dense, or None."""
    exactly_targeted = not isinstance(config.target_modules, str) and name in config.target_modules
    if not exactly_targeted and (module is head or name.rpartition(".")[2] in HEAD_NAMES):
        return "output head"
    if _has_replaced_forward(module):
        return "its forward was replaced, by hooks of accelerate or the like"
    if type(module) is not nn.Linear and not _is_conv1d(module):
        return f"{type(module).__name__} is a subclass of nn.Linear with behaviour of its own"
    if "weight" not in module._parameters:
        return "its weight is computed from other parameters (weight_norm, prune, ...)"
    if is_traceable_wrapper_subclass(module.weight):
        return f"weight is a {type(module.weight).__name__}; convert before it is sharded"
    for other_name, other in owners[id(module.weight)]:
        if not _is_linear_like(other):
            return f"weight is tied to {other_name} ({type(other).__name__})"
        if _is_conv1d(other) != _is_conv1d(module):
            return f"weight is tied to {other_name}, which reads it transposed"
    supported = FLOAT_DTYPES if module.weight.device.type == "cpu" else FLOAT_DTYPES[:3]
    if module.weight.dtype not in supported:
        return f"weight has dtype {dtype_name(module.weight.dtype)}"
    rows, columns = _logical_shape(module)
    multiple = _multiple(config)
    if rows % multiple != 0 or columns % multiple != 0 or rows == 0 or columns == 0:
        return f"out x in = {rows} x {columns}, both must be multiples of {multiple}"
    return None


def _multiple(config: SlopeConfig) -> int:
    """What out and in of a layer must be multiples of."""
    return 8 if config.compressed else parse_pattern(config.pattern)[1]


def _has_replaced_forward(module: nn.Module) -> bool:
    # On the module itself: it would go on computing with that module's weight. Its class's own may
    # be there too, bound, where accelerate took a hook away.
    forward = vars(module).get("forward")
    own = getattr(forward, "__func__", None) is type(module).forward
    return forward is not None and not (own and getattr(forward, "__self__", None) is module)


def _is_conv1d(module: nn.Module) -> bool:
    # By name, so that transformers need not be installed.
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def _is_linear_like(module: nn.Module) -> TypeGuard[nn.Linear]:
    # Conv1D has the attributes that are read here, its weight transposed.
    return isinstance(module, nn.Linear) or _is_conv1d(module)


def _logical_shape(module: nn.Linear) -> tuple[int, int]:
    """(out, in); Conv1D stores its weight as [in, out]."""
    first, second = module.weight.shape
    return (second, first) if _is_conv1d(module) else (first, second)


def _weight_owners(model: nn.Module) -> dict[int, list[tuple[str, nn.Module]]]:
    owners: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append((name, module))
    return owners


def _output_head(model: nn.Module) -> nn.Module | None:
    get_output_embeddings = getattr(model, "get_output_embeddings", None)
    if get_output_embeddings is None:
        return None
    try:
        return get_output_embeddings()  # type: ignore[no-any-return]
    except NotImplementedError:
        return None


def _matches(patterns: str | Sequence[str], name: str) -> bool:
    if patterns == "all-linear":
        return True
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(name == pattern or name.endswith(f".{pattern}") for pattern in patterns)


# ---- masks ---------------------------------------------------------------------------------------

# How a layer may be called in SlopeConfig.masks and .scores.
_KEY_SUFFIXES = ("", ".weight", ".mask", ".weight.mask")


def _check_given_names(config: SlopeConfig, names: list[str]) -> None:
    known = {name + suffix for name in names for suffix in _KEY_SUFFIXES}
    for argument, mapping in (("masks", config.masks), ("scores", config.scores)):
        if unknown := sorted(set(mapping) - known):
            raise ValueError(f"convert: {argument} names no layer to convert: {', '.join(unknown)}")


def _given(argument: str, mapping: Mapping[str, Any], names: list[str]) -> Any | None:
    """What is given for a weight under any of its names."""
    keys = [key for name in names for s in _KEY_SUFFIXES if (key := name + s) in mapping]
    if len(keys) > 1:
        raise ValueError(f"convert: {argument} has one weight twice: {', '.join(keys)}")
    return mapping[keys[0]] if keys else None


def _choose_mask(weight: Tensor, names: list[str], config: SlopeConfig) -> Tensor:
    """The mask of a weight [out, in] as its layer stores it: uint8 bitmask or bool."""
    n, m = parse_pattern(config.pattern)
    mask = _given("masks", config.masks, names)
    scores = _given("scores", config.scores, names)
    name = names[0]
    chosen = mask is not None or scores is not None or config.mask == "random"
    if chosen and weight.is_meta:
        raise ValueError(f"convert: {name} is on the meta device; only magnitude masks work there")
    if mask is not None:
        bits = _given_mask(mask, weight, name)
        if not (bits.unflatten(-1, (-1, m)).sum(-1) == n).all():
            raise ValueError(f"convert: masks[{name!r}] must keep exactly {n} of every {m}")
        return reference.pack_bits(bits) if config.compressed else bits
    if scores is not None:
        scores = _tensor_of("scores", scores, name).to(weight.device)
        if scores.is_complex():
            raise ValueError(f"convert: scores[{name!r}] must be real, got {scores.dtype}")
        if scores.dtype not in FLOAT_DTYPES[:3]:  # of ranks, say; kernels take no fp64
            scores = scores.cpu().double()
        if scores.shape != weight.shape:
            raise ValueError(
                f"convert: scores[{name!r}] must be [out, in] = {list(weight.shape)}, "
                f"got {list(scores.shape)}"
            )
    elif config.mask == "random":
        generator = torch.Generator().manual_seed(int(config.seed) ^ zlib.crc32(name.encode()))
        scores = torch.rand(weight.shape, generator=generator).to(weight.device)
    else:
        scores = weight.detach().abs()
    kept = ops.prune_24(scores) if config.compressed else prune_nm(scores, n, m)
    return kept.to(weight.device)


def _tensor_of(argument: str, value: Any, name: str) -> Tensor:
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"convert: {argument}[{name!r}] must be a tensor: {error}") from error


def _given_mask(mask: Any, weight: Tensor, name: str) -> Tensor:
    """A given mask in any of its three forms -> bool [out, in]."""
    mask = _tensor_of("masks", mask, name)
    bits: Tensor
    rows, columns = weight.shape
    if mask.shape == weight.shape:
        if not ((mask == 0) | (mask == 1)).all():
            raise ValueError(f"convert: masks[{name!r}] must hold only 0 and 1")
        bits = mask.bool()
    elif mask.dtype == torch.uint8 and mask.shape == (rows, columns // 8):
        bits = reference.unpack_bits(mask)
    elif mask.dtype == torch.uint8 and mask.shape == (rows * columns // 8,):
        highest_first = reference.unpack_bits(mask.unsqueeze(-1)).flip(-1)
        bits = highest_first.view(rows, columns)
    else:
        raise ValueError(
            f"convert: masks[{name!r}] must be bool [out, in] = [{rows}, {columns}], "
            f"uint8 [out, in/8] or packed uint8 [out * in / 8], "
            f"got {mask.dtype} {list(mask.shape)}"
        )
    return bits.to(weight.device)


# ---- twins ---------------------------------------------------------------------------------------


def _sparse_twins(
    plan: Mapping[nn.Linear, list[str]], config: SlopeConfig
) -> dict[nn.Module, SparseLayer]:
    """A sparse layer for each module; shared weights are shared again."""
    names_of_weight: dict[int, list[str]] = {}
    for module, names in plan.items():
        names_of_weight.setdefault(id(module.weight), []).extend(names)
    replacements: dict[nn.Module, SparseLayer] = {}
    by_weight: dict[int, SparseLayer] = {}
    for module in plan:
        first = by_weight.get(id(module.weight))
        layer = _sparse_twin(module, names_of_weight[id(module.weight)], first, config)
        by_weight.setdefault(id(module.weight), layer)
        replacements[module] = layer
    return replacements


def _sparse_twin(
    module: nn.Linear, names: list[str], first: SparseLayer | None, config: SlopeConfig
) -> SparseLayer:
    """A sparse layer for ``module``; it shares weight and masks of ``first``, if there is one."""
    weight = module.weight.t() if _is_conv1d(module) else module.weight
    mask = _choose_mask(weight, names, config) if first is None else first.mask
    twin: SparseLayer
    if config.compressed:
        twin = SLoPeLinear.from_dense(
            weight,
            module.bias,
            mask,
            backward_copy=config.backward_copy,
            backend=config.backend,
        )
    else:
        twin = MaskedLinear.from_dense(weight, module.bias, mask, pattern=config.pattern)
    if first is not None:
        twin.weight = first.weight
        twin._buffers = first._buffers
    vars(twin.weight).update(vars(module.weight))
    twin.dense_type = type(module)
    _carry_over(module, twin)
    return twin


def _dense_twin(layer: SparseLayer) -> nn.Module:
    weight = layer.dense_weight().detach()
    if layer.has_adapter:
        dtype = torch.promote_types(weight.dtype, torch.float32)
        low_rank = layer.lora_B.detach().to(dtype) @ layer.lora_A.detach().to(dtype)
        weight = (weight.to(dtype) + layer.lora_scale * low_rank).to(weight.dtype)
    twin: nn.Module
    if layer.dense_type is nn.Linear:
        twin = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    else:
        with torch.device("meta"):
            twin = layer.dense_type(layer.out_features, layer.in_features)  # Conv1D(nf, nx)
        weight = weight.t().contiguous()
    twin.weight = nn.Parameter(weight, requires_grad=layer.weight.requires_grad)
    twin.bias = layer.bias
    vars(twin.weight).update(vars(layer.weight))
    _carry_over(layer, twin)
    return twin


# What a sparse layer knows and a dense one has no use for; and what is bound to the old module.
_NOT_CARRIED_OVER = (
    "_compiled_call_impl",
    "_home",
    "_prepared",
    "activation",
    "backend",
    "backward_copy",
    "dense_type",
    "forward",
    "lora_scale",
    "m",
    "n",
    "pattern",
)


def _carry_over(old: nn.Module, new: nn.Module) -> None:
    """Hooks (the same dicts, so that their handles still remove them), mode, user attributes."""
    for key, value in vars(old).items():
        if "hook" in key or (key not in vars(new) and key not in _NOT_CARRIED_OVER):
            vars(new)[key] = value
    new.train(old.training)


def _derived_buffers(model: nn.Module) -> list[str]:
    return [
        qualified_name(prefix, name)
        for prefix, module in model.named_modules()
        if isinstance(module, SLoPeLinear)
        for name in DERIVED_BUFFERS
    ]


def _replace(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> nn.Module:
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and child in replacements:
                parent._modules[name] = replacements[child]
    return replacements.get(model, model)


def _have_ddp_ignore(model: nn.Module, derived_before: set[str]) -> None:
    """Tells DistributedDataParallel of the model's derived buffers instead of those before."""
    ignored = [name for name in vars(model).pop(_DDP_IGNORES, ()) if name not in derived_before]
    if ignored := ignored + _derived_buffers(model):
        setattr(model, _DDP_IGNORES, ignored)
