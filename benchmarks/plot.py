# SPDX-License-Identifier: Apache-2.0
"""Writes the benchmark tables of README.md from the committed records.

    python benchmarks/plot.py            rewrite the tables
    python benchmarks/plot.py --check    exit 1 if a table is not what the records say

A table stands between ``<!-- records: GPU/FILE DTYPE -->`` and ``<!-- /records -->``, where
GPU/FILE.json lies under benchmarks/results; it shows the records of that dtype.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parent.parent / "README.md"
BLOCK = re.compile(r"(<!-- records: (\S+) (\w+) -->\n).*?(<!-- /records -->)", re.DOTALL)


def table(records: list[dict[str, Any]]) -> str:
    """A Markdown table with a line per record, and where and when they were measured."""
    lines = [
        "| op | weight | time | limit | of limit | against |",
        "|---|---|---:|---:|---:|---|",
    ]
    for r in records:
        time = f"{r['value']:.1f} ± {r['spread']:.1f} {r['unit']}"
        lines.append(
            f"| {r['bench']} | {r['case']} | {time} | {r['limit']:.1f} {r['unit']} "
            f"| {r['limit_fraction']:.0%} | {r['ratio']:.1f}x {r['baseline']} |"
        )
    r = records[0]
    where = f"{r['dtype']}, {r['gpu']}, torch {r['torch']}, {r['date']}, commit {r['commit']}"
    return "\n".join(lines) + f"\n\n{where}. Medians ± interquartile range.\n"


def render(text: str) -> str:
    """``text`` with every table made anew from its records."""

    def replace(match: re.Match[str]) -> str:
        records = json.loads((RESULTS / f"{match[2]}.json").read_text())
        return match[1] + table([r for r in records if r["dtype"] == match[3]]) + match[4]

    return BLOCK.sub(replace, text)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    check = parser.parse_args().check
    current = README.read_text()
    rendered = render(current)
    if check:
        if rendered != current:
            print("README.md: a table differs from its records; run python benchmarks/plot.py")
        return int(rendered != current)
    README.write_text(rendered)
    return 0


if __name__ == "__main__":
    sys.exit(main())
