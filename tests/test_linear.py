# SPDX-License-Identifier: Apache-2.0
"""SLoPeLinear: numerics against the oracle, and everything that torch does to modules."""

import copy
import gc
import io
import pickle
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import oracle
import slope_ext as slope
from cases import LEADING, WEIGHT_SHAPES
from slope_ext import _freshness, ops


def layer_and_twin(
    in_features, out_features, *, bias=True, device="cpu", dtype=torch.float32, **kw
):
    layer = slope.SLoPeLinear(in_features, out_features, bias, device, dtype, **kw)
    return layer, oracle.DenseMaskedLinear(layer)


def assert_twins_agree(layer, twin, x, **tolerance):
    """Forward, dX, dW, db of one call."""
    x1, x2 = (x.detach().clone().requires_grad_() for _ in range(2))
    y1, y2 = layer(x1), twin(x2)
    dy = torch.randn_like(y1)
    y1.backward(dy)
    y2.backward(dy)
    torch.testing.assert_close(y1, y2, **tolerance)
    torch.testing.assert_close(x1.grad, x2.grad, **tolerance)
    kept = twin.weight.grad[twin.mask].view_as(layer.weight)
    torch.testing.assert_close(layer.weight.grad, kept, **tolerance)
    if layer.bias is not None:
        torch.testing.assert_close(layer.bias.grad, twin.bias.grad, **tolerance)


# ---- numerics ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", WEIGHT_SHAPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("backward_copy", ["cached", "recompute"])
def test_equals_dense_masked_twin(shape, bias, backward_copy, device):
    out_features, in_features = shape
    layer, twin = layer_and_twin(
        in_features, out_features, bias=bias, device=device, backward_copy=backward_copy
    )
    assert_twins_agree(layer, twin, torch.randn(9, in_features, device=device))


@pytest.mark.parametrize("leading", LEADING)
def test_any_leading_dimensions(leading, device):
    layer, twin = layer_and_twin(24, 16, device=device)
    assert_twins_agree(layer, twin, torch.randn(*leading, 24, device=device))


def test_equals_twin_to_rounding_in_float64():
    layer, twin = layer_and_twin(64, 48, dtype=torch.float64)
    x = torch.randn(33, 64, dtype=torch.float64)
    assert_twins_agree(layer, twin, x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_parameters(dtype, device):
    layer, twin = layer_and_twin(64, 32, device=device, dtype=dtype)
    x = torch.randn(16, 64, device=device, dtype=dtype)
    assert_twins_agree(layer, twin, x, rtol=3e-2, atol=3e-2)


def test_adapter_equals_twin(device):
    layer, twin = layer_and_twin(24, 16, device=device)
    layer.add_adapter(4, scale=0.5)
    nn.init.normal_(layer.lora_B)
    twin.add_adapter(layer)
    assert_twins_agree(layer, twin, torch.randn(9, 24, device=device))
    torch.testing.assert_close(layer.lora_A.grad, twin.lora[0].grad)
    torch.testing.assert_close(layer.lora_B.grad, twin.lora[1].grad)


def test_new_adapter_leaves_the_output_bit_equal(device):
    layer = slope.SLoPeLinear(24, 16, device=device)
    x = torch.randn(9, 24, device=device)
    before = layer(x)
    layer.add_adapter(4)
    torch.testing.assert_close(layer(x), before, rtol=0, atol=0)


@pytest.mark.parametrize("backward_copy", ["cached", "recompute"])
@pytest.mark.parametrize("rank", [0, 4])
def test_autocast_with_fp32_parameters(rank, backward_copy, device):
    layer, twin = layer_and_twin(64, 32, device=device, backward_copy=backward_copy)
    if rank:
        layer.add_adapter(rank)  # B = 0: what the layer and its other gradients are stays
    x = torch.randn(16, 64, device=device)
    x1, x2 = (x.clone().requires_grad_() for _ in range(2))
    with torch.autocast(device.type, torch.bfloat16):
        y = layer(x1)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    twin(x2).sum().backward()
    assert layer.weight.grad.dtype == torch.float32
    torch.testing.assert_close(x1.grad, x2.grad, rtol=3e-2, atol=3e-2)
    kept = twin.weight.grad[twin.mask].view_as(layer.weight)
    torch.testing.assert_close(layer.weight.grad, kept, rtol=3e-2, atol=6e-2)
    if rank:
        expected = torch.ones_like(y.float()).t() @ (x @ layer.lora_A.t())
        assert layer.lora_B.grad.dtype == torch.float32
        torch.testing.assert_close(layer.lora_B.grad, expected, rtol=3e-2, atol=6e-2)


def test_gradient_accumulation(device):
    layer, twin = layer_and_twin(24, 16, device=device)
    for _ in range(3):
        x = torch.randn(5, 24, device=device)
        layer(x).square().sum().backward()
        twin(x).square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, twin.weight.grad[twin.mask].view_as(layer.weight))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing(use_reentrant, device):
    layer = slope.SLoPeLinear(24, 24, device=device)
    x = torch.randn(5, 24, device=device)
    grads = []
    for checkpointed in (False, True):
        layer.zero_grad()
        x_ = x.clone().requires_grad_()
        y = checkpoint(layer, x_, use_reentrant=use_reentrant) if checkpointed else layer(x_)
        y.square().sum().backward()
        grads.append((x_.grad, layer.weight.grad))
    for plain, recomputed in zip(*grads, strict=True):
        assert torch.equal(plain, recomputed)


