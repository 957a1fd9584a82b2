"""Drawing with a model that may have LoRAs: which model, with which settings, and the pictures of (prompt, seed) pairs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image

from texforce_cli.diffusion.models import ModelSource, Precision, known_model, resolve_model
from texforce_cli.diffusion.policy import PIXELS, Denoising, Policy, latent_side
from texforce_cli.diffusion.sampler import draw
from texforce_cli.errors import UsageError, is_utf8
from texforce_cli.presets import Family
from texforce_cli.workflows.loras import LoadedLora
from texforce_cli.workflows.run_folder import versions


@dataclass(frozen=True, kw_only=True)
class DrawingOptions:
    """How to draw, as far as somebody said. `steps`, `guidance`, `eta` and `negative_prompt` None: as the first LoRA was
    trained, or as is usual; `size` None: the model's."""

    steps: int | None = None
    guidance: float | None = None
    eta: float | None = None
    scheduler: str = "ddim"
    size: int | None = None
    negative_prompt: str | None = None
    batch: int = 8
    device: str = "auto"
    precision: Precision = "fp32"
    allow_pickle: bool = False

    def __post_init__(self) -> None:
        for name, (lowest, highest) in _RANGES.items():
            value = getattr(self, name)
            if value is not None and not lowest <= value <= highest:  # NaN lies nowhere
                raise UsageError(f"--{name} {value} is not between {lowest} and {highest}", "give a number that is")
        if self.scheduler not in SCHEDULERS:
            raise UsageError(f"unknown scheduler '{self.scheduler}'", f"one of {', '.join(SCHEDULERS)}")


_RANGES = {"steps": (1, 1000), "guidance": (1, 100), "eta": (0, 1), "size": (1, 16_384), "batch": (1, 100_000)}


def source_for(model: str, trained: Mapping[str, Any], device: str = "auto") -> ModelSource:
    """The model asked for; `auto` is the one that the LoRA was trained on, where that is one of the known names."""
    base = trained.get("base")
    if model != "auto" or not base:
        return resolve_model(model, device)
    known = known_model(str(base)) if trained.get("base_kind", "tiny") in ("tiny", "hub") else None
    if known is None:  # a file that somebody gave away does not choose what is downloaded
        raise UsageError(f"the LoRA was trained on '{base}'", "say where that is with --model")
    return replace(known, reason="the base of the LoRA")


def denoising_for(options: DrawingOptions, trained: Mapping[str, Any], family: Family) -> Denoising:
    """As asked for, else as the LoRA was trained, else as is usual.

    Raises:
        UsageError: no picture has that size, or the negative prompt is no text.
    """
    if not is_utf8(options.negative_prompt or ""):
        raise UsageError(f"the negative prompt {options.negative_prompt!a} is no UTF-8 text", "write it in UTF-8")
    if options.size is not None:
        latent_side(options.size, PIXELS[family])
    usual: dict[str, Any] = {"steps": 50, "guidance": 7.5, "eta": 1.0, "negative_prompt": ""}
    if family == "tiny":
        usual |= {"steps": 20, "guidance": 3.0}
    values: dict[str, Any] = {}
    for name, default in usual.items():
        wanted = getattr(options, name)
        found = trained.get(name)
        values[name] = wanted if wanted is not None else found if _is_like(found, default) else default
    return Denoising(int(values["steps"]), values["guidance"], values["eta"], options.size, values["negative_prompt"])


def caveats(options: DrawingOptions, loras: Sequence[LoadedLora]) -> list[str]:
    """In sentences, what may be wrong with LoRAs, and what was asked for, or they were trained with, that their pictures are
    drawn without."""
    said = [text for lora in loras for text in lora.warnings]
    kept = {lora.trained.get("uncond_embedding") == "base" for lora in loras if lora.trained}
    if options.scheduler != "ddim" and options.eta is not None:
        said.append(f"--eta {options.eta:g} is for --scheduler ddim; {options.scheduler} does not look at it")
    if options.scheduler != "ddim" and True in kept:
        said.append(
            f"--scheduler {options.scheduler} does not keep the base's embedding of the negative prompt, as the LoRA was trained; "
            "ddim does"
        )
    if len(kept) > 1:
        said.append(
            "of LoRAs that are drawn together some were trained with --uncond-embedding base: the first one decides"
        )
    return said


