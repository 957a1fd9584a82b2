"""One training epoch on the embedded model (64x64 pictures), arm against arm in turns: seconds by phase, and rewards.

python benchmarks/train_speed.py --guidance 1 --trl-python ENV/bin/python --out FILE.json
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a file, from any folder

from benchmarks.floor import Floor
from texforce_cli import tiny
from texforce_cli.algorithms.ddpo import DDPO
from texforce_cli.algorithms.reference import PlainDDPO
from texforce_cli.config import TrainConfig
from texforce_cli.devices import cpu_computes_bf16, keep_memory, same_bits
from texforce_cli.diffusion.models import load_pipeline
from texforce_cli.diffusion.policy import Policy
from texforce_cli.files import write_json
from texforce_cli.workflows.assembly import make_adapter, make_algorithm, make_optimisation, make_policy, make_rewards
from texforce_cli.workflows.plan import Plan, plan
from texforce_cli.workflows.run_folder import versions

UPDATES = 4
WINDOW = 3
"""Steps that the window arm trains."""
PHASES = ("sampling", "rewards", "training", "total")
COMPARED = (
    ("plain", "texforce"),
    ("plain", "texforce-snapshot"),
    ("plain", "texforce-window"),
    ("plain", "texforce-bf16"),
    ("trl", "texforce-unet"),
    ("trl-bf16", "texforce-unet-bf16"),
)
PLAIN = "plain"
ARMS = (
    "texforce",
    "texforce-snapshot",
    "texforce-window",
    "texforce-bf16",
    PLAIN,
    "texforce-unet",
    "texforce-unet-bf16",
    "trl",
    "trl-bf16",
)
TRL_SCRIPT = Path(__file__).parent / "trl_ddpo" / "run.py"


@dataclass(frozen=True)
class Epoch:
    """What one epoch took and drew. `reward` is the mean over its pictures, which are drawn before its updates."""

    seconds: dict[str, float]
    images: int
    updates: int
    reward: float


class Arm(Protocol):
    """A trainer that goes on learning from epoch to epoch and is idle in between."""

    settings: dict[str, Any]

    def run_epoch(self) -> Epoch:
        """Draw, score and learn once."""
        ...


class TexforceArm:
    """The parts of `texforce train`, with `kind` in place of its algorithm."""

    def __init__(self, made: Plan, kind: type[DDPO] = DDPO) -> None:
        config, prompts = made.config, made.prompts.seen
        same_bits()  # as a run does
        pipeline = load_pipeline(made.source, device=torch.device(config.device), precision=config.precision)
        keep_memory()
        adapter = make_adapter(pipeline, config)
        policy, rewards = make_policy(pipeline, config, adapter), make_rewards(config, made.registry)
        self.optimisation = make_optimisation(config, policy)
        usual = make_algorithm(
            config, policy, rewards, self.optimisation, prompts, progress=lambda *done, **reward: None
        )
        assert isinstance(usual, DDPO)
        self.algorithm = kind(
            policy, rewards, self.optimisation, prompts, usual.settings, seed=config.seed, progress=usual.progress
        )
        names = "train precision train_steps guidance uncond_embedding lr rank advantages group_size clip_range seed".split()
        self.settings: dict[str, Any] = {name: getattr(config, name) for name in names}
        self.epochs = 0

    def run_epoch(self) -> Epoch:
        """One epoch in this process."""
        before, start = self.optimisation.updates, time.perf_counter()
        report = self.algorithm.run_epoch(self.epochs)
        seconds: dict[str, float] = {"total": time.perf_counter() - start} | {
            str(k): v for k, v in report.seconds.items()
        }
        self.epochs += 1
        return Epoch(seconds, report.images, self.optimisation.updates - before, report.reward_mean)


class TrlArm:
    """TRL's DDPOTrainer in an environment of its own: a process that waits on its stdin between epochs."""

    def __init__(self, python: Path, arguments: Sequence[str], log: Path, stack: contextlib.ExitStack) -> None:
        self.log = log
        self.process = subprocess.Popen(
            [str(python), str(TRL_SCRIPT), "--serve", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stack.enter_context(self.log.open("w", encoding="utf-8")),
            encoding="utf-8",
        )
        stack.callback(self._end)
        self.settings: dict[str, Any] = {}
        self.versions: dict[str, str] = {}
        while "ready" not in self._logged():  # it must not load while another arm is timed
            if self.process.poll() is not None:
                raise self._failed()
            time.sleep(0.1)

    def run_epoch(self) -> Epoch:
        """One epoch in the other process, timed there."""
        assert self.process.stdin and self.process.stdout
        with contextlib.suppress(BrokenPipeError):  # it has ended: the empty answer says so
            self.process.stdin.write("epoch\n")
            self.process.stdin.flush()
        text = self.process.stdout.readline()
        if not text:
            raise self._failed()
        line = json.loads(text)
        self.settings, self.versions = line["settings"], line["versions"]
        return Epoch(line["seconds"], line["images"], line["updates"], line["reward_mean"])

    def _logged(self) -> list[str]:
        return self.log.read_text(encoding="utf-8", errors="replace").splitlines()

    def _failed(self) -> SystemExit:
        return SystemExit("\n".join(["the trl arm ended; its last words:", *self._logged()[-20:]]))

    def _end(self) -> None:
        self.process.terminate()
        self.process.wait()


@dataclass
class Result:
    """The epochs of one arm, the warm-up first."""

    epochs: list[Epoch] = field(default_factory=list)

    def seconds(self, phase: str) -> list[float]:
        """Of the measured rounds."""
        return [epoch.seconds[phase] for epoch in self.epochs[1:]]

    def median(self, phase: str) -> float:
        """Over the measured rounds."""
        return statistics.median(self.seconds(phase))


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options of an epoch that is measured."""
    p = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--guidance", type=float, default=1.0, help="in sampling and training (1)")
    p.add_argument("--rounds", type=int, default=5, help="measured rounds, after one that warms up (5)")
    p.add_argument("--images", type=int, default=256, help="in an epoch (256)")
    p.add_argument("--steps", type=int, default=10, help="denoising steps (10)")
    p.add_argument("--trained-steps", type=int, default=4, help="how many of them are trained, the first ones (4)")
    p.add_argument("--micro-batch", type=int, default=32, help="images in one pass, sampling and training (32)")
    p.add_argument("--threads", type=int, default=2, help="of torch (2)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", type=Path, help="JSON file for everything that was measured")
    return p


def parsed(p: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, where it can be measured; else the parser ends the program."""
    a = p.parse_args(argv)
    if a.guidance < 1 or a.rounds < 1 or a.threads < 1:
        p.error("--guidance, --rounds and --threads must be 1 or more")
    if a.images < 1 or a.micro_batch < 1 or a.images % (a.micro_batch * UPDATES):
        p.error(f"--images must be a multiple of {UPDATES} times --micro-batch")
    return a


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    p = parser(__doc__)
    p.add_argument("--trl-python", type=Path, help="python of TRL's environment; without it the trl arm is left out")
    p.add_argument("--arms", nargs="+", choices=ARMS, metavar="ARM", help=f"those to run (all): {', '.join(ARMS)}")
    p.add_argument("--trl-arguments", default="", help="more for the trl arm, such as '--lr 1e-2'")
    a = parsed(p, argv)
    if a.trl_python and not a.trl_python.is_file():
        p.error(f"there is no file '{a.trl_python}'")
    return a


def texforce_plan(a: argparse.Namespace, **flags: Any) -> Plan:
    """The tiny preset with what all arms have in common."""
    common: dict[str, Any] = {
        "model": "tiny",
        "device": "cpu",
        "prompts": "animals",
        "reward": ["jpeg-incompressibility"],
        "seed": a.seed,
        "guidance": a.guidance,
        "steps": a.steps,
        "train_steps": f"first:{a.trained_steps}",
        "samples_per_epoch": a.images,
        "images": a.images * (a.rounds + 1),
        "micro_batch": a.micro_batch,
        "grad_accum": a.images // (a.micro_batch * UPDATES),
    }
    return plan({**common, **flags})


def trl_arguments(a: argparse.Namespace, config: TrainConfig, prompts: Path) -> list[str]:
    """The same work for benchmarks/trl_ddpo/run.py, with the settings of `texforce-unet`."""
    options: dict[str, Any] = {
        "model": tiny.WEIGHTS,
        "prompts-file": prompts,
        "seed": config.seed,
        "guidance": config.guidance,
        "steps": config.steps,
        "timestep-fraction": a.trained_steps / a.steps,
        "samples-per-epoch": config.samples_per_epoch,
        "sample-batch": config.micro_batch,
        "train-batch": config.micro_batch,
        "updates-per-epoch": UPDATES,
        "lr": config.lr,
        "rank": config.rank,
        "clip-range": config.clip_range,
        "threads": a.threads,
    }
    return [f"--{name}={value}" for name, value in options.items()] + shlex.split(a.trl_arguments)


def make_arms(a: argparse.Namespace, stack: contextlib.ExitStack) -> dict[str, Arm]:
    """Every arm that can run and was asked for, in the order of a round."""
    unet: dict[str, Any] = {"train": "unet", "rank": 4}
    ways: dict[str, dict[str, Any]] = {
        "texforce": {},
        "texforce-snapshot": {"uncond_embedding": "snapshot"},
        "texforce-window": {"train_steps": f"window:{WINDOW}"},
        "texforce-bf16": {"precision": "bf16"},
        PLAIN: {},
        "texforce-unet": unet,
        "texforce-unet-bf16": {**unet, "precision": "bf16"},
    }
    wanted, reasons = a.arms or ARMS, left_out(a)
    arms: dict[str, Arm] = {
        name: TexforceArm(texforce_plan(a, **way), PlainDDPO if name == PLAIN else DDPO)
        for name, way in ways.items()
        if name in wanted and name not in reasons
    }
    for name, more in (("trl", []), ("trl-bf16", ["--precision=bf16"])):
        if name in wanted and name not in reasons:
            made = texforce_plan(a, **unet)
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            prompts = folder / "prompts.txt"
            prompts.write_text("".join(f"{prompt.text}\n" for prompt in made.prompts.seen), encoding="utf-8")
            given = [*trl_arguments(a, made.config, prompts), *more]
            arms[name] = TrlArm(a.trl_python, given, folder / "trl.log", stack)
    return arms


def left_out(a: argparse.Namespace) -> dict[str, str]:
    """The arms that do not run, with the reason."""
    reasons = {name: "not in --arms" for name in ARMS if a.arms and name not in a.arms}
    if a.guidance == 1:
        reasons["texforce-snapshot"] = "guidance 1 has no unconditional branch"
    if a.trained_steps <= WINDOW:
        reasons["texforce-window"] = f"no more than {WINDOW} steps are trained"
    for name in ARMS:
        if name.endswith("bf16") and not cpu_computes_bf16():
            reasons[name] = "torch knows of no bf16 instructions of this processor"
        if name.startswith("trl") and not a.trl_python:
            reasons[name] = "no --trl-python was given"
    return reasons


def floor_of(a: argparse.Namespace, policy: Policy, trained: int | None = None, *, kept: bool = False) -> Floor:
    """The passes of an epoch that trains `trained` steps; `kept`: the unconditional branch of sampling is used again."""
    branches = 2 if a.guidance > 1 else 1
    return Floor(
        policy,
        images=a.images,
        micro_batch=a.micro_batch,
        steps=a.steps,
        trained=a.trained_steps if trained is None else trained,
        branches=(branches, 1 if kept else branches),
    )


def make_floors(a: argparse.Namespace, arms: dict[str, Arm]) -> dict[str, Floor]:
    """The floor of each of our arms, by name; the plain way's is that of `texforce`."""
    different: dict[str, dict[str, Any]] = {"texforce-snapshot": {"kept": True}, "texforce-window": {"trained": WINDOW}}
    return {
        name: floor_of(a, arm.algorithm.policy, **different.get(name, {}))
        for name, arm in arms.items()
        if isinstance(arm, TexforceArm) and name != PLAIN
    }


def measure(
    a: argparse.Namespace, arms: dict[str, Arm], floors: dict[str, Floor]
) -> tuple[dict[str, Result], dict[str, list[dict[str, float]]]]:
    """One epoch of every arm in turn, again and again, and its floor after it; the floors by name and round."""
    results = {name: Result() for name in arms}
    least: dict[str, list[dict[str, float]]] = {name: [] for name in floors}
    for turn in range(a.rounds + 1):
        for name, arm in arms.items():
            epoch = arm.run_epoch()
            if (epoch.images, epoch.updates) != (a.images, UPDATES):
                raise SystemExit(
                    f"{name}: {epoch.images} images and {epoch.updates} updates, not the work of the others"
                )
            results[name].epochs.append(epoch)
            label = f"round {turn} of {a.rounds}" if turn else "warm-up"
            if name in floors:
                least[name].append(floors[name].run())
            print(f"{label}: {name} {epoch.seconds['total']:.2f} s, reward {epoch.reward:.3f}", file=sys.stderr)
    return results, least


def ceilings(results: dict[str, Result], least: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, float]]:
    """What `ratios` could be at most: the slower way's seconds over those of the other arm's U-Net passes alone."""
    return {
        f"{slow}/{quick}": {
            phase: results[slow].median(phase) / statistics.median(one[phase] for one in least[quick][1:])
            for phase in ("sampling", "training", "total")
        }
        for slow, quick in COMPARED
        if slow in results and quick in results
    }