def test_initialisation_is_that_of_nn_linear():
    layer = slope.SLoPeLinear(512, 256)
    bound = 1 / 512**0.5
    assert layer.weight.abs().max() <= bound
    # Of four uniform magnitudes the two largest have means 3/5 and 4/5 of the bound.
    assert layer.weight.abs().mean().item() == pytest.approx(0.7 * bound, rel=0.01)
    assert layer.bias.abs().max() <= bound
    dense = layer.dense_weight()
    assert (dense.view(256, -1, 4) != 0).sum(-1).eq(2).all()


# ---- the backward copy is never stale ------------------------------------------------------------


def double_pruned(layer):
    """W^{R,C} from the present weight and the layer's present transposed mask, independently."""
    mask = oracle.unbits(layer.weight_t_bitmask).t().to(layer.weight.device)
    return layer.dense_weight().detach() * mask


def assert_backward_is_current(layer):
    x = torch.randn(3, layer.in_features, device=layer.weight.device, dtype=layer.weight.dtype)
    x.requires_grad_()
    y = layer(x)
    dy = torch.randn_like(y)
    y.backward(dy)
    torch.testing.assert_close(x.grad, dy @ double_pruned(layer))
    survivors = oracle.unbits(layer.weight_bitmask)
    kept_t = oracle.unbits(layer.weight_t_bitmask)
    assert (kept_t.view(layer.in_features, -1, 4).sum(-1) == 2).all()
    # A position outside W may be kept only where fewer than two survive.
    outside = (kept_t & ~survivors.t()).view(layer.in_features, -1, 4).sum(-1)
    surviving = survivors.t().reshape(layer.in_features, -1, 4).sum(-1)
    assert (outside == (2 - surviving).clamp(min=0)).all()


class LegacySGD(torch.optim.Optimizer):
    """Writes through .data, which no version counter shows."""

    def __init__(self, params):
        super().__init__(params, {})

    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.data.add_(p.grad.data, alpha=-0.1)


STOCK_OPTIMIZERS = {
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "AdamW single": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=False),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1),
    "through .data": LegacySGD,
    "slope AdamW": lambda p: slope.optim.AdamW(p, lr=0.1, mask_interval=2),
}


@pytest.mark.parametrize("name", STOCK_OPTIMIZERS)
@pytest.mark.parametrize("backward_copy", ["cached", "recompute"])
def test_follows_every_optimizer(name, backward_copy, device):
    layer = slope.SLoPeLinear(24, 16, device=device, backward_copy=backward_copy)
    optimizer = STOCK_OPTIMIZERS[name](layer.parameters())
    for _ in range(4):
        before = layer.weight.detach().clone()
        optimizer.zero_grad()
        assert_backward_is_current(layer)
        optimizer.step()
        assert not torch.equal(layer.weight, before)
    assert_backward_is_current(layer)


def reload(layer, assign):
    other = slope.SLoPeLinear(24, 16, device=layer.weight.device)
    layer.load_state_dict({k: v.clone() for k, v in other.state_dict().items()}, assign=assign)


def flat_view(layer):
    """The weight becomes a view of a larger buffer, which is then written: a flat parameter."""
    flat = torch.randn(8 + layer.weight.numel(), device=layer.weight.device)
    layer.weight.data = flat[8:].view_as(layer.weight)
    with torch.enable_grad():
        assert_backward_is_current(layer)
    flat.mul_(2)


