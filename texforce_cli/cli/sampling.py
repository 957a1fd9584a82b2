"""The options of the commands that draw pictures, once."""

from __future__ import annotations

from typing import Annotated, Literal, Optional

import typer

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