def _is_like(value: Any, example: Any) -> bool:
    if isinstance(example, str):
        return isinstance(value, str)
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1000


def policy_for(pipeline: Any, denoising: Denoising, trained: Mapping[str, Any]) -> Policy:
    """Made before any LoRA is put on: one trained with `--uncond-embedding base` keeps the base's negative prompt."""
    policy = Policy(
        pipeline, denoising, unconditional="base" if trained.get("uncond_embedding") == "base" else "trained"
    )
    policy.snapshot_unconditional()
    return policy


def draw_pictures(policy: Policy, scheduler: str, pairs: Sequence[tuple[str, int]]) -> list[Image.Image]:
    """A picture for each (prompt, seed), as one batch. `ddim` is our own sampler; the others run through diffusers.

    Raises:
        TexforceError: as `Policy.decode`.
    """
    if scheduler != "ddim":
        return _with_scheduler(policy, scheduler, pairs)
    prompts, seeds = [prompt for prompt, _ in pairs], [seed for _, seed in pairs]
    return [Image.fromarray(image) for image in draw(policy, prompts, seeds, batch=len(pairs))]


def drawn_by(device: torch.device) -> str:
    """The versions and the kind of device that what is drawn depends on, in its last bits and beyond."""
    found = versions()
    packages = ", ".join(f"{n} {found[n]}" for n in ("texforce", "torch", "diffusers", "transformers") if n in found)
    return f"{packages} on {torch.cuda.get_device_name(device) if device.type == 'cuda' else device.type}"


def too_long(policy: Policy, prompts: Iterable[str]) -> list[str]:
    """What there is to say of prompts, and of the negative one, of which the model does not see the end: of the first three, and how many
    more there are."""
    texts = dict.fromkeys([policy.denoising.negative_prompt, *prompts])
    cut = [(text, tokens) for text in texts if (tokens := policy.too_long(text))]
    said = [
        f"{tokens} tokens of the prompt '{text[:60]}' are beyond the limit and are not seen" for text, tokens in cut[:3]
    ]
    return [*said, f"so are some of {len(cut) - 3} more prompts"] if len(cut) > 3 else said


def _with_scheduler(policy: Policy, scheduler: str, pairs: Sequence[tuple[str, int]]) -> list[Image.Image]:
    pipeline, denoising = policy.pipeline, policy.denoising
    previous = pipeline.scheduler
    pipeline.scheduler = _SCHEDULERS[scheduler](previous.config)
    try:
        with torch.no_grad():
            latents = pipeline(
                [prompt for prompt, _ in pairs],
                negative_prompt=[denoising.negative_prompt] * len(pairs),
                num_inference_steps=denoising.steps,
                guidance_scale=denoising.guidance,
                height=denoising.size,
                width=denoising.size,
                generator=[torch.Generator().manual_seed(seed) for _, seed in pairs],
                output_type="latent",  # as a picture it would be black where it is not finite
            ).images
            return [Image.fromarray(picture) for picture in policy.decode(latents).numpy()]
    finally:
        pipeline.scheduler = previous


def _scheduler(name: str) -> Callable[[Any], Any]:
    def make(config: Any) -> Any:
        import diffusers

        return getattr(diffusers, name).from_config(config)

    return make


_SCHEDULERS = {
    "dpm": _scheduler("DPMSolverMultistepScheduler"),
    "euler": _scheduler("EulerDiscreteScheduler"),
    "euler-a": _scheduler("EulerAncestralDiscreteScheduler"),
    "pndm": _scheduler("PNDMScheduler"),
    "unipc": _scheduler("UniPCMultistepScheduler"),
}
SCHEDULERS = ("ddim", *_SCHEDULERS)
