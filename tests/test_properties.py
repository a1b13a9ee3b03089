# SPDX-License-Identifier: Apache-2.0
"""Properties of the ops on shapes, values and types that hypothesis draws, on every device."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import oracle
from cases import Operands, assert_same_bits
from slope_ext import _packed, ops, reference
from slope_ext._check import metadata_words

property_of = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
sizes = st.integers(1, 40).map(lambda n: 8 * n)
wide_sizes = st.integers(1, 20).map(lambda n: 32 * n)
dtypes = st.sampled_from([torch.float16, torch.bfloat16, torch.float32])
halves = st.sampled_from([torch.float16, torch.bfloat16])
seeds = st.integers(0, 2**31)
# What decides a choice, or is easily moved wrongly
specials = st.lists(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, float("inf"), float("-inf"), float("nan"), 1e-6]),
    max_size=8,
)


@pytest.fixture(autouse=True)
def _exact_sums():
    """Else cuBLAS may add parts of a product in the result's type."""
    matmul = torch.backends.cuda.matmul
    names = [f"allow_{dtype}_reduced_precision_reduction" for dtype in ("fp16", "bf16")]
    before = [getattr(matmul, name) for name in names]
    for name in names:
        setattr(matmul, name, False)
    yield
    for name, value in zip(names, before, strict=True):
        setattr(matmul, name, value)


def weight_of(rows, columns, dtype, special, seed, device):
    """Small integers, so that ties are common, amid special values."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-3, 4, (rows, columns), generator=generator).to(dtype)
    for value in special:
        weight[torch.rand(rows, columns, generator=generator) < 0.1] = value
    return weight.to(device)


@property_of
@given(sizes, sizes, dtypes, specials, seeds)
def test_choice_and_compression(device, rows, columns, dtype, special, seed):
    weight = weight_of(rows, columns, dtype, special, seed, device)
    bitmask = ops.prune_24(weight)
    scores = torch.where(weight.isnan(), float("inf"), weight)
    assert torch.equal(bitmask.cpu(), oracle.bits(oracle.keep_two_of_four(scores)))
    values = ops.compress(weight, bitmask)
    dense = ops.decompress(values, bitmask)
    kept = oracle.unbits(bitmask.cpu()).to(device)
    assert_same_bits(
        (dense, ops.compress(dense, bitmask)),
        (torch.where(kept, weight, torch.zeros_like(weight)), values),
    )


@property_of
@given(sizes, sizes, dtypes, specials, seeds)
def test_fused_forms(device, rows, columns, dtype, special, seed):
    weight = weight_of(rows, columns, dtype, special, seed, device)
    found = ops.prune_compress_transposed(weight)
    assert_same_bits(found, reference.prune_compress_transposed(weight))
    values, bitmask, values_t, bitmask_t = found
    assert_same_bits(ops.prune_compress(weight), (values, bitmask))
    out = torch.full_like(values_t, 7)
    ops.transpose_values(values, bitmask, bitmask_t, out)
    assert_same_bits((out,), (values_t,))
    again, out = torch.zeros_like(bitmask_t), torch.full_like(values_t, 7)
    ops.double_prune_(values, bitmask, again, out)
    assert_same_bits((again, out), (bitmask_t, values_t))


@pytest.mark.gpu
@property_of
@given(sizes, wide_sizes, seeds)
def test_words(rows, columns, seed):
    bitmask = ops.prune_24(weight_of(rows, columns, torch.float32, [], seed, "cpu"))
    expected, words = (
        torch.full((metadata_words(rows, columns),), -1, dtype=torch.int32, device=place)
        for place in ("cpu", "cuda")
    )
    reference.pack_metadata(bitmask, expected)
    ops.pack_metadata(bitmask.cuda(), words)
    assert torch.equal(words.cpu(), expected)


def assert_near(y, exact, sums, ulps=0.51):
    """So many ulps of the result, and what sums of their magnitude err by in fp32."""
    off = (y.double() - exact).abs()
    info = torch.finfo(y.dtype)
    allowed = ulps * info.eps * exact.abs().clamp(min=info.smallest_normal) + 4e-6 * sums
    assert bool((off <= allowed).all())


def backends_of(rows, columns, dtype, device):
    """Those that take a weight on a device; more than one on Hopper."""
    if device.type == "cpu":
        return ["auto"]
    kinds = ("native", "cusparselt")
    return [k for k in kinds if _packed.backend_of(rows, columns, dtype, device, k) == k] or [
        "reference"
    ]


@property_of
@given(wide_sizes, wide_sizes, st.integers(1, 300), halves, st.booleans(), seeds)
def test_products(device, rows, columns, tokens, dtype, has_bias, seed):
    torch.manual_seed(seed)
    o = Operands(rows, columns, dtype, device, bias=has_bias)
    ops.transpose_values(o.values, o.bitmask, o.bitmask_t, o.values_t)
    x, dy = o.randn(tokens, columns), o.randn(tokens, rows)
    bias = torch.zeros(rows, device=device) if o.bias is None else o.bias
    y_exact = F.linear(x.double(), o.dense.double(), bias.double())
    y_sums = F.linear(x.double().abs(), o.dense.double().abs(), bias.double().abs())
    w_t = ops.decompress(o.values_t, o.bitmask_t).double()
    for backend in backends_of(rows, columns, dtype, device):
        ulps = 0.51 if backend == "native" else 1.02  # libraries may round a bias or a part apart
        y = ops.linear(x, o.values, o.bitmask, o.bias, backend=backend)
        assert_near(y, y_exact, y_sums, ulps)
        dx = ops.input_grad(dy, o.values, o.bitmask, o.bitmask_t, o.values_t, backend=backend)
        assert_near(dx, F.linear(dy.double(), w_t), F.linear(dy.double().abs(), w_t.abs()), ulps)
    grad = ops.weight_grad(dy, x, o.bitmask)
    exact, sums = dy.double().t() @ x.double(), dy.double().abs().t() @ x.double().abs()
    exact, sums = (ops.compress(t.float(), o.bitmask).double() for t in (exact, sums))
    assert_near(grad, exact, sums, ulps=1.02)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["native", "cusparselt"])
@pytest.mark.parametrize("tokens", [4096, 16384])
def test_products_of_many_tokens(backend, tokens):
    device = torch.device("cuda")
    o = Operands(1088, 544, torch.bfloat16, device)
    if backend not in backends_of(1088, 544, torch.bfloat16, device):
        pytest.skip("not taken here")
    x = o.randn(tokens, 544)
    exact = F.linear(x.double(), o.dense.double(), o.bias.double())
    sums = F.linear(x.double().abs(), o.dense.double().abs(), o.bias.double().abs())
    y = ops.linear(x, o.values, o.bitmask, o.bias, backend=backend)
    assert_near(y, exact, sums, ulps=0.51 if backend == "native" else 1.02)
