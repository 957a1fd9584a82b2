"""`texforce fuse`: the weighted sum of LoRAs as one LoRA, exact or of the lowest rank, written module by module and checked.

Nothing here imports torch: the work is numpy's, a few modules in memory at a time, and pickles whole.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import numpy as np

from texforce_cli import __version__
from texforce_cli.core.lora_algebra import (
    Array,
    Pair,
    Spectrum,
    concatenate,
    distance,
    double,
    rounding,
    sketch,
    sketched_norm,
    squared_norm,
    term_scale,
    truncate,
)
from texforce_cli.errors import TexforceError, UsageError
from texforce_cli.files import finite, flush, user_path
from texforce_cli.lora.header import model_keys, shared_training, told
from texforce_cli.lora.lora import Lora, LoraModule, common_bases
from texforce_cli.lora.names import COMPONENTS, is_convolution
from texforce_cli.lora.read import PEFT_CONFIG, PEFT_NAME, PICKLES, read_lora
from texforce_cli.lora.spec import LoraSpec, parse_lora, telling
from texforce_cli.lora.write import STORAGE_ERROR, Format, Layout, Precision, Slot, new_lora, size_of, write_lora
from texforce_cli.threads import ahead, beside
from texforce_cli.workflows.events import Listener, Progressed, Warned, silent
from texforce_cli.workflows.loras import LoadedLora, rewards_in
from texforce_cli.workflows.stopping import StopRequest

Method = Literal["cat", "svd"]

ENDING = ".safetensors"
_LONGEST_NAME = 150
_LONGEST_LINEAGE = 20_000
_EXACT = 1e-7
_LARGEST = float(np.finfo(np.float32).max)
_CANCELS = {"fp32": 8.0, "fp16": 2.0, "bf16": 1.5}
"""How many times larger than their sum terms may be for their own factors to hold it to STORAGE_ERROR."""
_SURE = 0.1
"""An estimate below this share of what storing may bring is not looked into."""


@dataclass(frozen=True)
class FuseRequest:
    """What to fuse and how. `sources` are SOURCE[:WEIGHT]; `out` None: a name made of theirs, in the current folder.

    `method` None is svd where `rank` or `max_error` is given, else cat.
    """

    sources: Sequence[str]
    out: Path | None = None
    method: Method | None = None
    rank: int | None = None
    max_error: float | None = None
    format: Format = "diffusers"
    precision: Precision = "fp32"
    allow_pickle: bool = False
    force: bool = False


@dataclass(frozen=True)
class FusePlan:
    """A fusion on paper: headers are read, no factor. `terms` are the modules that add up to each slot, with weights."""

    request: FuseRequest
    method: Method
    out: Path
    loras: tuple[tuple[LoraSpec, Lora], ...]
    slots: tuple[Slot, ...]
    terms: Mapping[str, tuple[tuple[LoraModule, float], ...]]
    bases: frozenset[str]
    layout: Layout

    @property
    def warnings(self) -> list[str]:
        """What may be wrong with it."""
        said = [text for spec, lora in self.loras for text in LoadedLora(spec, lora, {}).warnings]
        unsure = [lora for _, lora in self.loras if len(lora.bases) > 1]
        if unsure and (len(unsure) < len(self.loras) or len(self.bases) > 1):
            names = ", ".join(f"'{lora.source}'" for lora in unsure)
            taken = f", taken to be {next(iter(self.bases))} as the others are" if len(self.bases) == 1 else ""
            said.append(
                f"nothing in {names} tells whether it is for {unsure[0].base}, which have the same shapes{taken}"
            )
        return said + self.layout.warnings(self.slots)

    def about(self) -> dict[str, Any]:
        """The plan as plain values."""
        return {
            "out": str(self.out),
            "method": self.method,
            "format": self.layout.format,
            "dtype": self.layout.precision,
            "base": " or ".join(sorted(self.bases)) or "unknown",
            "sources": [
                {"source": lora.source, "weight": spec.weights, "format": lora.format, "components": lora.components}
                for spec, lora in self.loras
            ],
            "modules": len(self.slots),
            "highest_rank": max(slot.rank for slot in self.slots),
            "bytes": sum(
                math.prod(shape) * dtype.itemsize for dtype, shape in self.layout.planned(self.slots).values()
            ),
        }


@dataclass(frozen=True)
class FuseResult:
    """The file, or PEFT folder, that was written. Errors are relative (Frobenius): `truncation_error` exact, of svd;
    `measured_error` of what was read back against the sum of the sources, estimated."""

    out: Path
    modules: int
    ranks: tuple[int, int]
    truncation_error: float
    measured_error: float
    worst: tuple[str, float]
    bytes: int


@dataclass(frozen=True)
class _Done:
    """What stays known of a module when its factors are written: its rank, what its truncation left out, and, of the sum of
    its sources, the sketch and the `term_scale`."""

    rank: int
    spectrum: Spectrum
    sketch: Array
    size: float

    @property
    def error(self) -> float:
        """The relative error of the truncation."""
        return _relative(self.spectrum.dropped, self.spectrum.total)


def plan_fuse(request: FuseRequest) -> FusePlan:
    """Read the headers of the sources and lay out the result.

    Raises:
        UsageError: nothing to fuse, contradicting options, an output that exists or is an input.
        TexforceError: a source that cannot be read or fused with the others.
    """
    if not request.sources:
        raise UsageError(
            "there is nothing to fuse", "name one or more LoRAs: texforce fuse a.safetensors:0.7 b.safetensors:0.3"
        )
    method: Method = request.method or ("svd" if request.rank or request.max_error is not None else "cat")
    if method == "cat" and (request.rank or request.max_error is not None):
        raise UsageError("--rank and --max-error belong to --method svd", "leave --method cat out")
    if request.rank and request.max_error is not None:
        raise UsageError("--rank and --max-error exclude each other", "give one of them")
    specs = [parse_lora(text) for text in request.sources]
    loras = [(spec, read_lora(spec.source, allow_pickle=request.allow_pickle)) for spec in specs]
    bases = common_bases(lora for _, lora in loras)
    terms: dict[str, list[tuple[LoraModule, float]]] = {}
    for spec, lora in loras:
        for name, module in lora.modules.items():
            weight = spec.weight_of(module.component) * module.scale
            if weight:
                terms.setdefault(name, []).append((module, weight))
    if not terms:
        raise UsageError("every weight is 0", "give at least one LoRA a weight")
    slots = tuple(_slot(terms[name], request.rank, method, bases) for name in sorted(terms))
    out = _out(request, loras)
    inputs = [file for _, lora in loras for file in lora.files]
    refuse_output(out, inputs, folder=request.format == "peft", force=request.force)
    layout = Layout.of(slots, request.format, request.precision, bases)
    return FusePlan(request, method, out, tuple(loras), slots, {n: tuple(t) for n, t in terms.items()}, bases, layout)


def fuse(plan: FusePlan, listener: Listener = silent) -> FuseResult:
    """Write the fusion, read it back and compare it with the sum of the sources.

    Raises:
        TexforceError: a source is damaged, the disk is full, or the result is not what it should be; nothing is left.
        Interrupted: asked to stop; nothing is left.
    """
    for text in plan.warnings:
        listener(Warned(text))
    stop, done = StopRequest(), dict[str, _Done]()
    with ahead(_provenance, *zip(*plan.loras)) as hashed:
        sources = list(hashed)

    def pairs() -> Iterator[Pair]:
        for slot, (pair, about) in zip(plan.slots, fused):
            stop.check()
            done[slot.name] = about
            listener(Progressed("fusing", len(done), len(plan.slots)))
            yield pair

    with stop.listening(), new_lora(plan.out, plan.layout.format, force=plan.request.force) as temporary:
        with ahead(partial(_fused, plan), plan.slots, most=_threads(plan)) as fused:
            write_lora(temporary, plan.layout, plan.slots, pairs(), lambda: _header(plan, sources, done))
        with beside(flush, temporary):
            measured = _verify(plan, temporary, done, stop, listener)
        size = size_of(temporary)
    ranks = [about.rank for about in done.values()]
    errors = [(name, about.error) for name, about in done.items() if about.error]
    worst = max(errors, key=lambda item: item[1], default=("", 0.0))
    return FuseResult(plan.out, len(done), (min(ranks), max(ranks)), _truncation_error(done), measured, worst, size)


def _threads(plan: FusePlan) -> int:
    """As many as keep what is in memory, for each some eight times the stacked factors of a module in float64, within 200 MB."""
    ranks = {name: sum(module.rank for module, _ in terms) for name, terms in plan.terms.items()}
    largest = max(ranks[slot.name] * (slot.inputs + slot.outputs) for slot in plan.slots)
    return max(1, int(200e6 / (8 * largest * np.dtype(np.float64).itemsize)))


def _relative(off: float, whole: float) -> float:
    """The relative error of two squared norms."""
    return math.sqrt(off / whole) if whole else 0.0


def _truncation_error(done: Mapping[str, _Done]) -> float:
    spectra = [about.spectrum for about in done.values()]
    return _relative(sum(spectrum.dropped for spectrum in spectra), sum(spectrum.total for spectrum in spectra))


@np.errstate(over="ignore", invalid="ignore")  # what does not fit is told once, by the layout
def _fused(plan: FusePlan, slot: Slot) -> tuple[Pair, _Done]:
    terms = [((module.a(), module.b()), weight) for module, weight in plan.terms[slot.name]]
    doubles = [(double(term), weight) for term, weight in terms]
    size, sketched = sum(weight**2 * term_scale(term) for term, weight in doubles), sketch(doubles)
    if not math.sqrt(size) <= _LARGEST:
        raise TexforceError(f"'{slot.name}' holds numbers that are too large", "use smaller weights")
    if plan.method == "svd":
        limit = plan.request.max_error
        pair, spectrum = truncate(
            concatenate(doubles), rank=plan.request.rank, max_error=_EXACT if limit is None else limit
        )
    else:
        pair, spectrum = concatenate(terms), Spectrum(0.0, 0.0)
        precision = plan.layout.precision
        # an estimate will do where the bound has much room
        whole = sketched_norm(sketched) if precision == "fp32" else squared_norm(concatenate(doubles))
        if size > _CANCELS[precision] ** 2 * whole:
            pair, _ = truncate(concatenate(doubles), max_error=0)
    return pair, _Done(len(pair[0]), spectrum, sketched, size)


def _verify(plan: FusePlan, written: Path, done: Mapping[str, _Done], stop: StopRequest, listener: Listener) -> float:
    """The relative error of what is on the disk, through our own reader; a module that is off by more than it may be is an
    error: by more than storing its factors brings, and, truncated, than what was left out."""
    again = read_lora(str(written)).modules
    missing = [slot.name for slot in plan.slots if slot.name not in again]
    if missing or len(again) != len(plan.slots):
        raise TexforceError(f"'{plan.out}' was not written whole ('{(missing or ['?'])[0]}')", "report this as a bug")
    bound = STORAGE_ERROR[plan.layout.precision]

    def measured(slot: Slot) -> tuple[float, float]:
        """Squared: how far a module on the disk is from the sum of its sources, and how large that is."""
        module, about = again[slot.name], done[slot.name]
        a, b = _doubles(module)
        own = a, b * module.scale
        off, whole = sketched_norm(sketch([(own, 1.0)]) - about.sketch), sketched_norm(about.sketch)
        if math.sqrt(off) <= _SURE * bound * math.sqrt(whole):
            return off, whole
        terms = [(_doubles(term), weight) for term, weight in plan.terms[slot.name]]
        return distance(own, terms), squared_norm(concatenate(terms))

    difference = total = 0.0
    with ahead(measured, plan.slots, most=_threads(plan)) as found:
        for index, (slot, (off, whole)) in enumerate(zip(plan.slots, found)):
            stop.check()
            about = done[slot.name]
            allowed = math.sqrt(about.spectrum.dropped) + bound * math.sqrt(whole) + rounding(about.size)
            if not math.sqrt(off) <= allowed:
                raise TexforceError(
                    f"'{slot.name}' in '{plan.out}' would differ from the sum of its sources by {math.sqrt(off):.2e}, "
                    f"{allowed:.2e} is allowed",
                    "its numbers may be too small for fp32: use larger weights"
                    if plan.layout.precision == "fp32"
                    else "try --dtype fp32",
                )
            if whole > rounding(about.size) ** 2:  # of terms that cancel to nothing, dust is all that is compared
                difference, total = difference + off, total + whole
            listener(Progressed("checking", index + 1, len(plan.slots)))
    return _relative(difference, total)


def _doubles(module: LoraModule) -> Pair:
    return double((module.a(), module.b()))


def _slot(terms: Sequence[tuple[LoraModule, float]], rank: int | None, method: Method, bases: frozenset[str]) -> Slot:
    module = terms[0][0]
    kernels = {term.kernel for term, _ in terms}
    if len(kernels - {()} | ({(1, 1)} if () in kernels else set())) > 1:
        raise TexforceError(f"'{module.name}' has other kernels in each file", "fuse LoRAs of one base model")
    kernel = max(kernels, key=len)
    if kernel in ((), (1, 1)):  # the same change; a loader wants the form that the layer has
        convolution = is_convolution(module.path) if module.component == "unet" else False
        if convolution is None and len(bases) == 1:
            convolution = {"SD 1.x": True, "SD 2.x": False, "SDXL": False}.get(next(iter(bases)))
        kernel = kernel if convolution is None else (1, 1) if convolution else ()
    total = sum(term.rank for term, _ in terms)
    if method == "svd":
        total = min(total, module.inputs, module.outputs, rank or total)
    return Slot(module.component, module.path, total, module.inputs, module.outputs, kernel)


def _out(request: FuseRequest, loras: Sequence[tuple[LoraSpec, Lora]]) -> Path:
    ending = "" if request.format == "peft" else ENDING
    if request.out is not None:
        return request.out
    parts = [f"{_stem(spec.source)}-{spec.weights.replace('=', '').replace(',', '-')}" for spec, _ in loras]
    name = "+".join(parts)
    if len(os.fsencode(name)) > _LONGEST_NAME:
        name = f"{len(parts)}-loras-{sha256(os.fsencode(name)).hexdigest()[:12]}"
    return Path(name + ending)


def _stem(source: str) -> str:
    """What a source is called: its file's name, or its folder's where that says nothing, a checkpoint's behind its run's."""
    path = user_path(source).absolute()
    path = path.resolve() if ".." in path.parts else path  # a link keeps the name that it was asked for by
    name = Path("-".join(telling(path)))
    return re.sub(r"[^\w.,+-]", "_", name.stem if name.suffix in (ENDING, *PICKLES) else name.name) or "lora"


def refuse_output(out: Path, inputs: Iterable[Path], *, folder: bool, force: bool) -> None:
    """Refuse an output of another ending, that is an input, that is there without `force`, or that holds anything else.

    `folder` where it is to be a PEFT folder: one that is replaced may hold nothing but PEFT's own files.

    Raises:
        UsageError: the sentence says which.
    """
    try:
        there, is_folder = os.path.lexists(out), out.is_dir()
        for file in inputs:
            if (
                there
                and out.exists()
                and (out.samefile(file) or (folder and is_folder and out.resolve() in file.resolve().parents))
            ):
                raise UsageError(f"'{out}' is one of the sources", "choose another --out")
    except OSError as error:
        raise UsageError(
            f"'{str(out)[:200]}' cannot be looked at ({error.strerror})", "choose another --out"
        ) from error
    if not out.name or out.name in (".", ".."):
        raise UsageError(f"'{out}' is no name for what is written", "choose another --out")
    if not folder and out.suffix != ENDING:
        raise UsageError(f"'{out}' does not end in {ENDING}", f"write --out {out.name}{ENDING}")
    if is_folder and (not folder or out.is_symlink()):
        raise UsageError(f"'{out}' is a folder", "choose another --out")
    if there and not is_folder and folder:
        raise UsageError(f"'{out}' is a file, and a PEFT adapter is a folder", "choose another --out")
    if there and not force:
        raise UsageError(f"'{out}' exists already", "choose another --out, or add --force")
    stranger = _stranger(out) if is_folder else None
    if stranger:
        raise UsageError(
            f"the folder '{out}' holds '{stranger}', which is no part of the adapter and would be lost",
            "choose another --out",
        )


def _stranger(folder: Path) -> Path | None:
    """The first file in a folder that is none of PEFT's; it looks no further, since that may be a whole disk."""
    inside = (path.relative_to(folder) for path in folder.rglob("*") if not path.is_dir())
    return next((path for path in inside if not _is_pefts(path)), None)


