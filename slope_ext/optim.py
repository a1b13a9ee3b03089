# SPDX-License-Identifier: Apache-2.0
"""AdamW for sparse and dense parameters together.

Any torch optimizer trains a converted model. This one also keeps the backward copies of 2:4 layers
in the same pass, re-chooses their transposed masks on schedule, and offers fp32 master weights.
"""

from __future__ import annotations

import math
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from slope_ext import _backward_copy, _freshness, _streams, ops, reference
from slope_ext._check import dtype_name, is_half
from slope_ext.linear import SLoPeLinear
from slope_ext.sparse_layer import SparseLayer, layers_by_weight, layers_of

_STATE_TENSORS = ("exp_avg", "exp_avg_sq", "master")
_REQUIRED = ("step", "exp_avg", "exp_avg_sq")  # of a parameter that has a state
_TRANSPOSED_MASK = "transposed_mask"
_DECOUPLED = "decoupled_weight_decay"


_SCALARS = ("lr", "eps", "weight_decay")
_PIECE = 1 << 24  # elements of a master that are compared at once
_ROUNDING = 1e-12  # a scheduler that ends at 0 may end so far below


class _Clipping(NamedTuple):
    norm: Tensor  # of all gradients
    max_norm: float
    captured: bool  # into a CUDA graph
    grads: list[weakref.ref[Tensor]]


