# SPDX-License-Identifier: Apache-2.0
"""Runs the gpu tests and records the run in tests/gpu_report.json, or checks that record.

    PYTHONPATH=. python scripts/gpu_report.py [pytest options]   run the gpu tests, write the record
    python scripts/gpu_report.py --check      exit 1 if the record is missing, failed or stale

With --processes N, N of them share the tests and what they print comes when all are through.
A run that selects tests (-k, -m, paths) writes no record. "measured" is what tests gave to
record_property.

The record holds why tests were skipped, and a hash of all that a GPU test depends on: csrc/,
slope_ext/ with the tables it ships, tests/, the build files. It is stale when those changed since
the run.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
REPORT = ROOT / "tests" / "gpu_report.json"
COUNTS = ("tests", "failures", "errors", "skipped")
_PASSED, _FAILED, _NO_TESTS = 0, 1, 5  # exit codes of pytest
SOURCES = (
    *("csrc/**/*", "cmake/*", "CMakeLists.txt", "setup.py"),
    *("slope_ext/**/*.py", "slope_ext/tuned/*.json", "tests/*.py"),
)


def source_hash() -> str:
    """sha256 over names and contents of the sources, 16 hex digits."""
    digest = hashlib.sha256()
    for path in sorted({p for pattern in SOURCES for p in ROOT.glob(pattern) if p.is_file()}):
        relative = path.relative_to(ROOT).as_posix()
        digest.update(relative.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def run(processes: int, pytest_arguments: list[str]) -> int:
    """Runs the gpu tests, shared by so many processes; returns an exit code of pytest, the worst.

    Each process sees all GPUs, another one first.
    """
    import torch

    from slope_ext.env_report import build_info, visible_gpus

    if not torch.cuda.is_available():
        print("gpu_report: torch sees no CUDA device", file=sys.stderr)
        return 2
    gpus = visible_gpus()
    with tempfile.TemporaryDirectory() as folder:
        junits = [Path(folder) / f"{i}.xml" for i in range(processes)]

        def run_part(i: int) -> tuple[int, str]:
            command = [sys.executable, "-m", "pytest", "-m", "gpu", f"--junitxml={junits[i]}"]
            command += [f"--part={i}/{processes}", *pytest_arguments]
            first = i % len(gpus)
            order = ",".join(gpus[first:] + gpus[:first])
            env = os.environ | {"CUDA_VISIBLE_DEVICES": order}
            output = None if processes == 1 else subprocess.PIPE
            ended = subprocess.run(command, cwd=ROOT, env=env, stdout=output, text=True)
            return ended.returncode, ended.stdout or ""

        with ThreadPoolExecutor(processes) as pool:
            ended = list(pool.map(run_part, range(processes)))
        if processes > 1:
            print(*(output for _, output in ended), sep="\n")
        codes = {code for code, _ in ended}
        broken = codes - {_PASSED, _FAILED, _NO_TESTS}  # of signals too
        if broken or not all(junit.exists() for junit in junits):
            print(f"gpu_report: pytest ended with {sorted(codes)}, no record written")
            return next(iter(broken), _FAILED)
        code = max(codes - {_NO_TESTS}, default=_NO_TESTS)
        suites = [_suite(junit) for junit in junits]
        counts = {key: sum(int(suite.attrib[key]) for suite in suites) for key in COUNTS}
        skips = [skip for suite in suites for skip in suite.iter("skipped")]
        measured = {
            p.attrib["name"]: p.attrib["value"]
            for suite in suites
            for p in suite.iter("property")
            if not p.attrib["name"].startswith("hypothesis")  # its own, of every test
        }
    if any(_selects(argument) for argument in pytest_arguments):
        print("gpu_report: tests were selected, no record written")
        return code
    record = {
        "passed": counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"],
        "failed": counts["failures"] + counts["errors"],
        "skipped": counts["skipped"],
        "skipped_because": Counter(sorted(s.attrib["message"] or s.attrib["type"] for s in skips)),
        "measured": measured,
        "gpu": torch.cuda.get_device_name(),
        "gpus": torch.cuda.device_count(),
        "capability": ".".join(map(str, torch.cuda.get_device_capability())),
        "torch": torch.__version__,
        "build": build_info(),
        "date": datetime.date.today().isoformat(),
        "sources": source_hash(),
    }
    REPORT.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))
    return code


def _selects(argument: str) -> bool:
    """Whether pytest runs less than all GPU tests by it."""
    option = argument.startswith(("-k", "-m", "--part"))
    return option or (ROOT / argument.split("::")[0]).exists()


def check() -> int:
    """Prints what is wrong with the record, if anything; returns 0 or 1."""
    if not REPORT.exists():
        print(f"{REPORT.relative_to(ROOT)} is missing: run `make test-gpu` on a machine with a GPU")
        return 1
    record: dict[str, Any] = json.loads(REPORT.read_text())
    if record["failed"] or not record["passed"]:
        print(f"the recorded GPU run has {record['failed']} failures, {record['passed']} passes")
        return 1
    if record["sources"] != source_hash():
        print(f"the recorded GPU run ({record['date']}) is of other sources: run `make test-gpu`")
        return 1
    print(f"{record['passed']} GPU tests passed on {record['gpu']}, {record['date']}")
    return 0


def _suite(junit: Path) -> ET.Element:
    suite = ET.parse(junit).getroot().find("testsuite")
    assert suite is not None
    return suite


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="check the record, run nothing")
    parser.add_argument("--processes", type=int, default=1, help="that share the tests")
    arguments, rest = parser.parse_known_args()
    return check() if arguments.check else run(arguments.processes, rest)


if __name__ == "__main__":
    sys.exit(main())
