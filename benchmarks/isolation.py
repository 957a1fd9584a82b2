"""What a worker process costs: one reward scored in this process and in its environment, in turns, 64 images of 512x512.

    texforce rewards install mean-colour
    python -m benchmarks.isolation --out FILE.json

The share of an epoch is taken of the smallest epoch there is: 64 images of the embedded model, drawn and learnt from in the
same turns. An epoch of Stable Diffusion takes minutes, so that there the share is smaller still.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import numpy as np
import torch

from benchmarks.train_speed import TexforceArm
from texforce_cli.files import write_json
from texforce_cli.rewards.environments import OURS, resolve
from texforce_cli.rewards.registry import load_registry
from texforce_cli.rewards.terms import RewardSet, TermSpec
from texforce_cli.testing import pictures
from texforce_cli.workflows.plan import plan

IMAGES, SIZE, BATCH = 64, 512, 8
NAME = "mean-colour"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    arms = _arms()
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(options.rounds + 1):  # the first warms up
        for name, run in arms.items():
            begun = time.perf_counter()
            run()
            if turn:
                seconds[name].append(time.perf_counter() - begun)
        print(f"round {turn} of {options.rounds}", file=sys.stderr, flush=True)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    overhead = medians["isolated"] - medians["in process"]
    share = overhead / (medians["epoch"] + medians["in process"])
    for name, values in seconds.items():
        print(f"{name:<12} {medians[name] * 1000:8.1f} ms ({min(values) * 1000:.1f} to {max(values) * 1000:.1f})")
    print(f"a worker costs {overhead * 1000:.1f} ms for {IMAGES} images of {SIZE}x{SIZE}: {share:.2%} of the epoch")
    if options.out:
        write_json(options.out, {"seconds": seconds, "overhead_seconds": overhead, "share_of_epoch": share})


def _arms() -> dict[str, Callable[[], object]]:
    registry = load_registry()
    info = registry.find(NAME)
    if info.environment is None:
        raise SystemExit(f"install the reward first: texforce rewards install {NAME}")
    sys.path.insert(0, resolve(OURS[NAME]).requirement)
    here = replace(info, environment=None)
    spec = TermSpec(NAME)
    isolated = RewardSet([spec], registry)
    registry.rewards[info.name, info.backend] = here
    inside = RewardSet([spec], registry)
    images = pictures(IMAGES, SIZE)
    flags = {"reward": ["brightness"], "model": "tiny", "device": "cpu", "samples_per_epoch": IMAGES, "epochs": 1}
    trainer = TexforceArm(plan({**flags, "eval_images": 0}))

    def scoring(rewards: RewardSet) -> Callable[[], object]:
        def run() -> list[np.ndarray]:
            return [
                rewards.score(images[i : i + BATCH], ["a cat"] * BATCH, [{}] * BATCH)[NAME]
                for i in range(0, IMAGES, BATCH)
            ]

        return run

    assert np.array_equal(np.concatenate(scoring(inside)()), np.concatenate(scoring(isolated)()))  # type: ignore[arg-type]
    return {"in process": scoring(inside), "isolated": scoring(isolated), "epoch": trainer.run_epoch}


if __name__ == "__main__":
    main()
