# SPDX-License-Identifier: Apache-2.0
"""trust_backward_copies: what a captured step computes and what it refuses.

On the CPU a capture is pretended: what is enqueued runs, but no host code counts on it.
"""

import contextlib

import pytest
import torch
from torch import nn

import slope_ext as slope
from slope_ext import _backward_copy


@pytest.fixture
def capturing(monkeypatch):
    @contextlib.contextmanager
    def context():
        with monkeypatch.context() as patch:
            patch.setattr(_backward_copy, "is_capturing", lambda tensor: True)
            yield

    return context


def trained(optimizer_of):
    """Two layers and an optimizer after a first step."""
    model = nn.Sequential(slope.SLoPeLinear(32, 64), nn.Tanh(), slope.SLoPeLinear(64, 16))
    optimizer = optimizer_of(model.parameters())
    step(model, optimizer)
    return model, optimizer


def step(model, optimizer):
    optimizer.zero_grad()
    model(torch.ones(4, 32, requires_grad=True)).square().sum().backward()
    optimizer.step()


def adamw(params):
    return slope.optim.AdamW(params, lr=1e-2)


@pytest.fixture
def writes(monkeypatch):
    """A list that grows with each write of a backward copy."""
    found = []
    unseen = _backward_copy._unseen

    def counted():
        found.append(None)
        return unseen()

    monkeypatch.setattr(_backward_copy, "_unseen", counted)
    return found


def test_a_capture_writes_the_copies(capturing, writes):
    model, optimizer = trained(adamw)
    writes.clear()
    with capturing():
        step(model, optimizer)
    assert len(writes) == 2


def test_a_capture_that_trusts_them_does_not(capturing, writes):
    model, optimizer = trained(adamw)
    writes.clear()
    with slope.trust_backward_copies(), capturing():
        for _ in range(3):
            step(model, optimizer)
    assert len(writes) == 0
    # What was captured has not run, as far as the host knows
    model(torch.ones(4, 32, requires_grad=True)).sum().backward()
    assert len(writes) == 2


def test_stale_copies_are_written_in_the_capture(capturing, writes):
    model, optimizer = trained(adamw)
    with torch.no_grad():
        model[0].weight.mul_(0.5)
    writes.clear()
    with slope.trust_backward_copies(), capturing():
        step(model, optimizer)
        step(model, optimizer)
    assert len(writes) == 1


def test_an_optimizer_that_leaves_the_copies_is_refused(capturing):
    model, optimizer = trained(lambda params: torch.optim.SGD(params, lr=1e-2))
    model(torch.ones(4, 32, requires_grad=True)).sum().backward()  # copies are up to date
    refused = pytest.raises(RuntimeError, match="changes 2 of 2 weights without")
    with refused, slope.trust_backward_copies(), capturing():
        step(model, optimizer)
    with slope.trust_backward_copies():  # it is left in any case
        pass


def test_an_eager_optimizer_beside_the_graph(capturing, writes):
    model, optimizer = trained(adamw)
    writes.clear()
    with slope.trust_backward_copies(), capturing():
        model(torch.ones(4, 32, requires_grad=True)).sum().backward()
    optimizer.step()
    assert len(writes) == 0
    slope.update_transposed_masks(model)
    assert len(writes) == 2  # at once: the next backward may be a replay


def test_it_is_entered_once():
    with slope.trust_backward_copies(), pytest.raises(RuntimeError, match="entered already"):
        slope.trust_backward_copies().__enter__()


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["auto", "cusparselt"])
def test_replays_are_eager_steps(backend, writes):
    torch.manual_seed(0)
    options = {"device": "cuda", "dtype": torch.bfloat16, "backend": backend}
    model = nn.Sequential(
        slope.SLoPeLinear(64, 128, **options), nn.Tanh(), slope.SLoPeLinear(128, 64, **options)
    )
    twin = nn.Sequential(
        slope.SLoPeLinear(64, 128, **options), nn.Tanh(), slope.SLoPeLinear(128, 64, **options)
    )
    twin.load_state_dict(model.state_dict())
    slope.load_transposed_masks(twin, slope.transposed_masks(model))
    x = torch.randn(32, 64, device="cuda", dtype=torch.bfloat16)

    def run(model, optimizer):
        optimizer.zero_grad(set_to_none=False)
        model(x).square().mean().backward()
        optimizer.step()

    optimizers = [slope.optim.AdamW(m.parameters(), lr=1e-2) for m in (model, twin)]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run(model, optimizers[0])
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    writes.clear()
    with slope.trust_backward_copies(), torch.cuda.graph(graph):
        run(model, optimizers[0])
    assert backend == "cusparselt" or len(writes) == 0
    for _ in range(3):
        run(twin, optimizers[1])
    for turn in range(6):
        graph.replay()
        run(twin, optimizers[1])
        if turn == 2:
            slope.update_transposed_masks(model)
            slope.update_transposed_masks(twin)
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours, theirs)
