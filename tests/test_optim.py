# SPDX-License-Identifier: Apache-2.0
"""slope_ext.optim.AdamW and stock optimizers, against torch.optim.AdamW on a masked dense twin."""

import copy
import functools
import io
import threading

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

import oracle
import slope_ext as slope
from slope_ext import _freshness, _streams, ops

OPTIONS = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


class Net(nn.Module):
    """Two sparse layers between dense parameters."""

    def __init__(self, device="cpu", dtype=torch.float32, **kwargs):
        super().__init__()
        like = {"device": device, "dtype": dtype}
        self.embedding = nn.Linear(8, 24, **like)
        self.up = slope.SLoPeLinear(24, 40, **like, **kwargs)
        self.down = slope.SLoPeLinear(40, 24, False, **like, **kwargs)
        self.norm = nn.LayerNorm(24, **like)

    def forward(self, x):
        return self.norm(self.down(torch.tanh(self.up(self.embedding(x)))))


def dense_twin(net):
    twin = copy.deepcopy(net)
    twin.up, twin.down = oracle.DenseMaskedLinear(net.up), oracle.DenseMaskedLinear(net.down)
    return twin


def assert_weights_agree(net, twin, **tolerance):
    for name in ("up", "down"):
        layer, dense = getattr(net, name), getattr(twin, name)
        torch.testing.assert_close(layer.dense_weight(), dense.weight * dense.mask, **tolerance)
    torch.testing.assert_close(net.embedding.weight, twin.embedding.weight, **tolerance)
    torch.testing.assert_close(net.norm.weight, twin.norm.weight, **tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("mask_interval", [100, 7])
def test_300_steps_equal_torch_adamw_on_the_masked_twin(dtype, mask_interval):
    """The transposed masks change every mask_interval steps, adapters join at step 250, in both."""
    net = Net(dtype=dtype)
    twin = dense_twin(net)
    ours = slope.optim.AdamW(net.parameters(), **OPTIONS, mask_interval=mask_interval)
    theirs = torch.optim.AdamW(twin.parameters(), **OPTIONS)
    target = nn.Linear(8, 24, dtype=dtype).requires_grad_(False)
    changed = 0
    for step in range(1, 301):
        if step == 250:
            for name in ("up", "down"):
                layer, dense = getattr(net, name), getattr(twin, name)
                layer.add_adapter(3, scale=0.5)
                dense.add_adapter(layer)
                ours.add_param_group({"params": [layer.lora_A, layer.lora_B]})
                theirs.add_param_group({"params": list(dense.lora)})
        x = torch.randn(6, 8, dtype=dtype)
        losses = []
        for model, optimizer in ((net, ours), (twin, theirs)):
            optimizer.zero_grad()
            loss = (model(x) - target(x)).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss)
        torch.testing.assert_close(
            *losses, rtol=1e-4 if dtype == torch.float32 else 1e-9, atol=1e-9
        )
        if step % mask_interval == 0:
            before = twin.up.mask_rc
            twin.up.choose()
            twin.down.choose()
            changed += not torch.equal(before, twin.up.mask_rc)
    assert changed >= 2
    torch.testing.assert_close(net.up.lora_B, twin.up.lora[1], rtol=1e-3, atol=1e-4)
    assert net.up.lora_B.abs().max() > 1e-3
    tolerance = (
        {"rtol": 1e-9, "atol": 1e-11} if dtype == torch.float64 else {"rtol": 1e-3, "atol": 1e-4}
    )
    assert_weights_agree(net, twin, **tolerance)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, **OPTIONS, foreach=True),
        lambda p: torch.optim.AdamW(p, **OPTIONS, fused=True),
        lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01),
    ],
    ids=["AdamW foreach", "AdamW fused", "SGD"],
)
def test_stock_optimizers_equal_themselves_on_the_masked_twin(make, device):
    """Element-wise optimizers do the same to values as to a masked dense weight."""
    net = Net(device)
    twin = dense_twin(net)
    optimizers = make(net.parameters()), make(twin.parameters())
    for _ in range(20):
        x = torch.randn(6, 8, device=device)
        for model, optimizer in zip((net, twin), optimizers, strict=True):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    assert_weights_agree(net, twin, rtol=1e-3, atol=1e-4)


