"""Settings that belong together. Values that are not named keep the defaults of `config.TrainConfig`.

`tiny` was found by experiment on the embedded model; what it gives is in docs/results.md. `phrase`, `many`, `face` and `hand` are the
paper's settings for Stable Diffusion 1.4, 1.5 and 2.1 (sec. 3 and supplement; DDPO's where it is silent: two updates an
epoch); nobody has measured them with texforce yet. `fast` is the automatic one with noise in the first steps alone, which are trained:
on the embedded model with four fifths of the images, and in bf16 on a CPU that has it (what that gives is in docs/results.md);
on Stable Diffusion in 20 steps with a kept unconditional branch, which was not tried.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

Family = Literal["tiny", "sd"]
"""The embedded model and Stable Diffusion know different words and want different settings."""

_TINY = {
    "steps": 10,
    "guidance": 1.0,
    "samples_per_epoch": 256,
    "group_size": 16,
    "advantages": "group",
    "micro_batch": 32,
    "grad_accum": 2,
    "clip_range": 8e-4,
    # the last noisy step's log-probability is 30 to 190 times as sensitive as theirs and decides nothing about the content
    "train_steps": "first:4",
    "rank": 4,
    "lr": 1e-2,
    "lr_schedule": "cosine",
    "warmup": 0.0,
    "images": 6400,
    "eval_images": 64,
}
_PAPER = {"epochs": 50, "samples_per_epoch": 512, "grad_accum": 32}

_FAST: Mapping[Family, Mapping[str, Any]] = {
    "tiny": {"train_steps": "window:3", "images": 5120, "precision": "bf16"},
    "sd": {
        "steps": 20,
        "train_steps": "window:4",
        "uncond_embedding": "snapshot",
        "advantages": "group",
        "group_size": 16,
    },
}

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "tiny": _TINY,
    "phrase": _PAPER,
    "many": {**_PAPER, "samples_per_epoch": 1024, "grad_accum": 64},
    "face": {**_PAPER, "prompts": "face"},
    "hand": {**_PAPER, "prompts": "hand"},
}
PRESET_NAMES = (*PRESETS, "fast")

_BY_COMPONENT: Mapping[tuple[str, str], Mapping[str, Any]] = {
    ("tiny", "unet"): {"lr": 3e-3},
    ("tiny", "both"): {"lr": 3e-3},
}


def preset_values(preset: str, train: str, family: Family | None, prompts: str) -> dict[str, Any]:
    """The values of a preset for the component that is trained; `fast` has none before the model family is known."""
    if preset != "fast":
        return {**PRESETS[preset], **_BY_COMPONENT.get((preset, train), {})}
    if family is None:
        return {}
    return {**preset_values(automatic_preset(family, prompts), train, family, prompts), **_FAST[family]}


def automatic_preset(family: Family, prompts: str) -> str:
    """The preset for a model family and a prompt set, where the user names none."""
    if family == "tiny":
        return "tiny"
    if prompts in ("face", "hand"):
        return prompts
    return "phrase" if prompts in ("color", "count", "composition", "location") else "many"
