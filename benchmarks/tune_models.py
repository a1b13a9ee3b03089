# SPDX-License-Identifier: Apache-2.0
"""Tunes the layers of the models in model_shapes.py, forward and backward, for a table that ships.

    PYTHONPATH=.:benchmarks python benchmarks/tune_models.py --out slope_ext/tuned/h200.json

Plans and the own product are timed against each other, so that "auto" goes by measured times on
such a GPU from the first call on; before that the kernels of the own product, with --kernels these
alone. What the table at --out has of other shapes, token counts and environments stays. Some
minutes; several GPUs can share the work, each with --part I/N.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import harness
import model_shapes
from slope_ext import SLoPeLinear, plan_cache
from slope_ext.ops.spmm import Backend

TOKENS = [8, 64, 512, 2048, 8192, 16384]
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="the table to merge into")
    parser.add_argument("--part", type=harness.part_of, default=(0, 1), metavar="I/N")
    parser.add_argument("--kernels", action="store_true", help="only kernels of the own product")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    arguments = parser.parse_args()
    number, count = arguments.part
    dtypes = [DTYPES[name] for name in arguments.dtypes]
    work = [(shape, dtype) for shape in model_shapes.users() for dtype in dtypes]
    backend: Backend = "native" if arguments.kernels else "auto"
    with harness.own_table(None):
        for (out_features, in_features), dtype in work[number::count]:
            layer = SLoPeLinear(
                in_features, out_features, bias=False, backend=backend, device="cuda", dtype=dtype
            )
            for entry in plan_cache.tune(layer, arguments.tokens):
                own = entry.native_seconds
                print(
                    f"{entry.key}: id {entry.id} {1e6 * entry.seconds:.1f} us, own product "
                    f"{'not tried' if own is None else f'{1e6 * own:.1f} us'}",
                    flush=True,
                )
            plan_cache.export_table(arguments.out)
        for line in plan_cache.tuned_kernels():
            usual = f"{1e6 * line.usual_seconds:.1f} us untuned"
            print(f"{line.key}: {line.kernels} {1e6 * line.seconds:.1f} us, {usual}")


if __name__ == "__main__":
    main()
