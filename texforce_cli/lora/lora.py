"""A LoRA in the one form that every format is read into: W' = W + sum of scale * B A over its modules."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from texforce_cli.errors import TexforceError
from texforce_cli.files import sha256
from texforce_cli.lora.names import COMPONENTS
from texforce_cli.tensorfile import Array, Entry

GENERATIONS = {768: "SD 1.x", 1024: "SD 2.x", 2048: "SDXL"}
"""Base models by the width of the text that their U-Net attends to."""
_XL_WIDTHS = {640, 1280, 2048, 2560, 5120}
_DEEP = re.compile(r".*\.transformer_blocks\.[1-9]\..*")
"""Only SDXL has more than one transformer block in a row, with layers of these inputs."""
_TEXT_WIDTHS = {768: {"SD 1.x", "SDXL"}, 1024: {"SD 2.x"}, 1280: {"SDXL"}}
_BASE_PATH = "base_model_name_or_path"
_INSIDE = re.compile(rf"|{'|'.join(COMPONENTS)}|snapshots|[0-9a-f]{{40}}")
"""Folders in a model's own, or in its place in the Hub's cache (models--owner--name/snapshots/HASH/unet)."""
_TOLD = (  # how other tools' headers call a base model
    (re.compile(r"(?<![a-z])(sd)?xl(?![a-z])", re.IGNORECASE), "SDXL"),
    (re.compile(r"(?<![a-z])(sd|stable-diffusion)[-_ ]?v?2([-_.]?[01])?(?!\d)", re.IGNORECASE), "SD 2.x"),
    (re.compile(r"(?<![a-z])(sd|stable-diffusion)[-_ ]?v?1([-_.]?[1-5])?(?!\d)", re.IGNORECASE), "SD 1.x"),
)
_HINTS = ("modelspec.architecture", "ss_base_model_version", _BASE_PATH)  # not ss_sd_model_name: a free name


class Tensors(Protocol):
    """Named tensors that are read one at a time: a safetensors file, or a pickle that was allowed."""

    @property
    def path(self) -> Path: ...
    @property
    def entries(self) -> Mapping[str, Entry]: ...
    def finite(self, key: str) -> Array: ...


@dataclass(frozen=True)
class LoraModule:
    """The low-rank change of one weight: scale * B A, with B (out, rank) and A (rank, inputs).

    `kernel` is (height, width) of a convolution, of which `inputs` counts every cell; () for a linear layer. `scale` is
    alpha / rank, or alpha / sqrt(rank) where the file says so. The factors stay on the disk.
    """

    component: str
    path: str
    rank: int
    inputs: int
    outputs: int
    kernel: tuple[int, ...]
    scale: float
    tensors: Tensors
    a_key: str
    b_key: str

    @property
    def name(self) -> str:
        """Component and path in one: `unet.mid_block.attentions.0...`."""
        return f"{self.component}.{self.path}"

    @property
    def alpha(self) -> float:
        """The alpha that gives this scale at this rank."""
        return self.scale * self.rank

    def a(self) -> Array:
        """A, (rank, inputs), float32 or wider. Raises TexforceError where it holds NaN or infinite values."""
        return self.tensors.finite(self.a_key).reshape(self.rank, self.inputs)

    def b(self) -> Array:
        """B, (outputs, rank), without the scale. Raises TexforceError where it holds NaN or infinite values."""
        return self.tensors.finite(self.b_key).reshape(self.outputs, self.rank)


@dataclass(frozen=True)
class Lora:
    """A LoRA whose headers were read: `modules` by name, in order; `source` as it was asked for, `files` what it is made of.

    `bases` are the base models that it may belong to, empty where nothing tells.
    """

    source: str
    files: tuple[Path, ...]
    format: str
    modules: Mapping[str, LoraModule]
    metadata: Mapping[str, str]
    bases: frozenset[str]
    warnings: tuple[str, ...] = ()

    @property
    def components(self) -> tuple[str, ...]:
        """Which of text_encoder, text_encoder_2 and unet it changes."""
        present = {module.component for module in self.modules.values()}
        return tuple(component for component in COMPONENTS if component in present)

    @property
    def base(self) -> str:
        """The base model for people: `SD 1.x`, `SD 1.x or SDXL`, `unknown`."""
        return " or ".join(sorted(self.bases)) or "unknown"

    def of(self, component: str) -> list[LoraModule]:
        """The modules of one component."""
        return [module for module in self.modules.values() if module.component == component]

    def arrays(self, weight_of: Callable[[str], float] = lambda component: 1.0) -> dict[str, Array]:
        """Every factor in memory by its key in diffusers' form, with alpha = rank; scale and weight are in B.

        Raises:
            TexforceError: NaN or infinite values, or a product that is too large.
        """
        arrays = {}
        for module in self.modules.values():
            factor = module.scale * weight_of(module.component)
            b = module.b()
            kernel = module.kernel
            a_shape = (module.rank, module.inputs // math.prod(kernel), *kernel)
            arrays[f"{module.name}.lora_A.weight"] = module.a().reshape(a_shape)
            with np.errstate(over="ignore"):
                b = b if factor == 1 else (b * factor).astype(b.dtype)
            if not np.isfinite(b).all():
                raise TexforceError(
                    f"'{self.source}' makes '{module.name}' infinite at {factor:g} times what it holds",
                    "use a smaller weight",
                )
            arrays[f"{module.name}.lora_B.weight"] = b.reshape(*b.shape, *(1 for _ in kernel))
        return arrays

    def sha256(self) -> list[str]:
        """The hash of each file, as `hashes`."""
        return hashes(self.files)


def hashes(files: Iterable[Path]) -> list[str]:
    """The SHA-256 of each file.

    Raises:
        TexforceError: one cannot be read any more.
    """
    found = []
    for file in files:
        try:
            now = file.stat()
            found.append(_sha256(file.absolute(), (now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns)))
        except OSError as error:
            raise TexforceError(f"'{file}' could not be read ({error.strerror or error})", "check the file") from error
    return found


@functools.lru_cache(maxsize=256)
def _sha256(file: Path, state: tuple[int, ...]) -> str:
    """A file may have gigabytes, and is asked for again for every variant that it is in."""
    return sha256(file)


class Sized(Protocol):
    """What a module tells of the model that it belongs to."""

    @property
    def component(self) -> str: ...
    @property
    def path(self) -> str: ...
    @property
    def inputs(self) -> int: ...


def bases_of(modules: Iterable[Sized], metadata: Mapping[str, str], whole: str = "the model") -> frozenset[str]:
    """The base models that fit the widths of the modules, narrowed by what the headers tell where several do.

    Raises:
        TexforceError: no base model has modules of all these widths; the sentence calls what they are of `whole`.
    """
    candidates: set[str] | None = None
    last = ""
    for module in modules:
        width = _fitting(module)
        if width is None:
            continue
        if candidates is not None and not candidates & set(width):
            raise TexforceError(
                f"{whole} mixes base models ('{last}' is of {' or '.join(sorted(candidates))}, "
                f"'{module.component}.{module.path}' of {' or '.join(sorted(width))})",
                "it cannot be used whole",
            )
        candidates = set(width) if candidates is None else candidates & set(width)
        last = f"{module.component}.{module.path}"
    told = told_base(metadata)
    if candidates is None:
        return frozenset({told} if told else ())
    return frozenset({told} if told in candidates else candidates)


def _fitting(module: Sized) -> Collection[str] | None:
    """The base models that have a module of this name and width; None where it tells nothing."""
    if module.component == "unet":
        if module.path.endswith((".attn2.to_k", ".attn2.to_v")):
            return {GENERATIONS.get(module.inputs, f"a model of text width {module.inputs}")}
        return {"SDXL"} if _DEEP.fullmatch(module.path) and module.inputs in _XL_WIDTHS else None
    if module.component == "text_encoder_2":  # a small model made for tests may have another width
        return {"SDXL"} if module.inputs == 1280 else None
    if module.path.endswith((".q_proj", ".k_proj", ".v_proj", ".out_proj", ".fc1")):
        return _TEXT_WIDTHS.get(module.inputs, {f"a model of text width {module.inputs}"})
    return _TEXT_WIDTHS.get(module.inputs // 4) if module.path.endswith(".fc2") else None


def of_second_encoder(path: str, shape: tuple[int, ...]) -> bool:
    """Whether a layer of a text encoder takes as much as one of SDXL's second does: 1280, or 5120."""
    return shape[1:2] == ((5120,) if path.endswith(".fc2") else (1280,))


