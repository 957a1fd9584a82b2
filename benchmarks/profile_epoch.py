"""Where an epoch's time goes, and how near it is to the floor: the same U-Net passes at the same batch and nothing else.

python benchmarks/profile_epoch.py --guidance 1 --out FILE.json

The epoch is that of `texforce train` with the tiny preset; the floor runs in turns with it. FLOPs are PyTorch's own count of one
forward and one backward.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a file, from any folder

from benchmarks.epoch import STEPS, TRAINED_STEPS, UPDATES, TexforceArm, cpu_model, texforce_plan
from texforce_cli.diffusion.policy import Policy
from texforce_cli.files import write_json
from texforce_cli.workflows.run_folder import versions


class Floor:
    """The U-Net passes of an epoch: `STEPS` forwards an image and branch, `TRAINED_STEPS` with a backward to the
    text embeddings."""

    def __init__(self, policy: Policy, images: int, micro_batch: int) -> None:
        self.policy, self.images = policy, images
        branches = 2 if policy.guided else 1
        size = micro_batch * branches
        generator = torch.Generator().manual_seed(0)
        self.micro_batch = micro_batch
        self.sample = torch.randn((size, *policy.latent_shape), generator=generator).to(policy.device, policy.dtype)
        self.timestep = torch.full((size,), 500, device=policy.device)
        with torch.no_grad():
            embedded = policy.embed(["a cat"]).table
        self.embeddings = embedded.to(policy.dtype).expand(size, -1, -1).contiguous()
        self.cotangent = torch.ones_like(self.sample)

    def forward(self) -> None:
        """One pass of sampling."""
        with torch.no_grad():
            self._unet(self.embeddings)

    def forward_and_backward(self) -> None:
        """One pass of training."""
        leaf = self.embeddings.detach().requires_grad_()
        torch.autograd.backward([self._unet(leaf)], [self.cotangent])

    def run(self) -> dict[str, float]:
        """Seconds of an epoch's passes, by phase."""
        batches = self.images // self.micro_batch
        return {
            "sampling": self._timed(self.forward, batches * STEPS),
            "training": self._timed(self.forward_and_backward, batches * TRAINED_STEPS),
        }

    def gigaflop(self) -> dict[str, float]:
        """Of one image, all its branches: one pass of sampling and one of training."""
        found = {}
        for name, one in (("sampling", self.forward), ("training", self.forward_and_backward)):
            with FlopCounterMode(display=False) as counted:
                one()
            found[name] = counted.get_total_flops() / self.micro_batch / 1e9
        return found

    def _unet(self, embeddings: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.policy.unet(
            self.sample, self.timestep, encoder_hidden_states=embeddings, return_dict=False
        )[0]
        return result

    def _timed(self, one: Callable[[], None], times: int) -> float:
        start = time.perf_counter()
        for _ in range(times):
            one()
        if self.policy.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--guidance", type=float, default=1.0, help="in sampling and training (1)")
    p.add_argument("--rounds", type=int, default=4, help="measured rounds, after one that warms up (4)")
    p.add_argument("--images", type=int, default=256, help="in an epoch (256)")
    p.add_argument("--micro-batch", type=int, default=32, help="images in one pass (32)")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", type=Path, help="JSON file for everything that was measured")
    a = p.parse_args(argv)
    if a.images % (a.micro_batch * UPDATES):
        p.error(f"--images must be a multiple of {UPDATES} times --micro-batch")
    return a


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    a = arguments(argv)
    torch.set_num_threads(a.threads)
    arm = TexforceArm(texforce_plan(a))
    floor = Floor(arm.algorithm.policy, a.images, a.micro_batch)
    epochs: list[dict[str, float]] = []
    floors: list[dict[str, float]] = []
    for turn in range(a.rounds + 1):
        epochs.append(arm.run_epoch().seconds)
        floors.append(floor.run())
        print(
            f"round {turn}: epoch {epochs[-1]['total']:.2f} s, floor {sum(floors[-1].values()):.2f} s", file=sys.stderr
        )
    ours = {phase: statistics.median(e[phase] for e in epochs[1:]) for phase in epochs[0]}
    least = {phase: statistics.median(f[phase] for f in floors[1:]) for phase in floors[0]}
    least["total"] = statistics.median(sum(f.values()) for f in floors[1:])
    gigaflop = floor.gigaflop()
    work = {
        "sampling": gigaflop["sampling"] * STEPS * a.images,
        "training": gigaflop["training"] * TRAINED_STEPS * a.images,
    }
    work["total"] = sum(work.values())
    result: dict[str, Any] = {
        "benchmark": "profile_epoch",
        **{name: getattr(a, name) for name in ("guidance", "rounds", "images", "micro_batch", "threads")},
        "cpu": cpu_model(),
        "versions": versions(),
        "gigaflop_an_image_and_pass": gigaflop,
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
        speed = f"{work[phase] / least[phase]:.0f}" if phase in work else ""
        print(f"{phase:<10}{seconds:>10.3f}{cells[0]:>10}{cells[1]:>8}{speed:>24}")
    if a.out:
        write_json(a.out, result)


if __name__ == "__main__":
    main()
