"""Whole weights of a U-Net or a text encoder, by the same names as the modules of LoRAs: folders and files of diffusers,
transformers, and the original one-file layout. They are read one tensor at a time, pickles whole.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from texforce_cli.errors import TexforceError, UsageError
from texforce_cli.files import user_path
from texforce_cli.lora.lora import Tensors, hashes, of_second_encoder
from texforce_cli.lora.names import COMPONENTS, locate
from texforce_cli.lora.pickles import read_pickle
from texforce_cli.lora.read import PICKLES, no_place
from texforce_cli.tensorfile import Array, TensorFile, shown

_FILES = ("diffusion_pytorch_model", "model", "pytorch_model")
_VARIANTS = ("", ".fp16", ".non_ema")
OPEN_CLIP = "cond_stage_model.model."
"""The text encoder of SD 2.x in the original layout; its layers are cut otherwise."""
_ELSEWHERE = ("first_stage_model.", "vae.", "model_ema.", OPEN_CLIP, "conditioner.embedders.1.")
_ORIGINAL = (
    "model.diffusion_model.",
    "cond_stage_model.transformer.text_model.",
    *(f"cond_stage_model.transformer.{part}." for part in ("embeddings", "encoder", "final_layer_norm")),  # of 2022
    "conditioner.embedders.0.transformer.text_model.",
)
_NO_WEIGHTS = (
    "position_ids",
    "alphas_cumprod",
    "logit_scale",
    "betas",
    "posterior_",
    "sqrt_",
    "log_one_minus",
    "v_pred",
)


@dataclass(frozen=True)
class FullWeights:
    """Weights by component, module and parameter: `unet.conv_in.weight`. `elsewhere` are prefixes that were left aside."""

    source: str
    places: Mapping[str, tuple[Tensors, str]]
    elsewhere: frozenset[str]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a weight."""
        tensors, key = self.places[name]
        return tensors.entries[key].shape

    def read(self, name: str) -> Array:
        """A weight, float32 or wider. Raises TexforceError where it holds NaN or infinite values."""
        tensors, key = self.places[name]
        return tensors.finite(key)

    @property
    def files(self) -> list[Path]:
        """The files that they are read from."""
        return sorted({tensors.path for tensors, _ in self.places.values()})

    def sha256(self) -> list[str]:
        """The hash of each file, as `hashes`."""
        return hashes(self.files)

    @property
    def components(self) -> tuple[str, ...]:
        """Which of text_encoder, text_encoder_2 and unet it holds."""
        present = {name.partition(".")[0] for name in self.places}
        return tuple(component for component in COMPONENTS if component in present)


def open_full(source: str, *, allow_pickle: bool = False) -> FullWeights:
    """The weights of a pipeline's folder, of one component's folder, or of a file.

    Raises:
        UsageError: nothing is there, or a pickle that was not allowed.
        TexforceError: damaged, a LoRA, or of another kind of model; the sentence names the file and the key.
    """
    try:
        files = _files(source, user_path(source))
    except (OSError, RuntimeError, ValueError) as error:
        raise no_place(source, error) from error
    places: dict[str, tuple[Tensors, str]] = {}
    elsewhere: set[str] = set()
    for file, component in files:
        tensors: Tensors
        if file.suffix in PICKLES:
            if not allow_pickle:
                raise UsageError(
                    f"'{file}' is a pickle, which can run code", "add --allow-pickle to read its tensors alone"
                )
            tensors = read_pickle(file)
        else:
            tensors = TensorFile.open(file)
        original = any(key.startswith(_ORIGINAL[0]) for key in tensors.entries)
        second = file.parent.name == "text_encoder_2" or (file.parent.name != "text_encoder" and _is_second(tensors))
        for key in tensors.entries:
            aside = next((prefix for prefix in _ELSEWHERE if key.startswith(prefix)), None)
            if aside is None and original and not key.startswith(_ORIGINAL):
                aside = f"{key.partition('.')[0]}."  # whole checkpoints carry what their training needed
            if aside:
                elsewhere.add(aside)
                continue
            module, _, parameter = key.rpartition(".")
            if any(part in key.rpartition(".model.")[2] for part in _NO_WEIGHTS) and parameter not in (
                "weight",
                "bias",
            ):
                continue
            located = locate(module) if parameter in ("weight", "bias") else None
            if located is None:
                kind = "a LoRA (use --lora)" if "lora" in key else "of no U-Net or CLIP text encoder that is known"
                raise TexforceError(f"'{file}' holds '{shown(key)}', which is {kind}", "give the weights of one")
            found, name, naming = located
            if second and (found, naming) == ("text_encoder", "bare"):
                found = "text_encoder_2"
            if component not in (None, found):
                raise TexforceError(f"'{file}' holds weights of {found}, not of {component}", "check the folder")
            places[f"{found}.{name}.{parameter}"] = (tensors, key)
    if not places:
        raise TexforceError(f"'{source}' holds no weights of a U-Net or text encoder", "check the file")
    return FullWeights(source, places, frozenset(elsewhere))


def _is_second(tensors: Tensors) -> bool:
    """Whether keys that name no component are those of SDXL's second encoder."""
    places = ((locate(key.removesuffix(".weight")), entry.shape) for key, entry in tensors.entries.items())
    return any(
        place is not None and place[::2] == ("text_encoder", "bare") and of_second_encoder(place[1], shape)
        for place, shape in places
    )


def _files(source: str, path: Path) -> list[tuple[Path, str | None]]:
    if path.is_file():
        return [(path, None)]
    if not path.is_dir():
        raise UsageError(f"there is no folder or file '{source}'", "check the path")
    parts: list[tuple[Path, str | None]] = [(path / name, name) for name in COMPONENTS if (path / name).is_dir()]
    folders = parts or [(path, path.name if path.name in COMPONENTS else None)]
    found = [(file, component) for folder, component in folders for file in _weight_files(folder)]
    if not found:
        raise UsageError(
            f"the folder '{source}' holds no weights", "there should be diffusion_pytorch_model or model.safetensors"
        )
    return found


def _weight_files(folder: Path) -> list[Path]:
    """The weights of one component: a file, or the shards that an index names."""
    for ending in (".safetensors", ".bin"):
        for name, variant in ((name, variant) for variant in _VARIANTS for name in _FILES):
            whole, index = folder / f"{name}{variant}{ending}", folder / f"{name}{ending}.index{variant}.json"
            if whole.is_file():
                return [whole]
            if index.is_file():
                try:
                    shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
                except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                    raise TexforceError(f"'{index}' cannot be read", "download it again") from error
                if any(not isinstance(shard, str) or Path(shard).name != shard for shard in shards):
                    raise TexforceError(f"'{index}' names files outside of its folder", "do not trust it")
                return [folder / shard for shard in shards]
    return []
