# SPDX-License-Identifier: Apache-2.0
"""SLoPeLinear on the sparse tensor cores: what they want of a weight is there and up to date."""

import copy
import io
import pickle
import threading

import pytest
import torch
from torch import nn

import slope_ext as slope
from slope_ext import _C, _packed, ops, plan_cache

pytestmark = pytest.mark.gpu

OUT, IN, TOKENS = 128, 192, 40
backend_of_tests = "auto"


@pytest.fixture(autouse=True, params=["native", "cusparselt"])
def _each_backend(request, monkeypatch):
    if request.param == "native" and not _packed._native_runs_here(0):
        pytest.skip("for GPUs of compute capability 9.0 and builds for sm_90a")
    monkeypatch.setitem(globals(), "backend_of_tests", request.param)


def make(dtype=torch.bfloat16, **options):
    options = {"backend": backend_of_tests} | options
    layer = slope.SLoPeLinear(IN, OUT, device="cuda", dtype=dtype, **options)
    layer.prepare()
    return layer


def assert_right(layer):
    """Output and gradients are those of the decompressed weights."""
    dtype = layer.weight.dtype
    x = torch.randn(TOKENS, IN, device="cuda").to(dtype).requires_grad_()
    dy = torch.randn(TOKENS, OUT, device="cuda").to(dtype)
    layer.weight.grad = None
    y = layer(x)
    y.backward(dy)
    close = {"rtol": 2e-2, "atol": 2e-2}
    dense = layer.dense_weight().detach().double()
    expected = x.double() @ dense.t() + layer.bias.double()
    torch.testing.assert_close(y.double(), expected, **close)
    dx = dy.double() @ layer.backward_weight().double()
    torch.testing.assert_close(x.grad.double(), dx, rtol=2e-2, atol=5e-2)
    dw = ops.compress((dy.double().t() @ x.detach().double()).to(dtype), layer.weight_bitmask)
    torch.testing.assert_close(layer.weight.grad, dw, rtol=2e-2, atol=0.1)


def assert_prepared(layer):
    assert _packed.fits(layer.weight, layer.weight_metadata, backend_of_tests)
    if layer.weight_t is not None:
        assert _packed.fits(layer.weight_t, layer.weight_t_metadata, backend_of_tests)


