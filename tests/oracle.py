# SPDX-License-Identifier: Apache-2.0
"""An independent implementation of the method: dense, masked, NumPy masks, explicit formulas.

It shares no code with slope_ext, so that agreement means something. Masks are bool, True = kept.
"""

import numpy as np
import torch
import torch.nn.functional as F


def keep_two_of_four(scores):
    """bool [rows, n]: the two largest of each four along the last axis, ties to the lower index."""
    scores = scores.detach().cpu().double().numpy()
    groups = scores.reshape(*scores.shape[:-1], scores.shape[-1] // 4, 4)
    order = np.argsort(-groups, axis=-1, kind="stable")[..., :2]
    mask = np.zeros(groups.shape, dtype=bool)
    np.put_along_axis(mask, order, True, axis=-1)
    return torch.from_numpy(mask.reshape(scores.shape))


def double_prune(weight, mask):
    """bool [out, in]: of mask's survivors the two largest magnitudes of each four rows; no fill."""
    magnitude = np.abs(weight.detach().cpu().double().numpy())
    mask = mask.cpu().numpy()
    kept = np.zeros_like(mask)
    for first in range(0, mask.shape[0], 4):
        for column in range(mask.shape[1]):
            rows = [r for r in range(first, first + 4) if mask[r, column]]
            for row in sorted(rows, key=lambda r: (-magnitude[r, column], r))[:2]:
                kept[row, column] = True
    return torch.from_numpy(kept)


def bits(mask):
    """bool [rows, n] -> uint8 [rows, n/8], lowest bit first."""
    return torch.from_numpy(np.packbits(mask.cpu().numpy(), axis=-1, bitorder="little"))


def unbits(bitmask):
    """uint8 [rows, n/8] -> bool [rows, n], lowest bit first."""
    packed = np.unpackbits(bitmask.cpu().numpy(), axis=-1, bitorder="little")
    return torch.from_numpy(packed.astype(bool))


class Product(torch.autograd.Function):
    """Y = X (M W)^T + b; dX = dY (M_rc W); dW = M (dY^T X)."""

    @staticmethod
    def forward(ctx, x, weight, mask, mask_rc, bias):
        ctx.save_for_backward(x, weight, mask, mask_rc)
        ctx.has_bias = bias is not None
        return torch.einsum("...i,oi->...o", x, weight * mask) + (0 if bias is None else bias)

    @staticmethod
    def backward(ctx, dy):
        x, weight, mask, mask_rc = ctx.saved_tensors
        dx = torch.einsum("...o,oi->...i", dy, weight * mask_rc)
        dw = torch.einsum("to,ti->oi", dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1]))
        db = dy.reshape(-1, dy.shape[-1]).sum(0) if ctx.has_bias else None
        return dx, dw * mask, None, None, db


class DenseMaskedLinear(torch.nn.Module):
    """The dense twin of a SLoPeLinear: same weights, same masks, optional adapter."""

    def __init__(self, layer):
        super().__init__()
        self.weight = torch.nn.Parameter(layer.dense_weight().detach().clone())
        self.bias = None
        if layer.bias is not None:
            self.bias = torch.nn.Parameter(layer.bias.detach().clone())
        self.mask = unbits(layer.weight_bitmask).to(self.weight.device)
        self.lora = None
        self.choose()

    def choose(self):
        self.mask_rc = double_prune(self.weight, self.mask).to(self.weight.device)

    def add_adapter(self, layer):
        factors = (layer.lora_A, layer.lora_B)
        self.lora = torch.nn.ParameterList(torch.nn.Parameter(p.detach().clone()) for p in factors)
        self.scale = layer.lora_scale

    def forward(self, x):
        y = Product.apply(x, self.weight, self.mask, self.mask_rc, self.bias)
        if self.lora is not None:
            y = y + self.scale * F.linear(F.linear(x, self.lora[0]), self.lora[1])
        return y
