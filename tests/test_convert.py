# SPDX-License-Identifier: Apache-2.0
import copy
import functools
import io
import pickle
import types
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

import oracle
import slope_ext as slope


class Block(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.q_proj = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width, bias=False), nn.GELU())
        self.out = nn.Linear(2 * width, width)

    def forward(self, x):
        return self.out(self.mlp(self.q_proj(x)))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(32, 16)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.lm_head = nn.Linear(16, 32, bias=False)

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.lm_head(x)


def sparse_names(model):
    return [n for n, m in model.named_modules() if isinstance(m, slope.SLoPeLinear)]


def quietly(model, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", slope.SlopeConversionWarning)
        return slope.convert(model, *args, **kwargs)


ALL = [f"blocks.{i}.{name}" for i in (0, 1) for name in ("q_proj", "mlp.0", "out")]


# ---- what is converted ---------------------------------------------------------------------------


def test_converts_in_place_and_warns_once():
    model = Model()
    with pytest.warns(slope.SlopeConversionWarning) as caught:
        assert slope.convert(model) is model
    assert len(caught) == 1
    assert "lm_head: output head" in str(caught[0].message)
    assert sparse_names(model) == ALL
    assert type(model.lm_head) is nn.Linear


def test_output_is_that_of_the_magnitude_pruned_model():
    model = Model()
    pruned = copy.deepcopy(model)
    for name in ALL:
        weight = pruned.get_submodule(name).weight
        weight.data.mul_(oracle.keep_two_of_four(weight.abs()))
    quietly(model)
    tokens = torch.randint(32, (2, 5))
    torch.testing.assert_close(model(tokens), pruned(tokens))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"target_modules": ["q_proj"]}, ["blocks.0.q_proj", "blocks.1.q_proj"]),
        ({"target_modules": ["blocks.1.out"]}, ["blocks.1.out"]),
        ({"target_modules": r"blocks\.0\..*"}, ALL[:3]),
        ({"exclude_modules": ["mlp.0", "q_proj"]}, ["blocks.0.out", "blocks.1.out"]),
        ({"exclude_modules": r".*\.out"}, [n for n in ALL if not n.endswith("out")]),
        ({"target_modules": ["lm_head"]}, ["lm_head"]),  # named exactly: a head too
    ],
)
def test_targets(config, expected):
    model = Model()
    quietly(model, slope.SlopeConfig(**config))
    assert sparse_names(model) == expected


@pytest.mark.parametrize(
    "targets", [["q_proj", "q_prj"], ["blocks"], r"blocks\.9\..*", ["embedding"]]
)
def test_a_target_that_matches_no_linear_layer_raises(targets):
    model = Model()
    with pytest.raises(ValueError, match="target_modules matches no linear layer with"):
        slope.convert(model, slope.SlopeConfig(target_modules=targets))
    assert sparse_names(model) == []


def test_an_exclusion_that_matches_no_linear_layer_warns():
    model = Model()
    config = slope.SlopeConfig(target_modules=["q_proj"], exclude_modules=["lm_head", "k_prj"])
    with pytest.warns(slope.SlopeConversionWarning, match="no linear layer with 'k_prj'$"):
        slope.convert(model, config)
    assert sparse_names(model) == ["blocks.0.q_proj", "blocks.1.q_proj"]


def test_no_target_at_all_is_refused():
    with pytest.raises(ValueError, match="target_modules must not be empty"):
        slope.SlopeConfig(target_modules=[])


def test_targets_of_a_model_that_was_converted_still_match():
    model, config = Model(), slope.SlopeConfig(target_modules=["q_proj", "blocks.0.out"])
    quietly(model, config)
    names = sparse_names(model)
    slope.convert(model, config)
    assert sparse_names(model) == names


@pytest.mark.parametrize(
    "left",
    [
        {"config": slope.SlopeConfig(exclude_modules=["b"])},
        {"filter_fn": lambda module, name: name != "b"},
    ],
    ids=["exclude_modules", "filter_fn"],
)
def test_a_layer_of_several_names_is_left_out_by_one(left):
    shared = nn.Linear(16, 16)
    model = slope.convert(nn.ModuleDict({"a": shared, "b": shared, "c": nn.Linear(16, 16)}), **left)
    assert model["a"] is model["b"] is shared
    assert sparse_names(model) == ["c"]