CHANGES = {
    "in place": lambda layer: layer.weight.mul_(-2),
    "copy_": lambda layer: layer.weight.copy_(torch.randn_like(layer.weight)),
    "data rebound": lambda layer: setattr(layer.weight, "data", torch.randn_like(layer.weight)),
    "data rebound to a view": lambda layer: setattr(
        layer.weight, "data", torch.randn(2, *layer.weight.shape, device=layer.weight.device)[1]
    ),
    "new Parameter": lambda layer: setattr(
        layer, "weight", nn.Parameter(torch.randn_like(layer.weight))
    ),
    "load_state_dict": lambda layer: reload(layer, assign=False),
    "load_state_dict assign": lambda layer: reload(layer, assign=True),
    "bitmask copy_": lambda layer: layer.weight_bitmask.copy_(layer.weight_bitmask.flip(0)),
    "bitmask replaced": lambda layer: setattr(
        layer, "weight_bitmask", layer.weight_bitmask.flip(0).clone()
    ),
    "reset_parameters": lambda layer: layer.reset_parameters(),
    "copy overwritten": lambda layer: layer.weight_t is None or layer.weight_t.zero_(),
    "to float64": lambda layer: layer.to(torch.float64) if layer.weight.is_cpu else None,
    "data rebound to float64": lambda layer: layer.weight.is_cpu
    and [setattr(p, "data", p.data.double()) for p in layer.parameters()],
    "to_empty, load": lambda layer: (
        layer.to_empty(device=layer.weight.device),
        reload(layer, False),
    ),
    "view of a flat buffer": lambda layer: flat_view(layer),
    "write through data, told": lambda layer: (
        layer.weight.data.mul_(3),
        layer.mark_backward_copy_stale(),
    ),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("backward_copy", ["cached", "recompute"])
@torch.no_grad()
def test_follows_every_change(change, backward_copy, device):
    layer = slope.SLoPeLinear(24, 16, device=device, backward_copy=backward_copy)
    with torch.enable_grad():
        assert_backward_is_current(layer)
    CHANGES[change](layer)
    with torch.enable_grad():
        assert_backward_is_current(layer)


def test_copy_is_not_refreshed_without_need(device):
    layer = slope.SLoPeLinear(24, 16, device=device)
    assert_backward_is_current(layer)
    version = layer.weight_t._version
    assert_backward_is_current(layer)
    assert layer.weight_t._version == version


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, slope.optim.AdamW])
@pytest.mark.parametrize("through", ["flat view", "masters"])
def test_follows_an_optimizer_of_other_tensors(optimizer, through, device):
    """The weight is a view of what is stepped, or is copied from it through .data."""
    layer = slope.SLoPeLinear(24, 16, device=device)
    size = layer.weight.numel()
    stepped = nn.Parameter(torch.randn(size if through == "masters" else 2 * size, device=device))
    if through == "flat view":
        layer.weight.data = stepped.data[size:].view_as(layer.weight)
    opt = optimizer([stepped], lr=0.5)
    for _ in range(3):
        assert_backward_is_current(layer)
        stepped.grad = torch.randn_like(stepped)
        opt.step()
        if through == "masters":
            layer.weight.data.copy_(stepped.data.view_as(layer.weight))
    assert_backward_is_current(layer)


def test_closure_of_our_optimizer(device):
    """Its backward runs inside of step, before the write."""
    layer = slope.SLoPeLinear(24, 16, device=device)
    optimizer = slope.optim.AdamW(layer.parameters(), lr=0.1)
    optimizer.step(lambda: assert_backward_is_current(layer))
    assert_backward_is_current(layer)


def test_recompute_keeps_no_copy():
    layer = slope.SLoPeLinear(64, 32, backward_copy="recompute")
    assert layer.weight_t is None
    assert {name for name, _ in layer.named_buffers()} == {"weight_bitmask", "weight_t_bitmask"}


# ---- copies, checkpoints -------------------------------------------------------------------------


def drifted_layer(device="cpu"):
    """A layer whose transposed mask is of an older weight, with an adapter."""
    layer = slope.SLoPeLinear(24, 16, device=device)
    layer.add_adapter(4, scale=2.0)
    with torch.no_grad():
        layer.weight.copy_(torch.randn_like(layer.weight))
        layer.lora_B.normal_()
    return layer