def ratios(results: dict[str, Result]) -> dict[str, dict[str, float]]:
    """How many times as long the first of each pair takes, by phase: ratios of medians."""
    return {
        f"{slow}/{quick}": {phase: results[slow].median(phase) / results[quick].median(phase) for phase in PHASES}
        for slow, quick in COMPARED
        if slow in results and quick in results
    }


def cpu_model() -> str:
    """The name of the processor."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def record(
    a: argparse.Namespace,
    arms: dict[str, Arm],
    results: dict[str, Result],
    least: dict[str, list[dict[str, float]]],
) -> dict[str, Any]:
    """Everything that was measured, for the JSON file."""
    trl = arms.get("trl") or arms.get("trl-bf16")
    ours = {name: version for name, version in versions().items() if name != "platform"}
    return {
        "benchmark": "train_speed",
        "guidance": a.guidance,
        "images": a.images,
        "micro_batch": a.micro_batch,
        "steps": a.steps,
        "trained_steps": a.trained_steps,
        "updates": UPDATES,
        "rounds": a.rounds,
        "threads": a.threads,
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "versions": {"texforce": ours, **({"trl": trl.versions} if isinstance(trl, TrlArm) else {})},
        "left_out": left_out(a),
        "arms": {
            name: {
                "settings": arms[name].settings,
                "seconds": {
                    phase: {
                        "median": result.median(phase),
                        "min": min(result.seconds(phase)),
                        "max": max(result.seconds(phase)),
                        "rounds": result.seconds(phase),
                    }
                    for phase in PHASES
                },
                "reward_after_images": {i * a.images: epoch.reward for i, epoch in enumerate(result.epochs)},
            }
            for name, result in results.items()
        },
        "ratios": ratios(results),
        "ceilings": ceilings(results, least),
        "floors": {name: rounds[1:] for name, rounds in least.items()},
    }


def table(a: argparse.Namespace, results: dict[str, Result], least: dict[str, list[dict[str, float]]]) -> str:
    """What a person reads."""
    highest = ceilings(results, least)

    def row(name: str, cells: Sequence[str], width: int) -> str:
        return f"{name:<26}" + "".join(f"{cell:>{width}}" for cell in cells)

    def spread(result: Result, phase: str) -> str:
        values = result.seconds(phase)
        return f"{result.median(phase):.3f} ({min(values):.3f}..{max(values):.3f})"

    lines = [
        f"guidance {a.guidance:g}, {a.steps} steps, {a.trained_steps} trained, {a.images} images an epoch, {a.threads} threads, {cpu_model()}",
        f"{a.rounds} rounds after a warm-up; median (min..max)",
        "",
        row("seconds", PHASES, 26),
        *(row(name, [spread(result, phase) for phase in PHASES], 26) for name, result in results.items()),
        "",
        row("ratio of medians", PHASES, 10),
        *(row(name, [f"{value:.2f}" for value in found.values()], 10) for name, found in ratios(results).items()),
        "",
        row("at most (U-Net alone)", PHASES, 10),
        *(
            row(name, [f"{found[phase]:.2f}" if phase in found else "" for phase in PHASES], 10)
            for name, found in highest.items()
        ),
        "",
        row("reward (kB) after images", [str(i * a.images) for i in range(a.rounds + 1)], 8),
        *(row(name, [f"{e.reward:.3f}" for e in result.epochs], 8) for name, result in results.items()),
        "",
        *(f"left out: {name} ({reason})" for name, reason in left_out(a).items()),
    ]
    return "\n".join(lines).rstrip()


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    a = arguments(argv)
    torch.set_num_threads(a.threads)
    with contextlib.ExitStack() as stack:
        arms = make_arms(a, stack)
        results, least = measure(a, arms, make_floors(a, arms))
        print(table(a, results, least))
        if a.out:
            write_json(a.out, record(a, arms, results, least))


if __name__ == "__main__":
    main()
