"""`texforce demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from texforce_cli.cli.console import Json

EXAMPLE = "Example: [bold]texforce demo[/bold]"


def demo(
    images: Annotated[int, typer.Option(help="Training budget in images.", min=256)] = 2560,
    seed: Annotated[int, typer.Option(help="Seed of everything random.", min=0)] = 0,
    out: Annotated[str, typer.Option(help="Run folder, new; default runs/demo, runs/demo-2, ...")] = "",
    json: Json = False,
) -> None:
    """See the whole method work, offline, on the embedded model: train for some minutes, then look at before and after."""
    from texforce_cli.cli.console import note, write_json
    from texforce_cli.cli.live import View, result_document, summarise
    from texforce_cli.workflows.demo import demo as workflow

    note("Training the text encoder of the embedded model to ask for pictures with more detail (larger JPEG files).")
    with View() as view:
        result, picture = workflow(images=images, seed=seed, out=Path(out) if out else None, listener=view)
    summarise(result)
    note(f"before and after: {picture}")
    if json:
        write_json(result_document(result) | {"before_after": str(picture)})
