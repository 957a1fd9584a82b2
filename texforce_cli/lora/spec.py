"""`SOURCE[:WEIGHT]`, the one way to name a LoRA with its weight."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from texforce_cli.errors import UsageError

_NUMERIC = re.compile(r"[-+]?[\d.,]+(e[-+]?\d+)?|[-+]?(nan|inf|infinity)", re.IGNORECASE)


@dataclass(frozen=True)
class LoraSpec:
    """A file or folder and its weight."""

    source: str
    weight: float = 1.0

    def __str__(self) -> str:
        return f"{self.source}:{self.weight:g}"


def parse_lora(text: str) -> LoraSpec:
    r"""Split at the last colon where a finite number follows: `a.safetensors:0.7`, `C:\loras\a.safetensors:-0.3`.

    Raises:
        UsageError: an empty source or weight, or a weight that looks like a number and is none (`nan`, `0,7`).
    """
    source, colon, tail = text.rpartition(":")
    if not colon or not (_NUMERIC.fullmatch(tail) or tail == ""):
        source, tail = text, "1"
    try:
        weight = float(tail)
    except ValueError:
        weight = math.nan
    if not source or not math.isfinite(weight):
        raise UsageError(f"'{text}' is no LoRA with a weight", "write PATH or PATH:0.7")
    return LoraSpec(source, weight)
