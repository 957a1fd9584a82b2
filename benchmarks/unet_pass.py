"""One pass through the embedded U-Net on the CPU, in every precision, memory layout and attention: what is quickest, and what
`torch.compile` adds.

python -m benchmarks.unet_pass --out FILE.json

The ways take turns. Processor time is counted, not time on the wall, so that other work on the machine matters less; with more
threads than one it is the sum over them.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

from benchmarks.train_speed import cpu_model
from texforce_cli.diffusion.models import load_pipeline, resolve_model, torch_dtype
from texforce_cli.files import write_json
from texforce_cli.workflows.run_folder import versions

LAYOUTS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}
ATTENTION = {"fused": AttnProcessor2_0, "plain": AttnProcessor}


def ways(given: Any, compiled: bool) -> dict[str, Any]:
    """The U-Net in every way, by name."""
    found = {}
    for precision in ("fp32", "bf16"):
        for layout, order in LAYOUTS.items():
            for attention, kind in ATTENTION.items():
                unet = copy.deepcopy(given).to(dtype=torch_dtype(precision), memory_format=order)  # type: ignore[arg-type]
                unet.set_attn_processor(kind())
                found[f"{precision}, {layout}, {attention}"] = unet
    if compiled:
        for name in ("fp32, channels last, fused", "bf16, contiguous, plain"):  # as texforce has them
            found[f"{name}, compiled"] = copy.deepcopy(found[name])
            found[f"{name}, compiled"].compile_repeated_blocks()
    return found


def timed(one: Callable[[], object]) -> float:
    """Milliseconds of processor time."""
    started = time.process_time()
    one()
    return 1000 * (time.process_time() - started)


def passes(unet: Any, images: int, tokens: int) -> dict[str, Callable[[], object]]:
    """A forward as in drawing, and a forward with its backward to the text embeddings as in learning."""
    generator = torch.Generator().manual_seed(0)
    side = unet.config.sample_size
    sample = torch.randn((images, unet.config.in_channels, side, side), generator=generator).to(unet.dtype)
    words = torch.randn((images, tokens, unet.config.cross_attention_dim), generator=generator).to(unet.dtype)

    def forward() -> object:
        with torch.no_grad():
            return unet(sample, 500, words).sample

    def both() -> object:
        leaf = words.clone().requires_grad_()
        return torch.autograd.grad(unet(sample, 500, leaf).sample.float().square().sum(), leaf)

    return {"forward": forward, "forward and backward": both}


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--images", type=int, default=32, help="in a pass (32)")
    p.add_argument("--rounds", type=int, default=9, help="measured, after one that warms up (9)")
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--no-compile", action="store_true", help="leave torch.compile out, which wants a C++ compiler")
    p.add_argument("--out", type=Path, help="JSON file for everything that was measured")
    a = p.parse_args(argv)
    torch.set_num_threads(a.threads)
    pipeline = load_pipeline(resolve_model("tiny"), device=torch.device("cpu"), precision="fp32")
    tokens = pipeline.tokenizer.model_max_length
    todo = {n: passes(unet, a.images, tokens) for n, unet in ways(pipeline.unet, not a.no_compile).items()}
    first: dict[str, float] = {}
    taken: dict[str, dict[str, list[float]]] = {name: {kind: [] for kind in of} for name, of in todo.items()}
    for turn in range(a.rounds + 1):
        for name, of in todo.items():
            started = time.perf_counter()
            for kind, one in of.items():
                spent = timed(one)
                if turn:
                    taken[name][kind].append(spent)
            if not turn:
                first[name] = round(time.perf_counter() - started, 1)
    found = {
        name: {
            kind: {"median": statistics.median(values), "min": min(values), "max": max(values)}
            for kind, values in of.items()
        }
        for name, of in taken.items()
    }
    for name, row in found.items():
        shown = (f"{kind} {v['median']:.0f} ({v['min']:.0f} to {v['max']:.0f})" for kind, v in row.items())
        print(f"{name:44}", *shown, f"first call {first[name]:.1f} s", sep="   ")
    if a.out:
        options = {"images": a.images, "rounds": a.rounds, "threads": a.threads, "unit": "ms of processor time"}
        machine = {"cpu": cpu_model(), "versions": versions()}
        write_json(
            a.out,
            {"benchmark": "unet_pass", **options, **machine, "passes": found, "first call, s on the clock": first},
        )


if __name__ == "__main__":
    main()
