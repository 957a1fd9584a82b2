"""`texforce sample`: pictures for prompts and seeds, with LoRAs, beside the base where asked."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from texforce_cli.diffusion.adapters import stack
from texforce_cli.diffusion.models import (
    ModelSource,
    Precision,
    fingerprint,
    load_pipeline,
    resolve_device,
    resolve_model,
)
from texforce_cli.diffusion.policy import Denoising, Policy
from texforce_cli.diffusion.sampler import draw
from texforce_cli.errors import TexforceError, UsageError
from texforce_cli.lora.files import LoraFile, read_lora
from texforce_cli.lora.spec import parse_lora
from texforce_cli.report.pictures import picture_grid, save_png
from texforce_cli.workflows.events import Listener, Note, Progressed, Warned, silent
from texforce_cli.workflows.run_folder import versions


@dataclass(frozen=True)
class SampleRequest:
    """What to draw and where to put it. `steps`, `guidance` None: what the first LoRA was trained with, or the usual."""

    prompts: Sequence[str]
    seeds: Sequence[int]
    out: Path
    model: str = "auto"
    loras: Sequence[str] = ()
    steps: int | None = None
    guidance: float | None = None
    eta: float = 1.0
    scheduler: str = "ddim"
    size: int | None = None
    negative_prompt: str = ""
    batch: int = 8
    device: str = "auto"
    precision: Precision = "fp32"
    safety_checker: bool = False
    grid: bool = False
    compare: bool = False
    force: bool = False


@dataclass(frozen=True)
class SampleResult:
    """The files that were written; `grid` where one was asked for."""

    files: tuple[Path, ...]
    grid: Path | None
    withheld: int


def parse_seeds(text: str) -> list[int]:
    """`7`, `0:8` (0 to 7), `1,5,9`, or a mixture: `0:4,100`.

    Raises:
        UsageError: not that, negative, empty, or more than 100,000.
    """
    seeds: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,18})(?::(\d{1,18}))?\s*", part)
        if not match:
            raise UsageError(f"the seeds '{text}' cannot be read", "write 7, 0:8 (which is 0 to 7) or 1,5,9")
        first, last = int(match[1]), int(match[2]) if match[2] else int(match[1]) + 1
        if not 0 < last - first <= 100_000:
            raise UsageError(f"the seeds '{part}' are {max(0, last - first)}", "write FIRST:LAST with LAST above FIRST")
        seeds.extend(range(first, last))
    return seeds


def sample(request: SampleRequest, listener: Listener = silent) -> SampleResult:
    """Draw every prompt with every seed.

    Raises:
        UsageError: no prompt, files that exist already, unknown names.
        TexforceError: a LoRA or model that cannot be used, a disk that cannot be written.
    """
    if not request.prompts:
        raise UsageError("there is no prompt to draw", 'give one, as in: texforce sample "a cat"')
    loras = [(spec, read_lora(spec.source)) for spec in map(parse_lora, request.loras)]
    source, denoising = _defaults(request, [file for _, file in loras])
    pairs = [(prompt, seed) for prompt in request.prompts for seed in request.seeds]
    variants = ["base", "tuned"] if request.compare and loras else ["tuned" if loras else "base"]
    paths = {variant: _paths(request, pairs, variant if len(variants) > 1 else "") for variant in variants}
    grid_path = request.out / "grid.png" if request.grid else None
    _refuse_to_overwrite(request, [*chain.from_iterable(paths.values()), *([grid_path] if grid_path else [])])

    listener(Note(f"model: {source.name} ({source.reason})"))
    device = resolve_device(request.device)
    pipeline = load_pipeline(source, device=device, precision=request.precision, safety_checker=request.safety_checker)
    if not request.safety_checker and source.family == "sd":
        listener(Note("the safety checker is off; turn it on with --safety-checker"))
    pictures: dict[str, list[Image.Image]] = {}
    withheld = 0
    for variant in variants:
        if variant == "tuned":
            stack(pipeline, [(file.weights, spec.weight) for spec, file in loras])
        images = _draw(pipeline, request, denoising, pairs, variant, listener)
        pictures[variant], blocked = _checked(pipeline, images, request.safety_checker)
        withheld += blocked
        about = _about(source, denoising, request, loras if variant == "tuned" else [])
        for (prompt, seed), picture, path in zip(pairs, pictures[variant], paths[variant]):
            save_png(
                path,
                picture,
                {"prompt": prompt, "seed": str(seed), "parameters": _readable(prompt, seed, about), **about},
            )
    if grid_path:
        save_png(grid_path, _grid(request, pictures, source), {"prompts": json.dumps(list(request.prompts))})
    return SampleResult(tuple(path for files in paths.values() for path in files), grid_path, withheld)


def _defaults(request: SampleRequest, files: Sequence[LoraFile]) -> tuple[ModelSource, Denoising]:
    """Model, steps and guidance: those asked for, else those the first LoRA was trained with, else the usual ones."""
    trained: dict[str, Any] = {}
    for file in files:
        try:
            trained = trained or json.loads(file.metadata.get("texforce", "{}"))
        except ValueError:
            continue
    source = _source(request.model, trained)
    usual = {"steps": 20 if source.family == "tiny" else 50, "guidance": 3.0 if source.family == "tiny" else 7.5}
    steps = request.steps or int(trained.get("steps") or usual["steps"])
    guidance = request.guidance if request.guidance is not None else float(trained.get("guidance") or usual["guidance"])
    return source, Denoising(steps, guidance, request.eta, request.size, request.negative_prompt)


def _source(model: str, trained: Mapping[str, Any]) -> ModelSource:
    """The model asked for; `auto` is the one that the LoRA was trained on."""
    base = str(trained.get("base", ""))
    if model != "auto" or not base:
        return resolve_model(model)
    revision = trained.get("base_hash", {}).get("revision")
    try:
        source = resolve_model(f"{base}@{revision}" if revision else base)
    except UsageError as error:
        raise UsageError(
            f"the LoRA was trained on '{base}', which is not found here", "give it with --model"
        ) from error
    return replace(source, reason="the base of the LoRA")


def _draw(
    pipeline: Any,
    request: SampleRequest,
    denoising: Denoising,
    pairs: Sequence[tuple[str, int]],
    variant: str,
    listener: Listener,
) -> list[Image.Image]:
    prompts, seeds = [prompt for prompt, _ in pairs], [seed for _, seed in pairs]

    def progress(done: int, total: int) -> None:
        listener(Progressed(variant, done, total))

    policy = Policy(pipeline, denoising)
    for prompt in dict.fromkeys(prompts):
        cut = policy.too_long(prompt)
        if cut:
            listener(Warned(f"{cut} tokens of the prompt '{prompt[:60]}' are beyond the limit and are not seen"))
    if request.scheduler == "ddim":
        images = draw(policy, prompts, seeds, batch=request.batch, progress=progress)
        return [Image.fromarray(image) for image in images]
    return _with_scheduler(pipeline, request, denoising, pairs, progress)


def _with_scheduler(
    pipeline: Any,
    request: SampleRequest,
    denoising: Denoising,
    pairs: Sequence[tuple[str, int]],
    progress: Callable[[int, int], None],
) -> list[Image.Image]:
    """Other schedulers run through diffusers' own pipeline, one generator an image."""
    previous = pipeline.scheduler
    pipeline.scheduler = _SCHEDULERS[request.scheduler](previous.config)
    pictures: list[Image.Image] = []
    try:
        for start in range(0, len(pairs), request.batch):
            batch = pairs[start : start + request.batch]
            pictures += pipeline(
                [prompt for prompt, _ in batch],
                negative_prompt=[denoising.negative_prompt] * len(batch),
                num_inference_steps=denoising.steps,
                guidance_scale=denoising.guidance,
                height=denoising.size,
                width=denoising.size,
                generator=[torch.Generator().manual_seed(seed) for _, seed in batch],
            ).images
            progress(len(pictures), len(pairs))
    finally:
        pipeline.scheduler = previous
    return pictures


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


