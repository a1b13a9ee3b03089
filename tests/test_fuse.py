# SPDX-License-Identifier: Apache-2.0
"""SlopeConfig.fuse: what the products of a model do beside multiplying, and its way back."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import slope_ext as slope
from cases import Calls
from slope_ext.fuse import SwiGLUMLP

# ---- relu ----------------------------------------------------------------------------------------


class OptLike(nn.Module):
    """What follows attention in Hugging Face's OPTDecoderLayer."""

    __module__ = "transformers.models.opt.modeling_opt"

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(16, 32), nn.Linear(32, 16)
        self.activation_fn = nn.ReLU()

    def forward(self, x):
        return self.fc2(self.activation_fn(self.fc1(x)))


def test_fused_relus_come_back():
    """Where one follows a layer at once, and both are used there alone."""
    shared = nn.Linear(16, 16)
    relu = nn.ReLU()
    model = nn.Sequential(
        nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.GELU(), OptLike(),
        nn.Sequential(shared, nn.ReLU(), shared), nn.Linear(16, 16), relu, nn.Linear(16, 16), relu,
    )  # fmt: skip
    twin = slope.convert(copy.deepcopy(model))
    slope.convert(model, slope.SlopeConfig(fuse=["relu"]))
    fused = [n for n, m in model.named_modules() if getattr(m, "activation", "none") == "relu"]
    assert fused == ["0", "4.fc1"]
    x = torch.randn(7, 16)
    assert torch.equal(model(x), twin(x))
    assert model.state_dict().keys() == twin.state_dict().keys()
    slope.to_dense(model)
    assert sum(isinstance(m, nn.ReLU) for m in model.modules()) == 4
    torch.testing.assert_close(model(x), twin(x))


class Sum(nn.Sequential):
    def forward(self, x):
        return self[0](x) + self[1](x)


def test_relus_that_follow_nothing_stay():
    """Another order, another module of OPT's names, an activation that is there."""
    gated = slope.SLoPeLinear(32, 32, activation="swiglu")
    other = OptLike()
    other.__class__ = type("Other", (OptLike,), {"__module__": "mine"})
    model = nn.Sequential(Sum(nn.Linear(16, 16), nn.ReLU()), other, nn.Linear(16, 32), gated)
    model.append(nn.ReLU())
    slope.convert(model, slope.SlopeConfig(fuse=["relu"]))
    assert sum(isinstance(m, nn.ReLU) for m in model.modules()) == 3
    assert gated.activation == "swiglu"


def test_relus_keep_hooks_and_mode():
    seen = []
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(inplace=True)).eval()
    model[1].register_forward_hook(lambda *_: seen.append("before"))
    slope.convert(model, slope.SlopeConfig(fuse=["relu"]))
    assert not model[1].training
    model[1].register_forward_hook(lambda *_: seen.append("after"))
    model[0] = nn.Sequential(model[0])  # something that wraps the layer
    model(torch.ones(2, 16))
    slope.to_dense(model.train())
    assert isinstance(model[1], nn.ReLU)
    assert model[1].training
    assert model[1].inplace
    model(torch.ones(2, 16))
    assert seen == ["before", "after"] * 2


@pytest.mark.gpu
def test_fused_relu_needs_no_more_memory():
    """The gradient of the ReLU's result is gone when those of the product are made."""
    peaks = []
    for fuse in ([], ["relu"]):
        layers = nn.Linear(256, 2048), nn.ReLU(), nn.Linear(2048, 256)
        model = nn.Sequential(*layers).bfloat16().cuda()
        slope.convert(model, slope.SlopeConfig(fuse=fuse))
        x = torch.randn(8192, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for _ in range(2):
            y = model(x)
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            y.backward(y.detach())
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] <= 1.05 * peaks[0]


# ---- swiglu --------------------------------------------------------------------------------------


def llama(device="cpu", dtype=torch.float32, bias=False, **options):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 16}
    config = transformers.LlamaConfig(vocab_size=64, mlp_bias=bias, **sizes, **heads, **options)
    config.initializer_range = 0.3  # so that what is mixed up shows
    with torch.device(device):
        return transformers.LlamaModel(config).to(dtype)


def twins(device, dtype=torch.float32, **options):
    """A converted model, and the same with SwiGLU fused."""
    model = slope.convert(llama(device, dtype, **options))
    fused = slope.convert(llama(device, dtype, **options), slope.SlopeConfig(fuse=["swiglu"]))
    reference = copy.deepcopy(model)
    slope.fuse.fuse_swiglus(reference)
    fused.load_state_dict(reference.state_dict())
    return model, fused


def test_a_fused_model_may_be_converted_again_by_the_same_targets():
    config = slope.SlopeConfig(
        fuse=["swiglu"], target_modules=["gate_proj", "up_proj", "down_proj"]
    )
    model = slope.convert(llama(), config)
    before = list(model.modules())
    assert list(slope.convert(model, config).modules()) == before


