"""A run that is killed again and again ends with the bits of one that was not.

    python -m benchmarks.kill_resume FOLDER --kills 30 --out FILE.json

One run goes through; a second one with the same options is killed (SIGKILL, of which no process learns) once before the
preflight, then at random moments, every third time while a checkpoint is being written, and resumed each time. Then adapter,
pictures, checkpoint and measurements of both are compared byte by byte, metrics without their seconds, and nothing temporary may
be left.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.train_speed import cpu_model
from texforce_cli.files import write_json
from texforce_cli.workflows.run_folder import versions

OPTIONS = (
    "--reward brightness --model tiny --device cpu --samples-per-epoch 8 --group-size 4 --micro-batch 4 --grad-accum 1 "
    "--steps 3 --draft-every 1e-9 --train-steps first:2 --eval-images 4 --eval-every 2 --seed 0"
).split()
_SAME = ("adapter/*", "samples/*", "*.png", "evaluations.jsonl", "prompts.jsonl")
BEFORE, SAVING = "before the preflight", "in a checkpoint"


def command(folder: Path, epochs: int) -> list[str]:
    """`texforce train` into the folder, or on with what lies there; every batch is kept as soon as it is drawn."""
    program = [sys.executable, "-m", "texforce_cli", "train"]
    if (folder / "run.json").exists():
        return [*program, "--resume", str(folder)]
    return [*program, *OPTIONS, "--epochs", str(epochs), "--out", str(folder)]


def killed(folder: Path, epochs: int, when: float | str) -> str:
    """Begin or go on, and kill: after so many seconds of work, or at the moment named. Says what happened."""
    process = subprocess.Popen(command(folder, epochs), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr if when != BEFORE else ():
        if "preflight" in line:
            break
    begun = time.monotonic()
    while process.poll() is None:
        if when == BEFORE:
            now = (folder / ".lock").exists()  # the model is not loaded yet
        elif when == SAVING:
            now = any((folder / "checkpoints").glob(".*.tmp"))
        else:
            now = time.monotonic() - begun > float(when)
        if now:
            process.kill()
            process.wait()
            return when if isinstance(when, str) else f"after {when:.2f} s"
        time.sleep(0.0002 if when == SAVING else 0.005)
    return f"ended by itself with {process.returncode}"


def differences(one: Path, two: Path) -> list[str]:
    """What is not the same in two finished runs."""
    names = {str(path.relative_to(run)) for run in (one, two) for kind in _SAME for path in run.glob(kind)}
    found = sorted(name for name in names if _bytes(one / name) != _bytes(two / name))
    last = sorted(path.name for path in (one / "checkpoints").iterdir())[-1]
    states = [(run / "checkpoints" / last / "state.safetensors").read_bytes() for run in (one, two)]
    found += ["checkpoint"] * (states[0] != states[1])
    found += ["metrics"] * (metrics(one) != metrics(two))
    found += [str(path.relative_to(two)) for path in two.rglob("*") if ".tmp" in path.name]
    return found


def _bytes(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def metrics(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what a clock says."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if "second" not in k} for line in lines]


def compare(folder: Path, kills: int, epochs: int, *, seed: int = 0, longest: float = 2.0) -> dict[str, Any]:
    """Make both runs in `folder`, the second one killed at most `longest` seconds after it began to work; what differs."""
    whole, parts = folder / "whole", folder / "parts"
    for run in (whole, parts):
        shutil.rmtree(run, ignore_errors=True)
    began = time.monotonic()
    subprocess.run(command(whole, epochs), check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    rng, done = random.Random(seed), []
    while len(done) < kills:
        moment = rng.uniform(0, longest)
        said = killed(parts, epochs, BEFORE if not done else SAVING if len(done) % 3 == 2 else moment)
        print(f"{len(done) + 1}: {said}", flush=True)
        if said.startswith("ended"):
            break
        done.append(said)
    if json.loads((parts / "run.json").read_text())["status"] != "finished":
        subprocess.run(command(parts, epochs), check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return {
        "kills": len(done),
        BEFORE: done.count(BEFORE),
        SAVING: done.count(SAVING),
        "epochs": epochs,
        "differences": differences(whole, parts),
        "minutes": round((time.monotonic() - began) / 60, 1),
        "cpu": cpu_model(),
        "versions": versions(),
    }


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    result = compare(options.folder, options.kills, options.epochs, seed=options.seed)
    print(json.dumps(result, indent=2))
    if options.out:
        write_json(options.out, result)
    sys.exit(bool(result["differences"]))


if __name__ == "__main__":
    main()