def _checked(pipeline: Any, pictures: list[Image.Image], check: bool) -> tuple[list[Image.Image], int]:
    """The pictures, those that the safety checker objects to blackened, and how many they are."""
    if not check:
        return pictures, 0
    if pipeline.safety_checker is None:
        raise TexforceError("this model comes without a safety checker", "leave out --safety-checker")
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


def _about(
    source: ModelSource, denoising: Denoising, request: SampleRequest, loras: Sequence[tuple[Any, LoraFile]]
) -> dict[str, str]:
    return {
        "model": source.location if source.kind == "hub" else source.name,
        "model_hash": json.dumps(fingerprint(source)),
        "loras": json.dumps([{"file": file.path.name, "weight": s.weight, "sha256": file.sha256} for s, file in loras]),
        "steps": str(denoising.steps),
        "guidance": f"{denoising.guidance:g}",
        "eta": f"{denoising.eta:g}",
        "scheduler": request.scheduler,
        "negative_prompt": denoising.negative_prompt,
        "software": f"texforce {versions().get('texforce', '')}".strip(),
    }


def _readable(prompt: str, seed: int, about: Mapping[str, str]) -> str:
    """The line that picture viewers of the field show."""
    return (
        f"{prompt}\nNegative prompt: {about['negative_prompt']}\nSteps: {about['steps']}, Sampler: {about['scheduler']}, "
        f"CFG scale: {about['guidance']}, Seed: {seed}, Model: {about['model']}"
    )


def _grid(request: SampleRequest, pictures: Mapping[str, list[Image.Image]], source: ModelSource) -> Image.Image:
    count = len(request.seeds)
    rows, captions = [], []
    for index, prompt in enumerate(request.prompts):
        for variant, images in pictures.items():
            rows.append(images[index * count : (index + 1) * count])
            captions.append(f"{prompt} ({variant})" if len(pictures) > 1 else prompt)
    return picture_grid(rows, captions=captions, headers=[f"seed {seed}" for seed in request.seeds], title=source.name)
