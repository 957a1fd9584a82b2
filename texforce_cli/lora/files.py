"""LoRA files in diffusers' form: `text_encoder.text_model....lora_A.weight`, `unet....lora_B.weight`, alpha = rank."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

import safetensors
import safetensors.torch
from torch import Tensor

from texforce_cli.errors import TexforceError, UsageError
from texforce_cli.files import sha256

FILE_NAME = "pytorch_lora_weights.safetensors"
_COMPONENTS = ("text_encoder.", "unet.")


@dataclass(frozen=True)
class LoraFile:
    """A LoRA read from disk: `weights` with alpha = rank, the header's `metadata`, the file's `sha256`."""

    path: Path
    weights: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    sha256: str


def lora_bytes(weights: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file that is the same, bit for bit, for the same content.

    The library writes the header's metadata in the random order of a hash map; here it is sorted.
    """
    data = safetensors.torch.save(dict(weights), metadata={"format": "pt", **metadata})
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def find_lora(source: str) -> Path:
    """The file that a path names: itself, or the one in an adapter, checkpoint or run folder.

    Raises:
        UsageError: nothing is there.
    """
    path = Path(source).expanduser()
    candidates = [path, path / FILE_NAME, path / "adapter" / FILE_NAME]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    if path.is_dir():
        raise UsageError(f"the folder '{source}' holds no LoRA", f"there is no {FILE_NAME} in it or in its adapter/")
    raise UsageError(f"there is no LoRA '{source}'", "check the path")


def read_lora(source: str) -> LoraFile:
    """Read a LoRA that diffusers or texforce wrote.

    Raises:
        UsageError: no such file, or a pickle.
        TexforceError: damaged, empty, another format; the sentence says which.
    """
    path = find_lora(source)
    if path.suffix != ".safetensors":
        raise UsageError(f"'{path}' is not a .safetensors file", "other formats can run code; convert it first")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            weights = {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118 - not a mapping
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise TexforceError(
            f"'{path}' is not a readable safetensors file ({error})", "copy or download it again"
        ) from error
    _refuse_other_formats(path, weights)
    weights = {_with_level(key): value for key, value in weights.items()}
    for key, value in weights.items():
        if not value.isfinite().all():
            raise TexforceError(f"'{path}' holds NaN or infinite values in '{key}'", "it cannot be used")
    return LoraFile(path, _alpha_baked(weights, metadata), metadata, sha256(path))


def _refuse_other_formats(path: Path, weights: Mapping[str, Tensor]) -> None:
    if not weights:
        raise TexforceError(f"'{path}' holds no tensors", "it is not a LoRA")
    for key in weights:
        if not key.endswith((".lora_A.weight", ".lora_B.weight")) or not key.startswith(_COMPONENTS):
            kind = "a kohya LoRA" if key.startswith("lora_") else "no LoRA of diffusers' form"
            raise TexforceError(f"'{path}' is {kind} (key '{key}')", "save it with diffusers' save_lora_weights")
        partner = key.replace("lora_A", "lora_B") if "lora_A" in key else key.replace("lora_B", "lora_A")
        if partner not in weights:
            raise TexforceError(f"'{path}' has '{key}' without '{partner}'", "the file is incomplete")


def _with_level(key: str) -> str:
    """Text-encoder keys always with `text_model.`, whatever version of transformers wrote them."""
    prefix, level = "text_encoder.", "text_model."
    if key.startswith(prefix) and not key.startswith(prefix + level):
        return prefix + level + key.removeprefix(prefix)
    return key


def _alpha_baked(weights: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Tensor]:
    """Fold the header's alpha / rank into B, so that every loader has alpha = rank."""
    try:
        header = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    except ValueError:
        header = {}
    header = header if isinstance(header, dict) else {}
    result = dict(weights)
    for key in weights:
        component = key.partition(".")[0]
        alpha, rank = header.get(f"{component}.lora_alpha"), header.get(f"{component}.r")
        if key.endswith(".lora_B.weight") and _is_positive(alpha) and _is_positive(rank):
            result[key] = weights[key] * (alpha / rank)
    return result


def _is_positive(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0
