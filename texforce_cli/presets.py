"""Settings that belong together. Values that are not named keep the defaults of `config.TrainConfig`.

`tiny` was found by experiment on the embedded model; what it gives is in docs/results.md. `phrase`, `many`, `face` and `hand` are the
paper's settings for Stable Diffusion 1.4, 1.5 and 2.1 (sec. 3 and supplement; DDPO's where it is silent: two updates an
epoch); nobody has measured them with texforce yet. `fast` is the automatic one with noise in the first steps alone, which are trained:
on the embedded model with three fifths of the images, and in bf16 on a CPU that has it (what that gives is in docs/results.md);
on Stable Diffusion in 20 steps with a kept unconditional branch, which was not tried.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
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
    "tiny": {"train_steps": "window:3", "images": 3840, "precision": "bf16"},
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

TFLOP_PER_CALL = 0.80
"""One U-Net call of SD 1.x for one 512-pixel image and branch, computed from its layers (0.40 T multiply-adds)."""


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


def computed_petaflop(sampling_calls: float, training_calls: float, size: int) -> float:
    """Work of a run on SD 1.x, computed: a training call is a forward and a backward, each as long as one call."""
    return (sampling_calls + 2 * training_calls) * TFLOP_PER_CALL * (size / 512) ** 2 / 1000


_ACTIVATIONS = {"text-encoder": 0.42, "unet": 0.53, "both": 0.56}
_CHECKPOINTED = 0.15
"""G numbers that a pass of training holds for a branch and an image of 512 pixels. Measured on a CPU on SD 1.5's layers, with fused
attention: the peak of the process above its weights (docs/performance.md)."""


@dataclass(frozen=True)
class Memory:
    """What a run on SD 1.x holds, computed: 1.07 G parameters, and `latents` an image in fp32, which are there twice while an
    epoch's are joined, and then once beside the activations of a pass of training through `branches` in `steps` of each image
    together."""

    train: str
    precision: str
    checkpointing: bool
    branches: int
    steps: int
    images: int
    latents: int
    size: int

    def gb(self, micro_batch: int) -> float:
        """With so many images in a pass."""
        number, pixels = 4 if self.precision == "fp32" else 2, (self.size / 512) ** 2
        one = (_CHECKPOINTED if self.checkpointing else _ACTIVATIONS[self.train]) * number * pixels
        one *= self.branches * self.steps
        trajectories = self.images * self.latents * 16384 * pixels * 4 / 1e9
        return 1.07 * number + trajectories + max(trajectories, one * micro_batch)

    def micro_batch(self, gb: float) -> int:
        """The largest of 8, 4, 2, 1 that fits into 90 % of `gb`."""
        return max((n for n in (8, 4, 2) if self.gb(n) < 0.9 * gb), default=1)


def computed_hours(petaflop: float, teraflops: float) -> float:
    """Hours of work at a sustained rate, rewards left out."""
    return petaflop * 1000 / teraflops / 3600
