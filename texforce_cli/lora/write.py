"""LoRAs written so that others load them exactly: diffusers' form, kohya's (A1111, ComfyUI), and PEFT's folders."""

from __future__ import annotations

import io
import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast
from uuid import uuid4

import ml_dtypes
import numpy as np

from texforce_cli.core.lora_algebra import Pair, balance
from texforce_cli.errors import TexforceError
from texforce_cli.files import appeared, atomic_path, flush, parents_of, patiently, settle, write_error, write_text
from texforce_cli.lora.names import COMPONENTS, kohya_name, peft_name
from texforce_cli.lora.read import ADAPTER_METADATA, PEFT_CONFIG, PEFT_NAME
from texforce_cli.tensorfile import Array, TensorWriter, write_tensors

Format = Literal["diffusers", "kohya", "peft"]
Precision = Literal["fp32", "fp16", "bf16"]

DTYPES: dict[str, np.dtype[Any]] = {
    "fp32": np.dtype(np.float32),
    "fp16": np.dtype(np.float16),
    "bf16": np.dtype(ml_dtypes.bfloat16),
}
STORAGE_ERROR = {"fp32": 1e-6, "fp16": 1e-3, "bf16": 5e-3}
"""The relative error (Frobenius) that storing in each precision may bring; measured: 3e-8, 3e-4, 2.4e-3."""
_ABOVE_ANY_RANK = 10**6
_Ranks = dict[str, dict[str, int]]
"""The rank of each module that was written, by component and by its name in the model."""


@dataclass(frozen=True)
class Slot:
    """The place of one module in a file that is to be written: its sizes, and the highest rank that it may have."""

    component: str
    path: str
    rank: int
    inputs: int
    outputs: int
    kernel: tuple[int, ...]

    @property
    def name(self) -> str:
        """Component and path in one."""
        return f"{self.component}.{self.path}"

    def shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of A and B in a file: a convolution keeps its kernel."""
        cells = math.prod(self.kernel)
        return (rank, self.inputs // cells, *self.kernel), (self.outputs, rank, *(1 for _ in self.kernel))


@dataclass(frozen=True)
class Layout:
    """How a LoRA is laid out: its format, its precision, `alpha` of the whole file and the `bases` that decide its names
    (kohya's), text encoders with the `level` text_model or not (PEFT's), those that get diffusers' `older` names."""

    format: Format
    precision: Precision
    alpha: float
    bases: frozenset[str]
    level: bool
    older: frozenset[str]

    @classmethod
    def of(cls, slots: Sequence[Slot], format: Format, precision: Precision, bases: frozenset[str]) -> Layout:
        """One alpha for all modules, the most common rank: loaders scale files with several alphas wrongly."""
        rank = Counter(slot.rank for slot in slots).most_common(1)[0][0]
        stored = float(DTYPES[precision].type(rank))  # bfloat16 cannot hold every integer
        if any(slot.component == "text_encoder_2" for slot in slots):
            bases = frozenset({"SDXL"})
        older = frozenset(COMPONENTS) - {"unet"} - {slot.component for slot in slots if ".self_attn." in slot.path}
        return cls(format, precision, stored, bases, format == "peft" and _has_level(), older)

    @property
    def implementation(self) -> str:
        """ModelSpec's name of the code whose names the modules have."""
        original = self.format == "kohya" and self.bases == {"SDXL"}
        return "https://github.com/Stability-AI/generative-models" if original else "diffusers"

    def tensors(self, slot: Slot, pair: Pair) -> Iterator[tuple[str, Array]]:
        """The tensors of one module by their keys, in this format and precision.

        Raises:
            TexforceError: a number does not fit into the precision.
        """
        rank = len(pair[0])
        a, b = pair
        if self.format == "kohya" and rank != self.alpha:
            b = b * (rank / self.alpha)
        if self.precision != "fp32":
            a, b = balance((a, b))
        down, up, alpha = self._keys(slot)
        for key, value, shape in zip((down, up), (a, b), slot.shapes(rank)):
            stored = value.astype(DTYPES[self.precision], copy=False)
            if not np.isfinite(stored.astype(np.float32, copy=False)).all():
                raise TexforceError(
                    f"'{slot.name}' holds numbers that do not fit into {self.precision}",
                    "use --dtype fp32 or bf16" if self.precision == "fp16" else "use smaller weights",
                )
            yield key, stored.reshape(shape)
        if alpha:
            yield alpha, np.array(self.alpha, DTYPES[self.precision])

    def planned(self, slots: Iterable[Slot]) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
        """Dtype and largest shape of each tensor, in order."""
        dtype = DTYPES[self.precision]
        planned: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {}
        for slot in slots:
            down, up, alpha = self._keys(slot)
            planned[down], planned[up] = ((dtype, shape) for shape in slot.shapes(slot.rank))
            if alpha:
                planned[alpha] = (dtype, ())
        return planned

    def warnings(self, slots: Iterable[Slot]) -> list[str]:
        """What diffusers does not load of it."""
        ranks: dict[str, dict[str, int]] = {}
        for slot in slots:
            if slot.component != "unet" and self.format == "kohya":
                ranks.setdefault(slot.component, {})[slot.path] = slot.rank
        said = []
        for component, own in ranks.items():
            attention = [path for path in own if ".self_attn." in path]
            if attention and not any(path.endswith(".out_proj") for path in attention):
                said.append(f"diffusers does not load the attention of {component} in kohya's form without an out_proj")
            projection = own.pop("text_projection", None)
            if projection and [projection] != [rank for rank, _ in Counter(own.values()).most_common(1)]:
                said.append(
                    f"diffusers loads {component}.text_projection in kohya's form only beside other layers of its rank"
                )
        return [f"{text}; write --format diffusers for it" for text in said]

    def peft_name(self, slot: Slot) -> str:
        """The module's name in a PEFT folder."""
        return peft_name(slot.component, slot.path, level=self.level)

    def live_name(self, slot: Slot) -> str:
        """The module's name in the model, by which a config of PEFT finds it, also a level further down."""
        return self.peft_name(slot).removeprefix("base_model.model.")

    def _keys(self, slot: Slot) -> tuple[str, str, str | None]:
        if self.format == "kohya":
            name = kohya_name(slot.component, slot.path, self.bases)
            return f"{name}.lora_down.weight", f"{name}.lora_up.weight", f"{name}.alpha"
        name = self.peft_name(slot) if self.format == "peft" else slot.name
        if self.format == "diffusers" and slot.component in self.older:  # diffusers tells the others by their attention
            return f"{name}.lora_linear_layer.down.weight", f"{name}.lora_linear_layer.up.weight", None
        return f"{name}.lora_A.weight", f"{name}.lora_B.weight", None


