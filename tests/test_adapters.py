# SPDX-License-Identifier: Apache-2.0
import copy
import warnings

import pytest
import torch
from torch import nn

import slope_ext as slope
from slope_ext import _freshness


def make_model(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 16))
    return slope.convert(model)


def make(total_steps=20, fraction=0.25, optimizer=slope.optim.AdamW, **kwargs):
    model = make_model()
    opt = optimizer(model.parameters(), lr=0.02)
    options = {"rank": 3, "total_steps": total_steps, "fraction": fraction, **kwargs}
    return model, opt, slope.LazyAdapters(model, opt, **options)


def train(model, opt, adapters, first, last, switches=None):
    for step in range(first, last):
        if adapters.step() and switches is not None:
            switches.append(step)
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(8, 16, generator=generator)
        opt.zero_grad()
        loss = (model(x) - x.roll(1, -1)).square().mean()
        loss.backward()
        opt.step()
    return loss.item()


@pytest.mark.parametrize(
    ("total", "fraction", "switch"), [(20, 0.25, 15), (100, 0.01, 99), (10, 0.01, 9), (4, 1.0, 0)]
)
def test_switches_once_at_the_last_fraction(total, fraction, switch):
    model, opt, adapters = make(total, fraction)
    switches = []
    train(model, opt, adapters, 0, total, switches)
    assert switches == [switch]
    assert adapters.active
    assert all(layer.has_adapter for layer in model if isinstance(layer, slope.SLoPeLinear))


def test_loss_does_not_jump_and_then_adapters_train():
    model, opt, adapters = make()
    train(model, opt, adapters, 0, 15)
    x = torch.randn(8, 16)
    before = model(x)
    assert adapters.step()
    torch.testing.assert_close(model(x), before, rtol=0, atol=0)
    assert len(opt.param_groups) == 2
    adapters.steps -= 1  # the step above counted
    train(model, opt, adapters, 15, 20)
    assert model[0].lora_B.abs().sum() > 0


def test_sparse_weight_stays_sparse_beside_the_adapter():
    model, opt, adapters = make()
    masks = [model[i].weight_bitmask.clone() for i in (0, 2)]
    train(model, opt, adapters, 0, 20)
    for index, mask in zip((0, 2), masks, strict=True):
        assert torch.equal(model[index].weight_bitmask, mask)
        assert model[index].weight.shape[1] * 2 == model[index].in_features


@pytest.mark.parametrize("optimizer", [slope.optim.AdamW, torch.optim.AdamW])
@pytest.mark.parametrize("stop", [3, 14, 15, 16, 19])
@pytest.mark.parametrize("model_first", [False, True])
def test_resume_on_either_side_of_the_switch(optimizer, stop, model_first):
    model, opt, adapters = make(optimizer=optimizer)
    train(model, opt, adapters, 0, stop)
    masks = copy.deepcopy(slope.transposed_masks(model))
    state = copy.deepcopy((adapters.state_dict(), model.state_dict(), opt.state_dict()))
    rng = torch.get_rng_state()
    expected = train(model, opt, adapters, stop, 20)

    resumed, opt_resumed, adapters_resumed = make(optimizer=optimizer)
    if model_first:  # the model's own load adds the adapters then
        resumed.load_state_dict(state[1])
        adapters_resumed.load_state_dict(state[0])
    else:
        adapters_resumed.load_state_dict(state[0])
        resumed.load_state_dict(state[1])
    opt_resumed.load_state_dict(state[2])
    if optimizer is not slope.optim.AdamW:
        # A stock optimizer does not keep the transposed masks; they are saved beside it.
        slope.load_transposed_masks(resumed, masks)
    torch.set_rng_state(rng)
    assert train(resumed, opt_resumed, adapters_resumed, stop, 20) == expected
    for ours, theirs in zip(resumed.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


SCHEDULERS = {
    "LambdaLR": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 0.5**step),
    "CosineAnnealingLR": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
    "SequentialLR": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [
            torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=3),
            torch.optim.lr_scheduler.CosineAnnealingLR(o, 7),
        ],
        milestones=[3],
    ),
    "OneCycleLR": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=11),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.filterwarnings("ignore:The epoch parameter")
def test_schedulers_drive_the_adapters_group(name):
    model, opt, adapters = make(total_steps=10, fraction=0.3)
    scheduler = SCHEDULERS[name](opt)
    for step in range(10):
        train(model, opt, adapters, step, step + 1)
        scheduler.step()
        first, added = opt.param_groups
        assert added["lr"] == pytest.approx(first["lr"])
    assert model[0].lora_B.abs().sum() > 0


