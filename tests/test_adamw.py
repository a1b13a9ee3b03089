# SPDX-License-Identifier: Apache-2.0
"""The op adamw_; slope_ext.optim.AdamW around it is tested in test_optim.py."""

import pytest
import torch

from cases import Operands
from slope_ext import ops

OPTIONS = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}


def state(params, dtype):
    zeros = [torch.zeros_like(p, dtype=dtype) for p in params]
    return zeros, [z.clone() for z in zeros], [torch.tensor(0.0) for _ in params]


def exact_steps(params, grads, exp_avgs, exp_avg_sqs, steps):
    """One step in fp64 as torch.optim.AdamW does it; weight and moments of each parameter."""
    twins = [param.double().requires_grad_() for param in params]
    options = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    optimizer = torch.optim.AdamW(twins, **options, foreach=True)
    for i, twin in enumerate(twins):
        twin.grad = grads[i].double()
        optimizer.state[twin] = {
            "step": torch.tensor(float(steps[i] - 1)),
            "exp_avg": exp_avgs[i].double(),
            "exp_avg_sq": exp_avg_sqs[i].double(),
        }
    optimizer.step()
    states = [optimizer.state[twin] for twin in twins]
    return [(t.detach(), s["exp_avg"], s["exp_avg_sq"]) for t, s in zip(twins, states, strict=True)]


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("grad_scale", [None, 64.0])
def test_equals_torch_adamw(maximize, grad_scale, device):
    params = [torch.randn(24, 16, device=device), torch.randn(7, device=device)]
    twins = [p.clone().requires_grad_() for p in params]
    torch_options = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    reference = torch.optim.AdamW(twins, **torch_options, maximize=maximize)
    exp_avgs, exp_avg_sqs, steps = state(params, torch.float32)
    for _ in range(10):
        grads = [torch.randn_like(p) for p in params]
        for twin, grad in zip(twins, grads, strict=True):
            twin.grad = grad.clone()
        reference.step()
        for step in steps:
            step += 1
        factor = grad_scale or 1.0
        ops.adamw_(
            params, [g * factor for g in grads], exp_avgs, exp_avg_sqs, [], steps,
            **OPTIONS, maximize=maximize,
            grad_scale=None if grad_scale is None else torch.tensor(grad_scale, device=device),
        )  # fmt: skip
    # Moments too: the weights hardly feel a constant factor of all gradients.
    for i, twin in enumerate(twins):
        theirs = reference.state[twin]
        torch.testing.assert_close(params[i], twin.detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(exp_avgs[i], theirs["exp_avg"])
        torch.testing.assert_close(exp_avg_sqs[i], theirs["exp_avg_sq"])


def test_masters_carry_what_bf16_rounds_away(device):
    param = torch.ones(64, 8, dtype=torch.bfloat16, device=device)
    master = param.float()
    exp_avgs, exp_avg_sqs, steps = state([param], torch.float32)
    for _ in range(100):
        steps[0] += 1
        ops.adamw_(
            [param], [torch.ones_like(param)], exp_avgs, exp_avg_sqs, [master], steps,
            **OPTIONS | {"lr": 1e-4, "weight_decay": 0.0},
        )  # fmt: skip
    torch.testing.assert_close(master, torch.full_like(master, 1 - 1e-2), rtol=0, atol=1e-4)
    assert torch.equal(param, master.bfloat16())
    assert (param < 1).all()


def test_writes_the_backward_copy(device):
    o = Operands(32, 24, torch.float32, device)
    exp_avgs, exp_avg_sqs, steps = state([o.values], torch.float32)
    steps[0] += 1
    version = o.values._version
    ops.adamw_(
        [o.values], [torch.randn_like(o.values)], exp_avgs, exp_avg_sqs, [], steps,
        [o.bitmask], [o.bitmask_t], [o.values_t], **OPTIONS,
    )  # fmt: skip
    assert o.values._version > version
    expected = torch.empty_like(o.values_t)
    ops.transpose_values(o.values, o.bitmask, o.bitmask_t, expected)
    assert torch.equal(o.values_t, expected)


HALVES = [torch.bfloat16, torch.float16]
# params, moments, masters
TYPES = [(torch.float32, torch.float32, False)]
TYPES += [(half, torch.float32, master) for half in HALVES for master in (False, True)]
TYPES += [(half, half, False) for half in HALVES]


@pytest.mark.parametrize(("dtype", "moments", "master"), TYPES)
@pytest.mark.parametrize("where", ["aligned", "off by one", "strided"])
def test_one_step_is_the_rounded_exact_step(dtype, moments, master, where, device):
    """More tensors than fit one launch, of all sizes; the step count on either side."""
    sizes = [(0,), (1,), (3, 5), (4096,), (4097,), (64, 200)] + [(n,) for n in range(8, 44)]

    def new(size, like, scale=1.0):
        if where == "off by one":
            whole = torch.empty(torch.Size(size).numel() + 1, dtype=like, device=device)
            tensor = whole[1:].view(size)
        else:
            strided = where == "strided" and len(size) == 2
            tensor = torch.empty(size[::-1] if strided else size, dtype=like, device=device)
            tensor = tensor.mT if strided else tensor
        return tensor.copy_(scale * torch.randn(tensor.shape))

    params = [new(size, dtype) for size in sizes]
    grads = [new(size, dtype, 0.1) for size in sizes]
    exp_avgs = [new(size, moments, 0.1) for size in sizes]
    exp_avg_sqs = [new(size, moments, 0.1).square_() for size in sizes]
    masters = [new(size, torch.float32) for size in sizes] if master else []
    at = [device if i % 2 else "cpu" for i in range(len(sizes))]
    steps = [torch.tensor(float(i % 7 + 1), device=at[i]) for i in range(len(sizes))]
    sources = masters or params
    lists = [[t.clone() for t in tensors] for tensors in (sources, grads, exp_avgs, exp_avg_sqs)]
    exact = exact_steps(*lists, [int(step) for step in steps])
    version = params[3]._version
    ops.adamw_(params, grads, exp_avgs, exp_avg_sqs, masters, steps, **OPTIONS)
    assert params[3]._version > version
    for i, expected in enumerate(exact):
        found = (sources[i], exp_avgs[i], exp_avg_sqs[i])
        for tensor, value in zip(found, expected, strict=True):
            rounding = 0.51 * torch.finfo(tensor.dtype).eps
            atol = 6e-8 if tensor.dtype == torch.float16 else 0.0  # subnormals
            torch.testing.assert_close(
                tensor.double(), value, rtol=rounding + 2e-6, atol=atol + 3e-7
            )
        if master:
            assert torch.equal(params[i], masters[i].to(dtype))


@pytest.mark.parametrize(("dtype", "moments", "master"), TYPES)
@pytest.mark.parametrize("shape", [(8, 8), (136, 264), (320, 520), (1024, 512)])
@pytest.mark.parametrize("where", ["aligned", "off by one", "strided"])
def test_copies_of_many_weights_follow(shape, dtype, moments, master, where, device):
    """The same bits as without copies, and the copies those of transpose_values."""
    weights = [Operands(*shape, dtype, device) for _ in range(3)]
    weights += [Operands(shape[1], shape[0], dtype, device)]

    def placed(tensor):
        if where == "strided":
            return tensor.t().contiguous().t()
        whole = tensor.new_empty(tensor.numel() + 1)
        offset = int(where == "off by one")
        return whole[offset : offset + tensor.numel()].view(tensor.shape).copy_(tensor)

    plain = [o.values.clone() for o in weights]
    values = [placed(o.values) for o in weights]
    grads = [placed(torch.randn_like(v)) for v in plain]
    runs = []
    for params in (values, plain):
        exp_avgs, exp_avg_sqs, steps = state(params, moments)
        masters = [p.float() for p in params] if master else []
        runs.append((params, grads, exp_avgs, exp_avg_sqs, masters, steps))
    copies = [[getattr(o, name) for o in weights] for name in ("bitmask", "bitmask_t", "values_t")]
    for _ in range(2):
        for run, extra in zip(runs, (copies, ()), strict=True):
            for step in run[-1]:
                step += 1
            ops.adamw_(*run, *extra, **OPTIONS)
    for tensors, others in zip(*runs, strict=True):
        assert all(map(torch.equal, tensors, others))
    for i, o in enumerate(weights):
        expected = torch.empty_like(o.values_t)
        ops.transpose_values(values[i], o.bitmask, o.bitmask_t, expected)
        assert torch.equal(o.values_t, expected)


def test_found_inf_leaves_all_but_the_copies(device):
    o = Operands(64, 48, torch.float32, device)
    exp_avgs, exp_avg_sqs, steps = state([o.values], torch.float32)
    steps[0] += 1
    before = o.values.clone()
    o.values_t.fill_(7)
    grads = [torch.full_like(o.values, float("inf"))]
    copies = ([o.bitmask], [o.bitmask_t], [o.values_t])
    lists = ([o.values], grads, exp_avgs, exp_avg_sqs, [], steps)
    ops.adamw_(*lists, *copies, **OPTIONS, found_inf=torch.ones((), device=device))
    assert torch.equal(o.values, before)
    assert not exp_avgs[0].any()
    expected = torch.empty_like(o.values_t)
    ops.transpose_values(o.values, o.bitmask, o.bitmask_t, expected)
    assert torch.equal(o.values_t, expected)
    ops.adamw_(*lists, *copies, **OPTIONS, found_inf=torch.zeros((), device=device))
    assert not torch.equal(o.values, before)


def test_lr_tensor_stands_for_lr(device):
    params = [torch.randn(100, device=device)]
    twins = [params[0].clone()]
    grads = [torch.randn_like(params[0])]
    for tensors, options in (
        (params, OPTIONS),
        (twins, OPTIONS | {"lr": 5.0, "lr_tensor": torch.tensor(OPTIONS["lr"], device=device)}),
    ):
        exp_avgs, exp_avg_sqs, steps = state(tensors, torch.float32)
        steps[0] += 1
        ops.adamw_(tensors, grads, exp_avgs, exp_avg_sqs, [], steps, **options)
    assert torch.equal(params[0], twins[0])


@pytest.mark.gpu
def test_float64_has_no_cuda_kernel():
    params = [torch.zeros(3, device="cuda", dtype=torch.float64)]
    exp_avgs, exp_avg_sqs, steps = state(params, torch.float64)
    with pytest.raises(RuntimeError, match=r"slope::adamw_: params\[0\] must be float16"):
        ops.adamw_(params, params, exp_avgs, exp_avg_sqs, [], steps, **OPTIONS)


def test_leaves_under_grad_mode(device):
    """Contiguous, and copied out and back."""
    leaves = [
        torch.randn(8, 6, device=device, requires_grad=True),
        torch.randn(6, 8, device=device).t().requires_grad_(),
    ]
    twins = [leaf.detach().clone() for leaf in leaves]
    for params in (leaves, twins):
        grads = [torch.ones(8, 6, device=device)] * 2
        exp_avgs, exp_avg_sqs, steps = state(params, torch.float32)
        for step in steps:
            step += 1
        ops.adamw_(params, grads, exp_avgs, exp_avg_sqs, [], steps, **OPTIONS)
    for leaf, twin in zip(leaves, twins, strict=True):
        assert torch.equal(leaf.detach(), twin)
