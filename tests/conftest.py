# SPDX-License-Identifier: Apache-2.0
"""Fixtures shared by all tests."""

import sys

import pytest
import torch

from slope_ext import _tuned_table, plan_cache


def pytest_addoption(parser):
    parser.addoption("--part", default="0/1", metavar="I/N", help="every N-th test, from I on")


@pytest.hookimpl(trylast=True)  # after -k and -m
def pytest_collection_modifyitems(config, items):
    number, count = map(int, config.getoption("--part").split("/"))
    if not 0 <= number < count:
        raise pytest.UsageError(f"--part must be I/N with 0 <= I < N, got {number}/{count}")
    items[:] = items[number::count]


DEVICES = [pytest.param("cpu", id="cpu"), pytest.param("cuda", id="cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=DEVICES)
def device(request):
    """Every device that an op runs on; the cuda case is a gpu test."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device(request.param)


@pytest.fixture
def switching_often():
    """Threads of Python take turns after a microsecond."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_tf32():
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.fixture(autouse=True)
def _own_compiled_variants():
    """Dynamo counts the variants of a function over all tests, and takes no more than eight."""
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.fixture(autouse=True)
def _own_plan_cache(tmp_path, monkeypatch):
    """No sweeps unless a test asks for them, and no table of the user's or the package's."""
    monkeypatch.setenv("SLOPE_EXT_CACHE_DIR", str(tmp_path / "plan_cache"))
    monkeypatch.setattr(_tuned_table, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(plan_cache, "_policy", "off")
    monkeypatch.setattr(_tuned_table, "_tables", {})
    yield
    _tuned_table.forget()
