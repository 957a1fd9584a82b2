"""A run that is killed again and again ends with the bits of one that was not.

    python -m benchmarks.kill_resume FOLDER --kills 30 --out FILE.json

One run goes through; a second one with the same options is killed (SIGKILL, of which no process learns) at random moments,
every third time while a checkpoint is being written, and resumed each time. Then adapter, checkpoint and measurements
of both are compared byte by byte, metrics without their seconds, and nothing temporary may be left.
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

from texforce_cli.files import write_json

OPTIONS = (
    "--reward brightness --model tiny --device cpu --samples-per-epoch 8 --group-size 4 --micro-batch 4 --grad-accum 1 "
    "--steps 3 --train-steps first:2 --eval-images 4 --eval-every 2 --seed 0"
).split()
_SAME = ("adapter/pytorch_lora_weights.safetensors", "evaluations.jsonl", "prompts.jsonl", "before_after.png")


def command(folder: Path, epochs: int) -> list[str]:
    """`texforce train` into the folder, or on with what lies there."""
    program = [sys.executable, "-m", "texforce_cli", "train"]
    if (folder / "run.json").exists():
        return [*program, "--resume", str(folder)]
    shutil.rmtree(folder, ignore_errors=True)  # killed before there was a run
    return [*program, *OPTIONS, "--epochs", str(epochs), "--out", str(folder)]


def killed(folder: Path, epochs: int, seconds: float, in_checkpoint: bool) -> str:
    """Begin or go on, and kill: after so many seconds of work, or when a checkpoint is being written. Says what happened."""
    process = subprocess.Popen(command(folder, epochs), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if "preflight" in line:
            break
    begun = time.monotonic()
    while process.poll() is None:
        writing = any((folder / "checkpoints").glob(".*.tmp")) if in_checkpoint else False
        if writing or (not in_checkpoint and time.monotonic() - begun > seconds):
            process.kill()
            process.wait()
            return "in a checkpoint" if writing else f"after {seconds:.2f} s"
        time.sleep(0.0002 if in_checkpoint else 0.005)
    return f"ended by itself with {process.returncode}"


def differences(one: Path, two: Path) -> list[str]:
    """What is not the same in two finished runs."""
    found = [name for name in _SAME if (one / name).read_bytes() != (two / name).read_bytes()]
    last = sorted(path.name for path in (one / "checkpoints").iterdir())[-1]
    states = [(run / "checkpoints" / last / "state.safetensors").read_bytes() for run in (one, two)]
    found += ["checkpoint"] * (states[0] != states[1])
    found += ["metrics"] * (metrics(one) != metrics(two))
    found += [str(path.relative_to(two)) for path in two.rglob("*") if ".tmp" in path.name]
    return found


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
        said = killed(parts, epochs, rng.uniform(0, longest), len(done) % 3 == 2)
        print(f"{len(done) + 1}: {said}", flush=True)
        if said.startswith("ended"):
            break
        done.append(said)
    if json.loads((parts / "run.json").read_text())["status"] != "finished":
        subprocess.run(command(parts, epochs), check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return {
        "kills": len(done),
        "in a checkpoint": done.count("in a checkpoint"),
        "epochs": epochs,
        "differences": differences(whole, parts),
        "minutes": round((time.monotonic() - began) / 60, 1),
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
