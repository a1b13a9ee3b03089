# SPDX-License-Identifier: Apache-2.0
"""What 16-bit moments cost a small pretraining run in loss, on any device.

    PYTHONPATH=.:benchmarks python benchmarks/moments.py --out benchmarks/results/cpu [--steps 400]

slope-pretrain --demo (a LLaMA of 4M parameters on Shakespeare, adapters in the last 1 % of the
steps) with bf16 parameters; for each decay of the second moment and each seed

masters         fp32 copies of the parameters and fp32 moments
fp32 moments    as it is
bf16 moments    --half-moments

Records: the validation loss at the end, median and range (largest less smallest) over the seeds;
baseline: fp32 moments.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

import harness
from slope_ext.recipes.arguments import DEMO

MODEL = DEMO["model"]
BASELINE = "fp32 moments"
OPTIONS = {"masters": ["--master-weights"], BASELINE: [], "bf16 moments": ["--half-moments"]}
DECAYS = [0.95, 0.999]
Case = tuple[int, float, str]  # seed, decay, method


def loss_of(case: Case, steps: int, folder: Path) -> float:
    """Validation loss at the end of a run."""
    seed, decay, method = case
    output = folder / f"{method}-{decay}-{seed}"
    command = [sys.executable, "-m", "slope_ext.recipes.pretrain", "--demo", "--no-autocast"]
    command += ["--dtype", "bfloat16", "--beta2", str(decay), "--seed", str(seed)]
    command += ["--steps", str(steps), "--eval-interval", str(steps), "--save-interval", str(steps)]
    command += [*OPTIONS[method], "--output-dir", str(output)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    loss = json.loads((output / "summary.json").read_text())["valid_loss"]
    print(f"{method}, beta2 = {decay}, seed {seed}: {loss:.4f}", flush=True)
    return float(loss)


def records_of(losses: dict[Case, float], steps: int) -> list[harness.Record]:
    """Records of the losses."""

    def over_seeds(decay: float, method: str) -> tuple[float, float]:
        found = [loss for case, loss in losses.items() if case[1:] == (decay, method)]
        return round(statistics.median(found), 4), round(max(found) - min(found), 4)

    records = []
    for decay, method in itertools.product(DECAYS, OPTIONS):
        ours, theirs = over_seeds(decay, method), over_seeds(decay, BASELINE)
        records.append(
            harness.record_of(
                bench="moments",
                case=f"{MODEL};beta2={decay};{method}",
                dtype=torch.bfloat16,
                tokens=steps * DEMO["batch_size"] * DEMO["seq_len"],
                metric="validation loss",
                unit="nats",
                ours=ours,
                baseline=BASELINE,
                theirs=theirs,
                ratio=round(theirs[0] / ours[0], 4),
            )
        )
    return records


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs side by side")
    parser.add_argument("--out", type=Path, help="folder of the records (default: results/<gpu>)")
    arguments = parser.parse_args()
    harness.environment()  # of the tree as it is now: the runs take long
    cases = list(itertools.product(range(arguments.seeds), DECAYS, OPTIONS))
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(arguments.jobs) as pool:
        found = pool.map(lambda case: loss_of(case, arguments.steps, Path(folder)), cases)
        losses = dict(zip(cases, found, strict=True))

    records = records_of(losses, arguments.steps)
    for record in records:
        print(f"{record.case}: {record.value:.4f}, range {record.spread:.4f}")
    harness.save(records, "moments", arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
