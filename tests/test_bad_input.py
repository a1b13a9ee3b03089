# SPDX-License-Identifier: Apache-2.0
"""Bad input raises an error that names op and argument, on every device, and changes nothing."""

import pytest
import torch

import slope_ext as slope
from cases import Operands
from slope_ext._check import metadata_bytes

ops = torch.ops.slope
ROWS, COLUMNS, RANK = 16, 48, 4


def good(device):
    """Good arguments of every op, by name; a case spoils one of them."""
    o = Operands(ROWS, COLUMNS, torch.float32, device, rank=RANK)
    x, dy = o.randn(5, COLUMNS), o.randn(5, ROWS)
    weight = {"values": o.values, "bitmask": o.bitmask}
    copy = {"bitmask_t": o.bitmask_t, "values_t": o.values_t}
    zeros = torch.zeros_like(o.values)
    # On CUDA what is packed is what the sparse tensor cores take.
    packable = {**weight, "values": o.values.half() if device != "cpu" else o.values}
    metadata = torch.empty(
        metadata_bytes(ROWS, COLUMNS, torch.device(device)), dtype=torch.uint8, device=device
    )
    adamw = {
        "params": [o.values], "grads": [zeros + 1], "exp_avgs": [zeros.clone()],
        "exp_avg_sqs": [zeros.clone()], "masters": [], "steps": [torch.tensor(1.0)],
        "bitmasks": [o.bitmask], "bitmasks_t": [o.bitmask_t], "values_t": [o.values_t],
        "lr": 0.1, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1,
        **{name: torch.ones((), device=device) for name in ("grad_scale", "lr_tensor")},
        "found_inf": torch.zeros((), device=device),
    }  # fmt: skip
    return {
        "prune_24": {"scores": o.dense},
        "prune_transposed": weight,
        "prune_compress": {"dense": o.dense},
        "prune_compress_transposed": {"dense": o.dense},
        "double_prune_": {**weight, **copy},
        "compress": {"dense": o.dense, "bitmask": o.bitmask},
        "decompress": weight,
        "transpose_values": {**weight, "bitmask_t": o.bitmask_t, "out": o.values_t},
        "pack": packable,
        "pack_metadata": {"bitmask": o.bitmask, "metadata": metadata},
        "linear": {
            "x": x, **weight, "bias": o.bias, **copy, "metadata": metadata, "backend": "auto",
            "activation": "none",
        },
        "input_grad": {"dy": dy, **weight, **copy, "metadata_t": None, "backend": "auto"},
        "weight_grad": {"dy": dy, "x": x, "bitmask": o.bitmask},
        "weight_grad_add_": {
            "grad": torch.ones_like(o.values), "dy": dy, "x": x, "bitmask": o.bitmask,
        },
        "linear_lowrank": {
            "x": x, **weight, "lora_A": o.lora_A, "lora_B": o.lora_B, "bias": o.bias, **copy,
            "backend": "auto", "activation": "none",
        },
        "input_grad_lowrank": {
            "dy": dy, **weight, "bitmask_t": o.bitmask_t, "lora_A": o.lora_A, "lora_B": o.lora_B,
            "values_t": o.values_t, "metadata_t": None, "backend": "auto",
        },
        "adamw_": adamw,
    }  # fmt: skip


def wrong_bits(bitmask):
    bad = bitmask.clone()
    bad[0, 0] = 0b0111_0011
    return bad


def integer(tensor):
    return tensor.int()


def half(tensor):
    return tensor.half()


def first(change):
    return lambda tensors: [change(tensors[0])]


