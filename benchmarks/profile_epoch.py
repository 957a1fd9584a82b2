"""Where an epoch's time goes, and how near it is to the floor: the same U-Net passes at the same batch and nothing else.

python benchmarks/profile_epoch.py --guidance 1 --out FILE.json

The epoch is that of `texforce train` with the tiny preset; the floor runs in turns with it. FLOPs are PyTorch's own count.
Options are those of train_speed.py.
"""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a file, from any folder

from benchmarks.train_speed import TexforceArm, arguments, cpu_model, floor_of, texforce_plan
from texforce_cli.files import write_json
from texforce_cli.workflows.run_folder import versions


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    a = arguments(argv)
    torch.set_num_threads(a.threads)
    arm = TexforceArm(texforce_plan(a))
    floor = floor_of(a, arm.algorithm.policy)
    epochs: list[dict[str, float]] = []
    floors: list[dict[str, float]] = []
    for turn in range(a.rounds + 1):
        epochs.append(arm.run_epoch().seconds)
        floors.append(floor.run())
        print(f"round {turn}: epoch {epochs[-1]['total']:.2f} s, floor {floors[-1]['total']:.2f} s", file=sys.stderr)
    ours = {phase: statistics.median(e[phase] for e in epochs[1:]) for phase in epochs[0]}
    least = {phase: statistics.median(f[phase] for f in floors[1:]) for phase in floors[0]}
    gigaflop = floor.gigaflop()
    result: dict[str, Any] = {
        "benchmark": "profile_epoch",
        **{
            name: getattr(a, name) for name in ("guidance", "steps", "trained_steps", "rounds", "images", "micro_batch")
        },
        "threads": a.threads,
        "cpu": cpu_model(),
        "versions": versions(),
        "gigaflop_an_epoch": gigaflop,
        "seconds": ours,
        "floor_seconds": least,
        "ratio": {phase: ours[phase] / least[phase] for phase in least},
        "rounds_measured": {"epoch": epochs[1:], "floor": floors[1:]},
    }
    print(
        f"guidance {a.guidance:g}, {a.images} images, micro-batch {a.micro_batch}, {a.threads} threads, {cpu_model()}"
    )
    print(f"{'phase':<10}{'epoch s':>10}{'floor s':>10}{'ratio':>8}{'GFLOP/s of the floor':>24}")
    for phase, seconds in ours.items():
        cells = (f"{least[phase]:.3f}", f"{seconds / least[phase]:.3f}") if phase in least else ("", "")
        speed = f"{gigaflop[phase] / least[phase]:.0f}" if phase in gigaflop else ""
        print(f"{phase:<10}{seconds:>10.3f}{cells[0]:>10}{cells[1]:>8}{speed:>24}")
    if a.out:
        write_json(a.out, result)


if __name__ == "__main__":
    main()
