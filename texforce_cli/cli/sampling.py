"""The options of the commands that draw pictures, once."""

from __future__ import annotations

import re
from typing import Annotated, Literal, Optional

import typer

from texforce_cli.errors import UsageError

_PANEL = "Sampling"

Steps = Annotated[
    Optional[int],
    typer.Option(help="Default: as the first LoRA was trained, else 50 (tiny 20).", rich_help_panel=_PANEL),
]
Guidance = Annotated[Optional[float], typer.Option(help="The same default, else 7.5 (tiny 3).", rich_help_panel=_PANEL)]
Eta = Annotated[
    Optional[float],
    typer.Option(help="Noise of DDIM steps; the same default, else 1.", rich_help_panel=_PANEL),
]
Scheduler = Annotated[Literal["ddim", "dpm", "euler", "euler-a", "pndm", "unipc"], typer.Option(rich_help_panel=_PANEL)]
Size = Annotated[
    Optional[int], typer.Option(help="Pixels; default the model's, whatever the LoRA's.", rich_help_panel=_PANEL)
]
NegativePrompt = Annotated[
    Optional[str], typer.Option(help="Default: as the first LoRA was trained, else none.", rich_help_panel=_PANEL)
]
Batch = Annotated[int, typer.Option(help="Pictures at a time.", rich_help_panel=_PANEL)]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.", rich_help_panel=_PANEL)]
Precision = Annotated[Literal["fp32", "bf16", "fp16"], typer.Option(rich_help_panel=_PANEL)]
AllowPickle = Annotated[
    bool, typer.Option("--allow-pickle", help="Read .bin, .pt: tensors alone.", rich_help_panel=_PANEL)
]


def parse_seeds(text: str) -> list[int]:
    """`7`, `0:8` (0 to 7), `1,5,9`, or a mixture: `0:4,100`.

    Raises:
        UsageError: not that, negative, empty, or more than 100,000.
    """
    seeds: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,18})(?::(\d{1,18}))?\s*", part)
        if not match:
            raise UsageError(f"the seeds '{text}' cannot be read", "write 7, 0:8 (which is 0 to 7) or 1,5,9")
        first, last = int(match[1]), int(match[2]) if match[2] else int(match[1]) + 1
        if not 0 < last - first <= 100_000:
            raise UsageError(f"the seeds '{part}' are {max(0, last - first)}", "write FIRST:LAST with LAST above FIRST")
        seeds.extend(range(first, last))
    return seeds