def test_adafactor_trains(device):
    net = Net(device)
    optimizer = torch.optim.Adafactor(net.parameters(), lr=0.02)
    x = torch.randn(32, 8, device=device)
    y = torch.randn(32, 24, device=device)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (net(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def train(net, optimizer, steps, seed, scaler=None):
    generator = torch.Generator().manual_seed(seed)
    device = net.up.weight.device
    dtype = net.up.weight.dtype
    for _ in range(steps):
        x = torch.randn(6, 8, generator=generator).to(device, dtype)
        optimizer.zero_grad()
        loss = (net(x).float() - 1).square().mean()
        if scaler is None:
            loss.backward()
            optimizer.step()
        else:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("moments", [{"master_weights": True}, {"half_moments": True}])
@pytest.mark.parametrize("stop", [5, 8, 10])
def test_resume_is_bit_equal(dtype, moments, stop, device):
    """Model and optimizer state, moments' dtypes, masters and transposed masks included."""
    options = {**OPTIONS, "mask_interval": 4, **moments}
    net = Net(device, dtype)
    start = copy.deepcopy(net)
    optimizer = slope.optim.AdamW(net.parameters(), **options)
    train(net, optimizer, stop, seed=1)
    train(net, optimizer, 9, seed=2)

    half = copy.deepcopy(start)
    optimizer_half = slope.optim.AdamW(half.parameters(), **options)
    train(half, optimizer_half, stop, seed=1)
    file = io.BytesIO()
    torch.save({"net": half.state_dict(), "optimizer": optimizer_half.state_dict()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)

    resumed = Net(device, dtype)
    optimizer_resumed = slope.optim.AdamW(resumed.parameters(), **options)
    resumed.load_state_dict(state["net"])
    optimizer_resumed.load_state_dict(state["optimizer"])
    assert torch.equal(resumed.up.weight_t_bitmask, half.up.weight_t_bitmask)
    train(resumed, optimizer_resumed, 9, seed=2)
    for ours, theirs in zip(resumed.parameters(), net.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(resumed.up.weight_t_bitmask, net.up.weight_t_bitmask)
    wide = dtype if "half_moments" in moments else torch.float32
    assert optimizer_resumed.state[resumed.up.weight]["exp_avg"].dtype == wide


def test_checkpoint_of_torch_adamw_loads():
    net = Net()
    theirs = torch.optim.AdamW(net.parameters(), **OPTIONS)
    train(net, theirs, 3, seed=1)
    twin = copy.deepcopy(net)
    ours = slope.optim.AdamW(twin.parameters(), lr=1.0)
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    for model, optimizer in ((net, theirs), (twin, ours)):
        train(model, optimizer, 3, seed=2)
    for a, b in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_checkpoint_comes_back_from_torch_adamw(dtype):
    """Which casts all of a state to the parameter's dtype, masks too."""
    layer = slope.SLoPeLinear(64, 16, dtype=dtype)
    ours = slope.optim.AdamW(layer.parameters())
    layer.weight.grad = torch.randn_like(layer.weight)
    ours.step()
    mask = layer.weight_t_bitmask.clone()
    theirs = torch.optim.AdamW(layer.parameters())
    theirs.load_state_dict(copy.deepcopy(ours.state_dict()))
    theirs.step()
    with torch.no_grad():
        layer.weight.copy_(torch.randn_like(layer.weight))
    layer.update_transposed_mask()
    assert not torch.equal(layer.weight_t_bitmask, mask)
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(layer.weight_t_bitmask, mask)
    ours.step()


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        torch.optim.Adagrad,
        torch.optim.RMSprop,
    ],
    ids=["SGD", "Adagrad", "RMSprop"],
)
def test_a_checkpoint_of_another_optimizer_is_refused(make):
    net = Net()
    theirs = make(net.parameters())
    train(net, theirs, 2, seed=1)
    ours = slope.optim.AdamW(net.parameters(), **OPTIONS)
    train(net, ours, 1, seed=2)
    before = copy.deepcopy(ours.state_dict())
    saved = theirs.state_dict()
    saved["param_groups"] = before["param_groups"]
    with pytest.raises(ValueError, match=r"a parameter .* has no .*: it is not of AdamW"):
        ours.load_state_dict(saved)
    after = ours.state_dict()
    for index, state in before["state"].items():
        for name, value in state.items():
            assert torch.equal(after["state"][index][name], value)


def test_a_state_that_was_only_looked_at_loads():
    layer = slope.SLoPeLinear(24, 16)
    optimizer = slope.optim.AdamW(layer.parameters())
    assert optimizer.state[layer.weight] == {}  # which makes one
    optimizer.load_state_dict(optimizer.state_dict())
    layer.weight.grad = torch.ones_like(layer.weight)
    optimizer.step()
    assert optimizer.state[layer.weight]["step"] == 1


def test_a_weight_that_was_flattened_is_refused_before_anything_counts():
    layer = slope.SLoPeLinear(24, 16)
    optimizer = slope.optim.AdamW(layer.parameters())
    layer.weight.data = layer.weight.data.flatten()
    layer.weight.grad = torch.ones_like(layer.weight)
    with pytest.raises(RuntimeError, match="flat as FullyShardedDataParallel"):
        optimizer.step()
    assert optimizer.param_groups[0]["mask_step"] == 0


@pytest.mark.parametrize("half_moments", [False, True])
def test_16_bit_moments_of_torch_widen_unless_half_is_wanted(half_moments):
    layer = slope.SLoPeLinear(24, 16, dtype=torch.bfloat16)
    theirs = torch.optim.AdamW(layer.parameters())
    layer.weight.grad = torch.randn_like(layer.weight)
    theirs.step()
    ours = slope.optim.AdamW(layer.parameters(), half_moments=half_moments)
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    for name in ("exp_avg", "exp_avg_sq"):
        moment = ours.state[layer.weight][name]
        assert moment.dtype == (torch.bfloat16 if half_moments else torch.float32)
        assert torch.equal(moment.bfloat16(), theirs.state[layer.weight][name])
    ours.step()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: torch.optim.AdamW(p, amsgrad=True), "amsgrad must be False"),
        (lambda p: torch.optim.Adam(p, weight_decay=0.1), "decoupled_weight_decay must be True"),
    ],
    ids=["amsgrad", "coupled"],
)
def test_checkpoints_of_other_algorithms_are_refused(make, message):
    layer = slope.SLoPeLinear(24, 16)
    state = make(layer.parameters()).state_dict()
    optimizer = slope.optim.AdamW(layer.parameters(), lr=0.5)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    with pytest.raises(ValueError, match=message):
        slope.optim.AdamW([{**state["param_groups"][0], "params": list(layer.parameters())}])
    assert optimizer.param_groups[0]["lr"] == 0.5
    optimizer.load_state_dict(torch.optim.Adam(layer.parameters()).state_dict())  # decays nothing
    optimizer.param_groups[0]["weight_decay"] = 0.1
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def test_hooks_see_a_checkpoint_before_it_is_checked():
    layer = slope.SLoPeLinear(24, 16)
    optimizer = slope.optim.AdamW(layer.parameters())
    layer.weight.grad = torch.ones_like(layer.weight)
    optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    state["param_groups"][0]["amsgrad"] = True
    moment = torch.full_like(layer.weight, 3.0)

    def repair(_, state_dict):
        state_dict = copy.deepcopy(state_dict)
        state_dict["param_groups"][0]["amsgrad"] = False
        state_dict["state"][0]["exp_avg"] = moment
        return state_dict

    optimizer.register_load_state_dict_pre_hook(repair)
    optimizer.load_state_dict(state)
    assert torch.equal(optimizer.state[layer.weight]["exp_avg"], moment)


def test_tensors_of_tensors_are_refused():
    """A DTensor stands for them."""
    optimizer = slope.optim.AdamW([torch.zeros(2, requires_grad=True)])
    nested = TwoTensor(torch.zeros(2), torch.zeros(2)).requires_grad_()
    with pytest.raises(TypeError, match="params must be plain tensors, got a TwoTensor"):
        optimizer.add_param_group({"params": [nested]})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [nested.detach()]})  # frozen
    optimizer.step()