def common_bases(loras: Iterable[Lora]) -> frozenset[str]:
    """The base models that all of them may belong to; empty where nothing tells.

    Raises:
        TexforceError: there is none, or the same module has other shapes in two of them.
    """
    first: dict[str, tuple[Lora, LoraModule]] = {}
    candidates: frozenset[str] = frozenset()
    before: Lora | None = None
    for lora in loras:
        for name, module in lora.modules.items():
            other, known = first.setdefault(name, (lora, module))
            if (known.inputs, known.outputs) != (module.inputs, module.outputs):
                raise TexforceError(
                    f"'{lora.source}' and '{other.source}' were made for different base models ('{name}' is "
                    f"{module.outputs} x {module.inputs} in one, {known.outputs} x {known.inputs} in the other)",
                    "fuse LoRAs of one base model",
                )
        if candidates and lora.bases and not candidates & lora.bases:
            assert before is not None
            foreign = (m.name for m in lora.modules.values() if not candidates & set(_fitting(m) or candidates))
            shown = next((f", as '{name}' shows" for name in foreign), "")
            raise TexforceError(
                f"'{lora.source}' was made for {lora.base}{shown}, '{before.source}' for {before.base}",
                "fuse LoRAs of one base model",
            )
        narrowed = candidates & lora.bases or candidates or lora.bases
        if narrowed != candidates:
            candidates, before = narrowed, lora
    return candidates


def told_base(metadata: Mapping[str, str]) -> str | None:
    """The base model that a header names; None where it names none that is known."""
    for key in _HINTS:
        text = metadata.get(key, "")
        if key == _BASE_PATH:  # the folders above it belong to somebody's machine
            text = next((part for part in reversed(re.split(r"[/\\]|--", text)) if not _INSIDE.fullmatch(part)), "")
        for pattern, base in _TOLD:
            if pattern.search(text):
                return base
    return None
