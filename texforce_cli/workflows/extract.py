"""`texforce fuse --extract`: a LoRA of the difference between two models, the closest of its rank, with the error."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from texforce_cli import __version__
from texforce_cli.core.lora_algebra import Pair, truncated_svd
from texforce_cli.errors import TexforceError
from texforce_cli.lora.full import FullWeights, open_full
from texforce_cli.lora.header import model_keys
from texforce_cli.lora.lora import bases_of
from texforce_cli.lora.read import read_lora
from texforce_cli.lora.write import STORAGE_ERROR, Format, Layout, Precision, Slot, new_lora, size_of, write_lora
from texforce_cli.tensorfile import Array
from texforce_cli.workflows.events import Listener, Progressed, Warned, silent
from texforce_cli.workflows.fuse import refuse_output
from texforce_cli.workflows.stopping import StopRequest

_EMBEDDINGS = ("token_embedding", "position_embedding")


@dataclass(frozen=True)
class ExtractRequest:
    """The models, the rank of the LoRA, where it goes. `max_rest` is the largest share of the squared change that may lie
    in biases, norms and embeddings, which no LoRA can hold."""

    base: str
    tuned: str
    out: Path
    rank: int
    max_rest: float = 0.01
    format: Format = "diffusers"
    precision: Precision = "fp32"
    allow_pickle: bool = False
    force: bool = False


@dataclass(frozen=True)
class ExtractResult:
    """What was written. `error` is that of the file as it was read back, relative to the change of the modules (Frobenius),
    `rest` the share of the squared change that is in `left_out`, by name, largest first."""

    out: Path
    modules: int
    error: float
    worst: tuple[str, float]
    rest: float
    left_out: tuple[tuple[str, float], ...]
    bytes: int


@dataclass(frozen=True)
class _Change:
    """Squared Frobenius norms of what differs."""

    modules: dict[str, float]
    rest: dict[str, float]

    @property
    def share(self) -> float:
        whole = sum(self.modules.values()) + sum(self.rest.values())
        return sum(self.rest.values()) / whole if whole else 0.0


def extract(request: ExtractRequest, listener: Listener = silent) -> ExtractResult:
    """Write a LoRA that turns `base` into `tuned` as nearly as its rank can.

    Raises:
        UsageError: an output that exists.
        TexforceError: models that differ in their layers, do not differ at all, or differ where a LoRA cannot.
        Interrupted: asked to stop; nothing is left.
    """
    base, tuned = (open_full(source, allow_pickle=request.allow_pickle) for source in (request.base, request.tuned))
    refuse_output(request.out, [*base.files, *tuned.files], folder=request.format == "peft", force=request.force)
    names = _common(base, tuned, listener)
    stop = StopRequest()
    with stop.listening():
        change = _measure(base, tuned, names, stop, listener)
        _refuse(request, change)
        slots = [_slot(name, base.shape(name), request.rank) for name in sorted(change.modules)]
        bases = bases_of(slots, {})
        if len(bases) > 1:
            listener(
                Warned(f"nothing tells whether these are of {' or '.join(sorted(bases))}, which have the same shapes")
            )
        layout = Layout.of(slots, request.format, request.precision, bases)
        for text in layout.warnings(slots):
            listener(Warned(text))
        dropped: dict[str, float] = {}

        def pairs() -> Iterator[Pair]:
            for slot in slots:
                stop.check()
                pair, spectrum = truncated_svd(_difference(base, tuned, slot), request.rank)
                dropped[slot.name] = spectrum.dropped
                listener(Progressed("decomposing", len(dropped), len(slots)))
                yield pair

        about = {
            "base": Path(request.base).name,
            "tuned": Path(request.tuned).name,
            "sha256": {name: weights.sha256() for name, weights in (("base", base), ("tuned", tuned))},
            "rank": request.rank,
        }

        def header() -> dict[str, str]:
            keys = model_keys(
                bases,
                [{}],
                title=f"{about['tuned']} - {about['base']}",
                description="LoRA of the difference of two models, extracted by texforce",
                rank=request.rank,
                alpha=layout.alpha,
                implementation=layout.implementation,
            )
            error = _relative(dropped, change)
            return {"texforce.extract": json.dumps({**about, "relative_error": error, "texforce": __version__}), **keys}

        with new_lora(request.out, request.format, force=request.force) as temporary:
            write_lora(temporary, layout, slots, pairs(), header)
            measured = _verify(request, temporary, base, tuned, slots, dropped, stop, listener)
            size = size_of(temporary)
    errors = {name: math.sqrt(off / change.modules[f"{name}.weight"]) for name, off in measured.items()}
    whole = sum(change.modules.values()) + sum(change.rest.values())
    rest = sorted(((name, square / whole) for name, square in change.rest.items()), key=lambda item: -item[1])
    return ExtractResult(
        out=request.out,
        modules=len(slots),
        error=_relative(measured, change),
        worst=max(errors.items(), key=lambda item: item[1]),
        rest=change.share,
        left_out=tuple(rest),
        bytes=size,
    )


def _relative(squares: Mapping[str, float], change: _Change) -> float:
    return math.sqrt(sum(squares.values()) / sum(change.modules.values()))


def _common(base: FullWeights, tuned: FullWeights, listener: Listener) -> list[str]:
    components = [name for name in tuned.components if name in base.components]
    if not components:
        raise TexforceError(
            f"'{base.source}' holds {', '.join(base.components)}, '{tuned.source}' {', '.join(tuned.components)}",
            "give two models with the same part",
        )
    for name in sorted({*base.components, *tuned.components} - {*components}):
        holder = base if name in base.components else tuned
        listener(Warned(f"the {name} of '{holder.source}' is not compared: the other model holds none"))
    for prefix in sorted(base.elsewhere | tuned.elsewhere):
        listener(Warned(f"weights under '{prefix}' are not compared"))
    of = tuple(f"{component}." for component in components)
    ours, theirs = ({name for name in weights.places if name.startswith(of)} for weights in (base, tuned))
    for name in sorted(ours ^ theirs):
        has, lacks = (base, tuned) if name in ours else (tuned, base)
        raise TexforceError(f"'{has.source}' has '{name}' and '{lacks.source}' has not", "give two models of one kind")
    for name in sorted(ours):
        if base.shape(name) != tuned.shape(name):
            shapes = f"{list(base.shape(name))} and {list(tuned.shape(name))}"
            raise TexforceError(f"'{name}' is {shapes} in the two models", "give two models of one kind")
    return sorted(ours)


def _measure(
    base: FullWeights, tuned: FullWeights, names: Sequence[str], stop: StopRequest, listener: Listener
) -> _Change:
    change = _Change({}, {})
    for index, name in enumerate(names):
        stop.check()
        square = float(np.sum((tuned.read(name).astype(np.float64) - base.read(name)) ** 2))
        if square:
            (change.modules if _has_lora(name, base.shape(name)) else change.rest)[name] = square
        listener(Progressed("comparing", index + 1, len(names)))
    return change


def _has_lora(name: str, shape: tuple[int, ...]) -> bool:
    return name.endswith(".weight") and len(shape) in (2, 4) and not any(part in name for part in _EMBEDDINGS)


def _refuse(request: ExtractRequest, change: _Change) -> None:
    if not change.modules and not change.rest:
        raise TexforceError(f"'{request.base}' and '{request.tuned}' are the same", "there is nothing to extract")
    if change.share > request.max_rest or not change.modules:
        first = sorted(change.rest, key=lambda name: -change.rest[name])[:3]
        raise TexforceError(
            f"{change.share:.1%} of the squared change lies in biases, norms and embeddings ({', '.join(first)}), which no LoRA "
            f"can hold; {request.max_rest:.1%} is the limit",
            "use the whole weights with --unet or --text-encoder, or raise --max-rest",
        )


def _slot(name: str, shape: tuple[int, ...], rank: int) -> Slot:
    component, _, rest = name.removesuffix(".weight").partition(".")
    inputs = math.prod(shape[1:])
    return Slot(component, rest, min(rank, shape[0], inputs), inputs, shape[0], shape[2:])


def _difference(base: FullWeights, tuned: FullWeights, slot: Slot) -> Array:
    name = f"{slot.name}.weight"
    difference = tuned.read(name).astype(np.float64) - base.read(name)
    return difference.reshape(slot.outputs, slot.inputs)


def _verify(
    request: ExtractRequest,
    written: Path,
    base: FullWeights,
    tuned: FullWeights,
    slots: Sequence[Slot],
    dropped: Mapping[str, float],
    stop: StopRequest,
    listener: Listener,
) -> dict[str, float]:
    """The squared distance of each module on the disk, through our own reader, from the difference that it stands for; one
    that is off by more than the truncation left out, and storing it brings, is an error."""
    again = read_lora(str(written)).modules
    if again.keys() != {slot.name for slot in slots}:
        raise TexforceError(f"'{request.out}' was not written whole", "report this as a bug")
    bound = STORAGE_ERROR[request.precision]
    measured: dict[str, float] = {}
    for index, slot in enumerate(slots):
        stop.check()
        module, difference = again[slot.name], _difference(base, tuned, slot)
        whole = float(np.sum(difference**2))
        off = float(np.sum((difference - module.scale * module.b().astype(np.float64) @ module.a()) ** 2))
        if not math.sqrt(off) <= math.sqrt(dropped[slot.name]) + bound * math.sqrt(whole):
            raise TexforceError(
                f"'{slot.name}' in '{request.out}' would be further from the difference than it should",
                "try --dtype fp32",
            )
        measured[slot.name] = off
        listener(Progressed("checking", index + 1, len(slots)))
    return measured