class AdamW(torch.optim.Optimizer):
    """AdamW as ``torch.optim.AdamW`` defines it: decoupled decay, eps after bias correction.

    On a 2:4 layer it does on the values what torch's AdamW does on a dense weight whose gradient is
    masked. Moments are fp32 for fp16 and bf16 parameters, else of the parameter's dtype.

    On CUDA a step is one pass over memory, a few launches for all parameters, and does not wait for
    the GPU: a GradScaler's scale and verdict, a tensor learning rate and the coefficient of
    :meth:`clip_grad_norm_` are read by the kernels. (fp64 parameters are for the CPU; on a GPU they
    take plain torch ops, which wait.) After a first step it can be captured into a CUDA graph;
    replays do not choose masks (call :func:`slope_ext.update_transposed_masks` between them), and
    leave the backward copies to backward passes.

    Load a checkpoint's model before its optimizer: the optimizer's state holds the transposed masks
    too, which are chosen again when a model is loaded (``set_model_state_dict``, then
    ``set_optimizer_state_dict``; ``set_state_dict`` does it the other way round). Every rank must
    step every parameter: as a ZeroRedundancyOptimizer's class take ``mask_interval=0``, and call
    :func:`slope_ext.update_transposed_masks` on all ranks. A write through ``weight.data`` after
    ``step()`` (clamping, say) is invisible to torch and needs
    ``SLoPeLinear.mark_backward_copy_stale()``; under ``torch.no_grad()`` without ``.data`` it does
    not. With ``master_weights`` such a write is lost.

    Args:
        params: parameters or parameter groups, sparse and dense ones in any mix.
        lr: learning rate; an fp32 scalar tensor on the parameters' device is read in each step, by
            a graph's replays too.
        betas: decay rates of the two moments, each in [0, 1).
        eps: added to the root of the second moment, after bias correction.
        weight_decay: decoupled; each step multiplies a weight by 1 - lr * weight_decay.
        mask_interval: steps between two choices of the transposed masks (100 in the paper,
            arXiv 2405.16325 section 3.1); 0 never chooses them again. What a GradScaler skips
            counts too.
        master_weights: keep fp32 copies of fp16 and bf16 parameters and update those. What is
            written to a weight or loaded between steps is taken over where it is not what its copy
            rounds to: weights win over copies, whichever was loaded last. Not seen are writes
            through ``.data`` or through a larger buffer that ``.data`` was set to a part of, and
            what is written between a graph's replays; step once after loading, before a capture,
            else every replay looks.
        half_moments: keep the moments of bf16 parameters in their dtype, as torch does; not with
            master_weights, nor for fp16 ones, whose second moments would be rounded to zero.
        maximize: ascend instead of descend.

    Raises:
        ValueError: an argument is out of range; the message names it.
        TypeError: a trained parameter is a tensor of tensors, such as FSDP2's DTensors.
    """

    # GradScaler hands grad_scale and found_inf over instead of unscaling in a pass of its own.
    _step_supports_amp_scaling = True
    # Counts its steps and stamps its own writes, see slope_ext/_freshness.py.
    keeps_backward_copies = True
    grad_scale: Tensor | None
    found_inf: Tensor | None

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        mask_interval: int = 100,
        master_weights: bool = False,
        half_moments: bool = False,
        maximize: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "mask_interval": mask_interval,
            "master_weights": master_weights,
            "half_moments": half_moments,
            "mask_step": 0,  # calls of step() that updated the group
            "maximize": maximize,
        }
        self._clipping: _Clipping | None = None
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A checkpoint of torch.optim.AdamW lacks this class's options.
        super().__setstate__(state)
        self._clipping = None
        for group in self.param_groups:
            group.pop(_DECOUPLED, None)  # of torch's Adam; here it is so
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group; its options are checked as the constructor's are.

        Raises:
            ValueError: an option is out of range; the message names it.
            TypeError: a trained parameter is a tensor of tensors, such as a DTensor.
        """
        options = {**self.defaults, **param_group}
        _require_options(options, read_tensors=True)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for name in _SCALARS:  # plain ones: checkpoints take no NumPy scalars
            group[name] = (
                options[name] if isinstance(options[name], Tensor) else float(options[name])
            )
        group["mask_interval"] = int(options["mask_interval"])
        try:
            params = group["params"]
            _require_wide_moments_of_fp16(options, params)
            _require_plain(params)
        except (TypeError, ValueError):
            del self.param_groups[-1]
            raise

    # Not traced: what it leaves for step would be lost, and that is a few launches already.
    @torch.compiler.disable  # type: ignore[misc]
    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Has the next step clip all gradients together; returns their norm, an fp32 scalar.

        As ``torch.nn.utils.clip_grad_norm_`` over every parameter of this optimizer, but for the
        pass that would scale the gradients: the step multiplies as it reads them. ``.grad`` stays
        as it is until then, and must stay so; a step that finds other gradients drops the clipping,
        and raises a RuntimeError where only some are others. Of several limits the least holds.
        With a GradScaler either call its ``unscale_`` before this, or not at all: the norm is then
        the scale times the true one, and the limit is of the true one. All parameters must be on
        one device.

        Raises:
            ValueError: ``max_norm`` is negative or NaN.
        """
        if not max_norm >= 0:
            raise ValueError(f"AdamW: max_norm must not be negative, got {max_norm}")
        self._follow_gradients()
        grads = self._gradients()
        halves = [grad for grad in grads if is_half(grad.dtype)]
        others = [grad for grad in grads if not is_half(grad.dtype)]
        norms = list(torch._foreach_norm(halves, dtype=torch.float32)) if halves else []
        norms += [norm.float() for norm in torch._foreach_norm(others)] if others else []
        if not norms:
            return torch.tensor(0.0)
        norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
        if self._clipping is not None:
            max_norm = min(max_norm, self._clipping.max_norm)
        captured = _streams.is_capturing(norm)
        self._clipping = _Clipping(norm, max_norm, captured, [weakref.ref(grad) for grad in grads])
        return norm

    def _gradients(self) -> list[Tensor]:
        params = (param for group in self.param_groups for param in group["params"])
        return [param.grad for param in params if param.grad is not None]

    def _follow_gradients(self) -> None:
        """Drops clipping of gradients that are gone; raises where it would be of others too."""
        if self._clipping is None:
            return
        clipped = {id(ref()) for ref in self._clipping.grads}
        known = [id(grad) in clipped for grad in self._gradients()]
        if any(known) and not all(known):
            raise RuntimeError(
                "AdamW: some gradients came after clip_grad_norm_; call it when all are there"
            )
        if not any(known):
            self._clipping = None

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's; clipping that no step used is dropped."""
        super().zero_grad(set_to_none)
        self._clipping = None

    @torch.compiler.disable  # type: ignore[misc]
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient; returns the closure's loss, if any.

        Raises:
            RuntimeError: a gradient is sparse; a gradient or state is of another dtype than its
                parameter; a sparse layer's weight is flat, as FullyShardedDataParallel makes it;
                clipping is of some gradients only; a CUDA graph holds one of clipping and step, or
                the first step of a parameter.
            ValueError: an option of a group was set to what is out of range.

        But for the closure, which has run, nothing has changed and nothing counted then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        layers = layers_by_weight()
        for group in self.param_groups:
            self._check_group(group, layers)
        self._follow_gradients()
        grad_scale, found_inf = self._grad_scale(), getattr(self, "found_inf", None)
        _freshness.count_optimizer_step()
        for group in self.param_groups:
            self._step_group(group, layers, grad_scale, found_inf)
        self._clipping = None
        return loss

    def _check_group(self, group: dict[str, Any], layers: dict[int, SparseLayer]) -> None:
        # Tensors among the options are not read: that would wait for the GPU
        _require_options(group, read_tensors=False)
        _require_wide_moments_of_fp16(group, group["params"])
        for param in group["params"]:
            if param.grad is None:
                continue
            if param.dim() != 2 and id(param) in layers:
                raise RuntimeError(
                    f"AdamW: the weight of a sparse layer is {list(param.shape)}, flat as "
                    "FullyShardedDataParallel makes it; torch's optimizers take these"
                )
            if param.grad.is_sparse:
                raise RuntimeError("AdamW: sparse gradients are not supported; use sparse=False")
            if param.grad.dtype != param.dtype:
                raise RuntimeError(
                    f"AdamW: the gradient of a {dtype_name(param.dtype)} parameter is "
                    f"{dtype_name(param.grad.dtype)}; it must be of the parameter's dtype"
                )
            state = self.state.get(param, {})
            moments = state["exp_avg"].dtype if state else param.dtype
            if moments not in (param.dtype, torch.float32) or (
                "master" in state and not is_half(param.dtype)
            ):
                raise RuntimeError(
                    f"AdamW: a parameter is {dtype_name(param.dtype)} now, but its state is of "
                    "another dtype; make a new optimizer after a change of dtype"
                )
            wants_master = group["master_weights"] and moments != param.dtype
            if not state or (wants_master and "master" not in state):
                _refuse_capture(param)

    def _grad_scale(self) -> Tensor | None:
        """What gradients are to be divided by: a GradScaler's scale times the clipping."""
        scale: Tensor | None = getattr(self, "grad_scale", None)
        if self._clipping is None:
            return scale
        norm, max_norm, captured, _ = self._clipping
        if captured != _streams.is_capturing(norm):
            raise RuntimeError(
                "AdamW: clip_grad_norm_ and step must be captured into one CUDA graph, or neither"
            )
        if scale is None:
            return ((norm + 1e-6) / max_norm).clamp(min=1)
        return ((norm / scale + 1e-6) / max_norm).clamp(min=1) * scale

    def _step_group(
        self,
        group: dict[str, Any],
        layers: dict[int, SparseLayer],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        params = [param for param in group["params"] if param.grad is not None]
        if not params:
            return
        states = [self._state_of(param, group) for param in params]
        mastered = [(p, s["master"]) for p, s in zip(params, states, strict=True) if "master" in s]
        written_to = [
            (param, master)
            for param, master in mastered
            if not _freshness.is_fresh(master, param, trained=False)
        ]
        for param, master in written_to:
            _take_over(param, master)
        group["mask_step"] += 1
        interval = group["mask_interval"]
        choose = interval > 0 and group["mask_step"] % interval == 0
        choose = choose and not _streams.is_capturing(params[0])

        # Buckets: what one adamw_ call can take. A layer whose mask is due gets its copy later.
        buckets: dict[Any, list[tuple[Tensor, SLoPeLinear | None]]] = defaultdict(list)
        written: set[int] = set()
        for param, state in zip(params, states, strict=True):
            copied = None if choose else _with_copy_to_write(layers.get(id(param)), written)
            key = (param.device, param.dtype, state["exp_avg"].dtype, "master" in state)
            buckets[(*key, copied is not None)].append((param, copied))
        for bucket in buckets.values():
            self._update(bucket, group, grad_scale, found_inf)
        for param, master in mastered:
            _freshness.mark_fresh(master, param, trained=False)
        for param, master in written_to:
            if _streams.is_capturing(param):  # what a capture records has not run
                _freshness.mark_stale(master)
        # Those too that had no gradient in this very step: experts that no token went to
        for layer in layers_of(group["params"]) if choose else ():
            layer.update_transposed_mask()

    def _update(
        self,
        bucket: list[tuple[Tensor, SLoPeLinear | None]],
        group: dict[str, Any],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        params = [param for param, _ in bucket]
        states = [self.state[param] for param in params]
        layers = [layer for _, layer in bucket if layer is not None]
        beta1, beta2 = group["betas"]
        device = params[0].device
        scalars = {"grad_scale": grad_scale, "found_inf": found_inf, "lr_tensor": None}
        lr = group["lr"]
        if isinstance(lr, Tensor):
            scalars["lr_tensor"], lr = lr.float(), 0.0
        lr = max(lr, 0.0)
        scalars = {name: s if s is None else s.to(device) for name, s in scalars.items()}

        steps = [state["step"] for state in states]
        if scalars["found_inf"] is None:
            torch._foreach_add_(steps, 1)
        else:
            advance = (scalars["found_inf"] == 0).float()
            torch._foreach_add_(steps, [advance.to(step.device) for step in steps])
        bitmasks = [layer.weight_bitmask for layer in layers]
        bitmasks_t = [layer.weight_t_bitmask for layer in layers]
        values_t: list[Tensor] = [layer.weight_t for layer in layers]  # type: ignore[misc]
        # fp64 is for references.
        update = reference.adamw_ if params[0].dtype == torch.float64 else ops.adamw_
        update(
            params,
            [param.grad for param in params],  # type: ignore[misc]
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [state["master"] for state in states if "master" in state],
            steps,
            bitmasks,
            bitmasks_t,
            values_t,
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            maximize=group["maximize"],
            **scalars,
        )
        values = params if layers else []  # all of a bucket have a copy, or none
        for copy, *sources in zip(values_t, values, bitmasks, bitmasks_t, strict=True):
            _backward_copy.mark(copy, *sources)

    # ---- state -----------------------------------------------------------------------------------

    def _state_of(self, param: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        state: dict[str, Any] = self.state[param]
        if not state:
            wide = is_half(param.dtype) and not group["half_moments"]
            dtype = torch.float32 if wide else param.dtype
            state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
            state["exp_avg"] = torch.zeros_like(param, dtype=dtype)
            state["exp_avg_sq"] = torch.zeros_like(param, dtype=dtype)
        wide = state["exp_avg"].dtype != param.dtype
        if group["master_weights"] and wide and "master" not in state:
            state["master"] = param.detach().float()
        return state

    def state_dict(self) -> dict[str, Any]:
        """torch's state_dict, and a copy of the transposed mask in the state of a sparse weight.

        A copy: who loads into these tensors (torch.distributed.checkpoint) loads a model before the
        optimizer, and that chooses masks.
        """
        result: dict[str, Any] = super().state_dict()
        state, layers = result["state"], layers_by_weight()
        for index, param in self._indexed_params():
            layer = layers.get(id(param))
            if layer is not None and index in state:
                state[index] = {**state[index], _TRANSPOSED_MASK: layer.transposed_mask.clone()}
        return result

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores moments, masters and transposed masks, each in the dtype it was saved in.

        But 16-bit moments of torch's AdamW become fp32, unless this optimizer has half_moments.

        Raises:
            ValueError: it is of another algorithm (SGD, amsgrad, coupled weight decay), or of
                half_moments for float16 parameters, or of a parameter of another shape, or a
                transposed mask is not of its weight. The optimizer has not changed then.
        """

        def check(_: torch.optim.Optimizer, hooked: dict[str, Any]) -> dict[str, Any]:
            nonlocal state_dict
            state_dict = hooked  # as the hooks of others left it
            groups = []
            for group, own in zip(hooked["param_groups"], self.param_groups, strict=False):
                _require_our_algorithm(group)
                _require_wide_moments_of_fp16(group, own["params"])
                # Options of this class that torch's AdamW does not have stay
                ours = {name: own[name] for name in self.defaults if name != "mask_step"}
                groups.append({**ours, **group})
            self._check_shapes(hooked)
            self._check_transposed_masks(hooked)
            groups += hooked["param_groups"][len(groups) :]  # too many, which torch refuses
            return {**hooked, "param_groups": groups}

        handle = self.register_load_state_dict_pre_hook(check)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        for group, saved_group in zip(self.param_groups, state_dict["param_groups"], strict=True):
            if "mask_step" not in saved_group:  # of torch.optim.AdamW
                states = [state_dict["state"].get(i, {}) for i in saved_group["params"]]
                group["mask_step"] = max((int(s["step"]) for s in states if "step" in s), default=0)
        layers = layers_by_weight()
        for group, param, saved in self._saved_states(state_dict):
            # torch casts state to the parameter's dtype, which would round fp32 moments.
            for name in _STATE_TENSORS:
                if name in saved:
                    widen = is_half(saved[name].dtype) and not group["half_moments"]
                    dtype = torch.float32 if widen else saved[name].dtype
                    self.state[param][name] = saved[name].to(param.device, dtype, copy=True)
            if "step" in saved:
                step = torch.as_tensor(saved["step"], dtype=torch.float32)
                self.state[param]["step"] = step.to(param.device, copy=True)
            self.state[param].pop(_TRANSPOSED_MASK, None)
            layer = layers.get(id(param))
            if layer is not None and _TRANSPOSED_MASK in saved:
                layer.set_transposed_mask(_as_mask_of(layer, saved[_TRANSPOSED_MASK]))

    def _check_shapes(self, state_dict: dict[str, Any]) -> None:
        for _, param, saved in self._saved_states(state_dict):
            missing = [name for name in _REQUIRED if name not in saved]
            if missing and saved.keys() - {_TRANSPOSED_MASK}:  # a state may be empty
                raise ValueError(
                    f"AdamW: state_dict: a parameter {list(param.shape)} has no "
                    f"{', '.join(missing)}, only {', '.join(sorted(saved))}: it is not of AdamW"
                )
            for name in _STATE_TENSORS:
                found = saved.get(name, param)
                if not isinstance(found, Tensor) or found.shape != param.shape:
                    got = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
                    raise ValueError(
                        f"AdamW: state_dict: {name} must be {list(param.shape)} as its parameter, "
                        f"got {got}"
                    )

    def _check_transposed_masks(self, state_dict: dict[str, Any]) -> None:
        layers = layers_by_weight()
        for _, param, saved in self._saved_states(state_dict):
            layer = layers.get(id(param))
            if layer is not None and _TRANSPOSED_MASK in saved:
                try:
                    layer.check_transposed_mask(_as_mask_of(layer, saved[_TRANSPOSED_MASK]))
                except ValueError as error:
                    shape = list(param.shape)
                    raise ValueError(f"AdamW: state_dict: values {shape}: {error}") from None

    def _saved_states(
        self, state_dict: dict[str, Any]
    ) -> Iterator[tuple[dict[str, Any], Tensor, dict[str, Any]]]:
        """Group, parameter and saved state of each parameter that has one."""
        for group, saved_group in zip(self.param_groups, state_dict["param_groups"], strict=False):
            for param, index in zip(group["params"], saved_group["params"], strict=False):
                if index in state_dict["state"]:
                    yield group, param, state_dict["state"][index]

    def _indexed_params(self) -> list[tuple[int, Tensor]]:
        # torch numbers the parameters of a state_dict in the order of the groups.
        return list(enumerate(p for group in self.param_groups for p in group["params"]))


def _as_mask_of(layer: SparseLayer, mask: Tensor) -> Tensor:
    """A mask that another optimizer of torch cast to the weight's dtype, which holds 0 to 255."""
    return mask.to(layer.transposed_mask.dtype) if mask.is_floating_point() else mask


def _is_number(tensor: Tensor) -> bool:
    return tensor.numel() == 1 and not tensor.is_complex()


def _number(value: Any) -> float:
    """A real number, or a tensor of one; NaN for anything else."""
    if isinstance(value, Tensor) and _is_number(value):
        return float(value)
    try:
        return float(value) if isinstance(value, Real) else math.nan
    except OverflowError:  # of an int
        return math.inf


def _require_options(options: dict[str, Any], *, read_tensors: bool) -> None:
    """Raises where an option of a group is out of range; of tensors, where it is no number."""

    def within(value: Any, low: float, end: float) -> bool:
        if isinstance(value, Tensor) and not read_tensors:
            return _is_number(value)
        return low <= _number(value) < end

    _require_our_algorithm(options)
    if options["half_moments"] and options["master_weights"]:
        raise ValueError("AdamW: half_moments must be False with master_weights")
    for name in _SCALARS:
        value = options[name]
        if not within(value, -_ROUNDING if name == "lr" else 0.0, math.inf):
            raise ValueError(
                f"AdamW: {name} must be a number, finite and not negative, got {value!r}"
            )
    interval = options["mask_interval"]
    if not isinstance(interval, Integral) or isinstance(interval, bool) or interval < 0:
        raise ValueError(f"AdamW: mask_interval must be an int from 0 on, got {interval!r}")
    betas = options["betas"]
    pair = isinstance(betas, (tuple, list)) and len(betas) == 2
    if not pair or not all(within(beta, 0.0, 1.0) for beta in betas):
        raise ValueError(f"AdamW: betas must be two numbers in [0, 1), got {betas!r}")


def _require_our_algorithm(options: dict[str, Any]) -> None:
    """Raises where options of torch's Adam or AdamW say what this class does not do."""
    if options.get("amsgrad"):
        raise ValueError("AdamW: amsgrad must be False")
    if not options.get(_DECOUPLED, True) and options.get("weight_decay"):
        raise ValueError("AdamW: decoupled_weight_decay must be True; Adam's decay is another")


def _require_wide_moments_of_fp16(options: dict[str, Any], params: Iterable[Tensor]) -> None:
    """Raises where second moments would underflow."""
    if options.get("half_moments") and any(param.dtype == torch.float16 for param in params):
        raise ValueError("AdamW: half_moments must be False for float16 parameters")


def _require_plain(params: Iterable[Tensor]) -> None:
    """Raises where a trained parameter is a tensor of tensors."""
    for param in params:
        if param.requires_grad and is_traceable_wrapper_subclass(param):
            raise TypeError(
                f"AdamW: params must be plain tensors, got a {type(param).__name__}; "
                "torch's optimizers take these"
            )


def _take_over(param: Tensor, master: Tensor) -> None:
    """Writes a parameter into its master but where that rounds to it, and has more digits.

    Rounds as the last step did, and then to the parameter's present type, since the model may have
    been cast since then. Where the last step is unknown (a master that was loaded, or written to in
    a captured step) rounding to either type of 16 bits counts; and rounding twice, if that makes a
    whole piece of the parameter: of some numbers it may by chance.
    """
    if param.shape != master.shape or param.device != master.device:
        return  # the step says so
    pieces = [(param, master)]
    if param.is_contiguous() and master.is_contiguous():
        flat = (param.detach().view(-1), master.view(-1))
        pieces = list(zip(*(tensor.split(_PIECE) for tensor in flat), strict=True))
    known = _freshness.marked_dtypes(master)
    for new, old in pieces:
        once = [old.to(dtype) for dtype in known or (torch.bfloat16, torch.float16)]
        twice = [rounded.to(new.dtype) == new for rounded in once]
        same = [made if known else (rounded == new) | (made & made.all())
                for rounded, made in zip(once, twice, strict=True)]  # fmt: skip
        torch.where(torch.stack(same).any(0), old, new, out=old)


def _refuse_capture(param: Tensor) -> None:
    """Raises while ``param`` is captured: replays would make its state anew each time."""
    if _streams.is_capturing(param):
        raise RuntimeError("AdamW: step must have run before one is captured into a CUDA graph")


def _with_copy_to_write(layer: SparseLayer | None, written: set[int]) -> SLoPeLinear | None:
    """The layer, if a step is to write its backward copy; else the next backward pass does.

    That does where a mask changed; once a step was captured, whatever a step writes; and for all
    but the first of layers that share a copy, since their weights were tied once. ``written`` are
    the ids of copies that have one.
    """
    if (
        not isinstance(layer, SLoPeLinear)
        or layer.weight_t is None
        or id(layer.weight_t) in written
    ):
        return None
    if _freshness.step_was_captured() or not layer.transposed_mask_is_fresh():
        return None
    written.add(id(layer.weight_t))
    return layer