def test_a_replaced_forward_is_not_carried_over():
    """What accelerate's hooks leave on a module is bound to that module and its weight."""

    def replace_forward(layer):
        layer.forward = functools.partial(type(layer).forward, layer)

    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    replace_forward(model[0])
    with pytest.warns(slope.SlopeConversionWarning, match="0: its forward was replaced"):
        slope.convert(model)
    assert sparse_names(model) == ["1"]
    replace_forward(model[1])
    with pytest.raises(ValueError, match="to_dense: 1 has a forward that was replaced"):
        slope.to_dense(model)
    assert sparse_names(model) == ["1"]

    for layer in model:  # what is left where a hook was taken away
        layer.forward = types.MethodType(type(layer).forward, layer)
    slope.convert(model)
    assert sparse_names(model) == ["0", "1"]
    for layer in slope.to_dense(model):
        assert type(layer) is nn.Linear
        assert "forward" not in vars(layer)


def test_a_wrapped_model_is_refused():
    wrapped = object.__new__(nn.parallel.DistributedDataParallel)  # without a process group
    nn.Module.__init__(wrapped)
    wrapped.module = nn.Linear(16, 16)
    for model in (wrapped, nn.Sequential(wrapped)):
        with pytest.raises(ValueError, match="must not be wrapped by DistributedDataParallel"):
            slope.convert(model)


def test_experts_in_one_parameter_are_named():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.up_proj = nn.Parameter(torch.zeros(4, 16, 32))
            self.router = nn.Linear(16, 8)
            self.position = nn.Parameter(torch.zeros(1, 16, 16))
            self.table = nn.Parameter(torch.zeros(4, 9, 9))

    class CausalConv1d(nn.Conv1d):
        pass

    model = nn.ModuleDict({"mlp": Experts(), "convolution": CausalConv1d(16, 16, 8)})
    with pytest.warns(slope.SlopeConversionWarning) as caught:
        slope.convert(model, slope.SlopeConfig(strict=True))
    (warning,) = caught
    assert str(warning.message).endswith("of experts it seems, stay dense: mlp.up_proj")
    assert sparse_names(model) == ["mlp.router"]


def test_a_pattern_is_what_it_says_not_how_it_is_written():
    layer = slope.convert(nn.Linear(16, 16), slope.SlopeConfig(pattern="02:4"))
    assert type(layer) is slope.SLoPeLinear
    with pytest.raises(TypeError, match="convert: config must be a SlopeConfig, got '2:4'"):
        slope.convert(nn.Linear(16, 16), "2:4")


def test_filter_fn_and_idempotence():
    model = Model()
    quietly(model, filter_fn=lambda module, name: "q_proj" not in name)
    assert sparse_names(model) == [n for n in ALL if "q_proj" not in n]
    layers = [model.get_submodule(n) for n in sparse_names(model)]
    quietly(model)
    assert sparse_names(model) == ALL
    assert all(model.get_submodule(n) in layers for n in ALL if "q_proj" not in n)


def test_skips_with_reasons_and_strict_raises():
    class Odd(nn.Linear):
        pass

    model = nn.ModuleDict(
        {
            "odd_shape": nn.Linear(12, 16),
            "subclass": Odd(16, 16),
            "attention": nn.MultiheadAttention(16, 2),
            "normed": torch.nn.utils.parametrizations.weight_norm(nn.Linear(16, 16)),
            "old_normed": torch.nn.utils.weight_norm(nn.Linear(16, 16)),
            "pruned": prune.identity(nn.Linear(16, 16), "weight"),
            "empty": nn.Linear(16, 0),
            "float8": nn.Linear(16, 16).to(torch.float8_e4m3fn),
            "encoder": nn.TransformerEncoderLayer(16, 2, 32),
            "good": nn.Linear(16, 16),
        }
    )
    with pytest.warns(slope.SlopeConversionWarning) as caught:
        slope.convert(model)
    message = str(caught[0].message)
    assert "odd_shape: out x in = 16 x 12, both must be multiples of 8" in message
    assert "subclass: Odd is a subclass" in message
    assert "attention.out_proj: NonDynamicallyQuantizableLinear is a subclass" in message
    assert "  normed: ParametrizedLinear is a subclass" in message
    for name in ("old_normed", "pruned"):
        assert f"{name}: its weight is computed from other parameters" in message
    assert "empty: out x in = 0 x 16" in message
    assert "float8: weight has dtype float8_e4m3fn" in message
    assert "encoder.linear1: nn.TransformerEncoderLayer reads its weight by itself" in message
    assert sparse_names(model) == ["good"]
    model["encoder"].eval()(torch.randn(3, 1, 16))

    model = nn.ModuleDict({"a": nn.Linear(16, 16), "b": nn.Linear(12, 16)})
    with pytest.raises(ValueError, match=r"strict[\s\S]*b: out x in"):
        slope.convert(model, slope.SlopeConfig(strict=True))
    assert sparse_names(model) == []


