# SPDX-License-Identifier: Apache-2.0
"""What a faithful implementation of SLoPe must hold, across layers of the package.

The properties were collected from the paper (arXiv 2405.16325) and from the ways in which an
implementation can miss it. Numbers in the names are theirs.
"""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import oracle
import slope_ext as slope
from ranks import run_ranks
from slope_ext import sparse_layer
from slope_ext.memory import memory_report
from slope_ext.sparse_layer import SparseLayer

SHAPES = {"4d": (256, 64), "3.5d": (224, 64), "2.69d": (344, 128), "d": (64, 64), "d/4": (16, 64)}


def test_1_mask_is_static_and_double_pruning_is_a_subset():
    layer = slope.SLoPeLinear(256, 512)
    mask = oracle.unbits(layer.weight_bitmask)
    optimizer = slope.optim.AdamW(layer.parameters(), lr=0.1, mask_interval=2)
    for _ in range(5):
        optimizer.zero_grad()
        layer(torch.randn(4, 256)).square().sum().backward()
        optimizer.step()
    assert torch.equal(oracle.unbits(layer.weight_bitmask), mask)
    assert (mask.view(512, -1, 4).sum(-1) == 2).all()
    backward = layer.backward_weight()
    assert ((backward != 0) <= mask).all()
    assert ((backward != 0).t().reshape(256, -1, 4).sum(-1) <= 2).all()


def test_1_extra_zeros_of_a_random_weight():
    layer = slope.SLoPeLinear(1024, 1024)
    zeros = (layer.backward_weight() == 0).double().mean().item() - 0.5
    assert zeros == pytest.approx(0.09375, abs=0.002)


def test_2_gradient_is_at_the_kept_positions_not_at_the_pruned_ones():
    layer = slope.SLoPeLinear(64, 32)
    x, dy = torch.randn(9, 64), torch.randn(9, 32)
    layer(x).backward(dy)
    mask = oracle.unbits(layer.weight_bitmask)
    dense = dy.t() @ x
    torch.testing.assert_close(layer.weight.grad, dense[mask].view(32, 32))
    assert not torch.allclose(layer.weight.grad, dense[~mask].view(32, 32))


@pytest.mark.parametrize("optimizer", [slope.optim.AdamW, torch.optim.AdamW])
def test_3_transposed_copy_after_every_step(optimizer):
    """Before, at and after the refresh at step 100."""
    layer = slope.SLoPeLinear(24, 16)
    opt = optimizer(layer.parameters(), lr=0.05)
    refreshed = []
    for step in range(1, 103):
        mask_t = layer.weight_t_bitmask.clone()
        opt.zero_grad()
        layer(torch.randn(4, 24)).square().sum().backward()
        opt.step()
        if not torch.equal(layer.weight_t_bitmask, mask_t):
            refreshed.append(step)
        current = oracle.unbits(layer.weight_t_bitmask).t()
        assert torch.equal(layer.backward_weight(), layer.dense_weight().detach() * current)
    assert refreshed == ([100] if optimizer is slope.optim.AdamW else [])


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("leading", [(6,), (2, 3)])
@pytest.mark.parametrize("bias", [True, False])
def test_4_forward_and_backward_of_every_shape(shape, leading, bias):
    out_features, in_features = shape
    layer = slope.SLoPeLinear(in_features, out_features, bias, dtype=torch.float64)
    twin = oracle.DenseMaskedLinear(layer)
    x1 = torch.randn(*leading, in_features, dtype=torch.float64, requires_grad=True)
    x2 = x1.detach().clone().requires_grad_()
    dy = torch.randn(out_features, *leading, dtype=torch.float64).movedim(0, -1)  # strided
    y1, y2 = layer(x1), twin(x2)
    y1.backward(dy)
    y2.backward(dy)
    for ours, theirs in [
        (y1, y2),
        (x1.grad, x2.grad),
        (layer.weight.grad, twin.weight.grad[twin.mask].view_as(layer.weight)),
        *([(layer.bias.grad, twin.bias.grad)] if bias else []),
    ]:
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_5_merged_adapter_equals_the_unmerged(shape, dtype):
    """Same factors, same scale; the first call too."""
    out_features, in_features = shape
    layer = slope.SLoPeLinear(in_features, out_features, dtype=dtype)
    layer.add_adapter(8, scale=0.5)
    nn.init.normal_(layer.lora_B, std=0.1)
    x = torch.randn(5, in_features, dtype=dtype)
    unmerged = layer(x)
    merged = slope.to_dense(layer)(x)
    torch.testing.assert_close(merged, unmerged, rtol=2e-2, atol=2e-2)