def _is_pefts(path: Path) -> bool:
    known = path.name in (PEFT_NAME, PEFT_CONFIG, "adapter_model.bin")
    return known and (len(path.parts) == 1 or (len(path.parts) == 2 and path.parts[0] in COMPONENTS))


def _provenance(spec: LoraSpec, lora: Lora) -> dict[str, Any]:
    """A source in the header: its name, hashes, weight, and where it came from itself."""
    about: dict[str, Any] = {
        "name": _stem(spec.source).encode("utf-8", "replace").decode(),
        "sha256": lora.sha256(),
        "weight": spec.weights,
        "format": lora.format,
    }
    for name, key in (("author", "modelspec.author"), ("licence", "modelspec.license")):
        if value := lora.metadata.get(key):
            about[name] = value[:500]
    origins = {"texforce.fuse": "fused from", "texforce": "trained", "texforce.extract": "extracted from"}
    for key, name in origins.items():
        if history := told(lora.metadata, key):
            about[name] = history if len(lora.metadata[key]) < _LONGEST_LINEAGE else _short_lineage(history)
    return about


def _short_lineage(about: Any, depth: int = 0) -> Any:
    """A lineage that has grown long, of what its sources say of their training only the rewards: names, hashes and weights stay."""
    if isinstance(about, dict) and depth < 50:
        short = {key: _short_lineage(value, depth + 1) for key, value in about.items() if key != "trained"}
        rewards = sorted(rewards_in(about.get("trained")))
        return {**short, "trained": {"rewards": rewards}} if rewards else short
    if isinstance(about, list) and depth < 50:
        return [_short_lineage(value, depth + 1) for value in about]
    return about if isinstance(about, str | int | float | bool | None) else None


def _header(plan: FusePlan, sources: Sequence[Mapping[str, Any]], done: Mapping[str, _Done]) -> dict[str, str]:
    about = {
        "sources": sources,
        "method": plan.method,
        "rank": plan.request.rank,
        "max_error": plan.request.max_error,
        "relative_error": _truncation_error(done),
        "dtype": plan.layout.precision,
        "texforce": __version__,
    }
    title = " + ".join(f"{spec.weights} {source['name']}" for (spec, _), source in zip(plan.loras, sources))
    rank = max((about.rank for about in done.values()), default=int(plan.layout.alpha))
    alpha = plan.layout.alpha if plan.layout.format == "kohya" else rank
    keys = model_keys(
        plan.bases,
        [lora.metadata for _, lora in plan.loras],
        title=title,
        description="LoRAs fused by texforce",
        rank=rank,
        alpha=alpha,
        implementation=plan.layout.implementation,
    )
    training = shared_training([lora.metadata for _, lora in plan.loras])
    return {"texforce.fuse": json.dumps(finite(about), sort_keys=True), **keys, **training}