def test_root_module():
    linear = nn.Linear(16, 24)
    sparse = slope.convert(linear)
    assert isinstance(sparse, slope.SLoPeLinear)
    dense = slope.to_dense(sparse)
    assert type(dense) is nn.Linear


# ---- what is kept --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_keeps_dtype_device_mode_and_requires_grad(dtype, device):
    linear = nn.Linear(16, 24, device=device, dtype=dtype)
    linear.weight.requires_grad_(False)
    bias = linear.bias
    model = nn.Sequential(linear).eval()
    slope.convert(model)
    layer = model[0]
    assert layer.weight.dtype == dtype
    assert layer.weight.device.type == device.type
    assert layer.weight_bitmask.device.type == device.type
    assert not layer.weight.requires_grad
    assert layer.bias is bias
    assert not layer.training


def test_keeps_hooks_and_their_handles():
    model = nn.Sequential(nn.Linear(16, 16))
    calls = []
    handles = [
        model[0].register_forward_hook(lambda *a: calls.append("forward")),
        model[0].register_forward_pre_hook(lambda *a: calls.append("pre")),
        model[0].register_full_backward_hook(lambda *a: calls.append("backward")),
    ]
    model[0].note = "kept"
    slope.convert(model)
    x = torch.randn(2, 16, requires_grad=True)
    model(x).sum().backward()
    assert calls == ["pre", "forward", "backward"]
    assert model[0].note == "kept"
    for handle in handles:
        handle.remove()
    slope.to_dense(model)
    model(x).sum().backward()
    assert len(calls) == 3


def test_shared_modules_and_weights_stay_shared():
    shared = nn.Linear(16, 16)
    model = nn.ModuleDict({"a": shared, "b": shared, "c": nn.Linear(16, 16)})
    model["c"].weight = shared.weight
    slope.convert(model)
    assert model["a"] is model["b"]
    assert model["c"] is not model["a"]
    assert model["c"].weight is model["a"].weight
    assert model["c"].weight_bitmask is model["a"].weight_bitmask

    optimizer = slope.optim.AdamW(model.parameters(), lr=0.1, mask_interval=2)
    for _ in range(3):
        optimizer.zero_grad()
        x = torch.randn(4, 16, requires_grad=True)
        (model["a"](x) + model["c"](x)).sum().backward()
        weights = model["a"].backward_weight() + model["c"].backward_weight()
        torch.testing.assert_close(x.grad, torch.ones(4, 16) @ weights)
        optimizer.step()
    slope.to_dense(model)
    assert model["c"].weight is model["a"].weight


def test_weight_tied_to_a_layer_that_stays_dense_stays_tied():
    model = nn.ModuleDict({"a": nn.Linear(16, 16), "b": nn.Linear(16, 16), "c": nn.Linear(16, 16)})
    model["b"].weight = model["a"].weight
    with pytest.warns(slope.SlopeConversionWarning, match="a: weight is tied to b, which stays"):
        slope.convert(model, slope.SlopeConfig(exclude_modules=["b"]))
    assert model["a"].weight is model["b"].weight
    assert sparse_names(model) == ["c"]