def test_reduce_on_plateau():
    model, opt, adapters = make(total_steps=10, fraction=0.3)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(opt, patience=0)
    for step in range(10):
        train(model, opt, adapters, step, step + 1)
        scheduler.step(1.0)
    assert opt.param_groups[1]["lr"] < 0.02


def test_group_options():
    model = make_model()
    opt = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.3)
    slope.LazyAdapters(
        model, opt, rank=2, total_steps=3, group={"weight_decay": 0.0, "lr": 0.4}
    ).activate()
    first, added = opt.param_groups
    assert (first["lr"], first["weight_decay"]) == (0.1, 0.3)
    assert (added["lr"], added["weight_decay"], len(added["params"])) == (0.4, 0.0, 4)


def test_scheduler_built_before_raises_at_once():
    model = make_model()
    opt = torch.optim.AdamW(model.parameters(), lr=0.1)
    torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1.0)
    with pytest.raises(ValueError, match="optimizer has a learning-rate scheduler already"):
        slope.LazyAdapters(model, opt, rank=2, total_steps=3)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adafactor, torch.optim.AdamW])
def test_empty_group_bothers_no_stock_optimizer(optimizer):
    model, opt, adapters = make(total_steps=4, fraction=0.3, optimizer=optimizer)
    train(model, opt, adapters, 0, 4)
    assert model[0].lora_B.abs().sum() > 0


def test_other_rank_than_the_checkpoint_raises():
    _, _, adapters = make()
    adapters.activate()
    state = adapters.state_dict()
    _, _, other = make(rank=5)
    with pytest.raises(ValueError, match="rank is 5, but the checkpoint has 3"):
        other.load_state_dict(state)
    assert not other.active


def test_adapters_on_simulated_sparsity():
    model = slope.convert(nn.Sequential(nn.Linear(16, 24)), slope.SlopeConfig(pattern="2:8"))
    opt = slope.optim.AdamW(model.parameters(), lr=0.02)
    adapters = slope.LazyAdapters(model, opt, rank=2, total_steps=2, fraction=0.5)
    for _ in range(2):
        adapters.step()
        opt.zero_grad()
        model(torch.randn(4, 16)).square().sum().backward()
        opt.step()
    assert model[0].lora_B.abs().sum() > 0


@pytest.mark.parametrize("optimizer", [slope.optim.AdamW, torch.optim.AdamW])
def test_named_parameters(optimizer):
    """torch's optimizers keep the names that they were given, in every group or in none."""
    model = make_model()
    opt = optimizer(model.named_parameters(), lr=0.02)
    adapters = slope.LazyAdapters(model, opt, rank=2, total_steps=2, fraction=0.5)
    train(model, opt, adapters, 0, 2)
    first, added = opt.state_dict()["param_groups"]
    assert first["param_names"] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert added["param_names"] == ["0.lora_A", "0.lora_B", "2.lora_A", "2.lora_B"]
    assert len(added["params"]) == 4


@pytest.mark.parametrize("pattern", ["2:4", "2:8"])
def test_adapters_made_on_the_meta_device(pattern):
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(16, 24, bias=False))
    layer = slope.convert(model, slope.SlopeConfig(pattern=pattern))[0]
    layer.add_adapter(2, scale=0.5)
    layer.to_empty(device="cpu")
    for factor in (layer.lora_A, layer.lora_B):
        nn.init.constant_(factor, float("nan"))
    layer.reset_parameters()
    assert layer.lora_scale == 0.5
    assert 0 < layer.lora_A.abs().max() <= 16**-0.5
    assert not layer.lora_B.any()


@pytest.mark.parametrize("optimizer", [slope.optim.AdamW, torch.optim.AdamW])
def test_resume_in_the_order_of_accelerate(optimizer):
    """Model, optimizer, and only then what is registered for checkpoints."""
    model, opt, adapters = make(optimizer=optimizer)
    train(model, opt, adapters, 0, 17)
    state = copy.deepcopy((model.state_dict(), opt.state_dict(), adapters.state_dict()))
    masks = slope.transposed_masks(model)
    expected = train(model, opt, adapters, 17, 20)
    model, opt, adapters = make(optimizer=optimizer)
    for each, saved in zip((model, opt, adapters), state, strict=True):
        each.load_state_dict(saved)
    slope.load_transposed_masks(model, masks)
    assert train(model, opt, adapters, 17, 20) == expected