def lora_bytes(weights: Mapping[str, Any], metadata: Mapping[str, str]) -> bytes:
    """A LoRA file in memory, the same bytes for the same content. `weights` is anything that numpy understands."""
    buffer = io.BytesIO()
    write_tensors(buffer, {key: np.asarray(value) for key, value in weights.items()}, {"format": "pt", **metadata})
    return buffer.getvalue()


@contextmanager
def new_lora(out: Path, format: Format, *, force: bool) -> Iterator[Path]:
    """A temporary path for a file, or a folder for PEFT's form, renamed to `out` when the block ends, else removed.

    Raises:
        UsageError: something is at `out` by then, without `force`.
        TexforceError: the place cannot be written or the disk is full.
    """
    if format != "peft":
        with atomic_path(out, fresh=not force) as temporary:
            yield temporary
        return
    temporary, aside = (out.with_name(f".{out.name}.{uuid4().hex[:8]}.{what}") for what in ("tmp", "old"))
    try:
        with parents_of(out):
            try:
                temporary.mkdir()
                yield temporary
                flush(temporary)
                settle(temporary)
                if not force and os.path.lexists(out):
                    raise appeared(out)
                if out.is_dir():
                    out.replace(aside)
                patiently(lambda: temporary.replace(out))
                settle(out.parent)
            finally:
                if aside.exists() and not out.exists():  # stopped between the two renames
                    aside.replace(out)
                for left in (temporary, aside):
                    shutil.rmtree(left, ignore_errors=True)
    except OSError as error:
        raise write_error(out, error) from error


def size_of(place: Path) -> int:
    """The bytes of a file, or of all files in a folder."""
    return sum(path.stat().st_size for path in [place, *place.rglob("*")] if path.is_file())