def assert_same_function(a, b):
    x = torch.randn(5, 24, device=a.weight.device)
    results = []
    for layer in (a, b):
        x_ = x.clone().requires_grad_()
        y = layer(x_)
        y.square().sum().backward()
        results.append((y, x_.grad))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


def test_deepcopy(device):
    layer = drifted_layer(device)
    twin = copy.deepcopy(layer)
    assert_same_function(layer, twin)  # the older transposed mask is copied too
    with torch.no_grad():
        twin.weight.mul_(2)
    assert not torch.equal(layer.weight, twin.weight)
    assert_backward_is_current_without_adapter(twin)


def assert_backward_is_current_without_adapter(layer):
    layer.remove_adapter()
    assert_backward_is_current(layer)


@pytest.mark.parametrize("how", ["pickle", "torch.save"])
def test_pickle_of_the_module(how):
    layer = drifted_layer()
    if how == "pickle":
        twin = pickle.loads(pickle.dumps(layer))
    else:
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert_same_function(layer, twin)


def test_state_dict_holds_exactly_the_data_model():
    layer = slope.SLoPeLinear(24, 16)
    assert {k: (tuple(v.shape), v.dtype) for k, v in layer.state_dict().items()} == {
        "weight": ((16, 12), torch.float32),
        "weight_bitmask": ((16, 3), torch.uint8),
        "bias": ((16,), torch.float32),
    }
    layer.add_adapter(4)
    assert set(layer.state_dict()) == {
        "weight", "weight_bitmask", "bias", "lora_A", "lora_B", "lora_scale",
    }  # fmt: skip


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("how", ["memory", "torch.save", "safetensors"])
def test_state_dict_round_trip(assign, how, tmp_path):
    layer = drifted_layer()
    state = layer.state_dict()
    if how == "torch.save":
        torch.save(state, tmp_path / "state.pt")
        state = torch.load(tmp_path / "state.pt", weights_only=True)
    elif how == "safetensors":
        safetensors = pytest.importorskip("safetensors.torch")
        safetensors.save_file(state, tmp_path / "state.safetensors")
        state = safetensors.load_file(tmp_path / "state.safetensors")
    twin = slope.SLoPeLinear(24, 16)  # has no adapter yet: loading adds it
    twin.load_state_dict(state, assign=assign)
    assert twin.lora_scale == 2.0
    layer.update_transposed_mask()  # a loaded layer chooses its mask from the loaded weight
    assert_same_function(layer, twin)


def test_adapter_scale_survives_exactly():
    layer = slope.SLoPeLinear(24, 16)
    layer.add_adapter(4, scale=0.1)
    twin = slope.SLoPeLinear(24, 16)
    twin.load_state_dict(layer.state_dict())
    assert twin.lora_scale == 0.1


def test_transposed_masks_are_saved_and_restored_by_hand():
    """For an exact resume with an optimizer that does not know of them."""
    layer = drifted_layer()
    model, twin = nn.Sequential(layer), nn.Sequential(slope.SLoPeLinear(24, 16))
    twin.load_state_dict(model.state_dict())
    slope.load_transposed_masks(twin, slope.transposed_masks(model))
    assert_same_function(layer, twin[0])
    slope.update_transposed_masks(twin)
    assert not torch.equal(twin[0].weight_t_bitmask, layer.weight_t_bitmask)
    with pytest.raises(KeyError):
        slope.load_transposed_masks(twin, {})


@pytest.mark.parametrize("backward_copy", ["cached", "recompute"])
def test_inference_mode_layer(backward_copy, device):
    with torch.inference_mode():
        layer = slope.SLoPeLinear(24, 16, device=device, backward_copy=backward_copy)
        weight = layer.backward_weight()
        layer.weight.mul_(2)
        torch.testing.assert_close(layer.backward_weight(), 2 * weight)


def test_load_reports_missing_and_unexpected_keys():
    layer = slope.SLoPeLinear(24, 16)
    state = layer.state_dict()
    del state["weight_bitmask"]
    state["other"] = torch.zeros(1)
    with pytest.raises(RuntimeError, match=r"weight_bitmask[\s\S]*other"):
        layer.load_state_dict(state)


