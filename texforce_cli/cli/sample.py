"""`texforce sample`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from texforce_cli.cli.console import Json
from texforce_cli.cli.sampling import (
    AllowPickle,
    Batch,
    Device,
    Eta,
    Guidance,
    NegativePrompt,
    Precision,
    Scheduler,
    Size,
    Steps,
    parse_seeds,
)
from texforce_cli.files import user_path

EXAMPLE = 'Example: [bold]texforce sample "a cat on the moon" --model tiny --seeds 0:8 --grid --out pictures[/bold]'
_WHAT, _HOW, _OUT = "What to draw", "Sampling", "Output"


def sample(
    prompts: Annotated[Optional[list[str]], typer.Argument(help="What to draw.", show_default=False)] = None,
    prompts_file: Annotated[
        Optional[str],
        typer.Option("--prompts", help="A prompt set, or FILE.txt, .jsonl, .csv.", rich_help_panel=_WHAT),
    ] = None,
    model: Annotated[
        str,
        typer.Option(
            help="As in train; default: what the LoRA was trained on, unless that is a folder, file or another Hub id.",
            rich_help_panel=_WHAT,
        ),
    ] = "auto",
    lora: Annotated[
        Optional[list[str]],
        typer.Option(
            "--lora", help="PATH[:WEIGHT] of a file, adapter, checkpoint or run; repeatable.", rich_help_panel=_WHAT
        ),
    ] = None,
    unet: Annotated[
        Optional[str],
        typer.Option(help="Whole weights in place of the model's: folder or file.", rich_help_panel=_WHAT),
    ] = None,
    text_encoder: Annotated[Optional[str], typer.Option(help="The same.", rich_help_panel=_WHAT)] = None,
    seeds: Annotated[str, typer.Option(help="7, 0:8 or 1,5,9: each prompt with each.", rich_help_panel=_WHAT)] = "0",
    compare: Annotated[
        bool, typer.Option("--compare", help="Also the base, same seeds.", rich_help_panel=_WHAT)
    ] = False,
    steps: Steps = None,
    guidance: Guidance = None,
    eta: Eta = None,
    scheduler: Scheduler = "ddim",
    size: Size = None,
    negative_prompt: NegativePrompt = None,
    batch: Batch = 8,
    device: Device = "auto",
    precision: Precision = "fp32",
    allow_pickle: AllowPickle = False,
    safety_checker: Annotated[
        bool,
        typer.Option("--safety-checker", help="Blacken what the model's checker objects to.", rich_help_panel=_HOW),
    ] = False,
    out: Annotated[
        Path, typer.Option(parser=user_path, metavar="PATH", help="Folder for the pictures.", rich_help_panel=_OUT)
    ] = Path("pictures"),
    grid: Annotated[
        bool, typer.Option("--grid", help="Also one captioned picture of all.", rich_help_panel=_OUT)
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite.", rich_help_panel=_OUT)] = False,
    json: Json = False,
) -> None:
    """Draw pictures with a model and any number of LoRAs; the same seed gives the same noise whatever else changes."""
    from texforce_cli.cli.console import note, warn, write_json
    from texforce_cli.cli.live import View
    from texforce_cli.workflows import sample as workflow

    request = workflow.SampleRequest(
        prompts=prompts or [],
        prompt_set=prompts_file,
        seeds=parse_seeds(seeds),
        out=out,
        model=model,
        loras=lora or [],
        unet=unet,
        text_encoder=text_encoder,
        allow_pickle=allow_pickle,
        steps=steps,
        guidance=guidance,
        eta=eta,
        scheduler=scheduler,
        size=size,
        negative_prompt=negative_prompt,
        batch=batch,
        device=device,
        precision=precision,
        safety_checker=safety_checker,
        grid=grid,
        compare=compare,
        force=force,
    )
    with View() as view:
        result = workflow.sample(request, view)
    if result.withheld:
        warn(f"the safety checker blackened {result.withheld} pictures")
    note(f"{len(result.files)} pictures in {out}")
    if result.grid:
        note(f"grid: {result.grid}")
    if json:
        files = [str(path) for path in result.files]
        write_json({"files": files, "grid": str(result.grid) if result.grid else None, "withheld": result.withheld})