def close(found, expected):
    tolerance = 1e-5 if found.dtype == torch.float32 else 0.04
    size = float(expected.detach().abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * size)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_mlp_gives_the_same_result_and_gradients(dtype, bias, device):
    model, fused = twins(device, dtype, bias=bias)
    mlps = [module for module in fused.modules() if isinstance(module, SwiGLUMLP)]
    assert len(mlps) == 2
    assert mlps[0].gate_up_proj.weight.shape == (96, 16)
    tokens = torch.randint(64, (2, 8), device=device)
    with torch.no_grad(), Calls() as calls:
        inferred = fused(tokens).last_hidden_state
    assert calls.names.count("linear") == 2 * (4 + 2)  # attention, gate_up, down
    close(inferred, model(tokens).last_hidden_state)
    trained, expected = fused(tokens).last_hidden_state, model(tokens).last_hidden_state
    close(trained, expected)
    dy = torch.randn_like(expected)
    trained.backward(dy)
    expected.backward(dy)
    for mlp, plain in zip(mlps, (layer.mlp for layer in model.layers), strict=True):
        turns = mlp.gate_up_proj.weight.grad.unflatten(0, (-1, 2, 8))
        for index, name in enumerate(("gate_proj", "up_proj")):
            gradient = getattr(plain, name).weight.grad
            close(turns[:, index].flatten(0, 1), gradient)
        close(mlp.down_proj.weight.grad, plain.down_proj.weight.grad)


def test_fused_mlps_come_apart(device):
    """In their class, with adapters, mode, requires_grad and frozen biases as they were."""
    model, fused = twins(device, bias=True)
    for module in fused.modules():
        if isinstance(module, SwiGLUMLP):
            module.gate_up_proj.add_adapter(4, scale=0.5)
            nn.init.normal_(module.gate_up_proj.lora_B)
            module.gate_up_proj.bias.requires_grad_(False)
    fused = pickle.loads(pickle.dumps(copy.deepcopy(fused))).eval()
    tokens = torch.randint(64, (2, 8), device=device)
    expected = fused(tokens).last_hidden_state
    assert "layers.0.mlp.gate_up_proj.weight" in fused.state_dict()
    slope.fuse.unfuse(fused)
    assert type(fused.layers[1].mlp) is type(model.layers[1].mlp)
    assert not fused.layers[1].mlp.gate_proj.bias.requires_grad
    assert not fused.layers[1].mlp.training
    assert {k for k in fused.state_dict() if "lora" not in k} == model.state_dict().keys()
    close(fused(tokens).last_hidden_state, expected)
    slope.to_dense(fused)
    assert not any(isinstance(module, slope.SLoPeLinear) for module in fused.modules())
    close(fused(tokens).last_hidden_state, expected)


def test_to_dense_of_a_fused_model(device):
    model, fused = twins(device)
    ignored = "_ddp_params_and_buffers_to_ignore"
    assert "layers.0.mlp.gate_up_proj.weight_t" in getattr(fused, ignored)
    assert "layers.0.mlp.gate_proj.weight_t" not in getattr(fused, ignored)
    slope.to_dense(fused)
    slope.to_dense(model)
    assert not hasattr(fused, ignored)
    for (name, found), (other, expected) in zip(
        fused.state_dict().items(), model.state_dict().items(), strict=True
    ):
        assert name == other
        assert torch.equal(found, expected)


def test_modes_hooks_and_frozen_adapters_are_kept(device):
    model = slope.convert(llama(device).eval(), slope.SlopeConfig(fuse=["swiglu"]))
    mlp = model.layers[0].mlp
    assert not any(module.training for module in model.modules())
    seen = []
    handle = mlp.register_forward_hook(lambda *_: seen.append(1))
    mlp.gate_up_proj.add_adapter(2)
    mlp.gate_up_proj.lora_A.requires_grad_(False)
    state = torch.get_rng_state()
    alone = copy.deepcopy(mlp)
    slope.fuse.unfuse(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module.training for module in model.modules())
    assert not model.layers[0].mlp.up_proj.lora_A.requires_grad
    assert model.layers[0].mlp.up_proj.lora_B.requires_grad
    x = torch.randn(3, 32, device=device)
    expected = alone(x)
    seen.clear()
    close(model.layers[0].mlp(x), expected)
    assert seen == [1]
    handle.remove()
    alone.train()
    dense = slope.to_dense(alone)  # itself, not a child of something
    assert type(dense) is type(model.layers[0].mlp)
    assert all(module.training for module in dense.modules())
    close(dense(x), expected)


@pytest.mark.parametrize("activation", ["relu", "swiglu"])
def test_to_dense_refuses_activations_that_no_module_has(activation):
    model = nn.Sequential(nn.ReLU(), slope.SLoPeLinear(32, 32, activation=activation))
    with pytest.raises(ValueError, match=f"to_dense: 1 applies '{activation}', which a dense"):
        slope.to_dense(model)
    assert isinstance(model[1], slope.SLoPeLinear)


def test_swiglu_under_vmap(device):
    layer = slope.SLoPeLinear(64, 96, device=device, activation="swiglu").requires_grad_(False)
    x = torch.randn(3, 5, 64, device=device)
    found, expected = x.clone().requires_grad_(), x.clone().requires_grad_()
    torch.vmap(layer)(found).sum().backward()
    layer(expected).sum().backward()
    close(found.grad, expected.grad)


