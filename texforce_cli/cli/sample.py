"""`texforce sample`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Optional

import typer

EXAMPLE = 'Example: [bold]texforce sample "a cat on the moon" --model tiny --seeds 0:8 --grid --out pictures[/bold]'
_WHAT, _HOW, _OUT = "What to draw", "Sampling", "Output"


def sample(
    prompts: Annotated[Optional[list[str]], typer.Argument(help="What to draw.", show_default=False)] = None,
    prompts_file: Annotated[
        Optional[str],
        typer.Option("--prompts", help="A prompt set, or FILE.txt, .jsonl, .csv.", rich_help_panel=_WHAT),
    ] = None,
    model: Annotated[
        str, typer.Option(help="As in train; default: what the LoRA was trained on.", rich_help_panel=_WHAT)
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
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read .bin, .pt: tensors alone.", rich_help_panel=_WHAT)
    ] = False,
    seeds: Annotated[str, typer.Option(help="7, 0:8 or 1,5,9: each prompt with each.", rich_help_panel=_WHAT)] = "0",
    compare: Annotated[
        bool, typer.Option("--compare", help="Also the base, same seeds.", rich_help_panel=_WHAT)
    ] = False,
    steps: Annotated[
        Optional[int], typer.Option(help="Default: as the LoRA was trained.", min=1, max=1000, rich_help_panel=_HOW)
    ] = None,
    guidance: Annotated[
        Optional[float], typer.Option(help="Default: as the LoRA was trained.", min=1, max=100, rich_help_panel=_HOW)
    ] = None,
    eta: Annotated[
        Optional[float], typer.Option(help="Noise of DDIM steps; default 1.", min=0, max=1, rich_help_panel=_HOW)
    ] = None,
    scheduler: Annotated[
        Literal["ddim", "dpm", "euler", "euler-a", "pndm", "unipc"], typer.Option(rich_help_panel=_HOW)
    ] = "ddim",
    size: Annotated[
        Optional[int], typer.Option(help="Pixels; default the model's.", min=8, rich_help_panel=_HOW)
    ] = None,
    negative_prompt: Annotated[
        Optional[str], typer.Option(help="Default: as the LoRA was trained.", rich_help_panel=_HOW)
    ] = None,
    batch: Annotated[int, typer.Option(help="Pictures at a time.", min=1, rich_help_panel=_HOW)] = 8,
    device: Annotated[str, typer.Option(rich_help_panel=_HOW)] = "auto",
    precision: Annotated[Literal["fp32", "bf16", "fp16"], typer.Option(rich_help_panel=_HOW)] = "fp32",
    safety_checker: Annotated[
        bool,
        typer.Option("--safety-checker", help="Blacken what the model's checker objects to.", rich_help_panel=_HOW),
    ] = False,
    out: Annotated[Path, typer.Option(help="Folder for the pictures.", rich_help_panel=_OUT)] = Path("pictures"),
    grid: Annotated[
        bool, typer.Option("--grid", help="Also one captioned picture of all.", rich_help_panel=_OUT)
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite.", rich_help_panel=_OUT)] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.", rich_help_panel=_OUT)] = False,
) -> None:
    """Draw pictures with a model and any number of LoRAs; the same seed gives the same noise whatever else changes."""
    from texforce_cli.cli.console import note, warn, write_json
    from texforce_cli.cli.live import TrainView
    from texforce_cli.workflows import sample as workflow

    request = workflow.SampleRequest(
        prompts=prompts or [],
        prompt_set=prompts_file,
        seeds=workflow.parse_seeds(seeds),
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
    with TrainView() as view:
        result = workflow.sample(request, view)
    if result.withheld:
        warn(f"the safety checker blackened {result.withheld} pictures")
    note(f"{len(result.files)} pictures in {out}")
    if result.grid:
        note(f"grid: {result.grid}")
    if json:
        files = [str(path) for path in result.files]
        write_json({"files": files, "grid": str(result.grid) if result.grid else None, "withheld": result.withheld})
