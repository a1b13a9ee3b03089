# SPDX-License-Identifier: Apache-2.0
"""Assertions for tests of code that uses slope_ext."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_as_accurate(
    actual: Tensor, plain: Tensor, exact: Tensor, *, factor: float = 2.0, floor: float = 1e-6
) -> None:
    """Asserts that an arithmetic result errs at most ``factor`` times what plain PyTorch errs.

    Args:
        actual: the result under test.
        plain: the same computed by plain PyTorch in the dtype of ``actual``.
        exact: the same computed in fp64.
        factor: allowed ratio of the largest errors.
        floor: error always allowed, relative to the largest exact magnitude (times the epsilon of
            the dtype over that of fp32).

    Raises:
        AssertionError: shape or dtype differ, a value is NaN where ``exact`` is not, or the error
            is too large.
    """
    assert actual.shape == exact.shape, f"shape {list(actual.shape)}, not {list(exact.shape)}"
    assert actual.dtype == plain.dtype, f"dtype {actual.dtype}, not {plain.dtype}"
    assert torch.equal(actual.isnan(), exact.isnan()), "NaN at other places than exact"
    if actual.numel() == 0:
        return
    scale = torch.finfo(actual.dtype).eps / torch.finfo(torch.float32).eps
    error = (actual.double() - exact).abs().nan_to_num().max().item()
    allowed = factor * (plain.double() - exact).abs().nan_to_num().max().item()
    allowed += floor * scale * exact.abs().nan_to_num().max().item()
    assert error <= allowed, f"error {error:.3e} above {allowed:.3e}"