@pytest.mark.parametrize("spoil", [lambda m: m[:8], lambda m: m.int(), lambda m: m | 1 | 2 | 4])
def test_a_transposed_mask_of_no_such_weight_is_refused(spoil):
    net = Net()
    optimizer = slope.optim.AdamW(net.parameters(), **OPTIONS)
    train(net, optimizer, 1, seed=1)
    before = slope.transposed_masks(net)
    state = copy.deepcopy(optimizer.state_dict())
    train(net, optimizer, 1, seed=2)
    moment = optimizer.state[net.up.weight]["exp_avg"].clone()
    for saved in state["state"].values():
        if "transposed_mask" in saved:
            saved["transposed_mask"] = spoil(saved["transposed_mask"])
    with pytest.raises(
        ValueError, match=r"AdamW: state_dict: values \[\d+, \d+\]: a transposed mask must"
    ):
        optimizer.load_state_dict(state)
    assert torch.equal(optimizer.state[net.up.weight]["exp_avg"], moment)

    last = list(before)[-1]
    with pytest.raises(ValueError, match=f"load_transposed_masks: {last}: a transposed mask must"):
        slope.load_transposed_masks(net, {**before, last: spoil(before[last])})
    for name, mask in slope.transposed_masks(net).items():
        assert torch.equal(mask, before[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_default_dtype_is_not_that_of_steps(dtype):
    layer = slope.SLoPeLinear(24, 16, dtype=torch.float32)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        optimizer = slope.optim.AdamW(layer.parameters())
        layer.weight.grad = torch.ones_like(layer.weight)
        optimizer.step()
    finally:
        torch.set_default_dtype(before)
    assert optimizer.state[layer.weight]["step"].dtype == torch.float32


def test_masks_of_layers_without_a_gradient_change_on_schedule_too(device):
    """Experts that get no token in the very step at which masks are due."""
    experts = [slope.SLoPeLinear(24, 16, device=device) for _ in range(2)]
    optimizer = slope.optim.AdamW([e.weight for e in experts], lr=0.5, mask_interval=2)
    before = [e.weight_t_bitmask.clone() for e in experts]
    for expert in (experts[0], experts[1]):
        optimizer.zero_grad()
        expert.weight.grad = torch.randn_like(expert.weight)
        optimizer.step()
    for expert, mask in zip(experts, before, strict=True):
        assert not torch.equal(expert.weight_t_bitmask, mask)


def test_masks_of_layers_tied_by_hand_change_on_schedule(device):
    layers = [slope.SLoPeLinear(24, 16, device=device) for _ in range(2)]
    layers[1].weight = layers[0].weight
    layers[1].weight_bitmask.copy_(layers[0].weight_bitmask)
    optimizer = slope.optim.AdamW([layers[0].weight], lr=0.5, mask_interval=1)
    before = [layer.weight_t_bitmask.clone() for layer in layers]
    layers[0].weight.grad = torch.randn_like(layers[0].weight)
    optimizer.step()
    for layer, mask in zip(layers, before, strict=True):
        assert not torch.equal(layer.weight_t_bitmask, mask)
    assert torch.equal(layers[0].weight_t_bitmask, layers[1].weight_t_bitmask)


def test_saved_masks_are_copies():
    """torch.distributed.checkpoint loads into what state_dict returns."""
    net = Net()
    optimizer = slope.optim.AdamW(net.parameters(), **OPTIONS)
    train(net, optimizer, 1, seed=1)
    live = {mask.data_ptr() for mask in (net.up.weight_t_bitmask, net.down.weight_t_bitmask)}
    saved = [s["transposed_mask"] for s in optimizer.state_dict()["state"].values() if len(s) > 3]
    for mask in (*saved, *slope.transposed_masks(net).values()):
        assert mask.data_ptr() not in live


def test_state_round_trip_of_a_parameter_without_gradient():
    net = Net()
    net.up.requires_grad_(False)
    optimizer = slope.optim.AdamW(net.parameters(), **OPTIONS)
    train(net, optimizer, 1, seed=1)
    state = optimizer.state_dict()
    optimizer.load_state_dict(copy.deepcopy(state))
    assert optimizer.state_dict()["state"].keys() == state["state"].keys()


def test_masters_can_be_turned_on_later():
    layer = slope.SLoPeLinear(24, 16, dtype=torch.bfloat16)
    optimizer = slope.optim.AdamW(layer.parameters())
    for masters in (False, True):
        optimizer.param_groups[0]["master_weights"] = masters
        layer.weight.grad = torch.ones_like(layer.weight)
        optimizer.step()
        assert ("master" in optimizer.state[layer.weight]) == masters
    assert torch.equal(optimizer.state[layer.weight]["master"].bfloat16(), layer.weight)


def still(net, optimizer):
    """A step that moves nothing."""
    for param in net.parameters():
        param.grad = torch.zeros_like(param)
    optimizer.step()


def with_masters(device, dtype=torch.bfloat16, **options):
    """A net after some steps, whose masters have digits that its parameters lack."""
    net = Net(device, dtype)
    optimizer = slope.optim.AdamW(net.parameters(), master_weights=True, **OPTIONS | options)
    train(net, optimizer, 3, seed=1)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    masters = {p: optimizer.state[p]["master"].clone() for p in net.parameters()}
    assert any((master != param).any() for param, master in masters.items())
    return net, optimizer, masters


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_that_are_loaded_or_set_are_taken_over(dtype, device):
    net, optimizer, _ = with_masters(device, dtype)
    other = Net(device, dtype).state_dict()
    net.load_state_dict(other)  # without the optimizer's state
    still(net, optimizer)
    for name, param in net.named_parameters():
        assert torch.equal(param, other[name]), name
        assert torch.equal(optimizer.state[param]["master"].to(dtype), other[name]), name
    weight = net.up.weight
    with torch.no_grad():
        weight.clamp_(max=0.01)
    bounded = weight.detach().clone()
    assert (bounded == bounded.max()).sum() > 1
    still(net, optimizer)
    assert torch.equal(weight, bounded)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_weight_rounded_to_the_other_16_bit_type_is_taken_over(dtype, device):
    net, optimizer, masters = with_masters(device, dtype)
    other = torch.bfloat16 if dtype == torch.float16 else torch.float16
    with torch.no_grad():
        for param, master in masters.items():
            param.copy_(master.to(other))
    written = [param.detach().clone() for param in net.parameters()]
    still(net, optimizer)
    assert all(map(torch.equal, net.parameters(), written))


@pytest.mark.parametrize("times", [1, 4])
def test_weights_that_are_rebound_are_taken_over(times, device):
    net, optimizer, _ = with_masters(device)
    weight = net.up.weight
    for _ in range(20):  # memory that is free again is taken again
        for _ in range(times):
            weight.data = weight.data * 1.5
        rebound = weight.detach().clone()
        still(net, optimizer)
        assert torch.equal(weight, rebound)


def test_weights_win_over_masters_that_are_loaded_alone(device):
    net, optimizer, _ = with_masters(device)
    _, optimizer_of_other, _ = with_masters(device, lr=0.1)
    theirs, before = optimizer_of_other.state_dict(), copy.deepcopy(net.state_dict())
    optimizer.load_state_dict(theirs)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    still(net, optimizer)
    assert_same_state(net, before)
    for index, state in optimizer.state_dict()["state"].items():  # in place
        state["master"].copy_(theirs["state"][index]["master"] + 1)
    still(net, optimizer)
    assert_same_state(net, before)


def assert_same_state(net, state):
    assert all(torch.equal(tensor, state[name]) for name, tensor in net.state_dict().items())


@pytest.mark.parametrize("how", ["cast", "model first", "optimizer first"])
@pytest.mark.parametrize("types", [("bfloat16", "float16"), ("float16", "bfloat16")])
def test_masters_keep_their_digits_in_a_model_of_the_other_type(types, how, device):
    first, other = (getattr(torch, name) for name in types)
    net, optimizer, masters = with_masters(device, first)
    before = [masters[param] for param in net.parameters()]
    if how == "cast":
        net.to(other)
    else:
        states = copy.deepcopy((net.state_dict(), optimizer.state_dict()))
        net, optimizer, _ = with_masters(device, other, lr=0.1)
        loads = [
            lambda: net.load_state_dict(states[0]),
            lambda: optimizer.load_state_dict(states[1]),
        ]
        for load in loads if how == "model first" else loads[::-1]:
            load()
    still(net, optimizer)
    kept = [optimizer.state[param]["master"] for param in net.parameters()]
    assert all(map(torch.equal, before, kept))


def test_a_weight_of_another_shape_is_refused_before_its_master_changes():
    net, optimizer, masters = with_masters("cpu")
    weight = net.down.weight
    weight.data = weight.data[:1].clone()
    weight.grad = torch.zeros_like(weight)
    with pytest.raises(RuntimeError, match="adamw_"):
        optimizer.step()
    assert torch.equal(optimizer.state[weight]["master"], masters[weight])


@pytest.mark.gpu
def test_a_captured_step_takes_over_what_was_written_before():
    net, optimizer, _ = with_masters("cuda")
    still(net, optimizer)
    with torch.no_grad():
        for param in net.parameters():
            param.mul_(0.5)
    written = [param.detach().clone() for param in net.parameters()]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for param in net.parameters():
        assert not _freshness.is_fresh(optimizer.state[param]["master"], param, trained=False)
    graph.replay()
    assert all(map(torch.equal, net.parameters(), written))


def test_what_was_not_written_keeps_its_digits(device):
    net, optimizer, masters = with_masters(device)
    weight = net.up.weight
    with torch.no_grad():
        weight[0] += 1.0
    still(net, optimizer)
    master = optimizer.state[weight]["master"]
    assert torch.equal(master[0], weight[0].float())
    assert torch.equal(master[1:], masters[weight][1:])
    assert (master[1:] != weight[1:]).any()


@pytest.mark.parametrize("model_first", [True, False])
def test_masters_of_a_checkpoint_keep_their_digits(model_first, device):
    net, optimizer, masters = with_masters(device)
    states = copy.deepcopy((net.state_dict(), optimizer.state_dict()))
    other, optimizer_of_other, _ = with_masters(device, lr=0.1)
    loads = [
        lambda: other.load_state_dict(states[0]),
        lambda: optimizer_of_other.load_state_dict(states[1]),
    ]
    for load in loads if model_first else loads[::-1]:
        load()
    still(other, optimizer_of_other)
    for param, theirs in zip(other.parameters(), net.parameters(), strict=True):
        assert torch.equal(optimizer_of_other.state[param]["master"], masters[theirs])


def test_steps_in_a_row_look_at_no_master(monkeypatch, device):
    net, optimizer, _ = with_masters(device)
    taken = []
    monkeypatch.setattr(slope.optim, "_take_over", lambda param, _: taken.append(param))
    train(net, optimizer, 3, seed=1)
    assert not taken
    twin, optimizer_of_twin = copy.deepcopy((net, optimizer))
    train(twin, optimizer_of_twin, 2, seed=1)
    assert len(taken) == len(list(twin.parameters())), "once, of a copy"


def test_sparse_gradients_are_refused():
    linear, embedding = nn.Linear(4, 4), nn.Embedding(8, 4, sparse=True)
    optimizer = slope.optim.AdamW([*linear.parameters(), *embedding.parameters()])
    linear(embedding(torch.tensor([1]))).sum().backward()
    before = linear.weight.detach().clone()
    with pytest.raises(RuntimeError, match="AdamW: sparse gradients"):
        optimizer.step()
    assert torch.equal(linear.weight, before)
    assert not optimizer.state


def test_loaded_state_is_a_copy():
    net = Net()
    optimizer = slope.optim.AdamW(net.parameters(), **OPTIONS)
    train(net, optimizer, 1, seed=1)
    state = copy.deepcopy(optimizer.state_dict())
    saved = state["state"][0]["exp_avg"].clone()
    optimizer.load_state_dict(state)
    train(net, optimizer, 1, seed=2)
    assert torch.equal(state["state"][0]["exp_avg"], saved)


def test_masters_follow_float32_training(device):
    """bf16 values with fp32 masters track fp32 training; without masters small updates are lost."""
    final = {}
    for name, dtype, masters in [
        ("fp32", torch.float32, False),
        ("masters", torch.bfloat16, True),
        ("plain", torch.bfloat16, False),
    ]:
        torch.manual_seed(0)
        layer = slope.SLoPeLinear(24, 16, False, device=device).to(dtype)
        optimizer = slope.optim.AdamW(
            layer.parameters(), lr=1e-5, weight_decay=0.0, master_weights=masters
        )
        start = layer.weight.detach().float().clone()
        for _ in range(200):
            layer.weight.grad = torch.ones_like(layer.weight)
            optimizer.step()
        state = optimizer.state[layer.weight]
        final[name] = (state["master"] if masters else layer.weight.detach().float()) - start
    torch.testing.assert_close(final["masters"], final["fp32"], rtol=1e-2, atol=1e-5)
    assert final["plain"].abs().mean() < 0.8 * final["fp32"].abs().mean()


def test_grad_scaler_unscales_and_skips_infinities(device):
    net, plain = Net(device), None
    plain = copy.deepcopy(net)
    scaler = torch.amp.GradScaler(device.type, init_scale=1024.0)
    ours = slope.optim.AdamW(net.parameters(), **OPTIONS)
    theirs = slope.optim.AdamW(plain.parameters(), **OPTIONS)
    train(net, ours, 5, seed=3, scaler=scaler)
    train(plain, theirs, 5, seed=3)
    for a, b in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)

    before = [p.detach().clone() for p in net.parameters()]
    steps = ours.state[net.up.weight]["step"].item()
    ours.zero_grad()
    scaler.scale(net(torch.full((6, 8), float("inf"), device=device)).sum()).backward()
    scaler.step(ours)
    scaler.update()
    assert scaler.get_scale() == 512.0
    assert ours.state[net.up.weight]["step"].item() == steps
    for param, old in zip(net.parameters(), before, strict=True):
        assert torch.equal(param, old)


def test_grad_scaler_after_unscale_and_clip(device):
    net = Net(device)
    plain = copy.deepcopy(net)
    scaler = torch.amp.GradScaler(device.type, init_scale=64.0)
    ours, theirs = (slope.optim.AdamW(m.parameters(), **OPTIONS) for m in (net, plain))
    x = torch.randn(6, 8, device=device)
    scaler.scale(net(x).square().sum()).backward()
    plain(x).square().sum().backward()
    scaler.unscale_(ours)
    norms = [nn.utils.clip_grad_norm_(m.parameters(), 0.1) for m in (net, plain)]
    torch.testing.assert_close(*norms)
    scaler.step(ours)
    theirs.step()
    for a, b in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_param_groups_and_scheduler():
    net = Net()
    optimizer = slope.optim.AdamW(
        [
            {"params": [net.up.weight, net.down.weight], "lr": 0.1, "weight_decay": 0.0},
            {"params": [net.embedding.weight], "betas": (0.5, 0.5)},
        ],
        **OPTIONS,
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    train(net, optimizer, 1, seed=0)
    scheduler.step()
    assert [g["lr"] for g in optimizer.param_groups] == [0.05, OPTIONS["lr"] * 0.5]
    assert optimizer.param_groups[1]["mask_interval"] == 100
    with pytest.raises(ValueError, match="AdamW: lr"):
        optimizer.add_param_group({"params": [net.norm.weight], "lr": -1.0})
    assert len(optimizer.param_groups) == 2


def test_closure_and_parameters_without_gradient():
    net = Net()
    optimizer = slope.optim.AdamW(net.parameters(), **OPTIONS)
    bias = net.up.bias.detach().clone()

    def closure():
        optimizer.zero_grad()
        loss = net(torch.ones(2, 8)).square().sum()
        loss.backward()
        net.up.bias.grad = None
        return loss

    assert optimizer.step(closure).item() > 0
    assert torch.equal(net.up.bias, bias)
    assert net.up.bias not in optimizer.state


def test_steps_of_a_bucket_differ():
    """A parameter that joins late has its own bias correction."""
    net = Net()
    optimizer = slope.optim.AdamW(net.parameters(), **OPTIONS)
    train(net, optimizer, 5, seed=0)
    late = nn.Parameter(torch.ones(3))
    optimizer.add_param_group({"params": [late], "weight_decay": 0.0})
    late.grad = torch.ones(3)
    optimizer.step()
    torch.testing.assert_close(late.detach(), torch.ones(3) - OPTIONS["lr"])


def test_masks_change_on_schedule_only(device):
    net = Net(device)
    optimizer = slope.optim.AdamW(net.parameters(), lr=0.05, mask_interval=3)
    masks = [net.up.weight_t_bitmask.clone()]
    for seed in range(7):
        train(net, optimizer, 1, seed)
        masks.append(net.up.weight_t_bitmask.clone())
    changes = [i for i in range(1, 8) if not torch.equal(masks[i], masks[i - 1])]
    assert changes == [3, 6]


def test_backward_copy_is_written_by_the_step(device):
    """After a step the copy is current already, masks of that step or not."""
    net = Net(device)
    optimizer = slope.optim.AdamW(net.parameters(), lr=0.05, mask_interval=3)
    train(net, optimizer, 1, seed=0)
    version = net.up.weight_t._version
    x = torch.randn(2, 24, device=device, requires_grad=True)
    net.up(x).sum().backward()
    assert net.up.weight_t._version == version
    torch.testing.assert_close(x.grad, torch.ones(2, 40, device=device) @ net.up.backward_weight())


@pytest.mark.parametrize("scale", [None, 64.0])
def test_clip_grad_norm_equals_torch(scale, device):
    net = Net(device)
    twin = copy.deepcopy(net)
    ours = slope.optim.AdamW(net.parameters(), **OPTIONS)
    theirs = slope.optim.AdamW(twin.parameters(), **OPTIONS)
    x = torch.randn(6, 8, device=device)
    for step in range(4):
        for model in (net, twin):
            model.zero_grad()
            (model(x).square().sum() * (scale or 1.0) * 10 ** (step - 2)).backward()
        if scale is not None:  # what a GradScaler hands over
            ours.grad_scale = torch.tensor(scale, device=device)
            for param in twin.parameters():
                param.grad /= scale
        norm = ours.clip_grad_norm_(0.5)
        expected = torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
        torch.testing.assert_close(norm / (scale or 1.0), expected, rtol=1e-5, atol=0)
        ours.step()
        theirs.step()
    for param, other in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(param, other, rtol=1e-4, atol=1e-5)


def test_half_moments_are_of_the_parameters_dtype(device):
    net = Net(device, torch.bfloat16)
    optimizer = slope.optim.AdamW(net.parameters(), **OPTIONS, half_moments=True)
    train(net, optimizer, 3, seed=0)
    assert optimizer.state[net.up.weight]["exp_avg"].dtype == torch.bfloat16
    with pytest.raises(ValueError, match="AdamW: half_moments"):
        slope.optim.AdamW(net.parameters(), half_moments=True, master_weights=True)
    with pytest.raises(ValueError, match="half_moments must be False for float16"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(4).half())]})
    assert len(optimizer.param_groups) == 1
    halves = slope.optim.AdamW([nn.Parameter(torch.ones(4).half())])
    state = slope.optim.AdamW([nn.Parameter(torch.ones(4).bfloat16())], half_moments=True)
    with pytest.raises(ValueError, match="half_moments must be False for float16"):
        halves.load_state_dict(state.state_dict())
    assert not halves.param_groups[0]["half_moments"]


