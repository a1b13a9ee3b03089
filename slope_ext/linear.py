# SPDX-License-Identifier: Apache-2.0
"""SLoPeLinear: a linear layer whose trainable Parameter is the compressed 2:4 weight itself."""

from __future__ import annotations

import math
import threading
import weakref
from typing import Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import Self

from slope_ext import _backward_copy, _freshness, _packed, _streams, ops
from slope_ext._check import (
    ACTIVATIONS,
    BACKENDS,
    FLOAT_DTYPES,
    GATE_ROWS,
    dtype_name,
    has_two_of_four,
)
from slope_ext.ops.spmm import Activation, Backend
from slope_ext.sparse_layer import (
    SparseLayer,
    check_features,
    layers_of_weight,
    warn_of_broadcasts,
)

BackwardCopy = Literal["cached", "recompute"]
# Buffers that a layer derives from weight and bitmask; the mask of the backward copy may be of an
# earlier weight.
DERIVED_BUFFERS = ("weight_metadata", "weight_t", "weight_t_bitmask", "weight_t_metadata")

_prepare_lock = threading.RLock()
Operand = tuple[
    Tensor,
    Tensor,
    Tensor | None,
    Tensor | None,
    Tensor | None,
    Tensor | None,
    Tensor | None,
    Backend,
    Activation,
]


