# SPDX-License-Identifier: Apache-2.0
"""The weight gradient in compressed form: weight_grad, and added to one: weight_grad_add_."""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from slope_ext import _streams, accumulation, reference
from slope_ext._check import Checker
from slope_ext._library import register, register_write


def weight_grad(dy: Tensor, x: Tensor, bitmask: Tensor) -> Tensor:
    """dW = dY^T X at the kept positions (arXiv 2405.16325, equation 5).

    Args:
        dy: fp16, bf16, fp32 or fp64 [..., out].
        x: [..., in], the dtype and leading dimensions of ``dy``, in a multiple of 8.
        bitmask: uint8 [out, in/8].

    Returns:
        [out, in/2], in the order of the values.

    Raises:
        RuntimeError: an argument has the wrong dtype, shape or device; the message names it.
    """
    return torch.ops.slope.weight_grad.default(dy, x, bitmask)  # type: ignore[no-any-return]


def weight_grad_add_(grad: Tensor, dy: Tensor, x: Tensor, bitmask: Tensor) -> None:
    """grad += weight_grad(dy, x, bitmask), in one pass over ``grad``.

    Args:
        grad: [out, in/2], the dtype of ``dy``, contiguous, on CUDA from a multiple of 16 bytes.
        dy, x, bitmask: as in :func:`weight_grad`.

    Raises:
        RuntimeError: an argument has the wrong dtype, shape or device; the message names it and
            ``grad`` is untouched.
    """
    torch.ops.slope.weight_grad_add_.default(grad, dy, x, bitmask)


_adding = threading.Lock()  # to gradients; autograd's own sum has a lock as well


def leaf_of(values: Tensor) -> Callable[[], Tensor | None]:
    """For ``gradient_of`` in backward: what autograd saved may be another tensor (checkpoints)."""
    return weakref.ref(values) if values.is_leaf else lambda: None


def gradient_of(
    leaf_of_values: Callable[[], Tensor | None], dy: Tensor, x: Tensor, bitmask: Tensor
) -> Tensor | None:
    """The gradient of values for autograd; None where it was added to the leaf's ``.grad``."""
    if accumulation.is_in_place() and not torch.compiler.is_compiling():
        leaf = leaf_of_values()
        grad = None if leaf is None else leaf.grad
        if (
            leaf is not None
            and grad is not None
            and _is_accumulated(leaf)
            and not _has_hooks(leaf)
            and _can_be_added_to(grad, dy)
        ):
            with _adding:
                _streams.wait_for_writer(grad)
                weight_grad_add_(grad, dy, x, bitmask)
                _streams.mark_written(grad)
            if grad.is_cuda:  # who called backward may read .grad then, as autograd has it
                engine = torch.autograd.Variable._execution_engine
                engine.queue_callback(functools.partial(_streams.wait_for_writer, grad))
            return None
    return weight_grad(dy, x, bitmask)


def _is_accumulated(leaf: Tensor) -> bool:
    """Whether the running backward pass adds into ``leaf.grad``: not what torch.autograd.grad or
    ``inputs=`` leaves alone."""
    try:
        node = torch.autograd.graph.get_gradient_edge(leaf).node
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # a leaf that torch.autograd.grad was asked for
        return False


def _has_hooks(leaf: Tensor) -> bool:
    return bool(leaf._backward_hooks or getattr(leaf, "_post_accumulate_grad_hooks", None))


def _can_be_added_to(grad: Tensor, dy: Tensor) -> bool:
    plain = type(grad) is Tensor and type(dy) is Tensor
    same = plain and grad.dtype == dy.dtype and grad.device == dy.device
    return same and grad.is_contiguous() and grad.data_ptr() % 16 == 0


def _check_add(grad: Tensor, dy: Tensor, x: Tensor, bitmask: Tensor) -> None:
    _check(dy, x, bitmask, "weight_grad_add_")
    check = Checker("weight_grad_add_")
    check.same_dtype("grad", grad, "dy", dy)
    check.same_device("grad", grad, "dy", dy)
    check.shape("grad", grad, (dy.shape[-1], x.shape[-1] // 2), "[out, in/2]")
    check.require(grad.is_contiguous(), "grad must be contiguous")


def _check(dy: Tensor, x: Tensor, bitmask: Tensor, op: str = "weight_grad") -> None:
    check = Checker(op)
    check.floating("dy", dy)
    check.same_dtype("x", x, "dy", dy)
    check.same_device("x", x, "dy", dy)
    check.require(dy.dim() >= 1, "dy must have at least 1 dimension, got shape []")
    if x.dim() != dy.dim() or x.shape[:-1] != dy.shape[:-1]:
        check.fail(
            f"x must have the leading dimensions of dy, {list(dy.shape[:-1])}, got {list(x.shape)}"
        )
    check.columns("x", x.shape[-1], "in")
    check.bitmask("bitmask", bitmask, dy.shape[-1], x.shape[-1], "dy", dy)


register(
    "weight_grad",
    check=_check,
    reference=reference.weight_grad,
    fake=lambda dy, x, bitmask: dy.new_empty(dy.shape[-1], x.shape[-1] // 2),
)
register(
    "weight_grad_add_",
    check=_check_add,
    reference=reference.weight_grad_add_,
    fake=lambda grad, dy, x, bitmask: None,
)
register_write("weight_grad_add_", "grad")