CASES = [
    ("prune_24", "scores", integer),
    ("prune_24", "scores", torch.flatten),
    ("prune_24", "scores", lambda t: t[:, :12]),
    ("prune_transposed", "values", integer),
    ("prune_transposed", "values", lambda t: t[None]),
    ("prune_transposed", "bitmask", lambda t: t[:, :2]),
    ("prune_transposed", "bitmask", lambda t: t.bool()),
    ("prune_compress", "dense", integer),
    ("prune_compress", "dense", torch.flatten),
    ("prune_compress", "dense", lambda t: t[:, :12]),
    ("prune_compress_transposed", "dense", integer),
    ("prune_compress_transposed", "dense", lambda t: t[0]),
    ("prune_compress_transposed", "dense", lambda t: t[:, :12]),
    ("prune_compress_transposed", "dense", lambda t: t[:12]),
    ("double_prune_", "values", integer),
    ("double_prune_", "values", torch.flatten),
    ("double_prune_", "bitmask", lambda t: t[1:]),
    ("double_prune_", "bitmask_t", lambda t: t.t()),
    ("double_prune_", "bitmask_t", lambda t: t.new_empty(2, 24).t()),
    ("double_prune_", "values_t", half),
    ("double_prune_", "values_t", lambda t: t[:, :4]),
    ("double_prune_", "values_t", lambda t: t.new_empty(8, 24).t()),
    ("compress", "dense", integer),
    ("compress", "dense", lambda t: t[0]),
    ("compress", "dense", lambda t: t[:, :20]),
    ("compress", "bitmask", integer),
    ("compress", "bitmask", lambda t: t[1:]),
    ("compress", "bitmask", lambda t: t.t()),
    ("compress", "bitmask", torch.flatten),
    ("decompress", "values", integer),
    ("decompress", "values", lambda t: t[:, :10]),
    ("decompress", "values", torch.flatten),
    ("decompress", "bitmask", lambda t: t[:, 1:]),
    ("decompress", "bitmask", lambda t: t.char()),
    ("transpose_values", "out", half),
    ("transpose_values", "out", lambda t: t[:, :4]),
    ("transpose_values", "out", lambda t: t.new_empty(8, 48).t()),
    ("transpose_values", "bitmask_t", lambda t: t.t()),
    ("transpose_values", "bitmask_t", half),
    ("pack", "values", integer),
    ("pack", "bitmask", lambda t: t[1:]),
    ("pack_metadata", "bitmask", torch.flatten),
    ("pack_metadata", "bitmask", integer),
    ("pack_metadata", "metadata", lambda t: t[1:]),
    ("pack_metadata", "metadata", integer),
    ("linear", "x", lambda t: t[:, :16]),
    ("linear", "x", half),
    ("linear", "x", lambda t: t[0, 0]),
    ("linear", "values", integer),
    ("linear", "bitmask", lambda t: t[1:]),
    ("linear", "bias", lambda t: t[1:]),
    ("linear", "bias", half),
    ("linear", "bias", lambda t: t[None]),
    ("linear", "bitmask_t", lambda t: t.t()),
    ("linear", "bitmask_t", lambda t: None),
    ("linear", "values_t", half),
    ("linear", "values_t", lambda t: t[1:]),
    ("linear", "values_t", lambda t: t.t().contiguous().t()),
    ("linear", "metadata", lambda t: t[:-1]),
    ("linear", "metadata", half),
    ("linear", "backend", lambda name: "fastest"),
    ("linear", "activation", lambda name: "gelu"),
    ("linear_lowrank", "activation", lambda name: "ReLU"),
    ("input_grad", "metadata_t", lambda t: torch.zeros(5)),
    ("input_grad", "backend", lambda name: ""),
    ("linear_lowrank", "backend", lambda name: "Auto"),
    ("input_grad", "dy", lambda t: t[:, :8]),
    ("input_grad", "dy", half),
    ("input_grad", "bitmask_t", lambda t: t[1:]),
    ("input_grad", "values_t", half),
    ("input_grad_lowrank", "dy", half),
    ("input_grad_lowrank", "bitmask_t", lambda t: t[1:]),
    ("input_grad_lowrank", "lora_A", lambda t: t[:, 1:]),
    ("input_grad_lowrank", "lora_B", lambda t: t[:, 1:]),
    ("input_grad_lowrank", "values_t", half),
    ("input_grad_lowrank", "metadata_t", lambda t: torch.zeros(5)),
    ("input_grad_lowrank", "backend", lambda name: ""),
    ("weight_grad_add_", "grad", half),
    ("weight_grad_add_", "grad", lambda t: t[1:]),
    ("weight_grad_add_", "grad", lambda t: t.t().contiguous().t()),
    ("weight_grad_add_", "dy", integer),
    ("weight_grad_add_", "x", lambda t: t[1:]),
    ("weight_grad", "dy", integer),
    ("weight_grad", "x", half),
    ("weight_grad", "x", lambda t: t[1:]),
    ("weight_grad", "x", lambda t: t[:, :12]),
    ("weight_grad", "bitmask", lambda t: t[1:]),
    ("linear_lowrank", "lora_A", lambda t: t[:, 1:]),
    ("linear_lowrank", "lora_A", half),
    ("linear_lowrank", "lora_B", lambda t: t[:, 1:]),
    ("linear_lowrank", "lora_B", torch.flatten),
    ("linear_lowrank", "x", half),
    ("linear_lowrank", "bias", lambda t: t[1:]),
    ("adamw_", "params", lambda t: []),
    ("adamw_", "params", first(integer)),
    ("adamw_", "grads", first(lambda t: t[1:])),
    ("adamw_", "grads", first(half)),
    ("adamw_", "grads", lambda t: []),
    ("adamw_", "exp_avgs", first(half)),
    ("adamw_", "exp_avg_sqs", first(torch.t)),
    ("adamw_", "masters", lambda t: [torch.zeros(3)]),
    ("adamw_", "steps", lambda t: [torch.zeros(3)]),
    ("adamw_", "bitmasks", lambda t: []),
    ("adamw_", "bitmasks", first(torch.t)),
    ("adamw_", "values_t", first(lambda t: t[1:])),
    ("adamw_", "beta1", lambda b: 1.0),
    ("adamw_", "grad_scale", half),
    ("adamw_", "lr_tensor", lambda t: torch.zeros(3, device=t.device)),
    ("adamw_", "found_inf", half),
    ("adamw_", "lr", lambda b: -1.0),
    ("adamw_", "eps", lambda b: -1.0),
]