@pytest.mark.gpu
def test_a_step_does_not_wait_for_the_gpu():
    net = Net("cuda", torch.bfloat16)
    lr = torch.tensor(1e-3, device="cuda")
    optimizer = slope.optim.AdamW(net.parameters(), lr=lr, mask_interval=2)
    x = torch.randn(6, 8, device="cuda", dtype=torch.bfloat16)
    for turn in range(4):
        optimizer.zero_grad()
        net(x).square().sum().backward()
        optimizer.found_inf = torch.zeros((), device="cuda")
        optimizer.grad_scale = torch.ones((), device="cuda")
        if turn == 1:
            torch.cuda.set_sync_debug_mode("error")
        try:
            optimizer.clip_grad_norm_(1.0)
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("moments", [{}, {"master_weights": True}, {"half_moments": True}])
def test_captured_steps_equal_eager_ones(moments):
    """Forward, backward and step in one graph; the learning rate changes between replays, and the
    gradients of one are infinite."""
    net = Net("cuda", torch.bfloat16)
    eager = copy.deepcopy(net)
    x = torch.randn(64, 8, device="cuda", dtype=torch.bfloat16)
    lr, eager_lr = (torch.tensor(3e-3, device="cuda") for _ in range(2))
    optimizer = slope.optim.AdamW(net.parameters(), **OPTIONS | {"lr": lr}, **moments)
    reference = slope.optim.AdamW(eager.parameters(), **OPTIONS | {"lr": eager_lr}, **moments)
    for opt in (optimizer, reference):  # as a GradScaler leaves them
        opt.grad_scale = torch.tensor(4.0, device="cuda")
        opt.found_inf = torch.tensor(0.0, device="cuda")

    def step(model, opt):
        opt.zero_grad(set_to_none=False)
        (4 * model(x).square().mean()).backward()
        opt.clip_grad_norm_(0.05)
        opt.step()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(net, optimizer)
    torch.cuda.current_stream().wait_stream(side)
    new = slope.optim.AdamW(net.parameters(), **OPTIONS)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(net, optimizer)
        with pytest.raises(RuntimeError, match="AdamW: step must have run before"):
            new.step()
    for _ in range(3):
        step(eager, reference)
    for turn in range(5):
        finite = x.clone()
        if turn == 3:
            x[0] = float("inf")
        for opt in (optimizer, reference):
            opt.found_inf.fill_(turn == 3)
        graph.replay()
        step(eager, reference)
        x.copy_(finite)
        lr.mul_(0.5)
        eager_lr.mul_(0.5)
        if turn == 2:
            slope.update_transposed_masks(net)
            slope.update_transposed_masks(eager)
    for param, other in zip(net.parameters(), eager.parameters(), strict=True):
        assert torch.equal(param, other)
        assert bool(param.isfinite().all())
    for layer, other in ((net.up, eager.up), (net.down, eager.down)):
        assert torch.equal(layer.backward_weight(), other.backward_weight())