def write_lora(
    place: Path,
    layout: Layout,
    slots: Sequence[Slot],
    pairs: Iterator[Pair],
    metadata: Callable[[], Mapping[str, str]],
) -> None:
    """Write the modules as `pairs` gives them, in the order of `slots`; `metadata` is asked at the end.

    The metadata may grow by 4 KB from what it is at the beginning. `place` is a file, or an empty folder for PEFT's form.
    `slots` have one component after the other.
    """
    ranks: _Ranks = {}

    def counted() -> Iterator[Pair]:
        for slot, pair in zip(slots, pairs):
            ranks.setdefault(slot.component, {})[layout.live_name(slot)] = len(pair[0])
            yield pair

    with ExitStack() as files:
        if layout.format == "peft":
            writers = _peft_folders(files, place, layout, slots, counted(), metadata, ranks)
        else:
            writers = [_tensors(files.enter_context(place.open("wb")), layout, slots, counted(), metadata)]
        for writer in writers:  # when every module is made, so that each file tells of the whole
            writer.finish({"format": "pt", **metadata(), **_told(layout, ranks)})


def _peft_folders(
    files: ExitStack,
    place: Path,
    layout: Layout,
    slots: Sequence[Slot],
    pairs: Iterator[Pair],
    metadata: Callable[[], Mapping[str, str]],
    ranks: _Ranks,
) -> list[TensorWriter]:
    components = list(dict.fromkeys(slot.component for slot in slots))
    writers = []
    for component in components:
        alone = len(components) == 1 and component != "text_encoder_2"  # whose keys do not tell it from the first
        folder = place if alone else place / component
        folder.mkdir(exist_ok=True)
        own = [slot for slot in slots if slot.component == component]
        handle = files.enter_context((folder / PEFT_NAME).open("wb"))
        writers.append(_tensors(handle, layout, own, pairs, metadata))
        write_text(folder / PEFT_CONFIG, json.dumps(_peft_config(ranks[component]), indent=2) + "\n")
    return writers


def _tensors(
    handle: BinaryIO,
    layout: Layout,
    slots: Sequence[Slot],
    pairs: Iterator[Pair],
    metadata: Callable[[], Mapping[str, str]],
) -> TensorWriter:
    all_differ: _Ranks = {}
    for index, slot in enumerate(slots):
        all_differ.setdefault(slot.component, {})[layout.live_name(slot)] = _ABOVE_ANY_RANK + index
    room = {**_told(layout, all_differ), "room": " " * 4096}
    writer = TensorWriter(handle, layout.planned(slots), {"format": "pt", **metadata(), **room})
    for slot in slots:
        try:
            with np.errstate(over="ignore", invalid="ignore"):  # what does not fit is told once, by the layout
                for key, value in layout.tensors(slot, next(pairs)):
                    writer.write(key, value)
        except np.linalg.LinAlgError as error:  # a decomposition that met infinity
            raise TexforceError(f"'{slot.name}' holds numbers that are too large", "use smaller weights") from error
    return writer


def _told(layout: Layout, ranks: _Ranks) -> dict[str, str]:
    """What the header says of the ranks where they differ within a component, or a text_projection has one: diffusers before
    0.40 else takes the first for the alpha of all, and every diffusers the most common for the rank of text_projection."""
    if layout.format != "diffusers" or all(
        len({*own.values()}) == 1 and "text_projection" not in own for own in ranks.values()
    ):
        return {}
    about = {f"{part}.{key}": value for part, own in ranks.items() for key, value in _peft_config(own).items()}
    return {ADAPTER_METADATA: json.dumps(about, sort_keys=True)}


def _has_level() -> bool:
    """Whether the transformers that is installed has the level `text_model` in CLIPTextModel."""
    import importlib.metadata  # slow, and of use to PEFT's form alone

    try:
        major, minor = importlib.metadata.version("transformers").split(".")[:2]
        return (int(major), int(minor)) < (5, 6)
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return False


def _peft_config(ranks: Mapping[str, int]) -> dict[str, Any]:
    """PEFT's adapter_config.json with alpha = rank in every module."""
    usual = Counter(ranks.values()).most_common(1)[0][0]
    others = {name: rank for name, rank in ranks.items() if rank != usual}
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": others,
        "alpha_pattern": cast(dict[str, Any], dict(others)),
        "target_modules": sorted(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
    }
