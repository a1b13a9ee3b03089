# SPDX-License-Identifier: Apache-2.0
"""Tunes the layers of the models in model_shapes.py, forward and backward, for a table that ships.

    PYTHONPATH=.:benchmarks python benchmarks/tune_models.py --out slope_ext/tuned/h200.json

Plans and the own product are timed against each other, so that "auto" goes by measured times on
such a GPU from the first call on. What the table at --out has of other shapes, token counts and
environments stays. Some minutes; several GPUs can share the work, each with --part I/N.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import harness
import model_shapes
from slope_ext import SLoPeLinear, plan_cache

TOKENS = [8, 64, 512, 2048, 8192, 16384]
DTYPES = [torch.bfloat16, torch.float16]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="the table to merge into")
    parser.add_argument("--part", type=harness.part_of, default=(0, 1), metavar="I/N")
    arguments = parser.parse_args()
    number, count = arguments.part
    work = [(shape, dtype) for shape in model_shapes.users() for dtype in DTYPES]
    with harness.own_table(None):
        for (out_features, in_features), dtype in work[number::count]:
            layer = SLoPeLinear(in_features, out_features, bias=False, device="cuda", dtype=dtype)
            for entry in plan_cache.tune(layer, TOKENS):
                own = entry.native_seconds
                print(
                    f"{entry.key}: id {entry.id} {1e6 * entry.seconds:.1f} us, own product "
                    f"{'not tried' if own is None else f'{1e6 * own:.1f} us'}",
                    flush=True,
                )
            plan_cache.export_table(arguments.out)


if __name__ == "__main__":
    main()