def test_load_refuses_a_broken_bitmask_and_changes_nothing():
    layer = slope.SLoPeLinear(24, 16)
    weight = layer.weight.detach().clone()
    state = slope.SLoPeLinear(24, 16).state_dict()
    state["weight_bitmask"] = state["weight_bitmask"].clone().fill_(0xFF)
    with pytest.raises(RuntimeError, match="weight_bitmask must have exactly two bits"):
        layer.load_state_dict(state)
    assert torch.equal(layer.weight, weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_load_refuses_a_bitmask_of_another_dtype(dtype):
    state = slope.SLoPeLinear(24, 16).state_dict()
    state["weight_bitmask"] = state["weight_bitmask"].to(dtype)
    with pytest.raises(RuntimeError, match="weight_bitmask must be uint8"):
        slope.SLoPeLinear(24, 16).load_state_dict(state)


def test_load_refuses_another_shape():
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        slope.SLoPeLinear(24, 16).load_state_dict(slope.SLoPeLinear(24, 24).state_dict())


# ---- devices and dtypes --------------------------------------------------------------------------


@pytest.mark.parametrize("assign", [False, True])
def test_meta_then_materialise(assign, device):
    source = slope.SLoPeLinear(24, 16, device=device)
    layer = slope.SLoPeLinear(24, 16, device="meta")
    assert all(tensor.is_meta for tensor in (*layer.parameters(), *layer.buffers()))
    assert layer(torch.empty(2, 24, device="meta")).shape == (2, 16)
    if not assign:
        layer.to_empty(device=device)
    layer.load_state_dict(source.state_dict(), assign=assign)
    assert_same_function(source, layer)
    assert_backward_is_current(layer)


def test_meta_then_to_empty_then_reset(device):
    layer = slope.SLoPeLinear(24, 16, device="meta").to_empty(device=device)
    layer.reset_parameters()
    assert_backward_is_current(layer)


def test_meta_then_filled_by_hand(device):
    """Neither load_state_dict nor reset_parameters says that the weight is there now."""
    source = slope.SLoPeLinear(24, 16, device=device)
    layer = slope.SLoPeLinear(24, 16, device="meta").to_empty(device=device)
    with torch.no_grad():
        for target, tensor in zip(layer.parameters(), source.parameters(), strict=True):
            target.copy_(tensor)
        layer.weight_bitmask.copy_(source.weight_bitmask)
    assert_same_function(source, layer)
    assert_backward_is_current(layer)


def test_dtype_cast_keeps_masks():
    layer = drifted_layer()
    mask_t = layer.weight_t_bitmask.clone()
    layer.to(torch.bfloat16)
    assert layer.weight_bitmask.dtype == torch.uint8
    assert layer.weight_t.dtype == torch.bfloat16
    layer(torch.randn(2, 24, dtype=torch.bfloat16, requires_grad=True)).sum().backward()
    assert torch.equal(layer.weight_t_bitmask, mask_t)


@pytest.mark.gpu
def test_move_to_the_gpu_and_back():
    layer = drifted_layer()
    reference = copy.deepcopy(layer)
    layer.cuda()
    x = torch.randn(5, 24, requires_grad=True)
    x_cuda = x.detach().cuda().requires_grad_()
    reference(x).sum().backward()
    layer(x_cuda).sum().backward()
    torch.testing.assert_close(x_cuda.grad.cpu(), x.grad)  # its older mask moved along
    layer.cpu()
    assert_same_function(reference, layer)


@pytest.mark.parametrize("backward_copy", ["cached", "recompute"])
def test_mask_is_chosen_before_hooks_copy_it(backward_copy, device):
    """As offloading does with what autograd saves; the copies tell nobody that they are stale."""
    layer = slope.SLoPeLinear(24, 16, device=device, backward_copy=backward_copy)
    x = torch.randn(5, 24, device=device)
    for change in ("none", "bitmask", "moved"):
        with torch.no_grad():
            if change == "bitmask":
                layer.weight_bitmask.copy_(layer.weight_bitmask.flip(0))
            elif change == "moved":
                layer._allocate_backward_copy()
                layer.weight_t_bitmask.fill_(0xFF)  # what may lie in new memory
                _freshness.mark_stale(layer.weight_t_bitmask)
        x.grad = None
        x.requires_grad_()
        copies = torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone)
        with copies:
            y = layer(x)
        y.backward(torch.ones_like(y))
        mask = oracle.unbits(layer.weight_bitmask).to(device)
        pruned = layer.dense_weight().detach()
        pruned = pruned * oracle.double_prune(pruned, mask).to(device)
        torch.testing.assert_close(x.grad, torch.ones_like(y) @ pruned)


