"""Where an epoch's time goes, and how near it is to the floor: the same U-Net passes at the same batch and nothing else.

python benchmarks/profile_epoch.py --guidance 1 --out FILE.json

The epoch is that of `texforce train` with the tiny preset; the floor runs in turns with it. FLOPs are PyTorch's own count (matrix
products, convolutions and attention), those of the epoch counted in one more that is not timed.
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
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a file, from any folder

from benchmarks.train_speed import TexforceArm, cpu_model, floor_of, parsed, parser, texforce_plan
from texforce_cli.files import write_json
from texforce_cli.workflows.run_folder import versions


def gigaflop_of(arm: TexforceArm) -> dict[str, float]:
    """Of one epoch, by phase: what was counted when a phase reports progress is of this phase."""
    found: dict[str, float] = {}
    with FlopCounterMode(display=False) as counted:

        def progress(phase: str, done: int, total: int, **reward: float) -> None:
            new = counted.get_total_flops() / 1e9 - sum(found.values())
            found[phase] = found.get(phase, 0.0) + new

        arm.algorithm.progress = progress
        arm.run_epoch()
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    a = parsed(parser(__doc__), argv)
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
    counted, least_counted = gigaflop_of(arm), floor.gigaflop()
    result: dict[str, Any] = {
        "benchmark": "profile_epoch",
        **{
            name: getattr(a, name) for name in ("guidance", "steps", "trained_steps", "rounds", "images", "micro_batch")
        },
        "threads": a.threads,
        "cpu": cpu_model(),
        "versions": versions(),
        "gigaflop": counted,
        "floor_gigaflop": least_counted,
        "seconds": ours,
        "floor_seconds": least,
        "ratio": {phase: ours[phase] / least[phase] for phase in least},
        "rounds_measured": {"epoch": epochs[1:], "floor": floors[1:]},
    }
    print(
        f"guidance {a.guidance:g}, {a.images} images, micro-batch {a.micro_batch}, {a.threads} threads, {cpu_model()}"
    )
    heads = ("epoch s", "floor s", "ratio", "GFLOP", "of the floor", "GFLOP/s")
    print(f"{'phase':<10}" + "".join(f"{head:>13}" for head in heads))
    for phase, seconds in ours.items():
        cells = [f"{seconds:.3f}"]
        cells += [f"{least[phase]:.3f}", f"{seconds / least[phase]:.3f}"] if phase in least else ["", ""]
        cells += [f"{of[phase]:.0f}" if phase in of else "" for of in (counted, least_counted)]
        cells.append(f"{counted[phase] / seconds:.0f}" if counted.get(phase) else "")
        print(f"{phase:<10}" + "".join(f"{cell:>13}" for cell in cells))
    if a.out:
        write_json(a.out, result)


if __name__ == "__main__":
    main()
