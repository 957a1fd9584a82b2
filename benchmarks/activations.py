"""What a pass of training holds on Stable Diffusion's layers: the parts of `texforce train --dry-run`'s memory.

python -m benchmarks.activations --out FILE.json

A forward and a backward of one denoising step, with guidance, on a CPU with random weights: the largest size of the process above
what it had before, in GB. Each case has a process of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.gpu import PRECISIONS, SIZES, pipeline_of
from benchmarks.train_speed import cpu_model
from texforce_cli.config import resolve
from texforce_cli.files import write_json
from texforce_cli.workflows.assembly import make_adapter, make_policy
from texforce_cli.workflows.cost import memory_of
from texforce_cli.workflows.run_folder import versions

CASES: tuple[dict[str, Any], ...] = (
    {},
    {"micro_batch": 2},
    {"precision": "fp32"},
    {"train": "unet"},
    {"train": "both"},
    {"gradient_checkpointing": True},
    {"train": "unet", "gradient_checkpointing": True},
)
"""Beside one image, in bf16, the text encoder."""


def grown(work: Callable[[], object]) -> float:
    """GB by which this process was larger than before, at most, while it did `work`."""
    process, done = psutil.Process(), threading.Event()
    before = most = process.memory_info().rss

    def watch() -> None:
        nonlocal most
        while not done.wait(0.002):
            most = max(most, process.memory_info().rss)

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        work()
    finally:
        done.set()
        watching.join()
    return (most - before) / 1e9


def measured(case: dict[str, Any], size: str) -> dict[str, float]:
    """The case, measured in this process, and what `--dry-run` counts for it."""
    options = {
        "reward": ["brightness"],
        "preset": "many",
        "device": "cpu",
        "precision": "bf16",
        "micro_batch": 1,
    } | case
    config = resolve(options, family="sd").config
    pipeline = pipeline_of(size, torch.device("cpu"), PRECISIONS[config.precision])
    policy = make_policy(pipeline, config, make_adapter(pipeline, config))
    prompts = ["a cat"] * config.micro_batch

    def learn() -> None:
        embeddings = policy.embed(prompts)
        leaf = embeddings.leaf()
        output, _ = policy.output(torch.zeros(len(prompts), *policy.latent_shape), 0, leaf)
        output.square().mean().backward()
        embeddings.backward(leaf)

    memory = memory_of(config, pipeline.vae.config.sample_size)
    return {"gb": grown(learn), "counted_gb": memory.activations(config.micro_batch)}


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--size", choices=SIZES, default="sd15")
    p.add_argument("--out", type=Path, help="JSON file for everything that was measured")
    p.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    a = p.parse_args(argv)
    if a.case is not None:
        print(json.dumps(measured(a.case, a.size)))
        return
    rows: list[dict[str, Any]] = []
    print(f"{'GB':>6}{'counted':>9}")
    for case in CASES:
        command = [sys.executable, "-m", "benchmarks.activations", "--size", a.size, "--case", json.dumps(case)]
        found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        rows.append({"case": case, **found})
        print(f"{found['gb']:>6.2f}{found['counted_gb']:>9.2f}  {case or ''}", flush=True)
    if a.out:
        about = {"benchmark": "activations", "size": a.size, "cpu": cpu_model(), "versions": versions()}
        write_json(a.out, {**about, "rows": rows})


if __name__ == "__main__":
    main()