def test_weight_that_a_conv1d_reads_transposed_stays_dense():
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    model = nn.ModuleDict({"a": nn.Linear(16, 16), "b": pytorch_utils.Conv1D(16, 16)})
    model["b"].weight = model["a"].weight
    with pytest.warns(slope.SlopeConversionWarning, match="which reads it transposed"):
        slope.convert(model)
    assert sparse_names(model) == []


def test_to_dense_of_tied_layers_of_which_one_has_an_adapter():
    model = nn.ModuleDict({"a": nn.Linear(16, 16), "b": nn.Linear(16, 16)})
    model["b"].weight = model["a"].weight
    slope.convert(model)
    model["a"].add_adapter(2)
    nn.init.normal_(model["a"].lora_B)
    x = torch.randn(3, 16)
    expected = [layer(x) for layer in model.values()]
    slope.to_dense(model)
    for layer, y in zip(model.values(), expected, strict=True):
        torch.testing.assert_close(layer(x), y)
    assert not hasattr(model["a"], "backward_copy")


def test_to_dense_of_layers_that_share_a_weight_but_not_a_mask():
    a = slope.SLoPeLinear(16, 16)
    other = slope.ops.prune_24(torch.rand(16, 16))
    b = slope.SLoPeLinear.from_compressed(a.weight.detach(), other)
    b.weight = a.weight
    model = nn.ModuleDict({"a": a, "b": b})
    x = torch.randn(3, 16)
    expected = [layer(x) for layer in model.values()]
    slope.to_dense(model)
    for layer, y in zip(model.values(), expected, strict=True):
        torch.testing.assert_close(layer(x), y)


def test_to_dense_ties_layers_whose_masks_are_equal():
    a = slope.SLoPeLinear(16, 16)
    b = slope.SLoPeLinear.from_compressed(a.weight.detach(), a.weight_bitmask.clone())
    b.weight = a.weight
    model = slope.to_dense(nn.ModuleDict({"a": a, "b": b}))
    assert model["a"].weight is model["b"].weight


def test_keeps_attributes_of_parameters():
    linear = nn.Linear(16, 16)
    linear.weight._no_weight_decay = True
    sparse = slope.convert(linear)
    assert sparse.weight._no_weight_decay
    assert slope.to_dense(sparse).weight._no_weight_decay


def test_head_tied_to_the_embedding_stays_dense_and_tied():
    model = Model()
    model.projection = nn.Linear(16, 32, bias=False)
    model.projection.weight = model.embed.weight
    with pytest.warns(
        slope.SlopeConversionWarning, match=r"projection: weight is tied to embed \(Embedding\)"
    ):
        slope.convert(model)
    assert model.projection.weight is model.embed.weight


def test_meta_model_then_load():
    source = quietly(Model())
    with torch.device("meta"):
        model = Model()
    quietly(model)
    assert all(p.is_meta for p in model.parameters())
    model.to_empty(device="cpu").load_state_dict(source.state_dict())
    tokens = torch.randint(32, (2, 5))
    assert torch.equal(model(tokens), source(tokens))


@pytest.mark.gpu
def test_meta_model_is_dense_on_the_gpu_one_layer_at_a_time():
    size, count = 2048, 8
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(size, size, bias=False) for _ in range(count)))
    slope.convert(model.bfloat16())
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model.to_empty(device="cuda")
    for layer in model:
        layer.reset_parameters()
    peak = torch.cuda.max_memory_allocated() - before
    held = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    dense = 2 * size * size
    assert peak <= held + 3 * dense < held + count * dense
    x = torch.randn(4, size, device="cuda", dtype=torch.bfloat16)
    assert model(x).isfinite().all()


# ---- masks ---------------------------------------------------------------------------------------


def mask_of(layer):
    return oracle.unbits(layer.weight_bitmask)


def test_random_masks_depend_on_seed_and_name_only():
    def masks(seed, dtype=torch.float32, targets="all-linear"):
        config = slope.SlopeConfig(mask="random", seed=seed, target_modules=targets)
        model = quietly(Model().to(dtype), config)
        return {name: mask_of(model.get_submodule(name)) for name in sparse_names(model)}

    first, second, other = masks(1), masks(1, torch.bfloat16, ["out", "mlp.0"]), masks(2)
    assert all(torch.equal(first[name], mask) for name, mask in second.items())
    assert not torch.equal(first[ALL[0]], other[ALL[0]])
    assert not torch.equal(first[ALL[0]], first[ALL[3]])
    counts = torch.stack(
        [mask_of.view(-1, 4).sum(-1) for mask_of in first.values() if mask_of.shape == (16, 16)]
    )
    assert (counts == 2).all()


