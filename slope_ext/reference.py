# SPDX-License-Identifier: Apache-2.0
"""Every op in plain PyTorch: what it computes, on any device, with no thought for speed.

These are the CPU kernels, the fallback on a GPU without a compiled kernel, and what the CUDA
kernels are tested against. Arguments are checked before (slope_ext/ops/<family>.py).

Shapes: W [out, in]; values [out, in/2]; bitmask uint8 [out, in/8], bit j % 8 of byte j // 8 says
whether column j is kept; values_t [in, out/2] and bitmask_t [in, out/8] are the double-pruned W,
transposed. Source: SLoPe, arXiv 2405.16325, section 3.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from slope_ext import _backward_copy
from slope_ext._check import GATE_ROWS

# ---- bits ----------------------------------------------------------------------------------------


def pack_bits(mask: Tensor) -> Tensor:
    """bool [..., n] -> uint8 [..., n/8], lowest bit first."""
    bits: Tensor = mask.unflatten(-1, (mask.shape[-1] // 8, 8)).to(torch.uint8)
    places = torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (bits << places).sum(-1, dtype=torch.uint8)


def unpack_bits(bitmask: Tensor) -> Tensor:
    """uint8 [..., n/8] -> bool [..., n], lowest bit first."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bitmask.device)
    return ((bitmask.unsqueeze(-1) >> shifts) & 1).bool().flatten(-2)


def _kept_columns(bitmask: Tensor) -> Tensor:
    """uint8 [rows, n/8] -> int64 [rows, n/2]: column of each kept element, ascending."""
    offsets = 8 * torch.arange(bitmask.shape[-1], device=bitmask.device)
    columns = _column_table(bitmask.device)[bitmask.long()]
    return (columns + offsets.unsqueeze(-1)).flatten(-2)


@functools.cache
def _column_table(device: torch.device) -> Tensor:
    """int64 [256, 4]: the four lowest set bits of each byte, ascending."""
    kept = unpack_bits(torch.arange(256, dtype=torch.uint8, device=device).unsqueeze(-1))
    # Stable: set bits first, each part ascending.
    return kept.int().argsort(dim=-1, descending=True, stable=True)[:, :4]


# ---- prune ---------------------------------------------------------------------------------------