def double_pruned(layer):
    """W^{R,C}, of the present weight whatever the layer's copy says."""
    values_t = torch.empty_like(layer.weight_t)
    masks = layer.weight_bitmask, layer.weight_t_bitmask
    ops.transpose_values(layer.weight, *masks, values_t)
    return ops.decompress(values_t, layer.weight_t_bitmask).t()


@pytest.fixture
def _captures_are_forgotten(monkeypatch):
    monkeypatch.setattr(_freshness, "_step_was_captured", False)


class Masters(torch.optim.Optimizer):
    """SGD on copies of the parameters; its caller writes those back."""

    def __init__(self, params):
        self.params = list(params)
        super().__init__([p.detach().clone() for p in self.params], {"lr": 0.1})

    def step(self):
        for group in self.param_groups:
            for master, param in zip(group["params"], self.params, strict=True):
                master.sub_(param.grad, alpha=group["lr"])


@pytest.mark.gpu
@pytest.mark.usefixtures("_captures_are_forgotten")
@pytest.mark.parametrize("captured", ["whole step", "our step", "torch's step", "masters"])
def test_eager_backward_passes_between_replays(captured):
    """They take weight and mask as they are, though no version counter saw what a replay wrote."""
    layer = slope.SLoPeLinear(256, 128, device="cuda", dtype=torch.bfloat16)
    if captured == "torch's step":
        optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, capturable=True)
    elif captured == "masters":
        optimizer = Masters(layer.parameters())
    else:
        optimizer = slope.optim.AdamW(layer.parameters(), lr=0.1, mask_interval=0)
    x = torch.randn(64, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn(64, 128, device="cuda", dtype=torch.bfloat16)

    def backward():
        layer.zero_grad(set_to_none=False)
        x.grad = None
        layer(x).backward(dy)

    def step():
        optimizer.step()
        if captured == "masters":
            for master, param in zip(
                optimizer.param_groups[0]["params"], optimizer.params, strict=True
            ):
                param.data.copy_(master)

    def assert_right():
        backward()
        expected = dy.double() @ double_pruned(layer).double()
        torch.testing.assert_close(x.grad.double(), expected, rtol=2e-2, atol=2e-2)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        backward()
        step()
        backward()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        if captured == "whole step":
            backward()
        step()
        with pytest.raises(RuntimeError, match="must not be chosen while a CUDA graph is captured"):
            layer.update_transposed_mask()
    for turn in range(3):
        assert_right()
        before = layer.weight.clone()
        graph.replay()
        assert not torch.equal(layer.weight, before)
        assert_right()
        if turn == 1:
            layer.update_transposed_mask()
        step()
        assert_right()


def test_after_a_captured_step_copies_are_left_to_backward(monkeypatch):
    layer = slope.SLoPeLinear(16, 8, bias=False)
    optimizer = slope.optim.AdamW([layer.weight], lr=0.1)
    x, dy = torch.randn(4, 16, requires_grad=True), torch.randn(4, 8)
    layer(x).backward(dy)
    monkeypatch.setattr(_freshness, "_step_was_captured", True)
    before = layer.weight_t.clone()
    optimizer.step()
    assert torch.equal(layer.weight_t, before)
    for _ in range(2):
        layer.weight.data.mul_(2)  # as a replay: unseen
        x.grad = None
        layer(x).backward(dy)
        torch.testing.assert_close(x.grad, dy @ double_pruned(layer))


def test_a_compiled_training_step_compiles_once(device):
    """Counting its steps is no reason to compile again, and they are seen."""

    class SGD(torch.optim.Optimizer):
        def step(self):
            for group in self.param_groups:
                for param in group["params"]:
                    param.data.sub_(param.grad, alpha=group["lr"])

    layer = slope.SLoPeLinear(16, 8, bias=False, device=device)
    optimizer = SGD([layer.weight], {"lr": 0.1})
    x = torch.randn(4, 16, device=device, requires_grad=True)
    dy = torch.randn(4, 8, device=device)

    @torch.compile(backend="aot_eager")
    def step():
        optimizer.step()

    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(4):
            x.grad = layer.weight.grad = None
            layer(x).backward(dy)
            torch.testing.assert_close(x.grad, dy @ double_pruned(layer))
            with torch.no_grad():
                step()


def test_clipping_ends_with_its_gradients():
    """Of two limits the least holds; zero_grad drops both; without gradients the norm is 0."""
    weight = nn.Parameter(torch.ones(4, dtype=torch.float64))
    optimizer = slope.optim.AdamW([weight], lr=1e-3)
    assert optimizer.clip_grad_norm_(1.0) == 0.0
    weight.grad = torch.full_like(weight, 50.0)
    assert optimizer.clip_grad_norm_(1.0) == 100.0
    optimizer.clip_grad_norm_(float("inf"))
    optimizer.step()
    torch.testing.assert_close(
        optimizer.state[weight]["exp_avg"], 0.1 * torch.full_like(weight, 0.5)
    )
    weight.grad = torch.full_like(weight, 50.0)
    optimizer.clip_grad_norm_(1e-3)
    optimizer.zero_grad()
    before = optimizer.state[weight]["exp_avg"].clone()
    weight.grad = torch.full_like(weight, 0.1)
    optimizer.step()
    expected = 0.9 * before + 0.1 * weight.grad
    torch.testing.assert_close(optimizer.state[weight]["exp_avg"], expected)


def test_clipping_is_of_the_gradients_that_it_saw():
    weights = [nn.Parameter(torch.ones(4)) for _ in range(2)]
    optimizer = slope.optim.AdamW(weights, lr=1e-3, weight_decay=0.0)

    def clip():
        for weight in weights:
            weight.grad = torch.full_like(weight, 50.0)
        optimizer.clip_grad_norm_(1.0)

    clip()
    weights[1].grad = None  # the rest is as it was
    optimizer.step()
    first = optimizer.state[weights[0]]["exp_avg"]
    torch.testing.assert_close(first, torch.full((4,), 0.1 / 8**0.5), rtol=1e-4, atol=0)

    clip()
    for weight in weights:  # as model.zero_grad() and another backward pass
        weight.grad = torch.full_like(weight, 2.0)
    expected = 0.9 * first + 0.1 * 2.0
    optimizer.step()
    torch.testing.assert_close(optimizer.state[weights[0]]["exp_avg"], expected)

    clip()
    weights[0].grad = torch.ones(4)
    before = [weight.detach().clone() for weight in weights]
    for use in (optimizer.step, lambda: optimizer.clip_grad_norm_(1.0)):
        with pytest.raises(RuntimeError, match="some gradients came after clip_grad_norm_"):
            use()
    for weight, value in zip(weights, before, strict=True):
        assert torch.equal(weight, value)


def test_clipping_is_not_lost_in_compiled_code():
    weight = nn.Parameter(torch.ones(4))
    optimizer = slope.optim.AdamW([weight], lr=1e-3)
    weight.grad = torch.full_like(weight, 50.0)

    @functools.partial(torch.compile, backend="eager")
    def clip_and_step():
        optimizer.clip_grad_norm_(1.0)
        optimizer.step()

    clip_and_step()
    torch.testing.assert_close(optimizer.state[weight]["exp_avg"], torch.full((4,), 0.05))


@pytest.mark.parametrize("unscaled", [False, True])
def test_clipping_with_a_grad_scaler(unscaled, device):
    net = Net(device)
    twin = copy.deepcopy(net)
    ours = slope.optim.AdamW(net.parameters(), **OPTIONS)
    theirs = slope.optim.AdamW(twin.parameters(), **OPTIONS)
    scaler = torch.amp.GradScaler(device.type, init_scale=64.0)
    x = torch.randn(6, 8, device=device)
    for _ in range(3):
        ours.zero_grad()
        scaler.scale(net(x).square().sum()).backward()
        if unscaled:
            scaler.unscale_(ours)
        ours.clip_grad_norm_(0.5)
        scaler.step(ours)
        scaler.update()
        theirs.zero_grad()
        twin(x).square().sum().backward()
        nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
        theirs.step()
    for param, other in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(param, other, rtol=1e-4, atol=1e-5)


def test_schedule_of_masks_goes_on_from_a_checkpoint_of_torch():
    net = Net()
    optimizer = slope.optim.AdamW(net.parameters(), lr=0.05, mask_interval=4)
    plain = torch.optim.AdamW(net.parameters(), lr=0.05)
    train(net, plain, 3, seed=0)
    saved = plain.state_dict()
    assert optimizer.state[net.norm.bias] == {}  # looking makes an entry without state
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.load_state_dict(saved)
    before = net.up.weight_t_bitmask.clone()
    train(net, optimizer, 1, seed=1)
    assert not torch.equal(net.up.weight_t_bitmask, before)
    older = {i: {**state, "step": 7} for i, state in saved["state"].items()}
    optimizer.load_state_dict({**saved, "state": older})
    assert optimizer.state[net.up.weight]["step"] == 7.0


def test_layers_that_are_only_half_made_do_not_count(monkeypatch):
    def refuse(layer):
        raise MemoryError

    net = nn.Sequential(slope.SLoPeLinear(16, 16))
    half = slope.SLoPeLinear.__new__(slope.SLoPeLinear)  # as copy.deepcopy begins
    with monkeypatch.context() as patched:
        patched.setattr(slope.SLoPeLinear, "_allocate_backward_copy", refuse)
        with pytest.raises(MemoryError) as kept:  # which keeps the layer, too
            slope.SLoPeLinear(16, 16)
    optimizer = slope.optim.AdamW(net.parameters())
    net(torch.randn(4, 16)).sum().backward()
    optimizer.step()
    assert "_parameters" not in vars(half)
    assert kept.type is MemoryError
    assert optimizer.state_dict()["state"]


def test_steps_while_another_thread_makes_layers(switching_often):
    net = nn.Sequential(slope.SLoPeLinear(16, 16))
    optimizer = slope.optim.AdamW(net.parameters())
    net(torch.randn(4, 16)).sum().backward()
    optimizer.step()
    errors, made = [], []

    def make():
        try:
            for _ in range(200):
                made.append((copy.deepcopy(net), slope.SLoPeLinear(16, 16)))
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=make)
    thread.start()
    while thread.is_alive():
        optimizer.step()
    assert not errors
    assert len(made) == 200


