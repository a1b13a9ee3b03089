# SPDX-License-Identifier: Apache-2.0
"""Runs the gpu tests and records the run in tests/gpu_report.json, or checks that record.

    PYTHONPATH=. python scripts/gpu_report.py [pytest options]   run the gpu tests, write the record
    python scripts/gpu_report.py --check      exit 1 if the record is missing, failed or stale

A run that selects tests (-k, -m, paths) writes no record. "measured" is what tests gave to
record_property.

The record holds a hash of every source that a GPU test depends on: csrc/, slope_ext/, tests/, the
build files. It is stale when those changed since the run.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
REPORT = ROOT / "tests" / "gpu_report.json"
COUNTS = ("tests", "failures", "errors", "skipped")
SOURCES = ("csrc/**/*", "cmake/*", "CMakeLists.txt", "setup.py", "slope_ext/**/*.py", "tests/*.py")


def source_hash() -> str:
    """sha256 over names and contents of the sources, 16 hex digits."""
    digest = hashlib.sha256()
    for path in sorted({p for pattern in SOURCES for p in ROOT.glob(pattern) if p.is_file()}):
        relative = path.relative_to(ROOT).as_posix()
        digest.update(relative.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def run(pytest_arguments: list[str]) -> int:
    """Runs the gpu tests; returns pytest's exit code."""
    import torch

    from slope_ext.env_report import build_info

    if not torch.cuda.is_available():
        print("gpu_report: torch sees no CUDA device", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        junit = Path(folder) / "junit.xml"
        command = [sys.executable, "-m", "pytest", "-m", "gpu", f"--junitxml={junit}"]
        code = subprocess.run([*command, *pytest_arguments], cwd=ROOT, check=False).returncode
        if not junit.exists():
            return code
        suite = _suite(junit)
        counts = {key: int(suite.attrib[key]) for key in COUNTS}
        measured = {
            p.attrib["name"]: p.attrib["value"]
            for p in suite.iter("property")
            if not p.attrib["name"].startswith("hypothesis")  # its own, of every test
        }
    if any(a[:2] in ("-k", "-m") or (ROOT / a.split("::")[0]).exists() for a in pytest_arguments):
        print("gpu_report: tests were selected, no record written")
        return code
    record = {
        "passed": counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"],
        "failed": counts["failures"] + counts["errors"],
        "skipped": counts["skipped"],
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
    arguments, rest = parser.parse_known_args()
    return check() if arguments.check else run(rest)


if __name__ == "__main__":
    sys.exit(main())