def test_averaged_model(device):
    """It pairs the buffers of its copy with the model's, by place, and copies them. (With
    ``use_buffers`` it would average masks.)"""
    model = nn.Sequential(nn.Linear(24, 16), nn.Linear(16, 24), nn.Linear(24, 16)).to(device)
    model[2].weight = model[0].weight  # buffers of tied layers are one
    slope.convert(model)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    assert averaged.module[0]._buffers is averaged.module[2]._buffers
    weights = []
    for _ in range(2):
        with torch.no_grad():
            model[0].weight.add_(torch.randn_like(model[0].weight))
            model[0].weight_bitmask.copy_(model[0].weight_bitmask.flip(0))
        averaged.update_parameters(model)
        weights.append(model[0].weight.detach().clone())
    torch.testing.assert_close(averaged.module[0].weight, (weights[0] + weights[1]) / 2)
    assert torch.equal(averaged.module[0].weight_bitmask, model[0].weight_bitmask)
    x = torch.randn(3, 24, device=device)
    dense = slope.to_dense(copy.deepcopy(averaged.module))
    torch.testing.assert_close(averaged(x), dense(x))


@pytest.mark.parametrize(
    ("activation", "frozen"),
    [("none", False), ("none", True), ("relu", True), ("swiglu", False), ("swiglu", True)],
)  # the gradient of a ReLU wants its result as it was, torch's too
def test_result_may_be_written_in_place(activation, frozen, device):
    layer = slope.SLoPeLinear(24, 32, device=device, activation=activation)
    layer.requires_grad_(not frozen)
    residual = torch.randn(2, 3, 16 if activation == "swiglu" else 32, device=device)
    residual.requires_grad_()
    x = torch.randn(2, 3, 24, device=device)
    y = layer(x)
    expected = y.detach() + 2 * residual.detach()
    y += 2 * residual
    y.sum().backward()
    torch.testing.assert_close(y.detach(), expected)
    assert (residual.grad == 2).all()
    assert (layer.weight.grad is None) == frozen


def test_only_its_own_weight_may_move():
    """What is put in its place past nn.Module, as FSDP2 does it, has memory of somebody else."""
    layer = slope.SLoPeLinear(32, 16)
    assert layer._can_move()
    own, gathered = layer.weight, nn.Parameter(layer.weight.detach().clone())
    layer._parameters["weight"] = gathered
    assert not layer._can_move()
    layer._parameters["weight"] = own
    assert layer._can_move()
    layer.weight = gathered
    assert layer._can_move()
    assert copy.deepcopy(layer)._can_move()
    layer._parameters["weight"] = own * 2
    assert not layer._can_move()
    layer.weight = nn.Parameter(torch.cat([own, own])[:16])
    assert not layer._can_move()


def test_a_weight_that_was_computed_is_not_held(device):
    layer = slope.SLoPeLinear(24, 16, device=device)
    weight = layer.weight * 2
    x = torch.randn(3, 24, device=device)
    torch.func.functional_call(layer, {"weight": weight}, (x,)).sum().backward()
    assert layer.weight.grad is not None
    reference = weakref.ref(weight)
    del weight
    gc.collect()
    assert reference() is None
    copy.deepcopy(layer)


def test_legacy_files_fill_tensors_after_the_layer_is_there(device):
    """torch.load of the old format: what a layer computed when it was unpickled would be wrong."""
    layer = drifted_layer(device)
    file = io.BytesIO()
    torch.save(layer, file, _use_new_zipfile_serialization=False)
    file.seek(0)
    assert_same_function(layer, torch.load(file, weights_only=False))


def test_modes_without_a_gradient_are_refused_not_ignored():
    layer, x = slope.SLoPeLinear(24, 16), torch.randn(3, 24)
    layer.add_adapter(2)
    for name in ("slope::linear_lowrank", "slope::linear"):
        for use in (lambda: torch.func.jvp(layer, (x,), (x,)), lambda: torch.func.jacfwd(layer)(x)):
            with pytest.raises(NotImplementedError, match=f"{name} has no forward-mode gradient"):
                use()
        layer.remove_adapter()
    compiled = torch.compile(lambda x: torch.func.jvp(layer, (x,), (x,)), backend="eager")
    with pytest.raises(NotImplementedError, match="slope::linear has no forward-mode gradient"):
        compiled(x)
    for use in (lambda: torch.func.vjp(layer, x), lambda: torch.func.jacrev(layer)(x)):
        with pytest.raises(NotImplementedError, match="slope::linear has no gradient in"):
            use()
    torch.testing.assert_close(torch.func.vmap(layer)(x[:, None])[:, 0], layer(x))
    values = layer.weight.detach()
    with pytest.raises(NotImplementedError, match="slope::decompress has no forward-mode"):
        torch.func.jvp(lambda v: ops.decompress(v, layer.weight_bitmask), (values,), (values,))