@pytest.mark.parametrize("trained", [False, True])
def test_compiled_fused_mlp(trained, device):
    _, fused = twins(device)
    mlp = fused.layers[0].mlp
    x = torch.randn(5, 32, device=device)
    compiled = torch.compile(mlp, backend="aot_eager", fullgraph=True)
    with torch.set_grad_enabled(trained):
        close(compiled(x), mlp(x))


def test_what_is_not_alone_stays():
    """Hooks, ties, adapters, another activation, another module of the same children."""

    def converted(change, **options):
        model = slope.convert(llama(**options))
        change(model.layers[0].mlp, model.layers[1].mlp)
        slope.fuse.fuse_swiglus(model)
        return [isinstance(layer.mlp, SwiGLUMLP) for layer in model.layers]

    def tie(mlp, other):
        mlp.gate_proj.weight = other.up_proj.weight

    def share(mlp, other):
        mlp.gate_proj = other.gate_proj

    class Scaled(type(llama().layers[0].mlp)):
        def forward(self, x):
            down_proj = 2 * self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
            return down_proj

    def scaled(mlp, _):
        mlp.__class__ = Scaled

    def own_forward(mlp, _):
        mlp.forward = lambda x: x

    def freeze(mlp, _):
        mlp.up_proj.bias.requires_grad_(False)

    def share_bias(mlp, _):
        mlp.up_proj.bias = mlp.gate_proj.bias

    assert converted(lambda *_: None) == [True, True]
    assert converted(lambda mlp, _: mlp.up_proj.register_forward_hook(print)) == [False, True]
    assert converted(lambda mlp, _: mlp.gate_proj.add_adapter(2)) == [False, True]
    assert converted(tie) == [False, False]
    assert converted(share) == [False, False]
    assert converted(scaled) == [False, True]
    assert converted(own_forward) == [False, True]
    assert converted(freeze, bias=True) == [False, True]
    assert converted(share_bias, bias=True) == [False, True]
    assert converted(lambda mlp, _: mlp.act_fn.register_forward_hook(print)) == [False, True]
    assert converted(lambda *_: None, hidden_act="gelu") == [False, False]


def test_fused_on_meta_then_loaded(device):
    model, fused = twins("cpu")
    with torch.device("meta"):
        empty = slope.convert(llama("meta"), slope.SlopeConfig(fuse=["swiglu"]))
    empty.to_empty(device=device)
    empty.load_state_dict(fused.state_dict())
    empty.rotary_emb = copy.deepcopy(model.rotary_emb).to(device)
    tokens = torch.randint(64, (1, 8))
    close(empty(tokens.to(device)).last_hidden_state.cpu(), fused(tokens).last_hidden_state)


@pytest.mark.parametrize(
    ("dtype", "backend"),
    [
        (torch.float32, "auto"),
        (torch.bfloat16, "auto"),
        (torch.float16, "auto"),
        pytest.param(torch.bfloat16, "cusparselt", marks=pytest.mark.gpu),
        (torch.bfloat16, "reference"),
    ],
)
@pytest.mark.parametrize("rank", [0, 8])
def test_swiglu_layer(dtype, backend, rank, device):
    """In the product where nobody wants a gradient, after it else."""
    if backend == "cusparselt" and device.type == "cpu":
        pytest.skip("for GPUs")
    options = {"device": device, "dtype": dtype, "backend": backend}
    layer = slope.SLoPeLinear(64, 96, activation="swiglu", **options)
    plain = slope.SLoPeLinear(64, 96, **options)
    for module in (layer, plain):
        if rank:
            module.add_adapter(rank)
            nn.init.normal_(module.lora_B, std=0.1)
    plain.load_state_dict(layer.state_dict())
    x = 4 * torch.randn(3, 5, 64, device=device, dtype=dtype)
    gate, up = plain(x).double().unflatten(-1, (-1, 2, 8)).unbind(-2)
    expected = (F.silu(gate) * up).flatten(-2)
    with torch.no_grad():
        fused = layer(x)
    trained = layer(x)
    assert fused.shape == trained.shape == (3, 5, 48)
    assert trained.requires_grad
    tolerance = 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    for found in (fused, trained):
        torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


def test_swiglu_has_no_gradient_as_an_op(device):
    layer = slope.SLoPeLinear(64, 96, device=device, activation="swiglu")
    layer.add_adapter(4)
    weight, bitmask, *rest = layer.operand()
    x = torch.randn(5, 64, device=device)
    with pytest.raises(RuntimeError, match=r"slope::linear: activation must not be swiglu"):
        torch.ops.slope.linear(x, weight, bitmask, *rest)
    adapter = (layer.lora_A, layer.lora_B, 1.0)
    with pytest.raises(RuntimeError, match=r"slope::linear_lowrank: activation must not be"):
        torch.ops.slope.linear_lowrank(x, weight, bitmask, *adapter, *rest)
