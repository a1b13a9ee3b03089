# SPDX-License-Identifier: Apache-2.0
"""What 16-bit moments cost a small pretraining run in loss, on any device.

    PYTHONPATH=.:benchmarks python benchmarks/moments.py --out benchmarks/results/cpu [--steps 1000]

slope-pretrain --demo (a LLaMA of 5M parameters on Shakespeare, adapters in the last 1 % of the
steps) with bf16 parameters; for each decay of the second moment and each seed

masters         fp32 copies of the parameters and fp32 moments
fp32 moments    as it is
bf16 moments    --half-moments

Records: the validation loss at the end, mean and standard deviation over the seeds; baseline: fp32
moments.
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

MODEL = "llama-demo"
TOKENS_OF_STEP = 8 * 128
OPTIONS = {"masters": ["--master-weights"], "fp32 moments": [], "bf16 moments": ["--half-moments"]}
DECAYS = [0.95, 0.999]


def loss_of(method: str, decay: float, seed: int, steps: int, folder: Path) -> float:
    """Validation loss at the end of a run."""
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


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs side by side")
    parser.add_argument("--out", type=Path, help="folder of the records (default: results/<gpu>)")
    arguments = parser.parse_args()
    cases = list(itertools.product(range(arguments.seeds), DECAYS, OPTIONS))
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(arguments.jobs) as pool:
        found = pool.map(
            lambda case: loss_of(case[2], case[1], case[0], arguments.steps, Path(folder)), cases
        )
        losses = dict(zip(cases, found, strict=True))

    def summary(method: str, decay: float) -> tuple[float, float]:
        of_seeds = [losses[seed, decay, method] for seed in range(arguments.seeds)]
        return round(statistics.mean(of_seeds), 4), round(statistics.stdev(of_seeds), 4)

    records = []
    for decay, method in itertools.product(DECAYS, OPTIONS):
        ours, theirs = summary(method, decay), summary("fp32 moments", decay)
        records.append(
            harness.record_of(
                bench="moments",
                case=f"{MODEL};beta2={decay};{method}",
                dtype=torch.bfloat16,
                tokens=arguments.steps * TOKENS_OF_STEP,
                metric="validation loss",
                unit="nats",
                ours=ours,
                baseline="fp32 moments",
                theirs=theirs,
                ratio=round(theirs[0] / ours[0], 4),
            )
        )
        print(harness.line(records[-1]))
    harness.save(records, "moments", arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