@pytest.mark.parametrize("rank", [0, 2])
def test_tensors_that_outlive_a_transform(rank, device):
    """torch.func's wrapper is still around them."""
    layer, x = slope.SLoPeLinear(24, 16, device=device), torch.randn(3, 24, device=device)
    if rank:
        layer.add_adapter(rank)
        torch.nn.init.normal_(layer.lora_B)
    x.requires_grad_()
    layer(x).square().sum().backward()
    expected = [tensor.grad for tensor in (x, *layer.parameters())]
    x.grad = None
    layer.zero_grad()
    outlived = []
    torch.func.grad(lambda wrapped: (outlived.append(wrapped), wrapped.sum())[1])(x)
    assert torch._C._functorch.is_functorch_wrapped_tensor(outlived[0])
    layer(outlived[0]).square().sum().backward()
    for tensor, gradient in zip((x, *layer.parameters()), expected, strict=True):
        torch.testing.assert_close(tensor.grad, gradient)


@pytest.mark.parametrize("composes", [False, True])
def test_masks_that_outlive_a_transform(composes, device, monkeypatch):
    """Also where backward composes input_grad, as on CUDA."""
    if composes:
        monkeypatch.setattr("slope_ext.ops.spmm.composes", lambda dy: True)
    layer, x = slope.SLoPeLinear(24, 16, device=device), torch.randn(3, 24, device=device)
    buffers = layer.weight_bitmask, layer.weight_t_bitmask, torch.empty_like(layer.weight_t)
    outlived = []
    torch.func.grad(lambda x: (outlived.extend(b.clone() for b in buffers), x.sum())[1])(x)
    assert all(map(torch._C._functorch.is_functorch_wrapped_tensor, outlived))
    gradients = []
    for bitmask, bitmask_t, values_t in (buffers, outlived):
        inputs = x.clone().requires_grad_(), layer.weight
        y = ops.linear(*inputs, bitmask, None, bitmask_t, values_t)
        gradients.append(torch.autograd.grad(y.square().sum(), inputs))
    torch.testing.assert_close(*gradients)


# ---- torch.compile -------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 4])
def test_writes_to_what_compiled_code_returns_are_seen(rank):
    """Its ReLU's gradient takes the result: autograd must know of the write, not use it."""
    layer, follower = slope.SLoPeLinear(32, 16, activation="relu"), nn.Linear(16, 8)
    if rank:
        layer.add_adapter(rank)

    def both(x):
        y = layer(x)
        return y, follower(y)

    y, z = torch.compile(both, backend="aot_eager")(torch.randn(5, 32))
    y -= 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (y.sum() + z.sum()).backward()


@pytest.mark.parametrize("backward_copy", ["cached", "recompute"])
@pytest.mark.parametrize("adapter", [False, True])
def test_compile_fullgraph(backward_copy, adapter, device):
    layer = slope.SLoPeLinear(24, 16, device=device, backward_copy=backward_copy)
    if adapter:
        layer.add_adapter(4)
        nn.init.normal_(layer.lora_B)
    eager = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.05) for m in (layer, eager)]
    for _ in range(3):
        x = torch.randn(4, 24, device=device)
        results = []
        for module, optimizer in zip((compiled, eager), optimizers, strict=True):
            x_ = x.clone().requires_grad_()
            optimizer.zero_grad()
            y = module(x_).relu()
            y.square().sum().backward()
            optimizer.step()
            results.append((y, x_.grad))
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(layer.weight, eager.weight)


def test_compile_under_autocast(device):
    layer = slope.SLoPeLinear(24, 16, device=device)
    compiled = torch.compile(layer, fullgraph=True)
    x = torch.randn(4, 24, device=device, requires_grad=True)
    with torch.autocast(device.type, torch.bfloat16):
        y = compiled(x)
        expected = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected)
    y.float().sum().backward()
    assert layer.weight.grad.dtype == torch.float32


def test_compile_with_activation_checkpointing(device):
    layer = slope.SLoPeLinear(24, 24, device=device)

    def function(x):
        return checkpoint(lambda x: layer(x).relu(), x, use_reentrant=False)

    x1, x2 = (torch.ones(4, 24, device=device, requires_grad=True) for _ in range(2))
    torch.compile(function, fullgraph=True)(x1).sum().backward()
    function(x2).sum().backward()
    torch.testing.assert_close(x1.grad, x2.grad)


