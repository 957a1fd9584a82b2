"""Time to the same reward: how long each arm trains until its held-out pictures are as good as those of the plain way.

python benchmarks/time_to_reward.py --out FILE.json --figure FILE.png

The reference is the textbook form of DDPO (PlainDDPO) with the default preset of the embedded model, for its whole budget. The
held-out difference that it ends with is the goal; an arm's time is that of its first measurement at or above the goal, the
reference's as well. Arms take turns epoch by epoch in one process; each trains as long as the reference, but no more images than its
preset says, for there its learning rate ends. Only drawing, scoring and learning count, measuring does not. All arms are measured alike: the
same prompts, noise and number of denoising steps, in fp32, whatever they train with. The file is written after every seed; begun again with
the same options, the seeds in it are not repeated.

The figure has the means of the seeds against images and against seconds. `default` is exact: its gradient is the reference's.
The others are approximations: `window-of-3` draws noise in the first three steps alone and learns from them, `six-steps` draws in six steps
instead of ten, `groups-of-8` compares eight pictures of a prompt instead of sixteen, and `fast` is that preset: the window of three,
a budget of 20 epochs instead of 25, and bf16 where the processor multiplies in it. Seeds 20 and 100 to 103 were looked at while it was sought.
With --guidance 3 there are two more, which learn without a gradient through the unconditional branch: `snapshot` takes its output from drawing,
`base` that of the frozen encoder.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a file, from any folder

from benchmarks.train_speed import TexforceArm, cpu_model
from texforce_cli.algorithms.ddpo import DDPO
from texforce_cli.algorithms.reference import PlainDDPO
from texforce_cli.diffusion.models import load_pipeline
from texforce_cli.files import write_json
from texforce_cli.workflows.assembly import make_adapter, make_policy
from texforce_cli.workflows.heldout import HeldOut
from texforce_cli.workflows.plan import Plan, plan
from texforce_cli.workflows.run_folder import versions

REFERENCE = "plain"
ARMS: dict[str, tuple[type[DDPO], dict[str, Any]]] = {
    REFERENCE: (PlainDDPO, {"preset": "tiny"}),
    "default": (DDPO, {"preset": "tiny"}),
    "window-of-3": (DDPO, {"preset": "tiny", "train_steps": "window:3"}),
    "six-steps": (DDPO, {"preset": "tiny", "steps": 6}),
    "groups-of-8": (DDPO, {"preset": "tiny", "group_size": 8}),
    "fast": (DDPO, {"preset": "fast"}),
    "snapshot": (DDPO, {"preset": "tiny", "uncond_embedding": "snapshot"}),
    "base": (DDPO, {"preset": "tiny", "uncond_embedding": "base"}),
}
GUIDED = ("snapshot", "base")
"""Arms that are the default without guidance."""
RECORDED = (
    "steps",
    "train_steps",
    "total_epochs",
    "samples_per_epoch",
    "group_size",
    "lr",
    "precision",
    "guidance",
    "uncond_embedding",
)
"""What the file says of an arm."""
COLOURS = dict(zip(ARMS, ("#1c1917", "#c2410c", "#1d4ed8", "#0f766e", "#a16207", "#7e22ce", "#be185d", "#4d7c0f")))


@dataclass
class Track:
    """An arm with what it has reached: (images, seconds of training, held-out difference, half its interval)."""

    arm: TexforceArm
    heldout: HeldOut
    budget: int
    """Epochs."""
    seconds: float = 0.0
    images: int = 0
    points: list[tuple[int, float, float, float]] = field(default_factory=list)

    def step(self) -> None:
        """One epoch, then a measurement."""
        epoch = self.arm.run_epoch()
        self.seconds += epoch.seconds["total"]
        self.images += epoch.images
        measuring, trained = self.heldout.policy.adapter, self.arm.algorithm.policy.adapter
        assert measuring and trained
        measuring.load_state_dict(trained.state_dict())
        found = self.heldout.measure(self.arm.epochs, self.images, lambda done, total: None).difference
        self.points.append((self.images, self.seconds, found.mean, found.half_width))

    def reached(self, goal: float) -> float | None:
        """Seconds until the first measurement at or above `goal`."""
        return next((seconds for _, seconds, mean, _ in self.points if mean >= goal), None)


def planned(name: str, seed: int, a: argparse.Namespace) -> Plan:
    """An arm on paper."""
    common = {
        "model": "tiny",
        "device": "cpu",
        "prompts": "animals",
        "reward": [a.reward],
        "seed": seed,
        "guidance": a.guidance,
    }
    return plan({**common, **ARMS[name][1]})


def make_track(name: str, seed: int, a: argparse.Namespace) -> Track:
    """An arm at its beginning, and the pairs that it is measured on."""
    made = planned(name, seed, a)
    arm = TexforceArm(made, ARMS[name][0])
    # measured as the reference draws, whatever the arm trains with
    measured = planned(REFERENCE, seed, a)
    pipeline = load_pipeline(measured.source, device=torch.device("cpu"), precision=measured.config.precision)
    policy = make_policy(pipeline, measured.config, make_adapter(pipeline, made.config))
    heldout = HeldOut(made.prompts, a.pairs, policy, arm.algorithm.rewards, batch=measured.config.micro_batch)
    heldout.measure_base(lambda done, total: None)
    return Track(arm, heldout, made.config.total_epochs)


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seeds", type=int, nargs="+", default=[30, 31, 32])
    p.add_argument("--arms", nargs="+", default=[name for name in ARMS if name not in GUIDED], choices=list(ARMS))
    p.add_argument("--guidance", type=float, default=1.0, help="of every arm, in training and in measuring (1)")
    p.add_argument("--reward", default="jpeg-incompressibility")
    p.add_argument("--epochs", type=int, default=25, help="of the reference (25, its preset's budget)")
    p.add_argument("--pairs", type=int, default=64, help="held-out (prompt, seed) pairs (64)")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--out", type=Path, help="JSON file for everything that was measured")
    p.add_argument("--figure", type=Path, help="PNG of the curves")
    a = p.parse_args(argv)
    if a.guidance == 1 and (same := [name for name in a.arms if name in GUIDED]):
        p.error(f"{' and '.join(same)}: without guidance there is no unconditional branch; give --guidance 3")
    return a


def earlier(path: Path | None, about: dict[str, Any]) -> list[dict[str, Any]]:
    """The runs that a file holds already, if they were made with the same options."""
    if not path or not path.exists():
        return []
    held: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if any(held.get(key) != value for key, value in about.items()):
        sys.exit(f"'{path}' holds runs with other options: name another file")
    return list(held["runs"])


def draw_curves(runs: Sequence[dict[str, Any]], names: Sequence[str], path: Path) -> None:
    """Held-out difference against images, and against seconds of training: the mean of the seeds, and each seed faintly."""
    import numpy as np
    from matplotlib.figure import Figure

    made = Figure(figsize=(10, 4.2), layout="constrained")
    for axes, (column, label) in zip(made.subplots(1, 2, sharey=True), ((0, "images"), (1, "seconds of training"))):
        for name in names:
            curves = [np.array([[0, 0, 0, 0], *run["points"][name]], float) for run in runs]
            for curve in curves:
                axes.plot(curve[:, column], curve[:, 2], color=COLOURS[name], alpha=0.25, linewidth=0.7)
            ends = min(curve[-1, column] for curve in curves)
            places = np.linspace(0, ends, 60)
            mean = np.mean([np.interp(places, curve[:, column], curve[:, 2]) for curve in curves], axis=0)
            axes.plot(places, mean, color=COLOURS[name], linewidth=1.8, label=name)
        axes.axhline(0, color="#57534e", linewidth=0.8)
        axes.set_xlabel(label)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    made.axes[0].set_ylabel("held-out reward above the base")
    made.legend(*made.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(names), frameon=False)
    made.savefig(path, dpi=110)


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    a = arguments(argv)
    torch.set_num_threads(a.threads)
    names = [REFERENCE, *(name for name in a.arms if name != REFERENCE)]
    about = {
        "benchmark": "time_to_reward",
        "reward": a.reward,
        "epochs": a.epochs,
        "pairs": a.pairs,
        "threads": a.threads,
        "cpu": cpu_model(),
        "versions": versions(),
    }
    plans = {name: planned(name, a.seeds[0], a).config for name in names}
    about["arms"] = {
        name: {"algorithm": ARMS[name][0].__name__, **{key: getattr(config, key) for key in RECORDED}}
        for name, config in plans.items()
    }
    about["measured in"] = plans[REFERENCE].precision
    runs = earlier(a.out, about)
    for seed in a.seeds:
        if seed in (run["seed"] for run in runs):
            continue
        tracks = {name: make_track(name, seed, a) for name in names}
        reference = tracks[REFERENCE]
        while len(reference.points) < a.epochs:
            reference.step()
            for track in list(tracks.values())[1:]:  # each gets the seconds that the reference has had, and no more
                while track.seconds < reference.seconds and track.arm.epochs < track.budget:
                    track.step()
            shown = (f"{name} {t.points[-1][2]:+.3f} at {t.seconds:.0f} s" for name, t in tracks.items())
            print(f"seed {seed}: {', '.join(shown)}", file=sys.stderr)
        goal = reference.points[-1][2]
        took = {name: track.reached(goal) for name, track in tracks.items()}
        runs.append({"seed": seed, "goal": goal, "seconds": took, "points": {n: t.points for n, t in tracks.items()}})
        for name in names:
            ratio = f"{took[REFERENCE] / took[name]:.2f} times as fast" if took[name] else "never"  # type: ignore[operator]
            print(f"seed {seed}: {name} reaches {goal:+.3f} after {took[name] or 0:.0f} s: {ratio}")
        if a.out:
            write_json(a.out, {**about, "runs": runs})
    for name in names[1:]:
        ratios = [run["seconds"][REFERENCE] / run["seconds"][name] for run in runs if run["seconds"][name]]
        print(f"{name}: {len(ratios)} of {len(runs)} seeds; ratios {', '.join(f'{r:.2f}' for r in ratios)}", end="")
        print(f"; median {statistics.median(ratios):.2f}" if ratios else "")
    if a.figure:
        draw_curves(runs, names, a.figure)


if __name__ == "__main__":
    main()