# 6: optimizer == torch's AdamW on the masked dense twin: tests/test_optim.py.
# 7: state_dict, GradScaler, clipping, accumulation: tests/test_linear.py and test_optim.py. DDP:


def _ddp_model(pattern="2:4"):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16))
    return slope.convert(model, slope.SlopeConfig(pattern=pattern))


def _ddp_train(model, batches):
    optimizer = slope.optim.AdamW(model.parameters(), lr=0.01, mask_interval=2)
    for batch in batches:
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()


def _ddp_worker(rank, data, folder):
    model = _ddp_model()
    if rank == 1:
        model[0].reset_parameters()  # rank 0's weights and masks count
    model = nn.parallel.DistributedDataParallel(model)
    broadcast = {id(buffer) for buffer in model.modules_buffers}
    assert id(model.module[0].weight_bitmask) in broadcast
    assert id(model.module[0].weight_t) not in broadcast, "each rank derives its own"
    slope.end_mask_broadcasts(model)
    version = model.module[0].weight_bitmask._version
    _ddp_train(model, [batch.chunk(2)[rank] for batch in data])
    assert model.module[0].weight_bitmask._version == version
    torch.save(model.module.state_dict(), f"{folder}/{rank}.pt")


def _adapter_worker(rank, data, folder):
    model = _ddp_model()
    optimizer = slope.optim.AdamW(model.parameters(), lr=0.01)
    adapters = slope.LazyAdapters(model, optimizer, rank=2, total_steps=4, fraction=0.5)
    ddp = nn.parallel.DistributedDataParallel(model)
    with pytest.raises(ValueError, match="module inside DistributedDataParallel"):
        slope.LazyAdapters(ddp, optimizer, rank=2, total_steps=4)
    for batch in data:
        if adapters.step():
            ddp = slope.end_mask_broadcasts(nn.parallel.DistributedDataParallel(model))
        optimizer.zero_grad()
        ddp(batch.chunk(2)[rank]).square().mean().backward()
        optimizer.step()
    torch.save(model.state_dict(), f"{folder}/lora{rank}.pt")


@pytest.mark.slow
def test_7_ddp_keeps_lazy_adapters_equal_on_all_ranks(tmp_path):
    run_ranks(_adapter_worker, torch.randn(4, 8, 16), tmp_path, folder=tmp_path)
    first, second = (torch.load(tmp_path / f"lora{rank}.pt") for rank in (0, 1))
    assert first["0.lora_B"].abs().sum() > 0
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
def test_7_ddp_averages_compressed_gradients(tmp_path):
    """Two processes on half batches equal one process on the whole batch."""
    data = torch.randn(4, 8, 16)
    run_ranks(_ddp_worker, data, tmp_path, folder=tmp_path)
    model = _ddp_model()
    _ddp_train(model, data)
    for rank in (0, 1):
        state = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name, expected in model.state_dict().items():
            torch.testing.assert_close(state[name], expected, rtol=1e-4, atol=1e-5)