# ---- being an nn.Linear --------------------------------------------------------------------------


def test_is_an_nn_linear_with_logical_sizes():
    layer = slope.SLoPeLinear(24, 16)
    assert isinstance(layer, nn.Linear)
    assert (layer.in_features, layer.out_features) == (24, 16)
    assert layer.weight.shape == (16, 12)
    assert "in_features=24, out_features=16, bias=True, 2:4" in repr(layer)


def test_grad_has_the_shape_of_the_parameter_and_clips(device):
    layer, twin = layer_and_twin(24, 16, device=device)
    x = torch.randn(9, 24, device=device)
    layer(x).square().sum().backward()
    twin(x).square().sum().backward()
    assert layer.weight.grad.shape == (16, 12)
    ours = nn.utils.clip_grad_norm_(layer.parameters(), 0.1)
    theirs = nn.utils.clip_grad_norm_(twin.parameters(), 0.1)
    torch.testing.assert_close(ours, theirs)


def test_frozen_layer_passes_gradients_through(device):
    layer, twin = layer_and_twin(24, 16, device=device)
    layer.requires_grad_(False)
    x = torch.randn(9, 24, device=device, requires_grad=True)
    layer(x).sum().backward()
    assert layer.weight.grad is None
    x2 = x.detach().clone().requires_grad_()
    twin(x2).sum().backward()
    torch.testing.assert_close(x.grad, x2.grad)


def test_inference_mode(device):
    layer, twin = layer_and_twin(24, 16, device=device)
    x = torch.randn(9, 24, device=device)
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), twin(x))


@pytest.mark.parametrize("stale_at", ["mask", "values"])
def test_layer_used_twice_in_one_forward(stale_at, device):
    """The first backward refreshes a copy that the second has saved."""
    layer, twin = layer_and_twin(24, 24, device=device)
    if stale_at == "mask":
        layer.weight_t_bitmask = torch.zeros_like(layer.weight_t_bitmask)
        slope._freshness.mark_stale(layer.weight_t_bitmask)
    x1 = torch.randn(5, 24, device=device, requires_grad=True)
    x2 = x1.detach().clone().requires_grad_()
    layer(layer(x1).tanh()).sum().backward()
    twin(twin(x2).tanh()).sum().backward()
    torch.testing.assert_close(x1.grad, x2.grad)
    torch.testing.assert_close(layer.weight.grad, twin.weight.grad[twin.mask].view_as(layer.weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [0, 8])
@pytest.mark.parametrize("compiled", [False, True])
def test_relu_in_the_product_is_a_relu_after_it(dtype, rank, compiled, device):
    plain, fused = (
        slope.SLoPeLinear(64, 96, device=device, dtype=dtype, activation=activation)
        for activation in ("none", "relu")
    )
    for layer in (plain, fused):
        if rank:
            layer.add_adapter(rank)
            torch.nn.init.normal_(layer.lora_B, std=0.1)
    fused.load_state_dict(plain.state_dict())
    assert "activation='relu'" in repr(fused)
    xs = [torch.randn(5, 64, device=device, dtype=dtype).requires_grad_() for _ in range(2)]
    with torch.no_grad():
        xs[1].copy_(xs[0])
    module = torch.compile(fused, backend="aot_eager", fullgraph=True) if compiled else fused
    expected, found = torch.relu(plain(xs[0])), module(xs[1])
    assert torch.equal(found, expected)
    assert (found == 0).any()
    dy = torch.randn_like(expected)
    expected.backward(dy)
    found.backward(dy)
    assert torch.equal(xs[0].grad, xs[1].grad)
    for param, other in zip(plain.parameters(), fused.parameters(), strict=True):
        if compiled:  # products of other strides
            torch.testing.assert_close(param.grad, other.grad, rtol=0.02, atol=0.02)
        else:
            assert torch.equal(param.grad, other.grad)


def test_masks_change_while_other_threads_multiply(switching_often):
    layer, x = slope.SLoPeLinear(16, 16), torch.randn(2, 16)
    expected, errors = layer(x).detach(), []

    def work():
        try:
            with torch.no_grad():
                for _ in range(1000):
                    assert torch.equal(layer(x), expected)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        layer.update_transposed_mask()
    assert not errors
