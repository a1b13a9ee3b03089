# SPDX-License-Identifier: Apache-2.0
"""Loads the op library and binds references, fakes and autocast rules to its schemas.

Which implementation runs:

=========  ======================================================================
CPU        the plain-PyTorch reference
CUDA       the compiled kernel where the build has one, or what is composed of such;
           else the reference, with one warning per op;
           ``SLOPE_EXT_FORCE_REFERENCE=1`` takes references only
Meta/Fake  the fake: checks and shapes, no data
=========  ======================================================================
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

_LIBRARY_FILE = Path(__file__).with_name("_ops.so")
FORCE_REFERENCE = os.environ.get("SLOPE_EXT_FORCE_REFERENCE", "0") not in ("", "0")

if not _LIBRARY_FILE.exists():
    raise ImportError(
        f"slope_ext: {_LIBRARY_FILE.name} is not built. Run `make build`, or "
        "`pip install --no-build-isolation -e .` in the source tree."
    )
torch.ops.load_library(_LIBRARY_FILE)
from slope_ext import _C  # noqa: E402  (after the file check, whose message says what to do)

if _C.build_info()["cuda"]:
    # The plan cache lives in the op library; its function table is all that _C knows of it.
    _api = ctypes.CDLL(str(_LIBRARY_FILE)).slope_spmm_cache_api
    _C.connect(ctypes.cast(_api, ctypes.c_void_p).value)

_registrations = torch.library.Library("slope", "IMPL")


OPS = (
    "adamw_",
    "compress",
    "decompress",
    "double_prune_",
    "input_grad",
    "input_grad_lowrank",
    "linear",
    "linear_lowrank",
    "pack",
    "pack_metadata",
    "prune_24",
    "prune_compress",
    "prune_compress_transposed",
    "prune_transposed",
    "transpose_values",
    "weight_grad",
    "weight_grad_add_",
)

# Asked before any reference is registered for CUDA.
CUDA_KERNELS = tuple(
    name for name in OPS if torch._C._dispatch_has_kernel_for_dispatch_key(f"slope::{name}", "CUDA")
)

# Ops without such a kernel that are made of ops which have one.
COMPOSED: set[str] = set()


def covers(major: int, minor: int) -> bool:
    """Whether the build has machine code for a GPU of compute capability ``major.minor``.

    Code for sm_XY runs on X.Z with Z >= Y; code for sm_XYa on X.Y alone.
    """
    for arch in re.findall(r"\d+[af]?", _C.build_info()["cuda_archs"]):
        built_major, built_minor = divmod(int(arch.rstrip("af")), 10)
        exact = arch.endswith("a")
        if major == built_major and (minor == built_minor if exact else minor >= built_minor):
            return True
    return False


def is_available() -> bool:
    """Whether compiled CUDA kernels run here, on the current GPU.

    That takes a CUDA GPU, a build with CUDA that covers it, and references not being forced.

    Where this is False everything still works, on plain-PyTorch references.
    ``python -m slope_ext.env_report`` says why and what to do.
    """
    if not torch.cuda.is_available() or not CUDA_KERNELS or FORCE_REFERENCE:
        return False
    return covers(*torch.cuda.get_device_capability())


def register(
    name: str,
    *,
    check: Callable[..., None],
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    cuda: Callable[..., Any] | None = None,
) -> None:
    """Binds an op's implementations; all take the op's arguments.

    ``check`` raises RuntimeError that names op and argument, before anything is computed. ``cuda``
    is for ops without a compiled kernel of their own that are made of ops which have one.

    Gradients, views and versions are what torch.library knows of the op: a reference runs below
    autograd, as a compiled kernel does.
    """

    @functools.wraps(reference)
    def on_cpu(*args: Any, **kwargs: Any) -> Any:
        check(*args, **kwargs)
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return reference(*args, **kwargs)

    @functools.wraps(reference)
    def on_cuda(*args: Any, **kwargs: Any) -> Any:
        if composed:
            check(*args, **kwargs)
            return cuda(*args, **kwargs)  # type: ignore[misc]
        _warn_reference_on_gpu(name)
        return on_cpu(*args, **kwargs)

    composed = cuda is not None and bool(CUDA_KERNELS) and not FORCE_REFERENCE
    if composed:
        COMPOSED.add(name)

    @functools.wraps(fake)
    def on_fake(*args: Any, **kwargs: Any) -> Any:
        check(*args, **kwargs)
        return fake(*args, **kwargs)

    torch.library.register_kernel(f"slope::{name}", "cpu", on_cpu)
    if FORCE_REFERENCE and name in CUDA_KERNELS:
        _registrations.impl(name, on_cuda, "CUDA", allow_override=True)
    elif name not in CUDA_KERNELS:
        torch.library.register_kernel(f"slope::{name}", "cuda", on_cuda)
    torch.library.register_fake(f"slope::{name}", on_fake)


@functools.cache
def _warn_reference_on_gpu(name: str) -> None:
    reason = "SLOPE_EXT_FORCE_REFERENCE is set" if FORCE_REFERENCE else "no CUDA kernel is built"
    warnings.warn(
        f"slope::{name} runs its plain-PyTorch reference on the GPU ({reason}): results are "
        "right, speed and memory are not. See `python -m slope_ext.env_report`.",
        stacklevel=2,
    )


def refuse_forward_mode(op: Any) -> None:
    """Raises inside of torch.func.jvp and its like, as torch.library's ops would drop tangents."""
    if forward_ad._current_level >= 0:
        raise NotImplementedError(f"{op.name()} has no forward-mode gradient")


