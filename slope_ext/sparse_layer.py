# SPDX-License-Identifier: Apache-2.0
"""What sparse layers have in common: a transposed mask, an adapter, and being found by weight."""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from typing_extensions import Self

from slope_ext import _freshness
from slope_ext._check import dtype_name

# Every live layer. No WeakSet: other threads make layers while this one looks. And no lock, which
# would hang in signal handlers and after a fork; a set adds, discards and becomes a list at once.
_layers: set[weakref.ref[SparseLayer]] = set()
_BROADCASTS_ARE_WRITES = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13)


class SparseLayer(nn.Module):
    """Base of SLoPeLinear and MaskedLinear.

    Adapter: Y += lora_scale (X lora_A^T) lora_B^T with ``lora_A`` [rank, in] and ``lora_B``
    [out, rank], both None until :meth:`add_adapter`. The state_dict holds them and the scale
    (``lora_scale``, an fp64 scalar) only where they exist; loading a state_dict that has them adds
    them.
    """

    in_features: int
    out_features: int
    weight: nn.Parameter
    dense_type: type[nn.Module] = nn.Linear  # what to_dense makes of it
    mask_name: str  # buffer of the mask of W
    transposed_mask_name: str  # buffer of the mask of W^{R,C}, derived

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        # Copies and unpickled layers come through here too, unlike __init__.
        layer = super().__new__(cls)
        _layers.add(weakref.ref(layer, _layers.discard))
        return layer

    # ---- transposed mask -------------------------------------------------------------------------

    @property
    def mask(self) -> Tensor:
        """The mask of W, as the layer stores it."""
        return self._mask(self.mask_name)

    @property
    def transposed_mask(self) -> Tensor:
        """The mask of W^{R,C}, as the layer stores it."""
        return self._mask(self.transposed_mask_name)

    def _mask(self, name: str) -> Tensor:
        mask = self._buffers[name]  # get_buffer takes ten times as long, in every optimizer step
        assert mask is not None
        return mask

    def dense_weight(self) -> Tensor:
        """The weight [out, in] with its zeros; differentiable in ``weight``."""
        raise NotImplementedError

    def update_transposed_mask(self) -> None:
        """Chooses the mask of W^{R,C} again, from the present weight.

        Of a sharded weight (a DTensor) the next forward or backward pass does, which has it whole.
        """
        if is_traceable_wrapper_subclass(self.weight.data):
            _freshness.mark_stale(self.transposed_mask)
        else:
            with torch.no_grad():
                self._choose_transposed_mask()

    def _choose_transposed_mask(self) -> None:
        raise NotImplementedError

    def set_transposed_mask(self, mask: Tensor) -> None:
        """Takes a mask of W^{R,C} as it is, e.g. from a checkpoint of an optimizer.

        Raises:
            ValueError: it is none of a weight of this shape.
        """
        self.check_transposed_mask(mask)
        self.transposed_mask.copy_(mask)
        _freshness.mark_fresh(self.transposed_mask, self.mask)

    def check_transposed_mask(self, mask: Tensor) -> None:
        """Raises ValueError unless ``mask`` may be a mask of W^{R,C}."""
        present = self.transposed_mask
        if mask.dtype != present.dtype or mask.shape != present.shape:
            raise ValueError(
                f"a transposed mask must be {dtype_name(present.dtype)} {list(present.shape)} for "
                f"this weight, got {dtype_name(mask.dtype)} {list(mask.shape)}"
            )

    def transposed_mask_is_fresh(self) -> bool:
        """Whether the mask of W^{R,C} belongs to the present mask of W."""
        return _freshness.is_fresh(self.transposed_mask, self.mask)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        # A moved mask stays chosen as it was; an emptied one (to_empty) must be chosen again.
        was_fresh, before = self.transposed_mask_is_fresh(), self.transposed_mask
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        after = self.transposed_mask
        if after is not before:
            moved = (
                not after.is_meta and not before.is_meta and before.equal(after.to(before.device))
            )
            if was_fresh and moved:
                _freshness.mark_fresh(after, self.mask)
            else:
                _freshness.mark_stale(after)
        return self

    def __getstate__(self) -> dict[str, Any]:
        # Stamps live on storages and are not copied with them.
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        return {**state, "_transposed_mask_fresh": self.transposed_mask_is_fresh()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        fresh = state.pop("_transposed_mask_fresh")
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if fresh:
            _freshness.mark_fresh(self.transposed_mask, self.mask)
        else:
            _freshness.mark_stale(self.transposed_mask)

    # ---- adapter ---------------------------------------------------------------------------------

    def _init_adapter(self) -> None:
        self.register_parameter("lora_A", None)
        self.register_parameter("lora_B", None)
        self.lora_scale = 1.0

    @property
    def has_adapter(self) -> bool:
        return self.lora_A is not None

    def add_adapter(self, rank: int, scale: float = 1.0) -> None:
        """Adds A ~ U(-1/sqrt(in), 1/sqrt(in)) and B = 0: the layer's output stays as it is.

        A layer that :func:`slope_ext.plan_cache.tune` put on plans goes back to the own product,
        which makes the low-rank term in its kernel: the output may then round otherwise, and CUDA
        graphs that hold the layer must be captured anew.

        Args:
            rank: 1 or more.
            scale: factor of the low-rank term.

        Raises:
            ValueError: rank is not positive, the layer has an adapter already, or its weight is
                sharded (a DTensor).
        """
        if rank < 1:
            raise ValueError(f"add_adapter: rank must be at least 1, got {rank}")
        if self.has_adapter:
            raise ValueError("add_adapter: the layer has an adapter already; remove_adapter first")
        self._create_adapter(rank)
        self.lora_scale = scale
        self.reset_adapter()

    def reset_adapter(self) -> None:
        """Draws A anew and makes B zero, as :meth:`add_adapter` does; the scale stays."""
        if self.has_adapter:
            bound = 1 / math.sqrt(self.in_features)
            nn.init.uniform_(self.lora_A, -bound, bound)
            nn.init.zeros_(self.lora_B)

    def remove_adapter(self) -> None:
        """Drops the adapter; the sparse weight stays as it was trained beside it."""
        self._init_adapter()

    def _create_adapter(self, rank: int) -> None:
        if is_traceable_wrapper_subclass(self.weight):
            kind = type(self.weight).__name__
            raise ValueError(f"add_adapter: weight is a {kind}; add adapters before it is sharded")
        device, dtype = self.weight.device, self.weight.dtype
        self.lora_A = nn.Parameter(torch.empty(rank, self.in_features, device=device, dtype=dtype))
        self.lora_B = nn.Parameter(torch.empty(self.out_features, rank, device=device, dtype=dtype))

    # ---- state_dict ------------------------------------------------------------------------------

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.has_adapter:
            destination[prefix + "lora_scale"] = torch.tensor(self.lora_scale, dtype=torch.float64)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        mask = state_dict.get(prefix + self.mask_name)
        problem = None if mask is None else self._problem_of_mask(mask)
        if problem is not None:
            error_msgs.append(f"{prefix}{self.mask_name} {problem}")
            return
        self._before_load()
        lora_A = state_dict.get(prefix + "lora_A")
        if lora_A is not None and lora_A.dim() == 2 and not self.has_adapter:
            self._create_adapter(lora_A.shape[0])
            nn.init.zeros_(self.lora_B)  # of no effect where the state has none
        scale = state_dict.pop(prefix + "lora_scale", None)
        if scale is not None:
            self.lora_scale = float(scale)
        elif lora_A is not None:
            missing_keys.append(prefix + "lora_scale")
        super()._load_from_state_dict(
            state_dict,
            prefix,
            local_metadata,
            strict,
            missing_keys,
            unexpected_keys,
            error_msgs,
        )
        self._after_load()

    def _problem_of_mask(self, mask: Tensor) -> str | None:
        """What is wrong with a mask of W that is to be loaded, but for its shape; or None."""
        raise NotImplementedError

    def _before_load(self) -> None:
        """Called before a state is loaded, if its mask may be."""

    def _after_load(self) -> None:
        """Called after a state was loaded: what is derived follows."""
        raise NotImplementedError


def update_transposed_masks(model: nn.Module) -> None:
    """Chooses every transposed mask of ``model`` again, from its present weights.

    ``slope_ext.optim.AdamW`` does this on schedule; with another optimizer call it every 100 steps.
    """
    for _, layer in named_sparse_layers(model):
        layer.update_transposed_mask()


def transposed_masks(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the transposed masks of ``model`` by layer name, to be saved beside its state_dict.

    A state_dict leaves them out, since they can be derived; but a mask of an earlier weight cannot,
    so an exact resume needs them. ``slope_ext.optim.AdamW`` keeps them in its own state.
    """
    return {name: layer.transposed_mask.clone() for name, layer in named_sparse_layers(model)}


def load_transposed_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Puts back what :func:`transposed_masks` returned; after the model's own load_state_dict.

    Raises:
        KeyError: a sparse layer of ``model`` has no mask in ``masks``; its name is the key.
        ValueError: a mask does not fit its layer, whose name is told. No layer has changed then.
    """
    layers = named_sparse_layers(model)
    for name, layer in layers:
        try:
            layer.check_transposed_mask(masks[name])
        except ValueError as error:
            raise ValueError(f"load_transposed_masks: {name}: {error}") from None
    for name, layer in layers:
        layer.set_transposed_mask(masks[name])


def named_sparse_layers(model: nn.Module) -> list[tuple[str, SparseLayer]]:
    return [(name, m) for name, m in model.named_modules() if isinstance(m, SparseLayer)]


def qualified_name(module: str, name: str) -> str:
    """What a module's parameter or buffer is called in the model; the model's own name is ""."""
    return f"{module}.{name}" if module else name


def end_mask_broadcasts(ddp: DDP) -> DDP:
    """Has DistributedDataParallel leave masks alone from now on; returns it.

    It broadcasts them from rank 0 when it is made, and then in every forward pass, though training
    does not change them. In torch before 2.13 that counts as a write each time, after which the
    transposed masks are chosen again. Call this on every rank right after wrapping, before masks or
    an optimizer's state are loaded::

        ddp = slope.end_mask_broadcasts(DistributedDataParallel(model))
    """
    ddp.parameters_to_ignore |= {
        qualified_name(prefix, name)
        for prefix, layer in named_sparse_layers(ddp.module)
        for name in layer._buffers  # of masks or derived from them
    }
    ddp._assign_modules_buffers()
    return ddp


def warn_of_broadcasts(layer: SparseLayer) -> None:
    """Warns once where a mask was written because DistributedDataParallel broadcasts it."""
    ddp = DDP._active_ddp_module
    if ddp is None or not _BROADCASTS_ARE_WRITES:
        return
    if any(buffer is layer.mask for buffer in ddp.modules_buffers):
        warnings.warn(
            "slope_ext: DistributedDataParallel broadcasts masks in every forward pass, and then "
            "transposed masks are chosen again; call slope_ext.end_mask_broadcasts after wrapping",
            stacklevel=2,
        )


def layers_by_weight() -> dict[int, SparseLayer]:
    """Every live sparse layer, by ``id`` of its weight Parameter; of several that share it, one."""
    return {id(weight): layer for weight, layer in _live_layers()}


def check_features(layer: str, multiple: int, **sizes: int) -> None:
    """Raises ValueError, which names ``layer``, unless all are positive multiples of one number."""
    for name, size in sizes.items():
        if not isinstance(size, Integral) or size < multiple or size % multiple != 0:
            raise ValueError(f"{layer}: {name} must be a multiple of {multiple}, got {size}")


def layers_of_weight(weight: Tensor) -> list[SparseLayer]:
    """The live sparse layers that have this very weight, masks of their own or not."""
    return [layer for other, layer in _live_layers() if other is weight]


def layers_of(weights: Iterable[Tensor]) -> list[SparseLayer]:
    """The live sparse layers that have one of these weights, of those that share a mask one."""
    wanted = {id(weight) for weight in weights}
    found = [layer for weight, layer in _live_layers() if id(weight) in wanted]
    return list({id(layer.transposed_mask): layer for layer in found}.values())


def _live_layers() -> Iterator[tuple[Tensor, SparseLayer]]:
    for ref in list(_layers):
        # One that is being made, copied or unpickled has no parameters yet, or never will
        layer = ref()
        weight = None if layer is None else vars(layer).get("_parameters", {}).get("weight")
        if layer is not None and weight is not None:
            yield weight, layer