def test_an_optimizer_in_a_wrapper():
    """As accelerate wraps it: an Optimizer by class alone, what it does not have is the inner's."""

    class Wrapper(torch.optim.Optimizer):
        def __init__(self, optimizer):
            self.optimizer = optimizer

        param_groups = property(lambda self: self.optimizer.param_groups)

        def add_param_group(self, group):
            self.optimizer.add_param_group(group)

        def load_state_dict(self, state):
            self.optimizer.load_state_dict(state)

        def step(self):
            self.optimizer.step()

        def zero_grad(self):
            self.optimizer.zero_grad()

    def make_wrapped():
        model = make_model()
        opt = Wrapper(torch.optim.AdamW(model.parameters(), lr=0.02))
        return model, opt, slope.LazyAdapters(model, opt, rank=2, total_steps=4, fraction=0.5)

    model, opt, adapters = make_wrapped()
    train(model, opt, adapters, 0, 4)
    assert model[0].lora_B.abs().sum() > 0
    state = copy.deepcopy(opt.optimizer.state_dict())
    model, opt, adapters = make_wrapped()
    opt.load_state_dict(state)
    assert adapters.active


def test_a_checkpoint_of_before_the_switch_does_not_go_over_adapters():
    _, _, adapters = make()
    before = adapters.state_dict()
    adapters.activate()
    with pytest.raises(ValueError, match="the checkpoint is of before the switch"):
        adapters.load_state_dict(before)
    assert adapters.active


def test_optimizers_that_deal_out_parameters_are_refused():
    class ZeroRedundancyOptimizer(torch.optim.AdamW):
        pass

    model = make_model()
    opt = ZeroRedundancyOptimizer(model.parameters())
    with pytest.raises(ValueError, match="must not be a ZeroRedundancyOptimizer"):
        slope.LazyAdapters(model, opt, rank=2, total_steps=4)
    assert len(opt.param_groups) == 1


def test_switch_warns_of_a_captured_step(monkeypatch):
    layer = slope.SLoPeLinear(16, 16)
    optimizer = slope.optim.AdamW(layer.parameters())
    adapters = slope.LazyAdapters(layer, optimizer, rank=2, total_steps=2, fraction=0.5)
    for captured in (True, False):
        monkeypatch.setattr(_freshness, "_step_was_captured", captured)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            assert not adapters.step()
            assert not seen
            assert adapters.step()
        told = [str(w.message) for w in seen if w.filename == __file__]
        assert len(told) == int(captured)
        layer.remove_adapter()
        adapters.steps, adapters.active = 0, False
        optimizer.param_groups[-1]["params"].clear()


def test_part_of_an_adapter_is_not_loaded_unseen():
    """A scale that is missing is told; a B that is missing is zero, not what memory held."""
    model, other = (nn.Sequential(slope.SLoPeLinear(16, 16)) for _ in range(2))
    model[0].add_adapter(4, scale=3.0)
    state = model.state_dict()
    del state["0.lora_scale"]
    with pytest.raises(RuntimeError, match=r'Missing key.*"0\.lora_scale"'):
        other.load_state_dict(state)
    other = nn.Sequential(slope.SLoPeLinear(16, 16))
    state = model.state_dict()
    del state["0.lora_B"]
    assert other.load_state_dict(state, strict=False).missing_keys == ["0.lora_B"]
    assert not other[0].lora_B.any()


@pytest.mark.parametrize("named", [False, True])
def test_adapters_that_the_optimizer_has_are_not_stepped_twice(named):
    model = nn.Sequential(slope.SLoPeLinear(16, 16))
    model[0].add_adapter(4)
    params = model.named_parameters() if named else model.parameters()
    optimizer = slope.optim.AdamW(params, lr=0.1, weight_decay=0.0)
    before = model[0].lora_A.detach().clone()
    nn.init.ones_(model[0].lora_B)
    slope.LazyAdapters(model, optimizer, rank=4, total_steps=1).step()
    model(torch.ones(2, 16)).sum().backward()
    optimizer.step()
    torch.testing.assert_close((model[0].lora_A - before).abs(), torch.full_like(before, 0.1))
    first, last = optimizer.param_groups
    assert [len(group["params"]) for group in (first, last)] == [2, 2]
    if named:
        assert last["param_names"] == ["0.lora_A", "0.lora_B"]
        assert first["param_names"] == ["0.weight", "0.bias"]


@pytest.mark.parametrize("tied", [False, True])
def test_loading_by_swapping_tensors(tied):
    model, other = (nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)) for _ in range(2))
    for each in (model, other):
        if tied:
            each[1].weight = each[0].weight
        slope.convert(each)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        other.load_state_dict(model.state_dict())
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    x = torch.randn(3, 16)
    assert torch.equal(other(x), model(x))