def _fsdp_worker(rank, data, pattern):
    mesh = init_device_mesh("cpu", (2,))
    model = _ddp_model(pattern)
    expected = copy.deepcopy(model)
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.01) for m in (model, expected)]

    def train():
        for batch in data:
            for m, optimizer, part in zip(
                (model, expected), optimizers, (batch.chunk(2)[rank], batch), strict=True
            ):
                optimizer.zero_grad()
                m(part).square().mean().backward()
                optimizer.step()

    def assert_equal():
        for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(ours.full_tensor(), theirs, rtol=1e-4, atol=1e-5)
        x = torch.randn(3, 16).requires_grad_(), torch.randn(3, 16).requires_grad_()
        with torch.no_grad():
            x[1].copy_(x[0])
        for m, each in zip((model, expected), x, strict=True):
            m(each).sum().backward()
        torch.testing.assert_close(x[0].grad, x[1].grad, rtol=1e-4, atol=1e-5)

    train()
    assert_equal()
    model.load_state_dict(model.state_dict())
    expected.load_state_dict(expected.state_dict())
    assert_equal()
    slope.update_transposed_masks(model)
    slope.update_transposed_masks(expected)
    train()
    assert_equal()
    with pytest.raises(TypeError, match="params must be plain tensors, got a DTensor"):
        slope.optim.AdamW(model.parameters())
    with pytest.raises(ValueError, match="LazyAdapters: model must not be sharded"):
        slope.LazyAdapters(model, optimizers[0], rank=2, total_steps=4)
    layer = next(m for m in model.modules() if isinstance(m, SparseLayer))
    with pytest.raises(ValueError, match="add_adapter: weight is a DTensor"):
        layer.add_adapter(2)
    with pytest.raises(ValueError, match=r"to_dense: the weight of .* is a DTensor"):
        slope.to_dense(model)


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["2:4", "2:8"])
def test_7_fsdp2_equals_one_process(tmp_path, pattern):
    """Training, loading, and masks that are chosen again; torch's optimizer."""
    run_ranks(_fsdp_worker, torch.randn(4, 8, 16), pattern, folder=tmp_path)