def test_layers_that_were_tied_do_not_take_each_others_copy(monkeypatch):
    adamw_, copies = ops.adamw_, []

    def watch(*args, **kwargs):
        copies.append([copy.data_ptr() for copy in args[8]])
        adamw_(*args, **kwargs)

    monkeypatch.setattr(ops, "adamw_", watch)
    net = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    net[1].weight = net[0].weight
    slope.convert(net)
    net[1].weight = nn.Parameter(net[0].weight.detach().clone())
    assert net[1].weight_t is net[0].weight_t
    optimizer = slope.optim.AdamW(net.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        x = torch.randn(8, 16, requires_grad=True)
        net(x).square().sum().backward()
        optimizer.step()
        for layer in net:
            dy = torch.randn(8, 16)
            (dx,) = torch.autograd.grad(layer(x), x, dy)
            kept = ops.decompress(torch.ones(16, 8), layer.weight_t_bitmask).t()
            torch.testing.assert_close(dx, dy @ (layer.dense_weight() * kept))
    assert any(copies)
    assert all(len(set(written)) == len(written) for written in copies)  # none twice in a launch


def test_a_checkpoint_of_other_shapes_is_refused():
    dense, sparse = nn.Linear(16, 16), slope.SLoPeLinear(16, 16)
    saved = torch.optim.AdamW(dense.parameters())
    dense(torch.randn(4, 16)).sum().backward()
    saved.step()
    optimizer = slope.optim.AdamW(sparse.parameters())
    before = optimizer.state_dict()
    with pytest.raises(ValueError, match=r"state_dict: exp_avg must be \[16, 8\].*\[16, 16\]"):
        optimizer.load_state_dict(saved.state_dict())
    assert optimizer.state_dict() == before


def test_a_checkpoint_of_torch_keeps_options_of_groups():
    layers = [slope.SLoPeLinear(16, 16, bias=False) for _ in range(2)]
    groups = [
        {"params": [layer.weight], "mask_interval": n}
        for layer, n in zip(layers, (7, 0), strict=True)
    ]
    optimizer = slope.optim.AdamW(groups)
    theirs = torch.optim.AdamW([{"params": [layer.weight]} for layer in layers], lr=0.5)
    saved = theirs.state_dict()
    optimizer.load_state_dict(saved)
    assert [group["mask_interval"] for group in optimizer.param_groups] == [7, 0]
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.5]
    assert "mask_interval" not in saved["param_groups"][0]


