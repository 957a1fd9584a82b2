"""`SOURCE[:WEIGHT]`, the one way to name a LoRA with its weight."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from texforce_cli.errors import UsageError
from texforce_cli.files import placed

_NUMERIC = re.compile(r"[-+]?[\d.,]+(e[-+]?\d+)?|[-+]?(nan|inf|infinity)", re.IGNORECASE)
_PARTS = re.compile(r"(te|te2|unet)=[^=,]*(,(te|te2|unet)=[^=,]*)*")
_LARGEST = 1e6
_UNTELLING = re.compile(
    r"(model|(diffusion_)?pytorch_model|pytorch_lora_weights|adapter_model)\.\w+|adapter|checkpoints|unet|text_encoder"
)
"""Names that are the same in every run or model."""
_CHECKPOINT = re.compile(r"(epoch_|checkpoint-)\d+")
_NAMES = {"te": ("text_encoder", "text_encoder_2"), "te2": ("text_encoder_2",), "unet": ("unet",)}


@dataclass(frozen=True)
class LoraSpec:
    """A file or folder and its weight; `parts` holds the weights of single components where they were given."""

    source: str
    weight: float = 1.0
    parts: Mapping[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.source}:{self.weights}"

    @property
    def weights(self) -> str:
        """The weights as they are written: `0.7`, `te=0.7,unet=0.3`."""
        return ",".join(f"{name}={_short(value)}" for name, value in self.parts.items()) or _short(self.weight)

    def weight_of(self, component: str) -> float:
        """The weight of text_encoder, text_encoder_2 or unet; what names the component alone decides, then `te`."""
        fitting = [name for name in self.parts if component in _NAMES[name]]
        return self.parts[min(fitting, key=lambda name: len(_NAMES[name]))] if fitting else self.weight

    def idle(self, components: Collection[str]) -> list[str]:
        """The names in `parts` that none of these components has."""
        return [name for name in self.parts if not set(_NAMES[name]) & set(components)]


def parse_lora(text: str) -> LoraSpec:
    r"""Split at the last colon where weights follow: `a.safetensors:0.7`, `C:\loras\a:-0.3`, `a:te=0.7,unet=0.3`.

    A component that is not named has the weight 1. A path that itself ends so, `runs/a:1`, is whole where it alone exists.

    Raises:
        UsageError: an empty source or weight, or a weight that looks like a number and is none (`nan`, `0,7`).
    """
    source, colon, tail = text.rpartition(":")
    parts: dict[str, float] = {}
    weight = 1.0
    try:
        if not colon or (placed(text) and not placed(source)):
            source = text
        elif _PARTS.fullmatch(tail):
            for part in tail.split(","):
                name, _, value = part.partition("=")
                if name in parts or not _NUMERIC.fullmatch(value):
                    raise ValueError("given twice, or no number")
                parts[name] = float(value)
        elif _NUMERIC.fullmatch(tail) or not tail:
            weight = float(tail)
        else:
            source = text
    except ValueError:
        weight = math.nan
    if not source or not all(abs(value) <= _LARGEST for value in (weight, *parts.values())):
        raise UsageError(f"'{text}' is no LoRA with a weight", "write PATH, PATH:0.7 or PATH:te=0.7,unet=0.3")
    return LoraSpec(source, weight, parts)


def ends_as_if_with_a_weight(text: str) -> bool:
    """Whether `parse_lora` takes its end for a weight where no path of this name is there."""
    _, colon, tail = text.rpartition(":")
    return bool(colon and (not tail or _PARTS.fullmatch(tail) or _NUMERIC.fullmatch(tail)))


def telling(path: Path) -> tuple[str, ...]:
    """The last name of a path that tells it from others; a checkpoint's with that of its run before it."""
    while _UNTELLING.fullmatch(path.name) and path.parent.name not in ("", ".."):
        path = path.parent
    if _CHECKPOINT.fullmatch(path.name) and path.parent.name not in ("", ".."):
        return *telling(path.parent), path.name
    return (path.name,)


def _short(value: float) -> str:
    """The shortest text that is read back as the same number."""
    return repr(value).removesuffix(".0")