def test_given_scores_wanda_style():
    linear = nn.Linear(16, 24)
    wanda = linear.weight.detach().abs() * torch.rand(16)
    model = nn.ModuleDict({"fc": copy.deepcopy(linear)})
    slope.convert(model, slope.SlopeConfig(scores={"fc": wanda}))
    assert torch.equal(mask_of(model["fc"]), oracle.keep_two_of_four(wanda))
    torch.testing.assert_close(model["fc"].dense_weight(), linear.weight * mask_of(model["fc"]))


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64])
def test_scores_of_other_types_are_taken(dtype, device):
    ranks = torch.stack([torch.randperm(16) for _ in range(24)]).to(dtype)
    model = nn.ModuleDict({"fc": nn.Linear(16, 24, device=device)})
    slope.convert(model, slope.SlopeConfig(scores={"fc": ranks.to(device)}))
    assert model["fc"].weight_bitmask.device.type == device.type
    assert torch.equal(mask_of(model["fc"]).cpu(), oracle.keep_two_of_four(ranks))


@pytest.mark.parametrize("argument", ["scores", "masks"])
@pytest.mark.parametrize("given", ["wanda", [[1.0], [2.0, 3.0]], object()])
def test_what_is_given_and_is_no_tensor_is_refused(argument, given):
    model = nn.ModuleDict({"fc": nn.Linear(16, 24)})
    with pytest.raises(ValueError, match=rf"convert: {argument}\['fc'\] must be a tensor"):
        slope.convert(model, slope.SlopeConfig(**{argument: {"fc": given}}))
    assert sparse_names(model) == []


def test_a_seed_of_numpy_is_one():
    masks = []
    for seed in (5, np.int64(5)):
        model = nn.ModuleDict({"fc": nn.Linear(16, 24)})
        slope.convert(model, slope.SlopeConfig(mask="random", seed=seed))
        masks.append(mask_of(model["fc"]))
    assert torch.equal(*masks)


@pytest.mark.parametrize(
    ("key", "form"),
    [
        ("fc", lambda mask: mask),
        ("fc.weight", lambda mask: mask.float()),
        ("fc", lambda mask: oracle.bits(mask)),
        # MaskLLM: numpy.packbits of the flattened mask, highest bit first, key <param>.mask
        ("fc.weight.mask", lambda mask: np.packbits(mask.numpy())),
        ("fc.mask", lambda mask: torch.from_numpy(np.packbits(mask.numpy()))),
    ],
    ids=["bool", "float", "bitmask", "MaskLLM numpy", "MaskLLM torch"],
)
def test_given_masks_in_every_form(key, form):
    mask = oracle.keep_two_of_four(torch.rand(24, 16))
    model = nn.ModuleDict({"fc": nn.Linear(16, 24)})
    slope.convert(model, slope.SlopeConfig(masks={key: form(mask)}))
    assert torch.equal(mask_of(model["fc"]), mask)


@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_mask_given_under_any_name_of_a_shared_weight(name):
    shared = nn.Linear(16, 16)
    model = nn.ModuleDict({"a": shared, "b": shared, "c": nn.Linear(16, 16)})
    model["c"].weight = shared.weight
    mask = oracle.keep_two_of_four(torch.rand(16, 16))
    slope.convert(model, slope.SlopeConfig(masks={name: mask}))
    assert all(torch.equal(mask_of(layer), mask) for layer in model.values())


def test_two_masks_for_one_weight_raise():
    shared = nn.Linear(16, 16)
    model = nn.ModuleDict({"a": shared, "b": shared})
    mask = oracle.keep_two_of_four(torch.rand(16, 16))
    with pytest.raises(ValueError, match=r"masks has one weight twice: a, b\.weight"):
        slope.convert(model, slope.SlopeConfig(masks={"a": mask, "b.weight": mask}))