@pytest.mark.parametrize("backward_copy", ["cached", "recompute"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_new_layer(dtype, backward_copy):
    layer = make(dtype, backward_copy=backward_copy)
    assert_prepared(layer)
    assert_right(layer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_the_tensor_cores_do_not_take_still_computes(dtype):
    layer = make(dtype, backend="reference" if dtype == torch.bfloat16 else "auto")
    assert layer.weight_metadata is None
    assert layer.weight_t_metadata is None
    assert_right(layer)


@pytest.mark.parametrize("name", ["slope", "fused", "foreach", "sgd"])
def test_optimizer_steps_need_no_packing(name, monkeypatch):
    layer = make()
    optimizer = {
        "slope": lambda p: slope.optim.AdamW(p, lr=0.1),
        "fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
        "foreach": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
        "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    }[name](layer.parameters())
    assert_right(layer)
    address = layer.weight.data_ptr()
    for name in ("empty", "empty_words"):
        monkeypatch.setattr(_packed, name, lambda *_: pytest.fail("made anew"))
    for _ in range(3):
        before = layer.weight.detach().clone()
        optimizer.step()
        assert not torch.equal(layer.weight, before)
        assert_right(layer)
    assert layer.weight.data_ptr() == address


def other_values(layer):
    return torch.randn_like(layer.weight)


def other_mask(layer):
    return ops.prune_24(torch.rand(OUT, IN, device="cuda"))


def assign(layer, strict=True):
    state = {k: v.clone() for k, v in layer.state_dict().items()}
    state["weight_bitmask"] = other_mask(layer)
    layer.load_state_dict(state, assign=True)


def load(layer):
    state = {k: v.clone() for k, v in layer.state_dict().items()}
    state["weight"] = other_values(layer)
    state["weight_bitmask"] = other_mask(layer)
    layer.load_state_dict(state)


CHANGES = {
    ".data": lambda m: setattr(m.weight, "data", other_values(m)),
    ".data twice": lambda m: [setattr(m.weight, "data", other_values(m)) for _ in range(2)],
    "new Parameter": lambda m: setattr(m, "weight", nn.Parameter(other_values(m))),
    ".data.copy_": lambda m: [m.weight.data.copy_(other_values(m)), m.mark_backward_copy_stale()],
    "mask in place": lambda m: m.weight_bitmask.copy_(other_mask(m)),
    "mask rebound": lambda m: setattr(m.weight_bitmask, "data", other_mask(m)),
    "new mask": lambda m: setattr(m, "weight_bitmask", other_mask(m)),
    "cpu and back": lambda m: m.cpu().cuda(),
    "half": lambda m: m.half(),
    "float and back": lambda m: m.float().bfloat16(),
    "load": load,
    "assign": assign,
    "transposed mask": lambda m: m.update_transposed_mask(),
    "moved transposed copy": lambda m: setattr(m, "weight_t", m.weight_t.clone()),
    "reset": lambda m: m.reset_parameters(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_follows_every_change(change):
    layer = make()
    assert_right(layer)
    with torch.no_grad():
        CHANGES[change](layer)
    assert_right(layer)
    assert_prepared(layer)


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))],
    ids=["deepcopy", "pickle"],
)
def test_copies_are_independent_and_packed(duplicate):
    layer = make()
    twin = duplicate(layer)
    with torch.no_grad():
        twin.weight.mul_(-2)
    for each in (layer, twin):
        assert_right(each)
        assert_prepared(each)


def test_a_copy_has_the_buffers_of_its_model():
    """AveragedModel and its like pair them by place."""
    model = nn.Sequential(make(), make())
    twin = copy.deepcopy(model)
    for ours, theirs in zip(twin.named_buffers(), model.named_buffers(), strict=True):
        assert (ours[0], ours[1].shape, ours[1].dtype) == (
            theirs[0], theirs[1].shape, theirs[1].dtype
        )  # fmt: skip
    averaged = torch.optim.swa_utils.AveragedModel(model)
    with torch.no_grad():
        model[0].weight.mul_(3)
    averaged.update_parameters(model)
    for layer in averaged.module:
        assert_right(layer)


def test_part_of_a_flat_buffer_stays_where_it_is():
    """As wrappers with flat parameters want it; the product then packs in every call."""
    layer = make()
    flat = torch.randn(2 * layer.weight.numel(), device="cuda", dtype=torch.bfloat16)
    layer.weight.data = flat[64 : 64 + layer.weight.numel()].view_as(layer.weight)
    for _ in range(2):
        assert_right(layer)
        assert layer.weight.data_ptr() == flat.data_ptr() + 128
        flat.mul_(0.5)


def test_saved_weights_hold_no_metadata():
    layer = make()
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    weights = OUT * IN // 2 * 2 + OUT * IN // 8 + OUT * 2
    assert len(file.getvalue()) < weights + 4096
    assert not [key for key in layer.state_dict() if "metadata" in key]


def _requested_bytes():
    # What the allocator hands out for it may be a larger block that was free.
    return torch.cuda.memory_stats()["requested_bytes.all.current"]


def test_memory_is_values_masks_and_metadata():
    out, in_ = 1024, 2048
    weight = torch.randn(out, in_, device="cuda", dtype=torch.bfloat16)
    slope.SLoPeLinear.from_dense(weight, backend=backend_of_tests)  # what a first use makes
    before = _requested_bytes()
    layer = slope.SLoPeLinear.from_dense(weight, backend=backend_of_tests)
    assert layer.weight_metadata is not None
    added = _requested_bytes() - before
    room = _C.OVERREAD_BYTES if backend_of_tests == "cusparselt" else 0
    assert added == 2 * (out * in_ + 2 * out * in_ // 8 + room)  # values, bitmask, metadata


def test_captured_forward_and_backward_follow_weight_and_masks():
    layer = make()
    x = torch.randn(TOKENS, IN, device="cuda", dtype=torch.bfloat16).requires_grad_()
    dy = torch.randn(TOKENS, OUT, device="cuda", dtype=torch.bfloat16)

    def step():
        x.grad = layer.weight.grad = layer.bias.grad = None
        y = layer(x)
        y.backward(dy)
        return y

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step()
    for change in ("none", "weight", "transposed mask", "mask"):
        with torch.no_grad():
            if change == "weight":
                layer.weight.copy_(other_values(layer))
            elif change == "transposed mask":
                layer.weight.copy_(other_values(layer))
                layer.update_transposed_mask()
            elif change == "mask":
                layer.weight_bitmask.copy_(other_mask(layer))
                layer.update_transposed_mask()
                layer.prepare()
        graph.replay()
        close = {"rtol": 2e-2, "atol": 5e-2}
        dense = layer.dense_weight().detach().double()
        torch.testing.assert_close(
            y.double(), x.detach().double() @ dense.t() + layer.bias.double(), **close
        )
        dx = dy.double() @ layer.backward_weight().double()
        torch.testing.assert_close(x.grad.double(), dx, **close)


def test_mask_changed_before_a_capture_is_seen_after_it_too():
    layer = make()
    x = torch.randn(TOKENS, IN, device="cuda", dtype=torch.bfloat16)
    assert_right(layer)
    with torch.no_grad():
        layer.weight_bitmask.copy_(other_mask(layer))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        eager = layer(x)
        graph.replay()
    expected = x.double() @ layer.dense_weight().double().t() + layer.bias.double()
    for result in (y, eager):
        torch.testing.assert_close(result.double(), expected, rtol=2e-2, atol=2e-2)
    assert_right(layer)


def test_data_parallel_replicas():
    layer = make()
    replica = torch.nn.parallel.replicate(layer, [0])[0]
    x = torch.randn(TOKENS, IN, device="cuda", dtype=torch.bfloat16)
    torch.testing.assert_close(replica(x), layer(x))


@pytest.mark.parametrize("leading", [(1,), (7,), (8,), (2, 3), (4097,), (0,), (2, 0, 3)])
def test_any_number_of_tokens(leading):
    layer = make()
    x = torch.randn(*leading, IN, device="cuda", dtype=torch.bfloat16)
    y = layer(x)
    assert y.is_contiguous()
    expected = x.double() @ layer.dense_weight().double().t() + layer.bias.double()
    torch.testing.assert_close(y.double(), expected, rtol=2e-2, atol=2e-2)


def test_strided_input_and_odd_addresses():
    layer = make()
    wide = torch.randn(TOKENS, IN + 1, device="cuda", dtype=torch.bfloat16)
    for x in (wide[:, :IN], wide[:, 1:], wide.flatten()[1 : 1 + 8 * IN].view(8, IN)):
        torch.testing.assert_close(layer(x), layer(x.clone()))


def test_two_models_on_two_threads_and_streams():
    layers = [make() for _ in range(2)]
    errors = []

    def work(layer):
        try:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.default_stream())
            with torch.cuda.stream(stream):
                for _ in range(20):
                    assert_right(layer)
                    with torch.no_grad():
                        layer.weight.mul_(-1)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(layer,)) for layer in layers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_compiled_training_step():
    layer, x = make(), torch.randn(TOKENS, IN, device="cuda", dtype=torch.bfloat16)
    compiled = torch.compile(lambda x: layer(x).float().square().mean(), fullgraph=True)
    for _ in range(2):
        losses = []
        for function in (compiled, lambda x: layer(x).float().square().mean()):
            layer.weight.grad = None
            loss = function(x)
            loss.backward()
            losses.append((loss.detach(), layer.weight.grad))
        torch.testing.assert_close(losses[0], losses[1], rtol=2e-2, atol=1e-3)
        with torch.no_grad():
            layer.weight.mul_(2)


@pytest.mark.parametrize("adapter", [False, True])
def test_reduce_overhead(adapter):
    """torch.compile's CUDA graphs: no memory of their pool outlives a call."""
    layer = make()
    if adapter:
        layer.add_adapter(8, scale=0.5)
        nn.init.normal_(layer.lora_B, std=0.1)
    compiled = torch.compile(layer, mode="reduce-overhead", fullgraph=True)
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        x = torch.randn(TOKENS, IN, device="cuda", dtype=torch.bfloat16)
        results = []
        for module in (compiled, layer):
            x_ = x.clone().requires_grad_()
            layer.zero_grad()
            y = module(x_)
            y.backward(torch.ones_like(y))
            grads = [parameter.grad.clone() for parameter in layer.parameters()]
            results.append([y.detach().clone(), x_.grad.clone(), *grads])
        torch.testing.assert_close(*results, rtol=2e-2, atol=5e-2)
        with torch.no_grad():
            layer.weight.mul_(-1)


def test_adapter():
    layer = make()
    layer.add_adapter(8, scale=0.5)
    nn.init.normal_(layer.lora_B)
    for tokens in (40, 33):
        x = torch.randn(tokens, IN, device="cuda", dtype=torch.bfloat16)
        low_rank = 0.5 * (x.double() @ layer.lora_A.double().t()) @ layer.lora_B.double().t()
        expected = x.double() @ layer.dense_weight().double().t() + layer.bias.double() + low_rank
        torch.testing.assert_close(layer(x).double(), expected, rtol=2e-2, atol=5e-2)


def test_autocast_with_fp32_parameters_runs_on_the_tensor_cores():
    layer = make(torch.float32)
    x = torch.randn(TOKENS, IN, device="cuda")
    plan_cache.clear()
    with torch.autocast("cuda", torch.bfloat16):
        y = layer(x)
    assert plan_cache.info()["plans"] == (backend_of_tests == "cusparselt")
    expected = x @ layer.dense_weight().t() + layer.bias
    torch.testing.assert_close(y.float(), expected, rtol=2e-2, atol=2e-2)


def test_backward_passes_on_two_streams_share_a_copy():
    """The first refreshes it on its stream; the second sees that, and must wait for it."""
    layer = make()
    optimizer = torch.optim.SGD([layer.weight], lr=1.0)
    streams = [torch.cuda.Stream() for _ in range(2)]
    x = [torch.randn(TOKENS, IN, device="cuda").bfloat16().requires_grad_() for _ in range(2)]
    dy = torch.randn(TOKENS, OUT, device="cuda").bfloat16()
    for _ in range(3):
        layer.weight.grad = torch.randn_like(layer.weight)
        optimizer.step()  # not the project's: backward refreshes the copy
        dx = []
        for number, stream in enumerate(streams):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                y = layer(x[number])
                if number == 0:
                    torch.cuda._sleep(200_000_000)  # clocks: 0.1 s before the refresh
                dx += torch.autograd.grad(y, x[number], dy)
        assert not streams[0].query()  # else the second did not have to wait
        torch.cuda.synchronize()
        expected = dy.double() @ layer.backward_weight().double()
        for found in dx:
            torch.testing.assert_close(found.double(), expected, rtol=2e-2, atol=5e-2)


def test_random_calls_neither_leak_nor_err():
    """Mixed shapes, dtypes and streams, again and again: memory stays what it was."""
    generator = torch.Generator().manual_seed(1)
    layers = [make(dtype) for dtype in (torch.bfloat16, torch.float16)]
    weights = [(layer.dense_weight().detach(), layer.backward_weight()) for layer in layers]
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()

    def round_of_calls():
        for _ in range(50):
            number = int(torch.randint(2, (), generator=generator))
            layer, (dense, backward) = layers[number], weights[number]
            stream = streams[int(torch.randint(2, (), generator=generator))]
            tokens = int(torch.randint(1, 65, (), generator=generator))
            with torch.cuda.stream(stream):
                x = torch.randn(tokens, IN, device="cuda", dtype=layer.weight.dtype)
                y = layer(x.requires_grad_())
                y.backward(dy := torch.randn_like(y))
                expected = torch.addmm(layer.bias, x, dense.t())
                torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)
                torch.testing.assert_close(x.grad, dy @ backward, rtol=2e-2, atol=5e-2)
                layer.weight.grad = layer.bias.grad = None
        torch.cuda.synchronize()

    round_of_calls()
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        round_of_calls()
    assert torch.cuda.memory_allocated() <= before
    for layer in layers:
        assert_right(layer)
