# SPDX-License-Identifier: Apache-2.0
"""compute-sanitizer over the tests of the kernels; records it in tests/sanitizer_report.json.

    PYTHONPATH=. python scripts/sanitize.py [--tool memcheck] [--logs DIR]

A report is ours if the kernel is, or if the op library launched it; those make the exit code 1.
So do those of racecheck in spmm_sm90, which are counted apart, "misjudged": initcheck and racecheck
know neither what the TMA unit writes nor the barriers it signals, so somebody has to look. Reports
in kernels of other libraries are counted only, where a tool looks at these. Where they are those of
references and take most of the time (``ours_alone``) it is told to look at kernels whose names have
"slope". Whether memcheck then finds what they do is tried first: one is made to read beyond a
tensor's end.

Left out are tests of large shapes, of what the tools change (memory, threads, graphs, compiling,
how far the host is ahead of the GPU), and those of several devices and of the plan cache: their
kernels run in the others.

========== =========================================== ============================================
tool       looks at                                    with
========== =========================================== ============================================
memcheck   every kernel, of test_native ours; not      every tensor an allocation of its own
           tests of what torch's allocator counts
initcheck  the kernels that select, pack and step, in  as above; a product's result, written by
           tests without a product; so not compress    TMA, would count as never written
           where it adds to a gradient
racecheck  every kernel, of test_native and selection  shared memory
           ours; of test_native each tile with a tail
           and in segments, and products in two
           parts; not chunks_on_two_streams, in which
           all but cuBLAS's kernels are as elsewhere
synccheck  our kernels                                 barriers
========== =========================================== ============================================

Every tool goes over every file of tests in a process of its own, over the longest in several; they
run side by side, dealt out to the GPUs that CUDA_VISIBLE_DEVICES names. One that hangs is killed,
which fails its tool. A tool's record is written when it is through; memcheck of all takes some
minutes of a GPU that does nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from gpu_report import ROOT, source_hash

from slope_ext.env_report import visible_gpus

REPORT = ROOT / "tests" / "sanitizer_report.json"
# Families, the longest first
OWN_PRODUCT = "native"
PRODUCTS = ("spmm", "lowrank", "packed_layer", "weight_grad")
USES = ("linear", "launch", "properties")  # of kernels that are raced in the others
SELECTION = ("adamw", "compress", "prune", "transpose", "pack")
FAMILIES = (OWN_PRODUCT, *PRODUCTS, *USES, *SELECTION)
PACKS_WORDS = "words_of"  # of test_native
EACH_TILE_ONCE = (
    "tail_of_blocks_with_several_tiles and none",
    "segments_of_any_length and 1184",
    "a_product_in_two_parts and 512 and 40",
)
# Large shapes; what is slow, needs the caching allocator, or runs no kernel of ours (the backend
# "reference"; not the tests that compare kernels with references); what looks whether a tensor was
# freed: the tools keep the Python frames of launches; what wants the host back while a stream
# sleeps for 0.1 s: under the tools it is slower than that; and what launches again what others do.
LEFT_OUT = (
    *("4096", "4104", "4097", "random", "exact_step", "many_rows_of_tiles", "large_products"),
    *("graph", "captur", "compile", "overhead", "thread", "leak", "memory", "is_not_held"),
    *("two_streams_share", "for_who_called", "bits_stay"),
    "(reference and not reference_bits and not reference_are)",
)
# test_packed_operand_multiplies of test_pack: what they run are cuSPARSELt's kernels
LEFT_OUT_BY_MISJUDGING = (*LEFT_OUT, "multiplies")
MOST_SECONDS = 1200.0  # of a process; all of them together take seven minutes of a GPU
PYTORCH_ALLOCATES_EACH = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


# What a tool looks at our kernels alone by: mangled names that have a namespace's
OURS_ALONE = ("--kernel-name", "kns=slope")
# Has a kernel of ours read on beyond a tensor's end
PLANTED = """\
import torch
from slope_ext import ops

class Longer:
    def __init__(self, tensor):
        self.__cuda_array_interface__ = {
            "shape": (16, 64), "typestr": "<f2", "data": (tensor.data_ptr(), False), "version": 2
        }

