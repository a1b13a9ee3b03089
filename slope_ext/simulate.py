# SPDX-License-Identifier: Apache-2.0
"""General N:M sparsity by dense masked arithmetic, for accuracy work on any device.

The method is SLoPeLinear's (arXiv 2405.16325, section 3.1); nothing is smaller or faster.
"""

from __future__ import annotations

import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from slope_ext import _freshness
from slope_ext.sparse_layer import SparseLayer, check_features, warn_of_broadcasts


def parse_pattern(pattern: str) -> tuple[int, int]:
    """ "2:4" -> (2, 4).

    Raises:
        ValueError: pattern is not N:M with 1 <= N < M.
    """
    match = re.fullmatch(r"(\d+):(\d+)", pattern) if isinstance(pattern, str) else None
    if match is None or not 1 <= int(match[1]) < int(match[2]):
        raise ValueError(f"pattern must be 'N:M' with 1 <= N < M, got {pattern!r}")
    return int(match[1]), int(match[2])


def prune_nm(scores: Tensor, n: int, m: int) -> Tensor:
    """Keeps the n largest of each m along the last dimension; ties keep the lower index.

    Args:
        scores: [..., k], k a multiple of m. NaN counts as +inf.
        n, m: 1 <= n < m.

    Returns:
        bool [..., k], True = kept.
    """
    if scores.shape[-1] % m != 0:
        raise ValueError(
            f"prune_nm: scores must have a last dimension divisible by m = {m}, "
            f"got {list(scores.shape)}"
        )
    groups = scores.unflatten(-1, (scores.shape[-1] // m, m))
    order = groups.argsort(dim=-1, descending=True, stable=True)[..., :n]
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order, True).flatten(-2)


class _MaskedLinearFunction(torch.autograd.Function):
    """Y = X (M W)^T + b; backward through the double-pruned weight; dW masked."""

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, mask: Tensor, mask_rc: Tensor, bias: Tensor | None
    ) -> Tensor:
        return F.linear(x, weight * mask, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:4])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mask, mask_rc = ctx.saved_tensors
        needs = ctx.needs_input_grad
        dx = dy @ (weight * (mask & mask_rc)) if needs[0] else None
        rows_dy, rows_x = (tensor.reshape(-1, tensor.shape[-1]) for tensor in (dy, x))
        dw = (rows_dy.t() @ rows_x) * mask if needs[1] else None
        db = rows_dy.sum(0) if needs[4] else None
        return dx, dw, None, None, db


class MaskedLinear(SparseLayer, nn.Linear):
    """``nn.Linear`` trained as if its weight were N:M sparse along ``in``.

    ``weight`` is dense [out, in]; ``weight_mask`` bool [out, in] (True = kept) is in the
    state_dict, ``weight_t_mask`` bool [out, in], the double-pruned mask, is derived.

    Args:
        in_features, out_features: multiples of M.
        bias: whether to learn a bias.
        device, dtype: as in ``nn.Linear``.
        pattern: "N:M", e.g. "1:2", "2:8".

    Raises:
        ValueError: an argument is out of range; the message names it.
    """

    mask_name = "weight_mask"
    transposed_mask_name = "weight_t_mask"
    weight: nn.Parameter
    weight_mask: Tensor
    weight_t_mask: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        pattern: str = "2:4",
    ) -> None:
        self.pattern = pattern
        self.n, self.m = parse_pattern(pattern)
        check_features("MaskedLinear", self.m, in_features=in_features, out_features=out_features)
        nn.Linear.__init__(self, in_features, out_features, bias, device, dtype)
        self._init_adapter()
        mask = prune_nm(self.weight.detach().abs(), self.n, self.m)
        self.register_buffer("weight_mask", mask)
        self.register_buffer("weight_t_mask", torch.empty_like(mask), persistent=False)
        _freshness.mark_stale(self.weight_t_mask)
        if not self.weight.is_meta:
            self.update_transposed_mask()

    @classmethod
    def from_dense(
        cls, weight: Tensor, bias: Tensor | None, mask: Tensor | None, *, pattern: str
    ) -> Self:
        """Masks a dense weight [out, in]; a bool mask [out, in] of None prunes by magnitude."""
        out_features, in_features = weight.shape
        layer = cls(in_features, out_features, False, "meta", weight.dtype, pattern=pattern)
        if mask is None:
            mask = prune_nm(weight.detach().abs(), layer.n, layer.m)
        layer.weight = nn.Parameter(weight.detach() * mask, requires_grad=weight.requires_grad)
        layer.weight_mask = mask
        layer.weight_t_mask = torch.empty_like(mask)
        if bias is not None:
            layer.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias)
        _freshness.mark_stale(layer.weight_t_mask)
        if not layer.weight.is_meta:
            layer.update_transposed_mask()
        return layer

    def _problem_of_mask(self, mask: Tensor) -> str | None:
        if mask.is_meta or mask.shape != self.weight_mask.shape:
            return None
        kept = (mask != 0).unflatten(-1, (-1, self.m)).sum(-1)
        if not (kept == self.n).all():
            return f"must keep exactly {self.n} of every {self.m}"
        return None

    def _after_load(self) -> None:
        if self.weight_t_mask.device != self.weight.device:
            self.weight_t_mask = torch.empty_like(self.weight_mask)
        if not self.weight.is_meta:
            self.update_transposed_mask()

    def reset_parameters(self) -> None:
        """nn.Linear's initialisation; the largest magnitudes of each group are kept."""
        super().reset_parameters()
        if "weight_mask" in self._buffers and not self.weight.is_meta:
            self.weight_mask.copy_(prune_nm(self.weight.detach().abs(), self.n, self.m))
            self.reset_adapter()
            self.update_transposed_mask()

    def _choose_transposed_mask(self) -> None:
        # A kept zero survives before what was pruned.
        survivors = self.weight.abs().masked_fill(~self.weight_mask, -1.0)
        kept = prune_nm(survivors.t(), self.n, self.m).t() & self.weight_mask
        self.set_transposed_mask(kept)

    def forward(self, x: Tensor) -> Tensor:
        """Y = X (M W)^T + b [+ lora_scale (X A^T) B^T]; x [..., in] -> [..., out]."""
        if not torch.compiler.is_compiling() and not self.transposed_mask_is_fresh():
            warn_of_broadcasts(self)
            self.update_transposed_mask()
        weight: Tensor = self.weight
        bias: Tensor | None = self.bias
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight = x.to(dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        y: Tensor = _MaskedLinearFunction.apply(  # type: ignore[no-untyped-call]
            x, weight, self.weight_mask, self.weight_t_mask, bias
        )
        if self.has_adapter:
            y = y + self.lora_scale * F.linear(F.linear(x, self.lora_A), self.lora_B)
        return y

    def dense_weight(self) -> Tensor:
        """The weight [out, in] with its zeros; differentiable in ``weight``."""
        return self.weight * self.weight_mask

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.pattern} simulated"