def _resume_worker(rank, data):
    """Wrapped first, then loaded, on ranks of which one gets fewer batches."""
    model = _ddp_model()
    optimizer = slope.optim.AdamW(model.parameters(), lr=0.1, mask_interval=0)
    ddp = slope.end_mask_broadcasts(nn.parallel.DistributedDataParallel(model))
    masks = slope.transposed_masks(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(torch.randn_like(parameter))
    state = copy.deepcopy(model.state_dict())
    model.load_state_dict(state)
    slope.load_transposed_masks(model, masks)
    with ddp.join():
        for batch in data[: 3 - rank]:
            optimizer.zero_grad()
            ddp(batch).square().mean().backward()
            optimizer.step()
    for name, mask in slope.transposed_masks(model).items():
        assert torch.equal(mask, masks[name]), "chosen again"


@pytest.mark.slow
def test_7_ddp_keeps_masks_that_were_loaded(tmp_path):
    torch.manual_seed(1)
    run_ranks(_resume_worker, torch.randn(4, 8, 16), folder=tmp_path)


def test_7_broadcasts_of_masks_are_told_where_they_count_as_writes(monkeypatch):
    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module, self.parameters_to_ignore = module, {"mine"}
            self._assign_modules_buffers()

        def _assign_modules_buffers(self):
            named = self.module.named_buffers()
            self.modules_buffers = [b for n, b in named if n not in self.parameters_to_ignore]

    for pattern in ("2:4", "2:8"):
        model = slope.convert(nn.Linear(16, 16), slope.SlopeConfig(pattern=pattern))
        ddp = Wrapper(nn.Sequential(model))
        monkeypatch.setattr(nn.parallel.DistributedDataParallel, "_active_ddp_module", ddp)
        for writes in (False, True):
            monkeypatch.setattr(sparse_layer, "_BROADCASTS_ARE_WRITES", writes)
            model.mask.copy_(model.mask.clone())
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                model(torch.randn(2, 16))
            assert len(caught) == writes
        assert "call slope_ext.end_mask_broadcasts" in str(caught[0].message)
        slope.end_mask_broadcasts(ddp)
        assert not ddp.modules_buffers
        assert "mine" in ddp.parameters_to_ignore
        model.mask.copy_(model.mask.clone())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(torch.randn(2, 16))


# ---- 8: memory, embeddings at full cost ----------------------------------------------------------

# family, config, share of parameters in the converted layers
MODELS = {
    "OPT-13B": (
        "opt",
        {
            "hidden_size": 5120, "num_hidden_layers": 40, "num_attention_heads": 40,
            "ffn_dim": 20480, "vocab_size": 50272, "word_embed_proj_dim": 5120,
        },
    ),
    "LLaMA-3-8B": (
        "llama",
        {
            "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
            "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256,
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore::slope_ext.SlopeConversionWarning")
def test_8_memory_of_whole_models(name):
    transformers = pytest.importorskip("transformers")
    family, options = MODELS[name]
    config = transformers.AutoConfig.for_model(family, **options)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    dense_parameters = sum(p.numel() for p in model.parameters())
    reports = {}
    for backward_copy in ("cached", "recompute"):
        slope.convert(slope.to_dense(model), slope.SlopeConfig(backward_copy=backward_copy))
        reports[backward_copy] = memory_report(model)
    report = reports["cached"]
    # bf16 weights and gradients, two fp32 moments: 12 bytes a parameter.
    assert report.dense_training == 12 * dense_parameters
    assert report.dense_weights == 2 * dense_parameters
    layers = [m for m in model.modules() if isinstance(m, slope.SLoPeLinear)]
    sparse = sum(m.in_features * m.out_features for m in layers)
    # values 1 + bitmask 1/8, transposed copy the same, gradient 1, moments 4
    expected = 12 * (dense_parameters - sparse) + 7.25 * sparse
    assert report.training == expected
    assert report.weights == 2 * (dense_parameters - sparse) + 1.125 * sparse
    assert 0.60 < report.training_ratio < 0.70
    assert 0.5625 < report.inference_ratio < 0.63
    assert reports["recompute"].training == expected - sparse


def test_8_report_equals_the_bytes_that_exist():
    """Counted by hand from the tensors of a model with an adapter and a tied weight."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(40, 16)
            self.fc = nn.Linear(16, 24)
            self.out = nn.Linear(16, 40, bias=False)
            self.out.weight = self.embedding.weight

    with pytest.warns(slope.SlopeConversionWarning):
        model = slope.convert(Tied())
    model.fc.add_adapter(2)
    report = memory_report(model)

    def size(tensors):
        return sum(t.numel() * t.element_size() for t in tensors)

    unique = {id(t): t for t in model.state_dict(keep_vars=True).values()}.values()
    assert report.weights == size(t for t in unique if t.dim() > 0)
    assert report.backward_copy == size([model.fc.weight_t, model.fc.weight_t_bitmask])
    assert report.gradients == size(model.parameters())
    assert report.optimizer == 2 * size(model.parameters())
    dense = 4 * (40 * 16 + 16 * 24 + 24)
    assert report.dense_weights == dense
    assert report.dense_training == 4 * dense


def test_memory_report_as_on_a_gpu_counts_metadata_that_the_own_product_has():
    """Words of 64 rows and 256 columns; none where a size, the type or the backend rules it out."""
    dtype = torch.bfloat16

    def extra(layer):
        there, here = (memory_report(layer, on_gpu=gpu) for gpu in (True, False))
        return there.weights - here.weights, there.backward_copy - here.backward_copy

    with torch.device("meta"):
        whole = 256 * 512 // 8
        assert extra(slope.SLoPeLinear(512, 256, dtype=dtype)) == (whole, whole)
        assert extra(slope.SLoPeLinear(32, 24, dtype=dtype)) == (64 * 256 // 8, 0)
        recompute = slope.SLoPeLinear(512, 256, dtype=dtype, backward_copy="recompute")
        assert extra(recompute) == (whole, 0)
        for layer in (
            slope.SLoPeLinear(24, 16, dtype=dtype),
            slope.SLoPeLinear(512, 256),
            slope.SLoPeLinear(512, 256, dtype=dtype, backend="reference"),
        ):
            assert extra(layer) == (0, 0)
    tied = nn.Sequential(nn.Linear(512, 256, dtype=dtype), nn.Linear(512, 256, dtype=dtype))
    tied[1].weight = tied[0].weight
    assert extra(slope.convert(tied)) == (whole, whole)