short = torch.ones(8, 8, dtype=torch.float16, device="cuda")
longer = torch.as_tensor(Longer(short), device="cuda")
print(ops.prune_24(longer).sum())
"""


class Job(NamedTuple):
    """Some tests under a tool."""

    tool: Tool
    family: str
    part: str  # of the family's tests, as pytest's --part has it

    @property
    def name(self) -> str:
        return f"{self.tool.name}_{self.family}_{self.part.replace('/', '_of_')}"


@dataclass(frozen=True)
class Tool:
    """How one tool of compute-sanitizer is run."""

    name: str
    options: tuple[str, ...] = ()
    tests: tuple[str, ...] = FAMILIES
    left_out: tuple[str, ...] = LEFT_OUT
    native: tuple[str, ...] = ("test",)  # which tests of the own product; "test": all
    # That share the tests of a family; of one that is not named, one
    processes: dict[str, int] = field(default_factory=lambda: {OWN_PRODUCT: 10}, hash=False)
    ours_alone: tuple[str, ...] = ()  # families in which other kernels are not looked at
    environment: dict[str, str] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        assert {*self.processes, *self.ours_alone} <= {*self.tests}, "a family that is not run"

    def jobs(self) -> list[Job]:
        """What is to be run, a process each."""
        shares = {family: self.processes.get(family, 1) for family in self.tests}
        return [
            Job(self, family, f"{number}/{count}")
            for family, count in shares.items()
            for number in range(count)
        ]

    def run(self, job: Job, log: Path, gpu: str) -> bool:
        """Runs the tool over some tests, output into ``log``; False if one failed."""
        selected = f"not ({' or '.join(self.left_out)})"
        if job.family == OWN_PRODUCT:
            selected += f" and ({' or '.join(f'({tests})' for tests in self.native)})"
        options = [*self.options, *(OURS_ALONE if job.family in self.ours_alone else ())]
        pytest = ["-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "-k", selected]
        pytest += ["--part", job.part, f"tests/test_{job.family}.py"]
        return under(self.name, options, pytest, log, gpu, self.environment) == 0


def under(
    tool: str,
    options: Sequence[str],
    python: Sequence[str],
    log: Path,
    gpu: str,
    environment: dict[str, str],
) -> int:
    """Runs Python with these arguments under a tool, output into ``log``; returns its exit code."""
    command = ["compute-sanitizer", "--tool", tool, "--report-api-errors", "no"]
    command += ["--print-limit", "0", *options, sys.executable, *python]
    env = os.environ | environment | {"CUDA_VISIBLE_DEVICES": gpu}
    with (
        log.open("wb") as out,
        subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        ) as process,
    ):
        running.add(process)
        try:
            return process.wait(MOST_SECONDS)
        except subprocess.TimeoutExpired:
            kill(process)
            print(f"sanitize: killed after {MOST_SECONDS:.0f} s: {log.stem}", flush=True)
            return process.wait()
        except BaseException:  # Ctrl-C: it does not reach that group
            kill(process)
            raise
        finally:
            running.discard(process)


running: set[subprocess.Popen[bytes]] = set()


def kill(process: subprocess.Popen[bytes]) -> None:
    """Ends a tool and what runs under it, which are a process group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def looks_at_ours(log: Path, gpu: str) -> bool:
    """Whether a tool that looks at our kernels alone does: it finds what is planted there."""
    under("memcheck", OURS_ALONE, ["-c", PLANTED], log, gpu, PYTORCH_ALLOCATES_EACH)
    return any(map(is_ours, reports(log.read_text(errors="replace"))))


TOOLS = [
    Tool(
        "memcheck",
        ("--destroy-on-device-error", "kernel"),
        left_out=(*LEFT_OUT, "as_it_lies"),
        ours_alone=(OWN_PRODUCT,),
        environment=PYTORCH_ALLOCATES_EACH,
    ),
    Tool(
        "initcheck",
        tests=(*SELECTION, OWN_PRODUCT),
        left_out=LEFT_OUT_BY_MISJUDGING,
        native=(PACKS_WORDS,),
        processes={},
        environment=PYTORCH_ALLOCATES_EACH,
    ),
    Tool(
        "racecheck",
        tests=(OWN_PRODUCT, *PRODUCTS, *SELECTION),
        left_out=(*LEFT_OUT_BY_MISJUDGING, "chunks_on_two_streams"),
        native=EACH_TILE_ONCE,
        processes={OWN_PRODUCT: 10, "packed_layer": 4, "spmm": 2, "weight_grad": 2, "adamw": 3},
        # Not products by other libraries: not looked at, their kernels read illegal addresses
        ours_alone=(OWN_PRODUCT, *SELECTION),
    ),
    Tool("synccheck", ours_alone=FAMILIES),
]