@pytest.mark.parametrize("options", [{"master_weights": True}, {"half_moments": True}])
def test_parameters_that_became_wide_are_refused_before_anything_counts(options):
    layer = slope.SLoPeLinear(16, 16, bias=False, dtype=torch.bfloat16)
    optimizer = slope.optim.AdamW([layer.weight], **options)
    layer(torch.randn(4, 16).bfloat16()).sum().backward()
    optimizer.step()
    layer.float()
    layer.weight.grad = None
    optimizer.step()  # frozen: nothing is wrong
    layer.weight.grad = torch.ones_like(layer.weight)
    with pytest.raises(RuntimeError, match="is float32 now, but its state is of another dtype"):
        optimizer.step()
    assert int(optimizer.state[layer.weight]["step"]) == 1
    assert optimizer.param_groups[0]["mask_step"] == 1


@pytest.mark.parametrize(
    ("fault", "value"),
    [
        ("grad_dtype", torch.float32),
        ("lr", float("nan")),
        ("lr", -1e-6),
        ("betas", (1.0, 0.999)),
        ("mask_interval", -3),
        ("mask_interval", "never"),
        ("lr", torch.ones(2)),
        ("eps", torch.ones(2)),
        ("weight_decay", torch.ones(2)),
        ("lr", torch.tensor(1j)),
        ("half_moments", True),
        ("captured", None),
        ("clipped", None),
    ],
    ids=str,
)
def test_a_step_that_cannot_be_is_refused_before_anything_counts(fault, value, monkeypatch):
    dtype = torch.float16 if fault == "half_moments" else torch.bfloat16
    layers = [slope.SLoPeLinear(16, 16, bias=False, dtype=dtype) for _ in range(2)]
    groups = [{"params": [layer.weight]} for layer in layers]
    optimizer = slope.optim.AdamW(groups, lr=0.1)
    first, second = (layer.weight for layer in layers)
    if fault == "grad_dtype":
        second.grad_dtype = value
    first.grad = torch.ones_like(first)
    second.grad = torch.ones_like(second, dtype=value if fault == "grad_dtype" else dtype)
    kind, message = RuntimeError, ""
    if fault == "grad_dtype":
        message = "the gradient of a bfloat16 parameter is float32"
    elif fault == "captured":
        message = "step must have run before"
        monkeypatch.setattr(_streams, "is_capturing", lambda tensor: tensor is second)
    elif fault == "clipped":
        message = "clip_grad_norm_ and step must be captured into one"
        optimizer.clip_grad_norm_(1.0)
        weights = first, second
        monkeypatch.setattr(_streams, "is_capturing", lambda of: all(of is not w for w in weights))
    else:
        optimizer.param_groups[1][fault] = value
        kind, message = ValueError, f"AdamW: {fault} must be"
    before = [layer.weight.detach().clone() for layer in layers]
    counted = _freshness._optimizer_steps
    with pytest.raises(kind, match=message):
        optimizer.step()
    for layer, weight in zip(layers, before, strict=True):
        assert torch.equal(layer.weight, weight)
    assert not optimizer.state
    assert [group["mask_step"] for group in optimizer.param_groups] == [0, 0]
    assert _freshness._optimizer_steps == counted