def register_gradient(
    name: str, differentiable: tuple[str, ...], with_gradient: Callable[..., Any]
) -> None:
    """Has op ``name`` be ``with_gradient``, given all arguments, where it is to have a gradient.

    That is where one of the arguments named ``differentiable`` wants one. As
    torch.library.register_autograd does it, which takes longer over completing the arguments by the
    schema than over all the rest.
    """
    op = getattr(torch.ops.slope, name).default
    arguments = op._schema.arguments
    places = [i for i, argument in enumerate(arguments) if argument.name in differentiable]
    defaults = tuple(argument.default_value for argument in arguments)  # None: there is none

    def on_autograd(*given: Any) -> Any:
        refuse_forward_mode(op)
        if torch.is_grad_enabled():
            complete = given + defaults[len(given) :]
            for place in places:
                tensor = complete[place]
                if tensor is not None and tensor.requires_grad:
                    if torch._C._are_functorch_transforms_active():
                        raise NotImplementedError(
                            f"{op.name()} has no gradient in torch.func.grad and its like; use "
                            "torch.autograd"
                        )
                    return with_gradient(*complete)
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return op(*given)

    _registrations.impl(name, on_autograd, "Autograd")


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """torch's decorator, which costs nothing in a backward pass that records no graph."""
    guarded = torch.autograd.function.once_differentiable(backward)

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Any) -> Any:
        return guarded(ctx, *grads) if torch.is_grad_enabled() else backward(ctx, *grads)

    return run


def apply_of(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """``function.apply`` without what it does for torch.func alone, a third of its time.

    Not for calls under a transform, nor of tensors that outlived one (:func:`outlived_transform`).
    """
    return super(torch.autograd.Function, function).apply  # type: ignore[misc, no-any-return]


def outlived_transform(argument: Any) -> bool:
    """Whether outside of torch.func's transforms an argument is a tensor that one wrapped."""
    is_tensor = isinstance(argument, Tensor)
    return is_tensor and torch._C._functorch.is_functorch_wrapped_tensor(argument)


def register_write(name: str, *arguments: str) -> None:
    """Has op ``name`` advance the version counters of what it writes: tensors or lists of them.

    torch does this for its own ops; for a compiled op of a library somebody must.
    """
    op = getattr(torch.ops.slope, name).default
    names = [argument.name for argument in op._schema.arguments]

    def write(*args: Any, **kwargs: Any) -> None:
        with torch._C._ExcludeDispatchKeyGuard(_WRITE_KEYS):
            op(*args, **kwargs)
        given = dict(zip(names, args, strict=False)) | kwargs
        targets = []
        for argument in arguments:
            value = given[argument]
            targets += value if isinstance(value, list) else [value]
        torch.autograd.graph.increment_version([t for t in targets if not t.is_inference()])

    _registrations.impl(name, write, "ADInplaceOrView")


def register_autocast(name: str) -> None:
    """Under torch.autocast, floating-point arguments of op ``name`` take the autocast dtype.

    ``values_t`` is dropped instead: it is a cache of the values that are being cast here, and
    backward derives it from the cast values at no more traffic than casting it would cost.
    """
    op = getattr(torch.ops.slope, name).default
    argument_names = [argument.name for argument in op._schema.arguments]

    for device_type, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):

        def cast_and_call(*args: Any, _device_type: str = device_type, **kwargs: Any) -> Any:
            dtype = torch.get_autocast_dtype(_device_type)
            arguments = dict(zip(argument_names, args, strict=False)) | kwargs
            values_dtype = arguments["values"].dtype
            arguments = {key: _cast(value, dtype) for key, value in arguments.items()}
            if values_dtype != dtype:
                arguments["values_t"] = None
            with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST_KEYS):
                return op(**arguments)

        _registrations.impl(name, cast_and_call, key)


_AUTOCAST_KEYS = torch._C.DispatchKeySet(
    torch._C.DispatchKey.AutocastCPU
) | torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCUDA)


_WRITE_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    # float64 is left alone, as torch's own autocast does.
    if isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64:
        return value.to(dtype)
    return value
