# SPDX-License-Identifier: Apache-2.0
"""Small files of a run that a kill leaves whole or as they were, and JSON that may be damaged."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def replace_text(path: Path, text: str) -> None:
    """Write a file that is there with all of its text, or as it was before."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def read_object(path: Path) -> dict[str, Any] | None:
    """The JSON object that a file holds; None if it holds none, or cannot be read."""
    try:
        return json_object(path.read_bytes())
    except OSError:
        return None


def json_object(text: bytes) -> dict[str, Any] | None:
    """The JSON object that this is; None if it is none."""
    try:
        found = json.loads(text)
    except ValueError:  # no JSON, or no UTF-8
        return None
    return found if isinstance(found, dict) else None