def test_kept_zero_stays_kept():
    """Wanda and SparseGPT leave zeros in dense checkpoints; the mask is not read off them."""
    linear = nn.Linear(8, 8)
    nn.init.zeros_(linear.weight)
    mask = oracle.keep_two_of_four(torch.rand(8, 8))
    layer = slope.convert(linear, slope.SlopeConfig(masks={"": mask}))
    layer(torch.randn(3, 8)).sum().backward()
    with torch.no_grad():
        layer.weight -= layer.weight.grad
    assert torch.equal(layer.dense_weight() != 0, mask)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"masks": {"fc": torch.ones(24, 16)}}, r"masks\['fc'\] must keep exactly 2 of every 4"),
        ({"masks": {"fc": torch.full((24, 16), 2)}}, r"masks\['fc'\] must hold only 0 and 1"),
        ({"masks": {"fc": torch.ones(16, 24).bool()}}, r"masks\['fc'\] must be bool \[out, in\]"),
        ({"masks": {"fc": np.ones(7, np.uint8)}}, r"masks\['fc'\] must be bool"),
        ({"masks": {"nothing": torch.ones(24, 16)}}, "masks names no layer to convert: nothing"),
        ({"scores": {"fc": torch.ones(16, 24)}}, r"scores\['fc'\] must be \[out, in\]"),
        ({"scores": {"fx": torch.ones(24, 16)}}, "scores names no layer to convert: fx"),
    ],
)
def test_bad_masks_raise_and_leave_the_model(config, message):
    model = nn.ModuleDict({"fa": nn.Linear(16, 24), "fc": nn.Linear(16, 24)})
    with pytest.raises(ValueError, match=message):
        slope.convert(model, slope.SlopeConfig(**config))
    assert sparse_names(model) == []


def test_random_masks_need_a_real_weight():
    with pytest.raises(ValueError, match="fc is on the meta device"):
        slope.convert(
            nn.ModuleDict({"fc": nn.Linear(16, 16, device="meta")}),
            slope.SlopeConfig(mask="random"),
        )


# ---- to_dense ------------------------------------------------------------------------------------


def test_to_dense_is_the_inverse():
    model = quietly(Model())
    tokens = torch.randint(32, (2, 5))
    expected = model(tokens)
    slope.to_dense(model)
    assert sparse_names(model) == []
    assert all(type(model.get_submodule(name)) is nn.Linear for name in ALL)
    torch.testing.assert_close(model(tokens), expected)


def test_to_dense_adds_adapters_in():
    model = quietly(Model())
    layer = model.blocks[0].out
    layer.add_adapter(4, scale=0.5)
    nn.init.normal_(layer.lora_B)
    tokens = torch.randint(32, (2, 5))
    expected = model(tokens)
    slope.to_dense(model)
    torch.testing.assert_close(model(tokens), expected)


def test_dense_to_sparse_to_dense_to_sparse_keeps_masks():
    model = quietly(Model())
    masks = {name: mask_of(model.get_submodule(name)) for name in ALL}
    quietly(slope.to_dense(model))
    assert all(torch.equal(mask_of(model.get_submodule(n)), m) for n, m in masks.items())


# ---- Hugging Face models -------------------------------------------------------------------------


def hf_model(family):
    transformers = pytest.importorskip("transformers")
    small = {
        "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 32},
        "opt": {
            "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 64,
            "max_position_embeddings": 32, "word_embed_proj_dim": 32,
        },
        "llama": {
            "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "intermediate_size": 88, "max_position_embeddings": 32,
        },
    }[family]  # fmt: skip
    config = transformers.AutoConfig.for_model(family, vocab_size=64, **small)
    return transformers.AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize(("family", "layers"), [("gpt2", 8), ("opt", 12), ("llama", 14)])
