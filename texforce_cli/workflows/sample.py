"""`texforce sample`: pictures for prompts and seeds, with LoRAs, beside the base where asked."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from texforce_cli import __version__
from texforce_cli.devices import if_room, resolve_device
from texforce_cli.diffusion.adapters import base_model, stack
from texforce_cli.diffusion.models import (
    ModelSource,
    fingerprint,
    load_pipeline,
)
from texforce_cli.diffusion.policy import Denoising, Policy
from texforce_cli.diffusion.sampler import too_full
from texforce_cli.errors import TexforceError, UsageError, is_utf8
from texforce_cli.lora.lora import GENERATIONS
from texforce_cli.prompts import load_prompts
from texforce_cli.report.pictures import picture_grid, save_png
from texforce_cli.workflows.drawing import (
    DrawingOptions,
    caveats,
    denoising_for,
    draw_pictures,
    drawn_by,
    policy_for,
    source_for,
    too_long,
)
from texforce_cli.workflows.events import Listener, Note, Progressed, Warned, silent
from texforce_cli.workflows.loras import LoadedLora, hashes_of, load_lora, put_weights


@dataclass(frozen=True)
class SampleRequest(DrawingOptions):
    """What to draw and where to put it.

    `unet` and `text_encoder` are whole weights, a folder or file, that take the place of the model's own in every picture.
    `steps`, `guidance`, `eta` and `negative_prompt` None: as the first LoRA was trained, or as is usual. `prompt_set` is a
    set or file of more prompts.
    """

    prompts: Sequence[str]
    seeds: Sequence[int]
    out: Path
    prompt_set: str | None = None
    model: str = "auto"
    loras: Sequence[str] = ()
    unet: str | None = None
    text_encoder: str | None = None
    safety_checker: bool = False
    grid: bool = False
    compare: bool = False
    force: bool = False

    @property
    def replaced(self) -> dict[str, str]:
        """The components that get other weights, with their folder or file."""
        return {name: path for name, path in (("unet", self.unet), ("text_encoder", self.text_encoder)) if path}


@dataclass(frozen=True)
class SampleResult:
    """The files that were written; `grid` where one was asked for."""

    files: tuple[Path, ...]
    grid: Path | None
    withheld: int


def sample(request: SampleRequest, listener: Listener = silent) -> SampleResult:
    """Draw every prompt with every seed; each batch is on disk before the next is drawn.

    Raises:
        UsageError: no prompt, files that exist already, unknown names.
        TexforceError: a LoRA or model that cannot be used, a disk that cannot be written, no room for one picture.
    """
    loras = [load_lora(text, allow_pickle=request.allow_pickle) for text in request.loras]
    trained = next((lora.trained for lora in loras if lora.trained), {})
    source = source_for(request.model, trained, request.device)
    _refuse_embedded(source, loras)
    denoising = denoising_for(request, trained, source.family)
    pairs = _pairs(request, source)
    variants = ["base", "tuned"] if request.compare and loras else ["tuned" if loras else "base"]
    paths = {variant: _paths(request, pairs, variant if len(variants) > 1 else "") for variant in variants}
    grid_path = request.out / "grid.png" if request.grid else None
    _refuse_to_overwrite(request, [*chain.from_iterable(paths.values()), *([grid_path] if grid_path else [])])

    listener(Note(f"model: {source.name} ({source.reason})"))
    for sentence in caveats(request, loras):
        listener(Warned(sentence))
    device = resolve_device(request.device)
    pipeline = load_pipeline(source, device=device, precision=request.precision, safety_checker=request.safety_checker)
    if not request.safety_checker and source.family == "sd":
        listener(Note("the safety checker is off; turn it on with --safety-checker"))
    for component, weights in request.replaced.items():
        put_weights(pipeline, component, weights, allow_pickle=request.allow_pickle)
    policy = policy_for(pipeline, denoising, trained)
    _warn_of_long_prompts(policy, pairs, listener)
    stack(pipeline, [(lora.lora.source, lora.arrays) for lora in loras])  # whether they fit, before anything is drawn
    about = _about(source, denoising, request, policy.device)
    pictures: dict[str, list[Image.Image]] = {}
    withheld, room = 0, request.batch
    for variant in variants:
        used = loras if variant == "tuned" else []
        texts = {**about, "loras": json.dumps([lora.about for lora in used])}
        pictures[variant] = []
        with base_model(pipeline) if variant == "base" else contextlib.nullcontext():
            while len(pictures[variant]) < len(pairs):
                start = len(pictures[variant])
                part = slice(start, min(start + room, len(pairs)))
                made = _made(policy, request, pairs[part])
                if made is None:
                    room = (part.stop - start) // 2
                    listener(Warned(too_full(device, part.stop - start, room)))
                    continue
                drawn, blocked = made
                for (prompt, seed), picture, path in zip(pairs[part], drawn, paths[variant][part]):
                    readable = _readable(prompt, seed, about)
                    save_png(path, picture, {"prompt": prompt, "seed": str(seed), "parameters": readable, **texts})
                pictures[variant] += drawn
                withheld += blocked
                listener(Progressed(variant, len(pictures[variant]), len(pairs)))
    if grid_path:
        prompts = list(dict.fromkeys(prompt for prompt, _ in pairs))
        save_png(grid_path, _grid(prompts, request.seeds, pictures, source), {"prompts": json.dumps(prompts)})
    return SampleResult(tuple(path for files in paths.values() for path in files), grid_path, withheld)


def _refuse_embedded(source: ModelSource, loras: Sequence[LoadedLora]) -> None:
    """Raise UsageError where a LoRA of Stable Diffusion would be put on the embedded model."""
    for lora in loras:
        if source.kind == "tiny" and lora.lora.bases & set(GENERATIONS.values()):
            raise UsageError(
                f"the LoRA '{lora.lora.source}' is for {lora.lora.base}, not for '{source.name}' ({source.reason})",
                "name its model with --model",
            )


def _pairs(request: SampleRequest, source: ModelSource) -> list[tuple[str, int]]:
    prompts = list(request.prompts)
    if request.prompt_set:
        found = load_prompts(request.prompt_set, source.family, to_train=False)
        prompts += [prompt.text for prompt in (*found.seen, *found.unseen)]
    for prompt in prompts:
        if not is_utf8(prompt):
            raise UsageError(f"the prompt {prompt!a} is no UTF-8 text", "write it in UTF-8")
    if not prompts:
        raise UsageError("there is no prompt to draw", 'give one, as in: texforce sample "a cat"')
    return list(dict.fromkeys((prompt, seed) for prompt in prompts for seed in request.seeds))


def _warn_of_long_prompts(policy: Policy, pairs: Sequence[tuple[str, int]], listener: Listener) -> None:
    for sentence in too_long(policy, (prompt for prompt, _ in pairs)):
        listener(Warned(sentence))


def _made(
    policy: Policy, request: SampleRequest, pairs: Sequence[tuple[str, int]]
) -> tuple[list[Image.Image], int] | None:
    """The pictures, and how many of them the safety checker has blackened; None where the memory is too full for so many."""

    def make() -> tuple[list[Image.Image], int]:
        pictures = draw_pictures(policy, request.scheduler, pairs)
        return _checked(policy.pipeline, pictures, request.safety_checker)

    try:
        return if_room(make, last=len(pairs) == 1)
    except torch.OutOfMemoryError as error:
        smaller = "--precision bf16 or a smaller --size" if request.precision == "fp32" else "a smaller --size"
        raise TexforceError(f"the memory of {policy.device} is too full for one picture", f"use {smaller}") from error


def _checked(pipeline: Any, pictures: list[Image.Image], check: bool) -> tuple[list[Image.Image], int]:
    """The pictures, those that the safety checker objects to blackened, and how many they are."""
    if not check:
        return pictures, 0
    import numpy as np

    features = pipeline.feature_extractor(pictures, return_tensors="pt").to(pipeline.device)
    arrays = np.stack([np.asarray(picture) for picture in pictures])
    arrays, flags = pipeline.safety_checker(images=arrays, clip_input=features.pixel_values.to(pipeline.dtype))
    return [Image.fromarray(array) for array in arrays], sum(flags)


def _paths(request: SampleRequest, pairs: Sequence[tuple[str, int]], variant: str) -> list[Path]:
    prompts = list(dict.fromkeys(prompt for prompt, _ in pairs))
    tail = f"-{variant}" if variant else ""
    return [request.out / f"{prompts.index(prompt):03d}-{_slug(prompt)}-seed{seed}{tail}.png" for prompt, seed in pairs]


def _slug(prompt: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:48] or "prompt"


def _refuse_to_overwrite(request: SampleRequest, paths: Sequence[Path]) -> None:
    existing = [path for path in paths if path.exists()]
    if existing and not request.force:
        more = f" and {len(existing) - 1} more" if len(existing) > 1 else ""
        raise UsageError(f"'{existing[0]}'{more} exists already", "choose another --out, or overwrite with --force")


def _about(source: ModelSource, denoising: Denoising, request: SampleRequest, device: torch.device) -> dict[str, str]:
    return {
        "model": source.location if source.kind == "hub" else source.name,
        "model_hash": json.dumps(fingerprint(source)),
        **{name: Path(path).name for name, path in request.replaced.items()},
        "weights": json.dumps(hashes_of(request.replaced, allow_pickle=request.allow_pickle)),
        "steps": str(denoising.steps),
        "guidance": f"{denoising.guidance:g}",
        "eta": f"{denoising.eta:g}",
        "scheduler": request.scheduler,
        "negative_prompt": denoising.negative_prompt,
        "precision": request.precision,
        "software": f"texforce {__version__}",
        "drawn_by": drawn_by(device),
    }


def _readable(prompt: str, seed: int, about: Mapping[str, str]) -> str:
    """The line that picture viewers of the field show."""
    return (
        f"{prompt}\nNegative prompt: {about['negative_prompt']}\nSteps: {about['steps']}, Sampler: {about['scheduler']}, "
        f"CFG scale: {about['guidance']}, Seed: {seed}, Model: {about['model']}"
    )


def _grid(
    prompts: Sequence[str], seeds: Sequence[int], pictures: Mapping[str, list[Image.Image]], source: ModelSource
) -> Image.Image:
    columns = list(dict.fromkeys(seeds))
    count = len(columns)
    rows, captions = [], []
    for index, prompt in enumerate(prompts):
        for variant, images in pictures.items():
            rows.append(images[index * count : (index + 1) * count])
            captions.append(f"{prompt} ({variant})" if len(pictures) > 1 else prompt)
    return picture_grid(rows, captions=captions, headers=[f"seed {seed}" for seed in columns], title=source.name)