def test_a_schedule_may_end_a_rounding_below_zero():
    """As torch's LinearLR does with end_factor=0."""
    weight = nn.Parameter(torch.ones(4))
    optimizer = slope.optim.AdamW([weight], lr=1e-3)
    optimizer.param_groups[0]["lr"] = -1e-19
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert torch.equal(weight, torch.ones(4))


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"lr": float("nan")}, "lr"),
        ({"lr": "fast"}, "lr"),
        ({"lr": torch.ones(2)}, "lr"),
        ({"lr": 10**400}, "lr"),
        ({"eps": float("inf")}, "eps"),
        ({"weight_decay": -1}, "weight_decay"),
        ({"betas": (0.9,)}, "betas"),
        ({"betas": None}, "betas"),
        ({"betas": (0.9, float("nan"))}, "betas"),
        ({"mask_interval": 2.5}, "mask_interval"),
        ({"mask_interval": True}, "mask_interval"),
    ],
)
def test_options_out_of_range_are_refused(options, name):
    with pytest.raises(ValueError, match=f"AdamW: {name} must be"):
        slope.optim.AdamW([nn.Parameter(torch.zeros(4))], **options)


@pytest.mark.parametrize("max_norm", [-1.0, float("nan")])
def test_no_norm_is_refused(max_norm):
    optimizer = slope.optim.AdamW([nn.Parameter(torch.zeros(4))])
    with pytest.raises(ValueError, match="max_norm must not be negative"):
        optimizer.clip_grad_norm_(max_norm)


def test_options_of_numpy_are_saved_as_plain_numbers():
    options = {"lr": np.float32(0.5), "mask_interval": np.int64(7)}
    optimizer = slope.optim.AdamW([nn.Parameter(torch.zeros(4))], **options)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    group = torch.load(file, weights_only=True)["param_groups"][0]
    assert (group["lr"], group["mask_interval"]) == (0.5, 7)


@pytest.mark.parametrize("found", [None, torch.zeros(4)])
def test_state_of_no_such_parameter_is_refused(found):
    optimizer = slope.optim.AdamW([nn.Parameter(torch.zeros(3))])
    saved = optimizer.state_dict()
    saved["state"] = {0: {"step": 1.0, "exp_avg": found, "exp_avg_sq": torch.zeros(3)}}
    with pytest.raises(ValueError, match=r"exp_avg must be \[3\] as its parameter"):
        optimizer.load_state_dict(saved)
