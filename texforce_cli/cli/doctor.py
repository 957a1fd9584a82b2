"""`texforce doctor`."""

from __future__ import annotations

from typing import Annotated, Literal, Optional

import typer

from texforce_cli.cli.console import Json

EXAMPLE = "Example: [bold]texforce doctor --model tiny[/bold]"


def doctor(
    model: Annotated[Optional[str], typer.Option(help="As in train; default as train would choose.")] = None,
    device: Annotated[Optional[str], typer.Option(help="Default auto.", show_default=False)] = None,
    precision: Annotated[Optional[Literal["fp32", "bf16", "fp16"]], typer.Option(show_default=False)] = None,
    json: Json = False,
) -> None:
    """Look whether a run will work here: versions, device, room, plugins, and the ratio preflight on the model."""
    from texforce_cli.cli.console import data, warn, write_json
    from texforce_cli.cli.live import View
    from texforce_cli.workflows.doctor import document, examine

    with View() as view:
        findings, ready = examine(model, device, precision, view)
    troubles = [finding for finding in findings if finding.trouble]
    if json:
        write_json(document(findings, ready))
    else:
        for finding in findings:
            data(f"{finding.name}: {finding.value}")
        for finding in troubles:
            warn(f"{finding.name}: {finding.trouble}")
        data("ready: training will work here" if ready else "not ready: mend what the warnings say")
        data("begin with: texforce demo" if ready else "then ask again: texforce doctor")
    if not ready:
        raise typer.Exit(1)