def reports(text: str) -> list[str]:
    """The reports in a tool's output: runs of lines with its prefix that say where."""
    found = [""]
    for line in text.splitlines():
        said = line.partition("=========")[2]
        if said.strip():
            found[-1] += said + "\n"
        else:
            found.append("")
    return [report for report in found if re.search(r"^ +at |access at ", report, re.M)]


def said(text: str) -> int | None:
    """How many reports the tool says it made; None if it did not come to its end."""
    summary = re.findall(r"SUMMARY: (\d+) (?:error|hazard)", text)
    return None if "Internal Sanitizer Error" in text or not summary else int(summary[-1])


def unclear(texts: dict[str, str]) -> list[str]:
    """Jobs whose output has other reports than the tool says that it made."""
    return [job for job, text in texts.items() if said(text) != len(reports(text))]


def is_misjudged(report: str) -> bool:
    """Whether racecheck reports a kernel that uses the TMA unit."""
    return "Race reported" in report and "spmm_sm90_kernel" in report


def is_ours(report: str) -> bool:
    """Whether a kernel of this project, or one that its op library launched, is reported."""
    if is_misjudged(report):
        return False
    return "slope::" in report or "5slope" in report or "_ops.so" in report


def kernel_of(report: str) -> str:
    """The kernel that a report names first."""
    named = re.search(r"(?:access| +) at (.+?)\+0x", report)
    return named[1] if named else "?"


def result_of(texts: dict[str, str]) -> dict[str, Any]:
    """What a tool's output about each job says, for the record."""
    found: list[str] = []
    tests = 0
    for text in texts.values():
        found += reports(text)
        passed = re.search(r"(\d+) passed", text)
        tests += int(passed[1]) if passed else 0
    ours, misjudged = (sum(map(kind, found)) for kind in (is_ours, is_misjudged))
    others = [report for report in found if not is_ours(report) and not is_misjudged(report)]
    return {
        "tests": tests,
        "reports": ours,
        "reports_misjudged": misjudged,
        "reports_of_others": len(others),
        "others": sorted({kernel_of(report) for report in others}),
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "sources": source_hash(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--tool", action="append", choices=[tool.name for tool in TOOLS], help="default: all"
    )
    parser.add_argument("--logs", type=Path, default=ROOT / "build" / "sanitizer")
    arguments = parser.parse_args()
    arguments.logs.mkdir(parents=True, exist_ok=True)
    tools = [tool for tool in TOOLS if not arguments.tool or tool.name in arguments.tool]
    jobs = [job for tool in tools for job in tool.jobs()]
    logs = {job: arguments.logs / f"{job.name}.txt" for job in jobs}
    gpus = visible_gpus()
    filters = any(tool.ours_alone for tool in tools)
    if filters and not looks_at_ours(arguments.logs / "planted.txt", gpus[0]):
        print("sanitize: what is planted in a kernel of ours was not found")
        return 1
    left = Counter(job.tool for job in jobs)
    failed: dict[Tool, list[str]] = {tool: [] for tool in tools}
    good = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        runs = {
            pool.submit(job.tool.run, job, logs[job], gpus[place % len(gpus)]): job
            for place, job in enumerate(jobs)
        }
        try:
            for run in as_completed(runs):
                tool, name = runs[run].tool, runs[run].name
                if not run.result():
                    failed[tool].append(name)
                left[tool] -= 1
                if left[tool] == 0:
                    texts = {job.name: logs[job].read_text(errors="replace") for job in tool.jobs()}
                    good.append(recorded(tool, texts, failed[tool]))
        except BaseException:  # nor do the threads that wait see it
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(running):
                kill(process)
            raise
    return int(not all(good))


def recorded(tool: Tool, texts: dict[str, str], failed: list[str]) -> bool:
    """Prints what a tool said; records it if tests ran, all passed and nothing is ours."""
    result = result_of(texts)
    failed = [*failed, *unclear(texts)]
    print(f"{tool.name}: {result}{f', failed: {failed}' if failed else ''}", flush=True)
    for text in texts.values():
        for report in [r for r in reports(text) if is_ours(r) or is_misjudged(r)][:5]:
            print(report)
    if failed or result["reports"] + result["reports_misjudged"] > 0 or result["tests"] == 0:
        return False
    record = json.loads(REPORT.read_text()) if REPORT.exists() else {}
    REPORT.write_text(json.dumps(record | {tool.name: result}, indent=1) + "\n")
    return True


if __name__ == "__main__":
    sys.exit(main())