def test_there_are_cases_for_every_op():
    assert len(CASES) >= 40
    assert {name for name, _, _ in CASES} == set(slope._library.OPS)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def test_names_op_and_argument(case, device):
    name, argument, spoil = case
    arguments = good(device)[name]
    getattr(ops, name)(**arguments)  # the good ones pass
    before = {key: snapshot(value) for key, value in arguments.items()}
    spoiled = {**arguments, argument: spoil(arguments[argument])}
    # An error in a pair of arguments may be told of either.
    partners = {"bitmask_t": "values_t|bitmask_t", "scores": "scores", "params": "params|exp_avgs"}
    named = partners.get(argument, argument)
    with pytest.raises(RuntimeError, match=rf"slope::{name}: .*({named})"):
        getattr(ops, name)(**spoiled)
    for key, value in arguments.items():
        assert same(snapshot(value), before[key]), f"{key} was modified"


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def test_fakes_check_too(case):
    """torch.compile meets the same error while it traces."""
    name, argument, spoil = case
    arguments = good("cpu")[name]
    spoiled = {**arguments, argument: spoil(arguments[argument])}
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, spoiled)
        with pytest.raises(RuntimeError, match=f"slope::{name}: "):
            getattr(ops, name)(**fakes)


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        ("compress", "bitmask"),
        ("decompress", "bitmask"),
        ("prune_transposed", "bitmask"),
        ("double_prune_", "bitmask"),
        ("pack", "bitmask"),
        ("linear", "bitmask"),
        ("input_grad", "bitmask"),
        ("input_grad_lowrank", "bitmask"),
        ("weight_grad", "bitmask"),
        ("transpose_values", "bitmask_t"),
    ],
)
def test_bits_that_are_no_mask(name, argument):
    """Read on the CPU only: on a GPU that would wait for the device."""
    arguments = good("cpu")[name]
    arguments = {**arguments, argument: wrong_bits(arguments[argument])}
    with pytest.raises(
        RuntimeError, match=rf"slope::{name}: {argument} must have exactly two bits"
    ):
        getattr(ops, name)(**arguments)


def test_x_that_requires_grad_needs_bitmask_t(device):
    arguments = good(device)["linear"] | {"bitmask_t": None, "values_t": None}
    arguments["x"].requires_grad_()
    with pytest.raises(RuntimeError, match="slope::linear: bitmask_t must be given"):
        ops.linear(**arguments)


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "argument"), sorted({case[:2] for case in CASES}))
def test_operands_on_two_devices(name, argument):
    arguments = good("cuda")[name]
    value = arguments[argument]
    if isinstance(value, list) and value and argument != "steps":
        with pytest.raises(RuntimeError, match=rf"slope::{name}: .*device"):
            getattr(ops, name)(**{**arguments, argument: [value[0].cpu()]})
        return
    if not isinstance(value, torch.Tensor):
        pytest.skip("no tensor")
    if len([v for v in arguments.values() if isinstance(v, torch.Tensor)]) == 1:
        pytest.skip("one tensor only")
    with pytest.raises(RuntimeError, match=rf"slope::{name}: .*device"):
        getattr(ops, name)(**{**arguments, argument: value.cpu()})


@pytest.mark.gpu
@pytest.mark.parametrize(
    "name", sorted(set(slope._library.CUDA_KERNELS) - {"pack_metadata", "adamw_"})
)
def test_float64_has_no_cuda_kernel(name):
    arguments = good("cuda")[name]
    key = next(key for key in ("scores", "dense", "values", "dy") if key in arguments)
    with pytest.raises(RuntimeError, match=rf"slope::{name}: {key} must be float16"):
        getattr(ops, name)(**{**arguments, key: arguments[key].double()})


def test_swiglu_needs_whole_turns(device):
    weight = slope.SLoPeLinear(16, 24, bias=False, device=device)
    operand = (weight.weight.detach(), weight.weight_bitmask)
    x, factors = torch.ones(3, 16, device=device), torch.ones(24, 2, device=device)
    message = "values must have out a multiple of 16 for activation swiglu, got out = 24"
    with pytest.raises(RuntimeError, match=f"slope::linear: {message}"):
        ops.linear(x, *operand, activation="swiglu")
    with pytest.raises(RuntimeError, match=f"slope::linear_lowrank: {message}"):
        ops.linear_lowrank(x, *operand, factors[:16].t(), factors, activation="swiglu")


