# SPDX-License-Identifier: Apache-2.0
"""scripts/sanitize.py: what it makes of the output of compute-sanitizer."""

import importlib
import json
import os
import signal
import sys
import time
import types
from pathlib import Path

import pytest

import conftest

SCRIPTS = Path(__file__).parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))
try:
    sanitize = importlib.import_module("sanitize")
finally:
    sys.path.remove(str(SCRIPTS))

READ = """\
========= Invalid __global__ read of size 16 bytes
=========     at {kernel}+0x3390
=========     by thread (32,0,0) in block (0,0,0)
=========     Saved host backtrace up to driver entry point at kernel launch time
=========         Host Frame: {caller} [0x1376c] in {library}
=========
"""
RACE = """\
..s..========= Error: Race reported between Write access at {kernel}+0x4940
=========     and Read access at {kernel}+0x6ee0 [762 hazards]
=========
"""
OURS = "void slope::tile_kernel<(slope::FloatKind)1>(slope::WeightParams)"


def output(*reports, summary="ERROR SUMMARY: {} errors"):
    text = "========= COMPUTE-SANITIZER\n...\n" + "".join(reports) + "17 passed in 3.2s\n"
    return text + f"========= {summary.format(len(reports))}\n"


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    monkeypatch.setattr(sanitize.torch.cuda, "get_device_name", lambda: "GPU")


def counts(text):
    result = sanitize.result_of({"spmm": text})
    return result["tests"], result["reports"], result["reports_of_others"]


@pytest.mark.parametrize("report", [READ, RACE])
def test_kernels_of_others_are_named(report):
    text = output(report.format(kernel="nvjet_tst_64x8", caller="f", library="libcublasLt.so"))
    if report is RACE:
        text = text.replace("ERROR SUMMARY: 1 errors", "RACECHECK SUMMARY: 1 hazard displayed")
    assert sanitize.result_of({"spmm": text})["others"] == ["nvjet_tst_64x8"]


def test_a_clean_run():
    assert counts(output()) == (17, 0, 0)


def test_families_add_up():
    ours = READ.format(kernel=OURS, caller="cudaLaunchKernel", library="libcudart.so.13")
    result = sanitize.result_of({"spmm": output(ours), "pack": output(ours), "prune": output()})
    assert (result["tests"], result["reports"]) == (51, 2)


def test_every_test_of_a_family_is_in_one_part():
    parts = [job.part for job in sanitize.TOOLS[0].jobs() if job.family == sanitize.OWN_PRODUCT]
    assert len(parts) > 1
    dealt = []
    for part in parts:
        tests = list(range(11))
        config = types.SimpleNamespace(getoption=lambda _, part=part: part)
        conftest.pytest_collection_modifyitems(config, tests)
        dealt += tests
    assert sorted(dealt) == list(range(11))


def test_what_a_tool_said_is_recorded_if_it_is_clean(tmp_path, monkeypatch):
    monkeypatch.setattr(sanitize, "REPORT", tmp_path / "report.json")
    memcheck, initcheck, racecheck, _ = sanitize.TOOLS
    ours = READ.format(kernel=OURS, caller="cudaLaunchKernel", library="libcudart.so.13")
    assert sanitize.recorded(memcheck, {"a": output(), "b": output()}, [])
    assert not sanitize.recorded(initcheck, {"a": output(ours)}, [])
    assert not sanitize.recorded(racecheck, {"a": output()}, ["a"])
    record = json.loads(sanitize.REPORT.read_text())
    assert {tool: result["tests"] for tool, result in record.items()} == {"memcheck": 34}


def test_reports_of_our_kernels_and_of_what_our_library_launched_are_ours():
    ours = READ.format(kernel=OURS, caller="cudaLaunchKernel", library="libcudart.so.13")
    launched = READ.format(kernel="gemm", caller="slope::SpmmPlan::run", library="_ops.so")
    theirs = READ.format(kernel="gemm", caller="cublasLtMatmul", library="libcublasLt.so.13")
    assert counts(output(ours, launched, theirs)) == (17, 2, 1)


def test_races():
    summary = "RACECHECK SUMMARY: {} hazards displayed (2 errors, 0 warnings)"
    races = (RACE.format(kernel=OURS), RACE.format(kernel="gemm"))
    assert counts(output(*races, summary=summary)) == (17, 1, 1)


def test_races_where_tma_writes_count_apart_and_fail_too(tmp_path, monkeypatch):
    race = RACE.format(kernel="void slope::sm90::spmm_sm90_kernel<(slope::FloatKind)1>")
    assert counts(output(race)) == (17, 0, 0)
    assert sanitize.result_of({"spmm": output(race)})["reports_misjudged"] == 1
    monkeypatch.setattr(sanitize, "REPORT", tmp_path / "report.json")
    summary = "RACECHECK SUMMARY: {} hazards displayed (1 errors, 0 warnings)"
    assert not sanitize.recorded(sanitize.TOOLS[2], {"spmm": output(race, summary=summary)}, [])
    read = READ.format(kernel="slope::sm90::spmm_sm90_kernel", caller="", library="_ops.so")
    assert counts(output(read)) == (17, 1, 0)


@pytest.mark.parametrize(
    "text",
    [
        "17 passed in 3.2s\n",
        output() + "========= Internal Sanitizer Error: failed\n",
        output(summary="ERROR SUMMARY: 2 errors"),
    ],
    ids=["no summary", "internal error", "reports of a form that is not known"],
)
def test_what_cannot_be_trusted_is_not_recorded(text, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sanitize, "REPORT", tmp_path / "report.json")
    memcheck = sanitize.TOOLS[0]
    assert not sanitize.recorded(memcheck, {"pack": output(), "spmm": text}, [])
    assert "failed: ['spmm']" in capsys.readouterr().out
    assert not sanitize.REPORT.exists()


def is_alive(child):
    try:
        return Path(f"/proc/{child}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def test_what_hangs_is_killed_with_its_children(tmp_path, monkeypatch, capsys):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f"#!/bin/sh\nsleep 60 &\necho $! > {tmp_path}/child\necho begun\nwait\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(sanitize, "MOST_SECONDS", 1.0)
    log = tmp_path / "log"
    assert sanitize.under("racecheck", (), ["-c", ""], log, "0", {}) == -signal.SIGKILL
    assert log.read_text() == "begun\n"
    assert capsys.readouterr().out == "sanitize: killed after 1 s: log\n"
    child, deadline = (tmp_path / "child").read_text().strip(), time.monotonic() + 10
    while is_alive(child):
        assert time.monotonic() < deadline
    assert not sanitize.running
