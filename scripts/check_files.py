# SPDX-License-Identifier: Apache-2.0
"""Checks the files given as arguments: line ends, size, licence line. Prints what is wrong."""

from __future__ import annotations

import sys
from pathlib import Path

MAX_BYTES = 1_000_000
LICENCE = "SPDX-License-Identifier: Apache-2.0"
LICENSED = {".py", ".h", ".cpp", ".cu", ".cuh"}


def problems(path: Path) -> list[str]:
    """One line for each thing that is wrong with a file."""
    data = path.read_bytes()
    found = []
    if len(data) > MAX_BYTES:
        found.append(f"{path}: {len(data)} bytes, more than {MAX_BYTES}")
    if b"\0" in data or not data:
        return found  # binary or empty
    lines = data.split(b"\n")
    for number, line in enumerate(lines, 1):
        if line != line.rstrip():
            found.append(f"{path}:{number}: white space at the end of the line")
    if lines[-1] or (len(lines) > 2 and not lines[-2]):
        found.append(f"{path}: must end in exactly one newline")
    if path.suffix in LICENSED and LICENCE.encode() not in lines[0]:
        found.append(f"{path}:1: must say {LICENCE}")
    return found


if __name__ == "__main__":
    every = [problem for name in sys.argv[1:] for problem in problems(Path(name))]
    print("\n".join(every), end="\n" if every else "")
    sys.exit(bool(every))