class SLoPeLinear(SparseLayer, nn.Linear):
    """``nn.Linear`` with a 2:4 sparse weight, stored and trained compressed.

    Equivalent to (for the mask M that ``weight_bitmask`` holds)::

        activation(F.linear(x, M * W, bias))  # forward
        dX = dY @ double_pruned(M * W)        # backward, arXiv 2405.16325 section 3.1
        dW = M * (dY.T @ X)                   # kept as [out, in/2] in weight.grad

    ====================  =======================  =================================================
    ``weight``            Parameter [out, in/2]    kept values, row-major, ascending column
    ``weight_bitmask``    uint8 [out, in/8]        bit j % 8 of byte j // 8: column j is kept
    ``bias``              Parameter [out]          or None
    ``lora_A``            Parameter [rank, in]     None until ``add_adapter``
    ``lora_B``            Parameter [out, rank]    None until ``add_adapter``
    ``weight_t``          [in, out/2]              backward copy, derived, not in the state_dict;
                                                   None with ``backward_copy="recompute"``
    ``weight_t_bitmask``  uint8 [in, out/8]        its mask, derived, not in the state_dict
    ``weight_metadata``,  int32 or uint8           masks as the sparse tensor cores read them, uint8
    ``weight_t_metadata``                          right behind the values in memory; derived, not
                                                   in the state_dict; None where those cores are not
                                                   used
    ====================  =======================  =================================================

    The gradient, optimizer state, clipping, gradient scaling, DDP and checkpoints see an ordinary
    Parameter of half the elements. The backward copy is compared with ``weight`` in every backward
    and refreshed if that changed, by whatever optimizer, ``copy_``, ``load_state_dict`` or
    rebinding of ``.data`` (what torch cannot see: :meth:`mark_backward_copy_stale`). Its mask is
    chosen when the layer is made or its bitmask changes, and again by
    :meth:`update_transposed_mask` (``slope_ext.optim.AdamW`` does that every ``mask_interval``
    steps).

    fp16 and bf16 weights that cuSPARSELt multiplies move to memory where their metadata follows
    them, in the first forward pass or when the layer is moved. A forward pass that runs as Python
    sees a bitmask written by hand; compiled or captured ones need :meth:`prepare` after that.

    Args:
        in_features, out_features: logical sizes, multiples of 8.
        bias: whether to learn a bias.
        device, dtype: as in ``nn.Linear``; fp16, bf16, fp32 (or fp64 on the CPU).
        backend: "native", "cusparselt" or "reference", see :func:`slope_ext.ops.linear`; or "auto",
            the first of them that takes the weight, or what :func:`slope_ext.plan_cache.tune` found
            to be faster.
        backward_copy: "cached" keeps the transposed values (fastest); "recompute" derives them in
            every backward (least memory). Take "recompute" for fp32 weights under autocast, which
            derives them from the cast weight anyway.
        activation: "none", "relu" or "swiglu", see :func:`slope_ext.ops.linear`; with "swiglu" the
            layer gives out_features/2 features (out_features a multiple of 16).

    Raises:
        ValueError: an argument is out of range; the message names it.
    """

    mask_name = "weight_bitmask"
    transposed_mask_name = "weight_t_bitmask"
    weight: nn.Parameter
    weight_bitmask: Tensor
    weight_metadata: Tensor | None
    weight_t: Tensor | None
    weight_t_bitmask: Tensor
    weight_t_metadata: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        backward_copy: BackwardCopy = "cached",
        backend: Backend = "auto",
        activation: Activation = "none",
    ) -> None:
        # nn.Linear's own __init__ would allocate the dense weight.
        nn.Module.__init__(self)
        check_features("SLoPeLinear", 8, in_features=in_features, out_features=out_features)
        if dtype is not None and dtype not in FLOAT_DTYPES:
            raise ValueError(
                "SLoPeLinear: dtype must be float16, bfloat16, float32 or float64, "
                f"got {dtype_name(dtype)}"
            )
        if backward_copy not in ("cached", "recompute"):
            raise ValueError(
                f"SLoPeLinear: backward_copy must be 'cached' or 'recompute', got {backward_copy!r}"
            )
        if backend not in BACKENDS:
            raise ValueError(
                f"SLoPeLinear: backend must be one of {', '.join(BACKENDS)}, got {backend!r}"
            )
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"SLoPeLinear: activation must be one of {', '.join(ACTIVATIONS)}, "
                f"got {activation!r}"
            )
        if activation == "swiglu" and out_features % (2 * GATE_ROWS) != 0:
            raise ValueError(
                f"SLoPeLinear: out_features must be a multiple of {2 * GATE_ROWS} for activation "
                f"'swiglu', got {out_features}"
            )
        self.activation: Activation = activation
        self.in_features = in_features
        self.out_features = out_features
        self.backward_copy = backward_copy
        self.backend = backend
        self._prepared: tuple[Any, ...] | None = None  # see prepare()
        self._home: weakref.ref[Tensor] | None = None  # the weight that may move, None: the next
        bitmask = torch.empty(out_features, in_features // 8, device=device, dtype=torch.uint8)
        weight = torch.empty(out_features, in_features // 2, device=device, dtype=dtype)
        self.weight = nn.Parameter(weight)
        self.register_buffer("weight_bitmask", bitmask)
        self.register_buffer("weight_metadata", None, persistent=False)
        self.register_parameter("bias", None)
        if bias:
            self.bias = nn.Parameter(weight.new_empty(out_features))
        self._init_adapter()
        self._allocate_backward_copy()
        self.reset_parameters()
        if not weight.is_meta:
            self.prepare()

    @classmethod
    def from_dense(
        cls,
        weight: Tensor,
        bias: Tensor | None = None,
        bitmask: Tensor | None = None,
        *,
        backward_copy: BackwardCopy = "cached",
        backend: Backend = "auto",
    ) -> Self:
        """Compresses a dense weight; nothing dense is allocated.

        Args:
            weight: [out, in], in and out multiples of 8.
            bias: [out] or None; a Parameter is taken over, not copied.
            bitmask: uint8 [out, in/8]; None keeps the two largest magnitudes of each four.
            backward_copy, backend: as in the constructor.

        Raises:
            ValueError, RuntimeError: an argument has a wrong shape or dtype; the message names it.
        """
        with torch.no_grad():
            if bitmask is None:
                values, bitmask = ops.prune_compress(weight)
            else:
                values = ops.compress(weight, bitmask)
        values.requires_grad_(weight.requires_grad)
        return cls.from_compressed(
            values, bitmask, bias, backward_copy=backward_copy, backend=backend
        )

    @classmethod
    def from_compressed(
        cls,
        values: Tensor,
        bitmask: Tensor,
        bias: Tensor | None = None,
        *,
        backward_copy: BackwardCopy = "cached",
        backend: Backend = "auto",
        activation: Activation = "none",
    ) -> Self:
        """A layer of a weight that is compressed already, which it takes over.

        Args:
            values: [out, in/2]; its requires_grad is the weight's.
            bitmask: uint8 [out, in/8].
            bias: [out] or None; a Parameter is taken over, not copied.
            backward_copy, backend, activation: as in the constructor.

        Raises:
            ValueError: an argument has a wrong shape or dtype; the message names it.
        """
        if values.dim() != 2:
            raise ValueError(
                f"SLoPeLinear: values must be [out, in/2], got shape {list(values.shape)}"
            )
        out_features, half = values.shape
        if bitmask.dtype != torch.uint8 or tuple(bitmask.shape) != (out_features, half // 4):
            raise ValueError(
                f"SLoPeLinear: bitmask must be uint8 [out, in/8] = [{out_features}, {half // 4}], "
                f"got {bitmask.dtype} {list(bitmask.shape)}"
            )
        if bias is not None and tuple(bias.shape) != (out_features,):
            raise ValueError(
                f"SLoPeLinear: bias must be [out] = [{out_features}], got {list(bias.shape)}"
            )
        layer = cls(
            2 * half,
            out_features,
            bias=False,
            device="meta",
            dtype=values.dtype,
            backward_copy=backward_copy,
            backend=backend,
            activation=activation,
        )
        layer.weight = nn.Parameter(values.detach(), requires_grad=values.requires_grad)
        layer.weight_bitmask = bitmask
        if bias is not None:
            layer.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias)
        layer._allocate_backward_copy()
        layer.update_transposed_mask()
        layer.prepare()
        return layer

    def reset_parameters(self) -> None:
        """nn.Linear's initialisation, pruned to the two largest magnitudes of each four.

        An adapter is as new then, too.
        """
        if self.weight.is_meta:
            return
        with torch.no_grad():
            dense = self.weight.new_empty(self.out_features, self.in_features)
            nn.init.kaiming_uniform_(dense, a=math.sqrt(5))
            values, bitmask = ops.prune_compress(dense)
            self.weight.copy_(values)
            self.weight_bitmask.copy_(bitmask)
            if self.bias is not None:
                bound = 1 / math.sqrt(self.in_features)
                nn.init.uniform_(self.bias, -bound, bound)
        self.reset_adapter()
        self.update_transposed_mask()

    # ---- use -------------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        """Y = activation(X W^T + b [+ lora_scale (X A^T) B^T]); x [..., in] -> [..., out]."""
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            operand = self.operand()
        else:
            operand = self._prepared_operand() or self.prepare()
        if self.lora_A is None:
            return ops.linear(x, *operand)
        weight, bitmask, *rest = operand
        return ops.linear_lowrank(
            x,
            weight,
            bitmask,
            self.lora_A,
            self.lora_B,
            self.lora_scale,
            *rest,  # type: ignore[arg-type]
        )

    def operand(self) -> Operand:
        """What :func:`slope_ext.ops.linear` takes after ``x``, in its order."""
        return (
            self.weight,
            self.weight_bitmask,
            self.bias,
            self.weight_t_bitmask,
            self.weight_t,
            self.weight_metadata,
            self.weight_t_metadata,
            self.backend,
            self.activation,
        )

    def prepare(self) -> Operand:
        """Makes ready what a product wants, and returns :meth:`operand`.

        That is: buffers on the weight's device, values and metadata side by side, metadata that
        says what ``weight_bitmask`` says, a transposed mask that belongs to it. The first forward
        pass that runs as Python after one of these moved or changed does it.
        """
        return self._prepare(choose_mask=True)

    def _prepare(self, choose_mask: bool) -> Operand:
        with _prepare_lock:  # forward passes of two threads
            weight = self.weight
            if self.weight_t_bitmask.device != weight.device:
                self._allocate_backward_copy()  # weight.data moved
            elif self.weight_t is not None and not self._transposed_values_fit(self.weight_t):
                self._allocate_transposed_values()
            capturing = _streams.is_capturing(weight)
            # Backward would choose it too, but not where hooks hand it copies of saved tensors.
            due = self._transposed_mask_is_due()
            written = due and choose_mask and not capturing
            if written:
                warn_of_broadcasts(self)
                self.update_transposed_mask()
            if not weight.is_cuda:
                self.weight_metadata = None
            elif (self._pack(may_move=not capturing) or written) and not capturing:
                # From now on other streams may read what was written, and use memory given up.
                torch.cuda.current_stream(weight.device).synchronize()
            operand = self.operand()
            # What was only captured is not done yet. Holding the mask's storage keeps its address
            # from being used again.
            storage = self.weight_bitmask.untyped_storage()
            # A weight that was computed (functional_call, say) would be held with its graph.
            ready = weight.is_leaf and not capturing and (written or not due)
            self._prepared = (self._state(), operand, storage) if ready else None
            return operand

    def _prepared_operand(self) -> Operand | None:
        """What prepare() returned, if nothing that it depends on changed."""
        prepared = self._prepared  # another thread may take it back meanwhile
        if prepared is not None and prepared[0] == self._state():
            return prepared[1]  # type: ignore[no-any-return]
        return None

    def _state(self) -> tuple[Any, ...]:
        buffers = self._buffers  # nn.Module's attribute access would cost as much as the rest
        weight, bitmask = self.weight, buffers["weight_bitmask"]
        assert bitmask is not None
        return (
            id(weight),
            weight.data_ptr(),
            weight.dtype,
            id(bitmask),
            bitmask.data_ptr(),
            _freshness.version(bitmask),
            id(self.bias),
            id(buffers["weight_t_bitmask"]),
            id(buffers["weight_t"]),
            id(buffers["weight_metadata"]),
            id(buffers["weight_t_metadata"]),
            self.backend,
            self.activation,
        )

    def __getstate__(self) -> dict[str, Any]:
        # A copy has all buffers, metadata too: who pairs them with the model's wants as many.
        return {**super().__getstate__(), "_prepared": None, "_home": None}

    def dense_weight(self) -> Tensor:
        """The weight [out, in] with its zeros; differentiable in ``weight``."""
        return ops.decompress(self.weight, self.weight_bitmask)

    def extra_repr(self) -> str:
        rank = f", rank={self.lora_A.shape[0]}" if self.has_adapter else ""
        activation = "" if self.activation == "none" else f", activation={self.activation!r}"
        kind = f"2:4, backward_copy={self.backward_copy!r}"
        return f"{super().extra_repr()}, {kind}{activation}{rank}"

    # ---- backward copy ---------------------------------------------------------------------------

    def update_transposed_mask(self) -> None:
        self._prepared = None  # it may be stale afterwards
        super().update_transposed_mask()

    def _choose_transposed_mask(self) -> None:
        _backward_copy.choose_mask(self.weight, self.weight_bitmask, self.weight_t_bitmask)
        self._follow_transposed_mask()

    def set_transposed_mask(self, mask: Tensor) -> None:
        super().set_transposed_mask(mask)
        self._follow_transposed_mask()

    def check_transposed_mask(self, mask: Tensor) -> None:
        super().check_transposed_mask(mask)
        if not mask.is_meta and not has_two_of_four(mask):
            raise ValueError("a transposed mask must have exactly two bits set of every four")

    def backward_weight(self) -> Tensor:
        """The double-pruned weight [out, in] that the next backward multiplies with, detached."""
        with torch.no_grad():
            values_t, _ = _backward_copy.follow(
                self.weight,
                self.weight_bitmask,
                self.weight_t_bitmask,
                self.weight_t,
                self.weight_t_metadata,
                self.backend,
            )
            return ops.decompress(values_t, self.weight_t_bitmask).t()

    def mark_backward_copy_stale(self) -> None:
        """Has the next backward refresh the copy; its mask stays.

        Needed only after a write through ``weight.data`` that no optimizer step follows, which no
        version counter shows, and after the replay of a graph that writes the weight outside of an
        optimizer's step.
        """
        if self.weight_t is not None:
            _freshness.mark_stale(self.weight_t)

    def _transposed_mask_is_due(self) -> bool:
        masks = (self.weight_bitmask, self.weight_t_bitmask)
        # Inference tensors count no versions; nothing that derives from them is ever fresh.
        known = not any(mask.is_meta or mask.is_inference() for mask in masks)
        return known and _backward_copy.mask_is_stale(*masks)

    def _allocate_backward_copy(self) -> None:
        # The values follow in the first backward, the mask too unless it is chosen before.
        with torch.inference_mode(False):  # it outlives the call
            bitmask_t = torch.empty(
                self.in_features,
                self.out_features // 8,
                dtype=torch.uint8,
                device=self.weight.device,
            )
        self.register_buffer("weight_t_bitmask", bitmask_t, persistent=False)
        _freshness.mark_stale(bitmask_t)
        self._allocate_transposed_values()

    def _allocate_transposed_values(self) -> None:
        values_t = metadata_t = None
        if self.backward_copy == "cached":
            present = self._buffers.get("weight_t_metadata")
            prefers_plans = self._prefers_plans(self.in_features, self.out_features, present)
            values_t, metadata_t = _backward_copy.new_values_t(
                self.weight.data, self.backend, prefers_plans
            )
        self.register_buffer("weight_t", values_t, persistent=False)
        self.register_buffer("weight_t_metadata", metadata_t, persistent=False)

    def _transposed_values_fit(self, values_t: Tensor) -> bool:
        if values_t.dtype != self.weight.dtype:
            return False
        kind = self._kind(self.in_features, self.out_features, self.weight_t_metadata)
        return _packed.fits(values_t, self.weight_t_metadata, kind)

    def _follow_transposed_mask(self) -> None:
        # At once, not in the next backward: that may be the replay of a CUDA graph.
        if self.weight_t_metadata is not None:
            _backward_copy.follow_metadata(self.weight_t_bitmask, self.weight_t_metadata)

    # ---- packed operand --------------------------------------------------------------------------

    def _pack(self, may_move: bool) -> bool:
        """Brings weight_metadata up to date; whether anything was to do."""
        weight, metadata = self.weight, self.weight_metadata
        kind = self._kind(self.out_features, self.in_features, metadata)
        # Beside a weight that must not move, plans read neither; both are packed in every call.
        here = metadata is not None and metadata.device == weight.device
        stays = here and kind == "cusparselt" and not self._can_move()
        if not stays and (metadata is None or not _packed.fits(weight, metadata, kind)):
            metadata = None
            if may_move and kind == "native":
                metadata = _packed.empty_words(self.out_features, self.in_features, weight.device)
            elif may_move and kind == "cusparselt":
                metadata = self._move_to_packed()
            self.weight_metadata = metadata
        return metadata is not None and _backward_copy.follow_metadata(
            self.weight_bitmask, metadata
        )

    def _move_to_packed(self) -> Tensor | None:
        """Gives ``weight`` memory with room for metadata behind it; returns that, if there is."""
        if not self._can_move():
            return None
        weight = self.weight
        with torch.inference_mode(False), torch.no_grad():
            values, metadata = _packed.empty(
                self.out_features, self.in_features, weight.dtype, weight.device
            )
            values.copy_(weight)
            weight.data = values
        return metadata

    def _can_move(self) -> bool:
        """Whether the weight is this layer's alone.

        Not a DTensor and its like, what was computed, a part of somebody's flat buffer, or a
        Parameter that was put in its place past nn.Module: FSDP2 gathers one for each forward pass,
        into memory of its own.
        """
        weight = self.weight
        if not weight.is_leaf:
            return False
        if self._home is None:
            self._home = weakref.ref(weight)
        if self._home() is not weight or type(weight.data) is not Tensor:
            return False
        return weight.untyped_storage().nbytes() == weight.numel() * weight.element_size()

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name == "weight":
            self._home = None
        super().register_parameter(name, param)

    def _kind(self, rows: int, columns: int, metadata: Tensor | None) -> str | None:
        """What multiplies by a weight [rows, columns] that has this metadata."""
        place = (self.weight.dtype, self.weight.device)
        prefers_plans = self._prefers_plans(rows, columns, metadata)
        return _packed.backend_of(rows, columns, *place, self.backend, prefers_plans)

    def _prefers_plans(self, rows: int, columns: int, metadata: Tensor | None) -> bool:
        """Whether plans are to be taken where the own product runs too: as before, if it shows."""
        if metadata is not None:
            return metadata.dtype == torch.uint8
        # The table knows of plain products only.
        is_plain = self.backend == "auto" and self.activation == "none" and not self.has_adapter
        place = (self.weight.dtype, self.weight.device)
        return is_plain and self._can_move() and _packed.tuned_for_plans(rows, columns, *place)

    def choose_product(self) -> None:
        """Has the tuned table choose again between the own product and plans (backend "auto")."""
        self._home = None
        kind = self._kind(self.out_features, self.in_features, None)
        if not _packed.fits(self.weight, self.weight_metadata, kind):
            self.weight_metadata = None
        if self.weight_t is not None:
            kind_t = self._kind(self.in_features, self.out_features, None)
            if not _packed.fits(self.weight_t, self.weight_t_metadata, kind_t):
                self.weight_t_metadata = None
                self._allocate_transposed_values()
        self.prepare()

    def _create_adapter(self, rank: int) -> None:
        super()._create_adapter(rank)
        present = (self.weight_metadata, self.weight_t_metadata)
        by_plans = any(m is not None and m.dtype == torch.uint8 for m in present)
        # By those, an adapter costs a pass over Y. A captured step may go on to read the metadata.
        if self.backend == "auto" and by_plans and not _freshness.step_was_captured():
            self.choose_product()

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        self._prepared = self._home = None
        super()._apply(fn, recurse)
        if not self.weight.is_meta:
            self._prepare(choose_mask=False)  # after to_empty there is nothing to choose from
        return self

    # ---- state_dict ------------------------------------------------------------------------------

    def _problem_of_mask(self, mask: Tensor) -> str | None:
        if mask.dtype != torch.uint8:
            return f"must be uint8, got {mask.dtype}"
        if not mask.is_meta and not has_two_of_four(mask):
            return "must have exactly two bits set of every four"
        return None

    def _before_load(self) -> None:
        # Tensors that a weak reference is to are not swapped
        if torch.__future__.get_swap_module_params_on_conversion():
            for layer in layers_of_weight(self.weight):
                if isinstance(layer, SLoPeLinear):
                    layer._prepared = layer._home = None

    def _after_load(self) -> None:
        self._home = None
        # With assign=True the weight may have left the meta device or changed its dtype.
        if self.weight_t_bitmask.device != self.weight.device:
            self._allocate_backward_copy()
        if not self.weight.is_meta:
            self._prepare(choose_mask=False)
            self.update_transposed_mask()