def test_hugging_face_families(family, layers):
    """Every projection becomes sparse, the head does not; outputs are the pruned model's."""
    model = hf_model(family).eval()
    pruned = copy.deepcopy(model)
    with pytest.warns(slope.SlopeConversionWarning, match="lm_head"):
        slope.convert(model)
    names = sparse_names(model)
    assert len(names) == layers
    for name in names:
        module = pruned.get_submodule(name)
        conv1d = type(module).__name__ == "Conv1D"
        weight = module.weight.data.t() if conv1d else module.weight.data
        weight.mul_(oracle.keep_two_of_four(weight.abs()))
    tokens = torch.randint(64, (2, 9))
    torch.testing.assert_close(model(tokens).logits, pruned(tokens).logits)

    loss = model(tokens, labels=tokens).loss
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())

    expected = model(tokens).logits
    slope.to_dense(model)
    torch.testing.assert_close(model(tokens).logits, expected)
    assert {n: type(m) for n, m in model.named_modules()} == {
        n: type(m) for n, m in pruned.named_modules()
    }
    assert {k: v.shape for k, v in model.state_dict().items()} == {
        k: v.shape for k, v in pruned.state_dict().items()
    }


def test_hugging_face_gradient_checkpointing():
    model = quietly(hf_model("llama")).train()
    tokens = torch.randint(64, (2, 9))
    model(tokens, labels=tokens).loss.backward()
    plain = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(tokens, labels=tokens).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, plain[name])


def test_save_pretrained_round_trip(tmp_path):
    """Ordinary HF checkpoints hold the data model; a dense load of one fails loudly."""
    transformers = pytest.importorskip("transformers")
    from safetensors.torch import load_file

    model = quietly(hf_model("llama"))
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    assert state["model.layers.0.mlp.up_proj.weight"].shape == (88, 16)
    assert state["model.layers.0.mlp.up_proj.weight_bitmask"].dtype == torch.uint8
    twin = quietly(transformers.AutoModelForCausalLM.from_config(model.config))
    twin.load_state_dict(state, strict=False)
    tokens = torch.randint(64, (2, 9))
    torch.testing.assert_close(twin(tokens).logits, model(tokens).logits)
    with pytest.raises(RuntimeError, match=r"size mismatch|mismatched"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


def test_ddp_ignores_what_is_derived_and_what_it_ignored_before():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    model._ddp_params_and_buffers_to_ignore = ["1.bias"]
    slope.convert(model)
    ignored = model._ddp_params_and_buffers_to_ignore
    assert {"1.bias", "0.weight_t", "1.weight_t_bitmask", "1.weight_metadata"} <= set(ignored)
    assert not [name for name in ignored if name.endswith((".weight", ".weight_bitmask"))]
    slope.to_dense(model)
    assert model._ddp_params_and_buffers_to_ignore == ["1.bias"]


def test_ddp_list_is_theirs_again_after_to_dense():
    """A buffer of theirs with one of our names stays; a list that was not there is gone."""
    model = nn.Sequential(nn.Linear(16, 16), nn.Identity())
    model[1].register_buffer("weight_t", torch.zeros(1))
    model._ddp_params_and_buffers_to_ignore = ["1.weight_t"]
    assert "1.weight_t" in slope.convert(model)._ddp_params_and_buffers_to_ignore
    assert slope.to_dense(model)._ddp_params_and_buffers_to_ignore == ["1.weight_t"]
    other = nn.Sequential(nn.Linear(16, 16))
    assert not hasattr(slope.to_dense(slope.convert(other)), "_ddp_params_and_buffers_to_ignore")


def test_modules_that_were_compiled_compute_with_the_new_weights():
    net = nn.Sequential(nn.Linear(32, 32))
    net[0].compile(backend="eager")
    x = torch.randn(4, 32)
    net(x)
    slope.convert(net)
    torch.testing.assert_close(net(x), F.linear(x, net[0].dense_weight(), net[0].bias))
    net[0].compile(backend="eager")
    net(x)
    duplicate = copy.deepcopy(net)
    with torch.no_grad():
        duplicate[0].weight.zero_()
        duplicate[0].bias.zero_()
    assert not duplicate(x).any()
    pickle.loads(pickle.dumps(net))
    slope.to_dense(net)
    with torch.no_grad():
        net[0].weight.zero_()
        net[0].bias.zero_()
    assert not net(x).any()


def test_a_dense_model_that_was_sparse_can_be_saved_whole():
    net = slope.to_dense(slope.convert(nn.Sequential(nn.Linear(32, 32))))
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(loaded[0].weight, net[0].weight)