def prune_24(scores: Tensor) -> Tensor:
    """Keeps the two largest of each four; ties keep the lower index, NaN counts as +inf."""
    scores = torch.where(scores.isnan(), torch.inf, scores)
    groups = scores.unflatten(-1, (scores.shape[-1] // 4, 4))
    ahead, behind = groups.unsqueeze(-2), groups.unsqueeze(-1)  # [..., i, j]: j against i
    index = torch.arange(4, device=scores.device)
    lower = index.unsqueeze(-2) < index.unsqueeze(-1)
    beaten_by = ((ahead > behind) | ((ahead == behind) & lower)).sum(-1)
    return pack_bits((beaten_by < 2).flatten(-2))


def prune_transposed(values: Tensor, bitmask: Tensor) -> Tensor:
    """Double pruning: of W's survivors, the two of largest magnitude of each four along out.

    Fewer than two survivors: the lowest free positions fill up (their value will be 0).
    """
    kept = unpack_bits(bitmask)
    magnitude = decompress(values, bitmask).abs()
    return prune_24(magnitude.masked_fill(~kept, -1.0).t())


def prune_compress(dense: Tensor) -> tuple[Tensor, Tensor]:
    """Keeps the two largest magnitudes of each four: values and bitmask."""
    bitmask = prune_24(dense.abs())
    return compress(dense, bitmask), bitmask


def prune_compress_transposed(dense: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """prune_compress, and the double-pruned weight, transposed: values_t and bitmask_t."""
    values, bitmask = prune_compress(dense)
    bitmask_t = prune_transposed(values, bitmask)
    values_t = compress(decompress(values, bitmask).t(), bitmask_t)
    return values, bitmask, values_t, bitmask_t


def double_prune_(values: Tensor, bitmask: Tensor, bitmask_t: Tensor, values_t: Tensor) -> None:
    bitmask_t.copy_(prune_transposed(values, bitmask))
    transpose_values(values, bitmask, bitmask_t, values_t)


# ---- compress, transpose, pack -------------------------------------------------------------------


def compress(dense: Tensor, bitmask: Tensor) -> Tensor:
    return _as_bits(dense).gather(-1, _kept_columns(bitmask)).view(dense.dtype)


def decompress(values: Tensor, bitmask: Tensor) -> Tensor:
    dense = values.new_zeros(values.shape[0], 2 * values.shape[1])
    _as_bits(dense).scatter_(-1, _kept_columns(bitmask), _as_bits(values))
    return dense


def _as_bits(tensor: Tensor) -> Tensor:
    # As integers: moving fp16 or bf16 as such may alter the payload of a NaN.
    return tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def transpose_values(values: Tensor, bitmask: Tensor, bitmask_t: Tensor, out: Tensor) -> None:
    out.copy_(compress(decompress(values, bitmask).t(), bitmask_t))


def pack(values: Tensor, bitmask: Tensor) -> Tensor:
    """The identity layout: bytes of values, then bytes of bitmask."""
    return torch.cat([values.contiguous().view(torch.uint8).flatten(), bitmask.flatten()])


def pack_metadata(bitmask: Tensor, metadata: Tensor) -> None:
    """uint8: the identity layout, the bitmask itself; int32: the words of docs/layouts.md."""
    if metadata.dtype != torch.int32:
        metadata.copy_(bitmask.flatten())
        return
    rows, columns = bitmask.shape[0], 8 * bitmask.shape[1]
    kept = unpack_bits(bitmask).unflatten(-1, (columns // 4, 4))
    first = kept.int().argmax(-1)
    last = 3 - kept.flip(-1).int().argmax(-1)
    nibbles = metadata.new_full((-(-rows // 64) * 64, -(-columns // 256) * 64), 0x4)
    nibbles[:rows, : columns // 4] = first | last << 2
    # From [block, warp, half, g, quad, stage, t, nibble]
    # to [block, quad, warp, g, t, stage, half, nibble]
    nibbles = nibbles.view(-1, 4, 2, 8, nibbles.shape[1] // 64, 4, 4, 4)
    nibbles = nibbles.permute(0, 4, 1, 3, 6, 5, 2, 7).reshape(-1, 8).long()
    shifts = 4 * torch.arange(8, device=nibbles.device)
    words = (nibbles << shifts).sum(-1)
    metadata.copy_(torch.where(words < 1 << 31, words, words - (1 << 32)))


# ---- products ------------------------------------------------------------------------------------


def linear(
    x: Tensor,
    values: Tensor,
    bitmask: Tensor,
    bias: Tensor | None = None,
    bitmask_t: Tensor | None = None,
    values_t: Tensor | None = None,
    metadata: Tensor | None = None,
    metadata_t: Tensor | None = None,
    backend: str = "reference",
    activation: str = "none",
) -> Tensor:
    """Y = activation(X W^T + b). What ends in _t serves backward only; there is one backend."""
    return _activate(F.linear(x, decompress(values, bitmask), bias), activation)


def _activate(y: Tensor, activation: str) -> Tensor:
    if activation == "swiglu":
        return swiglu(y)
    return y.relu_() if activation == "relu" else y


def swiglu(y: Tensor) -> Tensor:
    """silu(gate) * up of features that come in turns, GATE_ROWS gates, as many ups."""
    gate, up = y.unflatten(-1, (-1, 2, GATE_ROWS)).unbind(-2)
    return torch.mul(F.silu(gate), up).flatten(-2)


def input_grad(
    dy: Tensor,
    values: Tensor,
    bitmask: Tensor,
    bitmask_t: Tensor,
    values_t: Tensor | None = None,
    metadata_t: Tensor | None = None,
    backend: str = "reference",
) -> Tensor:
    """dX = dY W^{R,C}. values_t is a cache: refreshed here if it is not up to date."""
    values_t, _ = _backward_copy.follow(values, bitmask, bitmask_t, values_t, metadata_t, backend)
    return F.linear(dy, decompress(values_t, bitmask_t))


def weight_grad(dy: Tensor, x: Tensor, bitmask: Tensor) -> Tensor:
    """dW = dY^T X at the kept positions, [out, in/2]."""
    dy, x = (tensor.reshape(-1, tensor.shape[-1]) for tensor in (dy, x))
    return compress(dy.t() @ x, bitmask)


def weight_grad_add_(grad: Tensor, dy: Tensor, x: Tensor, bitmask: Tensor) -> None:
    """grad += weight_grad(dy, x, bitmask)."""
    grad.add_(weight_grad(dy, x, bitmask))


def scaled_product(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """scale A B, a [..., inner] and b [inner, features]: the sums are scaled, then rounded."""
    rows = a.reshape(math.prod(a.shape[:-1]), a.shape[-1])
    product = torch.addmm(a.new_empty(()), rows, b, beta=0, alpha=scale)
    return product.view(*a.shape[:-1], b.shape[1])


def linear_lowrank(
    x: Tensor,
    values: Tensor,
    bitmask: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scale: float = 1.0,
    bias: Tensor | None = None,
    bitmask_t: Tensor | None = None,
    values_t: Tensor | None = None,
    metadata: Tensor | None = None,
    metadata_t: Tensor | None = None,
    backend: str = "reference",
    activation: str = "none",
) -> tuple[Tensor, Tensor]:
    """Y = activation(X W^T + T B^T + b) with T = scale X A^T; returns (Y, T)."""
    t = scaled_product(x, lora_A.t(), scale)
    y = F.linear(x, decompress(values, bitmask), bias)
    return _activate(y + F.linear(t, lora_B), activation), t


def input_grad_lowrank(
    dy: Tensor,
    values: Tensor,
    bitmask: Tensor,
    bitmask_t: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scale: float = 1.0,
    values_t: Tensor | None = None,
    metadata_t: Tensor | None = None,
    backend: str = "reference",
) -> tuple[Tensor, Tensor]:
    """dX = dY W^{R,C} + dT A with dT = scale dY B; returns (dX, dT)."""
    dt = scaled_product(dy, lora_B, scale)
    dx = input_grad(dy, values, bitmask, bitmask_t, values_t, metadata_t, backend)
    return dx + dt @ lora_A, dt


# ---- optimizer -----------------------------------------------------------------------------------


def adamw_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    masters: list[Tensor],
    steps: list[Tensor],
    bitmasks: list[Tensor],
    bitmasks_t: list[Tensor],
    values_t: list[Tensor],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool = False,
    grad_scale: Tensor | None = None,
    lr_tensor: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """One AdamW step as torch.optim.AdamW defines it (eps after bias correction).

    Arithmetic runs in fp32 (fp64 for fp64), on the master weights where they are given.
    """
    if found_inf is None or not found_inf:
        lr = lr if lr_tensor is None else float(lr_tensor)
        dtype = torch.promote_types(params[0].dtype, torch.float32)
        grads = [grad.to(dtype) for grad in grads]
        if grad_scale is not None:
            grads = list(torch._foreach_div(grads, float(grad_scale)))
        if maximize:
            grads = list(torch._foreach_neg(grads))
        weights = masters or [param.to(dtype) for param in params]
        stored = [(exp_avgs, [m.to(dtype) for m in exp_avgs])]
        stored += [(exp_avg_sqs, [v.to(dtype) for v in exp_avg_sqs])]
        exp_avgs, exp_avg_sqs = (computed for _, computed in stored)

        torch._foreach_mul_(weights, 1 - lr * weight_decay)
        torch._foreach_lerp_(exp_avgs, grads, 1 - beta1)
        torch._foreach_mul_(exp_avg_sqs, beta2)
        torch._foreach_addcmul_(exp_avg_sqs, grads, grads, value=1 - beta2)

        corrections = [(1 - beta1 ** step.item(), 1 - beta2 ** step.item()) for step in steps]
        denominators = torch._foreach_sqrt(exp_avg_sqs)
        torch._foreach_div_(denominators, [second**0.5 for _, second in corrections])
        torch._foreach_add_(denominators, eps)
        torch._foreach_addcdiv_(
            weights, exp_avgs, denominators, [-lr / first for first, _ in corrections]
        )
        for tensors, computed in (*stored, (params, weights)):
            for tensor, result in zip(tensors, computed, strict=True):
                if tensor is not result:
                    tensor.copy_(result)
    for param, bitmask, bitmask_t, out in zip(params, bitmasks, bitmasks_t, values_t, strict=False):
        transpose_values(param, bitmask, bitmask_t, out)