# ---- Python API ----------------------------------------------------------------------------------

MODEL = torch.nn.Sequential(torch.nn.Linear(16, 16))
API_CASES = [
    (lambda: slope.SLoPeLinear(12, 16), "SLoPeLinear: in_features must be a multiple of 8"),
    (lambda: slope.SLoPeLinear(16.0, 16), "SLoPeLinear: in_features must be a multiple of 8"),
    (lambda: slope.SLoPeLinear(16, 16, dtype=torch.int32), "SLoPeLinear: dtype must be float16"),
    (lambda: slope.SLoPeLinear(16, 0), "SLoPeLinear: out_features"),
    (lambda: slope.SLoPeLinear(16, 16, backward_copy="no"), "SLoPeLinear: backward_copy"),
    (lambda: slope.SLoPeLinear(16, 24, activation="swiglu"), "SLoPeLinear: out_features"),
    (lambda: slope.SlopeConfig(fuse="relu"), "SlopeConfig: fuse must be a collection"),
    (lambda: slope.SlopeConfig(fuse=None), "SlopeConfig: fuse must be a collection"),
    (lambda: slope.SlopeConfig(fuse=[["relu"]]), "SlopeConfig: fuse must be a collection"),
    (lambda: slope.SlopeConfig(fuse=iter(["relu"])), "SlopeConfig: fuse must be a collection"),
    (lambda: slope.SlopeConfig(fuse=["gelu"]), "SlopeConfig: fuse must be a collection"),
    (lambda: slope.SlopeConfig(mask="best"), "SlopeConfig: mask"),
    (lambda: slope.SlopeConfig(backward_copy="no"), "SlopeConfig: backward_copy"),
    (lambda: slope.SlopeConfig(pattern="4:2"), "SlopeConfig: pattern"),
    (lambda: slope.SlopeConfig(pattern="two of four"), "SlopeConfig: pattern"),
    (lambda: slope.SlopeConfig(pattern=(2, 4)), "SlopeConfig: pattern"),
    (lambda: slope.SlopeConfig(target_modules=None), "SlopeConfig: target_modules"),
    (lambda: slope.SlopeConfig(target_modules="("), "SlopeConfig: target_modules is no regular"),
    (lambda: slope.SlopeConfig(exclude_modules=[1]), "SlopeConfig: exclude_modules"),
    (lambda: slope.SlopeConfig(masks=None), "SlopeConfig: masks must be a Mapping"),
    (lambda: slope.SlopeConfig(scores=[]), "SlopeConfig: scores must be a Mapping"),
    (lambda: slope.SlopeConfig(seed="a"), "SlopeConfig: seed must be a"),
    (lambda: slope.MaskedLinear(12, 16, pattern="2:8"), "MaskedLinear: in_features"),
    (lambda: slope.optim.AdamW(MODEL.parameters(), lr=-1.0), "AdamW: lr"),
    (lambda: slope.optim.AdamW(MODEL.parameters(), eps=-1.0), "AdamW: eps"),
    (lambda: slope.optim.AdamW(MODEL.parameters(), betas=(1.0, 0.9)), "AdamW: betas"),
    (lambda: slope.optim.AdamW(MODEL.parameters(), weight_decay=-1), "AdamW: weight_decay"),
    (lambda: slope.optim.AdamW(MODEL.parameters(), mask_interval=-1), "AdamW: mask_interval"),
    (
        lambda: slope.LazyAdapters(
            MODEL, torch.optim.SGD(MODEL.parameters()), rank=2, total_steps=9
        ),
        "LazyAdapters: model has no sparse layer",
    ),
    (lambda: slope.LazyAdapters(None, None, rank=0, total_steps=9), "LazyAdapters: rank"),
    (lambda: slope.LazyAdapters(None, None, rank=1, total_steps=0), "LazyAdapters: total_steps"),
    (
        lambda: slope.LazyAdapters(None, None, rank=1, total_steps=9, fraction=2.0),
        "LazyAdapters: fraction",
    ),
    (lambda: slope.SLoPeLinear(16, 16).add_adapter(0), "add_adapter: rank"),
]


@pytest.mark.parametrize(("call", "message"), API_CASES, ids=[m for _, m in API_CASES])
def test_python_api_names_class_and_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def snapshot(value):
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    return [snapshot(item) for item in value] if isinstance(value, list) else value


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a.nan_to_num(7), b.nan_to_num(7))
    return all(map(same, a, b)) if isinstance(a, list) else a == b
